"""What racing saves, and whether it costs anything: the same searches with it and without.

    python bench/racing.py                                     # five seeds of the zoo, 100 candidates
    python bench/racing.py --seeds 2 --candidates 50 --fitness metric
    python bench/racing.py runs/real runs/real-raced           # pairs of finished runs: without, with

Prints, for each pair of runs, the item evaluations of both searches, the winner's fitness on the `test` items, and the
paired difference of the two winners on these items; and the means over all pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evomerge.evaluation.splits import SEARCH, TEST
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.prepare_objective import prepare_objective
from evomerge.problem.problem import Problem, open_problem
from evomerge.report.result import RunResult
from evomerge.report.tables import table
from evomerge.run.folder import RunFolder
from evomerge.spec.load import load_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.interfaces import NullTracker

QUICKSTART = Path(__file__).parent.parent / "search_spaces" / "quickstart.yaml"
HEADER = [
    *("run", "items without", "items with", "fewer", "pruned"),
    *("winner's test fitness without", "with", "with less without"),
]


def zoo_spec(seed: int, candidates: int, racing: bool, fitness: str) -> SearchSpec:
    """The quickstart's search under another seed (which draws the splits too), without its guard."""
    spec = load_spec(QUICKSTART)
    evaluation = spec.evaluation.model_copy(update={"racing": racing, "fitness": fitness, "guard": []})
    search = spec.search.model_copy(update={"seed": seed, "candidates": candidates})
    run = spec.run.model_copy(update={"keep": 0})
    return spec.model_copy(update={"evaluation": evaluation, "search": search, "run": run})


def zoo_runs(options: argparse.Namespace, root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Name and the folders of both runs, for each seed."""
    from evomerge.run.search import start

    for seed in range(options.seeds):
        folders = []
        for racing in (False, True):
            folder = root / f"{seed}-{'with' if racing else 'without'}"
            with contextlib.redirect_stdout(io.StringIO()):
                start(zoo_spec(seed, options.candidates, racing, options.fitness), folder=folder)
            folders.append(folder)
        yield f"seed {seed}", folders[0], folders[1]


def compare(name: str, without: Path, raced: Path) -> tuple[list[str], list[float]]:
    """A line of the table, and its (ratio of items, fitness without, with, difference)."""
    folders = [RunFolder.existing(path) for path in (without, raced)]
    results = [folder.result() for folder in folders]
    if results[0] is None or results[1] is None:
        raise SystemExit(f"{name}: both runs must be finished")
    items = [_items(folder, result) for folder, result in zip(folders, results, strict=True)]
    problem = open_problem(folders[0].spec)
    runner = ModelRunner(problem)
    scores = [
        folder.scores.load(runner.plan(result.winner.recipe).digest, TEST)
        for folder, result in zip(folders, results, strict=True)
    ]
    if scores[0] is None or scores[1] is None:
        raise SystemExit(f"{name}: the winners' per-item scores are gone")
    fitness = _fitness(problem, runner, folders[0])
    values = [fitness(part) for part in scores]
    difference, stderr = fitness.difference(scores[1], scores[0])
    ratio = items[0] / items[1]
    line = [
        *(name, str(items[0]), str(items[1]), f"{ratio:.2f} times", str(results[1].candidates.pruned)),
        *(f"{values[0]:.4f}", f"{values[1]:.4f}", f"{difference:+.4f} ± {stderr:.4f}"),
    ]
    return line, [ratio, *values, difference]


def _items(folder: RunFolder, result: RunResult) -> int:
    """Item evaluations of a search; of a run made before they were recorded, all items for every scored candidate."""
    if result.items.evaluated:
        return result.items.evaluated
    scored = [candidate for candidate in folder.candidates() if candidate.state == "done"]
    return len(scored) * sum(metrics[min(metrics)]["n"] for metrics in scored[0].scores[SEARCH].values())


def _fitness(problem: Problem, runner: ModelRunner, folder: RunFolder) -> Any:
    """The run's own fitness; its sources' scores are read back from its folder."""
    return prepare_objective(problem, runner, folder.scores, NullTracker()).fitness


def summary(rows: list[list[float]]) -> list[str]:
    """The last line: means, and the standard error of the mean difference over the pairs."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    spread = statistics.stdev(columns[3]) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    means = [statistics.fmean(column) for column in columns]
    return [
        "mean",
        "",
        "",
        f"{means[0]:.2f} times",
        "",
        *(f"{m:.4f}" for m in means[1:3]),
        f"{means[3]:+.4f} ± {spread:.4f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="finished runs: without racing, with, without, with, ...")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--fitness", choices=["metric", "smooth"], default="smooth")
    parser.add_argument("--keep", type=Path, help="keep the zoo's runs in this folder, and go on with those there")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if len(options.runs) % 2:
        parser.error("runs come in pairs: without racing, with it")
    with tempfile.TemporaryDirectory() as temporary:
        pairs: Any = zip([p.name for p in options.runs[1::2]], options.runs[::2], options.runs[1::2], strict=True)
        if not options.runs:
            pairs = zoo_runs(options, options.keep or Path(temporary))
        lines, rows = [], []
        for name, without, raced in pairs:
            line, row = compare(name, without, raced)
            print(" | ".join(line), file=sys.stderr, flush=True)
            lines.append(line)
            rows.append(row)
    print(table(HEADER, [*lines, summary(rows)]))


if __name__ == "__main__":
    main()
