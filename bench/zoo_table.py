"""How good the models of the zoo are, and what simple merges of them reach.

    python bench/zoo_table.py                # the models of the quickstart
    python bench/zoo_table.py --small        # those of the test suite

Prints a Markdown table of accuracies. What is tuned (λ, the weights) is tuned on every other item; the table is of the
rest. The first run trains the models, and says what that took in processor seconds.
"""

from __future__ import annotations

import argparse
import random
import resource
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evomerge import zoo
from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.engine.resident import Resident
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.planning.plan import make_plan
from evomerge.problem.problem import load_config, load_tokenizer
from evomerge.recipe import parse_recipe
from evomerge.zoo.skills import SKILLS

EVAL = Path(__file__).parent.parent / "eval"
TASKS = {f"zoo_{skill}": "acc" for skill in SKILLS} | {
    "zoo_arithmetic_generate": "exact_match",
    "zoo_text_bpb": "bits_per_byte",
}
STEERING = tuple(f"zoo_{skill}" for skill in SKILLS)
LAMBDAS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
Row = dict[str, float]


class Zoo:
    """A base, its experts and the items to score them on."""

    def __init__(self, names: Sequence[str]) -> None:
        self.base, *self.experts = (f"zoo:{name}" for name in names)
        self.checkpoints = {name: open_checkpoint(name) for name in (self.base, *self.experts)}
        base = self.checkpoints[self.base]
        tasks = load_tasks(list(TASKS), include_path=EVAL)
        self.evaluator = Evaluator(tasks, load_tokenizer(base), load_config(base))
        self.resident = Resident(self.checkpoints, torch.float32, "cpu")
        self.layers = base.layout.layer_count

    def score(self, recipe: Mapping[str, Any], tasks: Sequence[str], start: int) -> Row:
        """Scores a recipe on every other item of `tasks`, from item `start`."""
        plan = make_plan(parse_recipe(recipe), self.checkpoints)
        model, _ = self.resident.write(plan)
        chosen = {task: self.evaluator.everything[task][start::2] for task in tasks}
        scores = self.evaluator.score(model, chosen)
        return {task: scores[task].score(TASKS[task]).value for task in tasks}

    def tune(self, recipe: Mapping[str, Any]) -> float:
        """Mean accuracy over the skills, on the items to tune on."""
        row = self.score(recipe, STEERING, 0)
        return sum(row.values()) / len(row)

    def merge(self, method: str, weights: Sequence[Any], **parameters: Any) -> dict[str, Any]:
        """A recipe that merges the experts."""
        return {
            "merge_method": method,
            "base_model": self.base,
            "models": [
                {"model": name, "parameters": {"weight": weight}}
                for name, weight in zip(self.experts, weights, strict=True)
            ],
            "parameters": parameters,
            "dtype": "float32",
        }

    def alone(self, name: str) -> dict[str, Any]:
        """A recipe that is one model."""
        return {
            "merge_method": "linear",
            "models": [{"model": name, "parameters": {"weight": 1.0}}],
            "dtype": "float32",
        }


def per_model(family: Zoo, lam: float, tries: int, rng: random.Random) -> dict[str, Any]:
    """The best of `tries` random weights, one for each expert."""
    recipes = [
        family.merge("task_arithmetic", [lam * rng.uniform(0.5, 1.5) for _ in family.experts]) for _ in range(tries)
    ]
    return max(recipes, key=family.tune)


def per_layer(family: Zoo, start: Mapping[str, Any], tries: int, rng: random.Random) -> dict[str, Any]:
    """A hill climb over one weight for each expert and layer, from one weight for each expert."""
    weights = [[model["parameters"]["weight"]] * family.layers for model in start["models"]]
    best, fitness = dict(start), family.tune(start)
    for _ in range(tries):
        moved = [[max(0.0, w + rng.choice((0.0, rng.gauss(0, 0.25)))) for w in row] for row in weights]
        recipe = family.merge("task_arithmetic", moved)
        if (value := family.tune(recipe)) >= fitness:
            best, fitness, weights = recipe, value, moved
    return best


def rows(family: Zoo, tries: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What the table compares."""
    for name in (family.base, *family.experts):
        yield name, family.alone(name)
    one = [1.0] * len(family.experts)
    yield "uniform average of the experts", family.merge("task_arithmetic", one, normalize=True)
    grid = {lam: family.merge("task_arithmetic", one, **{"lambda": lam}) for lam in LAMBDAS}
    lam = max(grid, key=lambda lam: family.tune(grid[lam]))
    yield f"task arithmetic, best λ = {lam}", grid[lam]
    trimmed = {
        (density, lam): family.merge("ties", one, density=density, normalize=False, **{"lambda": lam})
        for density in (0.2, 0.5)
        for lam in (0.7, 1.0, 1.3)
    }
    best = max(trimmed, key=lambda key: family.tune(trimmed[key]))
    yield f"ties, best density = {best[0]}, λ = {best[1]}", trimmed[best]
    weighed = per_model(family, lam, tries, random.Random(0))
    yield f"a weight for each expert, best of {tries}", weighed
    yield (
        f"a weight for each expert and layer, {tries} steps from there",
        per_layer(family, weighed, tries, random.Random(1)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the models of the test suite")
    parser.add_argument("--tries", type=int, default=16, help="merges that each of the two searches tries")
    options = parser.parse_args()
    names = [name for name in zoo.NAMES if (name in zoo.SMALL) == options.small]
    missing = [name for name in names if not zoo.folder_of(name).is_dir()]
    for name in names:
        zoo.ensure(name)
    if missing:
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(f"trained {', '.join(missing)} in {used.ru_utime + used.ru_stime:.0f} s of processor time\n")
    family = Zoo(names)
    print(f"| model | {' | '.join([*TASKS, 'mean of the skills'])} |\n|---{'|---' * (len(TASKS) + 1)}|")
    for name, recipe in rows(family, options.tries):
        row = family.score(recipe, list(TASKS), 1)
        mean = sum(row[task] for task in STEERING) / len(STEERING)
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in [*row.values(), mean])} |", flush=True)


if __name__ == "__main__":
    main()
