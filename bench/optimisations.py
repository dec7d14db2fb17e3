"""What each special part of the engine and of the evaluator saves, measured alone on real models.

    python bench/optimisations.py
    python bench/optimisations.py --only kernels --methods ties

The same work with the part and without it: processor seconds of both, the least of several rounds in which they take
turns, and their ratio.

kernels        later candidates of every method that has a compiled kernel: with it, and with the method's own torch
               function (the statistics that both ask for are the engine's)
prefix_trees   scores with tokens that requests share read once, and with one sequence a request
generation     text by the native loop, whose rows leave when they have stopped, and by transformers' `generate` as
               lm-eval's HFLM calls it

Writes a section of the page for each part that was measured; the others, and what stands below them, stay.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.eval_speed import GENERATION, native_backend, write_generation
from bench.materialise import CASES, draws_of, open_models, plan_of
from bench.timing import best_in_turn
from evomerge.engine.kernel_dispatch import KERNELS
from evomerge.engine.resident import Resident
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.report.tables import table
from evomerge.system.memory import collect_rarely
from evomerge.system.quiet import quiet

SOURCES = 3
LOGLIKELIHOODS = ("real_blimp_islands", "real_arc_easy")
SEARCHES: Mapping[str, Mapping[str, Any]] = {
    "frankenmerge": {"methods": ["frankenmerge"]},
    "task_arithmetic, six groups of layers": {"methods": ["task_arithmetic"], "layer_groups": 6},
    "task_arithmetic, every layer": {"methods": ["task_arithmetic"], "layer_groups": "per_layer"},
}
HEADER = ["", "with, cpu s", "without, cpu s", "without / with"]
TITLE = "# What the special parts save"


@dataclass(frozen=True)
class Row:
    """Processor seconds of the same work with a part and without it."""

    label: str
    with_part: float
    without: float

    def cells(self) -> list[str]:
        """Returns the row as text."""
        return [self.label, f"{self.with_part:.2f}", f"{self.without:.2f}", f"{self.without / self.with_part:.2f}"]


def compare(label: str, with_part: Callable[[], object], without: Callable[[], object], rounds: int) -> Row:
    """Measures both in turn, after one of each that does not count."""
    with_part()
    without()
    costs = best_in_turn({True: with_part, False: without}, rounds)
    return Row(label, costs[True].cpu, costs[False].cpu)


# ---------------------------------------------------------------- compiled kernels


def without_kernels() -> AbstractContextManager[Any]:
    """Has the engine call the methods' own functions for a while."""
    return patch.dict(KERNELS, clear=True)


def kernels(options: argparse.Namespace) -> Iterator[Row]:
    """Measures every case of `materialise` whose method has a kernel and whose candidates differ."""
    names, checkpoints = open_models(options.models, SOURCES)
    for case in CASES:
        if case.method not in KERNELS or (options.methods and not any(word in case.label for word in options.methods)):
            continue
        draws = map(draws_of, range(options.rounds + 1))
        plans = [plan_of(case, each, checkpoints, options.models, names) for each in draws]
        if plans[0].digest == plans[1].digest:  # no settings, so that a later candidate costs nothing
            continue

        def write(resident: Resident, rest: Iterator[Any], context: Callable[[], AbstractContextManager[Any]]) -> None:
            with context():
                resident.write(next(rest))

        compiled = partial(write, Resident(checkpoints), iter(plans), nullcontext)
        own_function = partial(write, Resident(checkpoints), iter(plans), without_kernels)
        yield compare(case.label, compiled, own_function, options.rounds)


def evaluator_of(options: argparse.Namespace, tasks: list[str]) -> tuple[Any, Evaluator]:
    """Opens the base and what scores it on some tasks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet(), tempfile.TemporaryDirectory() as folder:
        if GENERATION in tasks:
            write_generation(Path(folder), options.data.resolve())
        loaded = load_tasks(tasks, include_path=[options.tasks, folder])
        path = options.models / "base"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        evaluator = Evaluator(loaded, AutoTokenizer.from_pretrained(path), model.config)
        evaluator.batch_digest()  # builds what the tasks ask, while their files are there
    evaluator.prepare(model)
    return model, evaluator


def prefix_trees(options: argparse.Namespace) -> Iterator[Row]:
    """Measures the scores of tasks whose requests share tokens."""
    model, evaluator = evaluator_of(options, list(LOGLIKELIHOODS))
    logprobs = native_backend(evaluator).logprobs
    for task in LOGLIKELIHOODS:
        selection = {task: tuple(range(options.items))}

        def score(trees: bool, selection: Mapping[str, tuple[int, ...]] = selection) -> None:
            with patch.object(logprobs, "tree_masks", trees):
                evaluator.score(model, selection)

        yield compare(f"{task}, {options.items} items", partial(score, True), partial(score, False), options.rounds)


def generation(options: argparse.Namespace) -> Iterator[Row]:
    """Measures short greedy answers."""
    model, evaluator = evaluator_of(options, [GENERATION])
    by_item = evaluator.requests(GENERATION).by_item[: options.items]
    instances = [instance for item in by_item for instance in item]
    respond = partial(native_backend(evaluator).generator.respond, model, instances)
    yield compare(
        f"{GENERATION}, {len(instances)} prompts of up to 24 new tokens",
        partial(respond, own_loop=True),
        partial(respond, own_loop=False),
        options.rounds,
    )


PARTS: Mapping[str, tuple[str, Callable[[argparse.Namespace], Iterator[Row]]]] = {
    "kernels": ("Compiled kernels: a later candidate", kernels),
    "prefix_trees": ("Prefix trees: one model's scores", prefix_trees),
    "generation": ("The native generation loop: short answers", generation),
}


def update(page: Path, sections: Mapping[str, str], intro: str) -> None:
    """Writes the page with these sections new, and all others as they were."""
    before = page.read_text(encoding="utf-8").split("\n## ")[1:] if page.is_file() else []
    kept = {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in before}
    titles = [title for title, _ in PARTS.values()]
    merged = kept | dict(sections)
    order = [title for title in titles if title in merged] + [title for title in merged if title not in titles]
    page.parent.mkdir(parents=True, exist_ok=True)
    text = [f"{TITLE}\n\n    python bench/optimisations.py\n\n{intro}", *(f"## {t}\n\n{merged[t]}" for t in order)]
    page.write_text("\n\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    """Prints the tables and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--methods", nargs="+", help="kernels whose label contains one of these")
    parser.add_argument("--models", type=Path, default=Path("models"), help="a folder with base and fine-tunes of it")
    parser.add_argument("--tasks", type=Path, default=Path("examples/real/tasks"))
    parser.add_argument("--data", type=Path, default=Path("examples/real/data/arc_easy.jsonl"))
    parser.add_argument("--items", type=int, default=40, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "optimisations.md")
    options = parser.parse_args()
    options.models, options.tasks = options.models.absolute(), options.tasks.absolute()
    torch.set_num_threads(options.threads)
    collect_rarely()  # as the command line does
    sections = {}
    for name in options.only:
        title, measure = PARTS[name]
        rows = []
        for row in measure(options):
            rows.append(row.cells())
            print(" | ".join(rows[-1]), flush=True)
        sections[title] = table(HEADER, rows)
        print(f"\n## {title}\n\n{sections[title]}\n", flush=True)
    intro = (
        f"Processor seconds of {options.threads} threads, the least of {options.rounds} rounds in turn (searches: one)."
        f" Base and {SOURCES} fine-tunes of it, {options.items} items of a task."
    )
    update(options.out, sections, intro)


if __name__ == "__main__":
    main()
