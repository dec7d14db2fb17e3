"""What each method gives at its published settings, alone and with each stage after it: a table on the `test` items.

    python bench/methods.py search_spaces/real.yaml
    python bench/methods.py search_spaces/quickstart.yaml --methods task_arithmetic wudi --stages svc

Models, tasks and splits are the file's; its search is not made. A method's row is the mean over the tasks of score over
the best source's, with a standard error, and its paired difference to the best source and, with a stage, to the method
without it; `merge` is the time to make the model in memory the first time, statistics included, and the second. As a
gene in the default search: `bench/search_efficiency.py --contenders default "with stages" "with newer methods"`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.evaluation.splits import TEST
from evomerge.methods.registry import METHODS, STAGES
from evomerge.objective.fitness import Scores
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import Problem, make_space, open_problem
from evomerge.recipe.parse import single_model
from evomerge.report.tables import table
from evomerge.space.baselines import baselines
from evomerge.spec.load import load_spec

DEFAULTS = " (defaults)"


def recipes(problem: Problem, methods: list[str], stages: list[str]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The recipe of each method with each stage, and with none (""), as generation 0 has it."""
    every: dict[tuple[str, str], Mapping[str, Any]] = {}
    for stage in ("", *stages):
        changes = {"methods": methods, "after": [stage] if stage else [], "choose": None}
        spec = problem.spec.model_copy(update={"space": problem.spec.space.model_copy(update=changes | {"genes": {}})})
        for start in baselines(make_space(spec, problem.checkpoints)):
            name = start.name.removesuffix(DEFAULTS)
            if start.name.endswith(DEFAULTS) and bool(stage) == ("after" in start.recipe):
                every[name, stage] = start.recipe
    return every


def rows(problem: Problem, methods: list[str], stages: list[str]) -> list[list[str]]:
    """The table's rows, best first."""
    runner, selection = ModelRunner(problem), problem.splits[TEST]

    def scored(recipe: Mapping[str, Any]) -> Scores:
        return runner.scores(runner.plan(recipe), selection)[0]

    sources = [scored(single_model(reference)) for reference in problem.spec.models.sources.values()]
    fitness = problem.reported.relative_to(sources)
    best = max(sources, key=fitness)
    results: dict[tuple[str, str], Scores] = {}
    lines: list[tuple[float, list[str]]] = []
    for (method, stage), recipe in recipes(problem, methods, stages).items():
        plan, seconds = runner.plan(recipe), []
        base = runner.plan(single_model(problem.reference))
        for _ in range(2):
            runner.materialise(base)
            started = time.perf_counter()
            runner.materialise(plan)
            seconds.append(time.perf_counter() - started)
        scores = results[method, stage] = scored(recipe)
        to_best = fitness.difference(scores, best)
        alone = results.get((method, "")) if stage else None
        gain = "" if alone is None else "{:+.3f} ± {:.3f}".format(*fitness.difference(scores, alone))
        value = fitness(scores)
        cells = [
            *(method, stage, f"{value:.3f} ± {fitness.stderr(scores):.3f}"),
            *("{:+.3f} ± {:.3f}".format(*to_best), gain),
            " / ".join(f"{each:.1f}" for each in seconds),
        ]
        lines.append((value, cells))
        print(*cells, sep=" | ", flush=True)
    return [cells for _, cells in sorted(lines, key=lambda line: -line[0])]


def main() -> None:
    """Scores them and prints the table."""
    names = [method.name for method in METHODS.values() if not method.copies_layers and method.needs_base]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", type=Path, help="a search.yaml")
    parser.add_argument("--methods", nargs="+", default=names, help="names of methods")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), help="names of stages")
    args = parser.parse_args()
    problem = open_problem(load_spec(args.search))
    header = ["method", "after", "fitness", "less the best source", "less the same without", "merge, s"]
    print(table(header, rows(problem, args.methods, args.stages)))


if __name__ == "__main__":
    main()
