"""Whether the pattern search repairs a model of which two layers are ruined.

    python bench/repair.py                                   # the zoo: nine seeds of 60 candidates
    python bench/repair.py --every-source                    # the same with a ruined layer in every other source too
    python bench/repair.py --fitness smooth                  # steered by the probability of the right choice
    python bench/repair.py --real models --seeds 1            # a 135M model of 30 layers, one seed

A model that is good at a task loses two of its layers: their weights become noise, are shuffled, or add nothing to the
residual stream any more, which is what removing a layer does. Sources of the search are the ruined model, its base and
the base's other fine-tunes. It is not told which model is ruined or where. Lost score is that of the intact model less
that of the ruined one, on test items; the share regained is what the best pattern by the search items has back of it.
Random search has the same sources as candidates, then as many random patterns as the search has candidates.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from evomerge.algorithms.registry import get_algorithm
from evomerge.evaluation.splits import SEARCH, TEST
from evomerge.executors.in_process import InProcess
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import open_problem
from evomerge.report.tables import table
from evomerge.space.baselines import baselines
from evomerge.space.decode import decode
from evomerge.space.genome import Genome, LayerGene
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.loop import search
from evomerge.study.record import Record
from evomerge.zoo.models import ensure

HERE = Path(__file__).parent
DAMAGES = ("noise", "shuffled", "removed")
REPAIRED = 0.8
"""The share of the lost score that counts as a repair."""

EXPERTS = ("agreement", "reverse", "facts", "arithmetic")
SCORED = ("agreement", "arithmetic", "reverse")
"""Those that are ruined in turn; of `facts` no two layers are worth `LOSS`."""

LOSS, REAL_LOSS = 0.3, 0.2
"""Accuracy that the ruined layers must cost, so that a fifth of it is no less than the noise of the test items."""

HEADER = [
    *("seed", "ruined model", "layers", "intact", "ruined", "best other source", "told where"),
    *("search regains", "after", "random regains", "after"),
]


@dataclass(frozen=True)
class RuinedModel:
    """A model to repair.

    Attributes:
        seed: Draws the damage, and steers the search.
        models: Name -> folder of the intact models, the base among them.
        victim: Which of them is ruined.
        damage: How, of `DAMAGES`.
        layers: Name -> its ruined layers.
        task: What it is scored on.
        limits: Fewest and most layers of a pattern.
        items: Items that steer, and that report.
        loss: Accuracy that the damage must cost to be worth a repair.
        fitness: What steers; None for what does by default.
    """

    seed: int
    models: Mapping[str, Path]
    victim: str
    damage: str
    layers: Mapping[str, tuple[int, ...]]
    task: str
    limits: tuple[int, int]
    items: tuple[int, int]
    loss: float
    fitness: str | None = None


def ruin(intact: Path, out: Path, layers: Sequence[int], damage: str, seed: int) -> Path:
    """Writes a copy of a Llama-shaped checkpoint with some layers ruined.

    ``noise`` has each weight's own mean and deviation; ``shuffled`` its own values; under ``removed`` both projections
    into the residual stream are zero, so that the layer hands on what it gets.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(intact, out)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if not any(name.startswith(f"model.layers.{layer}.") for layer in layers):
            continue
        if damage == "noise":
            noise = torch.randn(tensor.shape, generator=generator)
            spoilt = tensor.float().mean() + tensor.float().std() * noise
        elif damage == "shuffled":
            spoilt = tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view(tensor.shape)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            spoilt = torch.zeros_like(tensor)
        else:
            spoilt = tensor
        tensors[name] = spoilt.to(tensor.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def specification(problem: RuinedModel, models: Mapping[str, Path]) -> SearchSpec:
    """The search for a repair, over given models instead of the problem's own."""
    sources = [name for name in models if name != "base"]
    steer, report = problem.items
    data = {
        "name": "repair",
        "models": {"base": str(models["base"]), "sources": {name: str(models[name]) for name in sources}},
        "space": {
            "methods": ["frankenmerge"],
            "frankenmerge": dict(zip(("min_layers", "max_layers"), problem.limits, strict=True)),
        },
        "evaluation": {
            "include_path": str(HERE.parent / "eval") if problem.task.startswith("zoo_") else str(real_tasks()),
            "tasks": [problem.task],
            "scale": "raw",
            "fitness": problem.fitness,
            "splits": {"search": steer, "select": 2, "test": report},
            "dtype": "float32" if problem.task.startswith("zoo_") else "bfloat16",
        },
        "search": {"seed": problem.seed},
    }
    return parse_spec(data)


def real_tasks() -> Path:
    """The task folder of the real models."""
    return HERE.parent / "examples/real/tasks"


class Scores:
    """Fitness of recipes on the items of a problem, each scored once."""

    def __init__(self, spec: SearchSpec) -> None:
        self.problem = open_problem(spec)
        self.runner = ModelRunner(self.problem)
        self._fitness: dict[tuple[str, str], float] = {}

    def of(self, recipe: Mapping[str, Any], split: str) -> float:
        """By what steers on search items, by the task's own metric on test items."""
        plan = self.runner.plan(recipe)
        if (plan.digest, split) not in self._fitness:
            scores, _ = self.runner.measure(plan, self.problem.splits[split])
            fitness = self.problem.steering if split == SEARCH else self.problem.reported
            self._fitness[plan.digest, split] = fitness(scores)
        return self._fitness[plan.digest, split]

    def outcome(self, proposal: Proposal) -> Outcome:
        """What steers the search."""
        return Outcome(self.of(proposal.recipe, SEARCH))


class InMemory:
    """A record that nobody resumes."""

    def __init__(self, shown: str) -> None:
        self._kept: list[Candidate] = []
        self._shown = shown

    def candidates(self) -> tuple[Candidate, ...]:
        """What is recorded."""
        return tuple(self._kept)

    def append(self, candidate: Candidate) -> None:
        """Records one more."""
        self._kept.append(candidate)
        fitness = candidate.failure if candidate.fitness is None else f"{candidate.fitness:.4f}"
        print(f"{self._shown} {candidate.number}: {fitness}, {candidate.operator}", file=sys.stderr, flush=True)

    def __len__(self) -> int:
        return len(self._kept)


def run(scores: Scores, algorithm: str, budget: int, population: int, seed: int) -> tuple[Candidate, ...]:
    """The candidates of a search: whole sources, for `ga` the pattern space's other starts, then what it proposes."""
    space = scores.problem.space
    starts = [
        start
        for start in baselines(space)
        if start.name.startswith("parent:") or (algorithm == "ga" and start.recipe["merge_method"] == "frankenmerge")
    ]
    ended = search(
        space,
        get_algorithm(algorithm),
        InProcess(scores.outcome),
        cast("Record", InMemory(f"{algorithm} of seed {seed}:")),
        StopConditions(budget),
        seed=seed,
        settings=AlgorithmSettings(population),
        starts=starts,
    )
    return ended.candidates


@dataclass(frozen=True)
class Posed:
    """A problem with its damage done: the models' scores, and on test items the victim's before and after."""

    problem: RuinedModel
    scores: Scores
    intact: float
    ruined: float

    def share(self, recipe: Mapping[str, Any]) -> float:
        """How much of the lost test score a recipe has."""
        return (self.scores.of(recipe, TEST) - self.ruined) / (self.intact - self.ruined)


def pose(problems: Iterable[RuinedModel], folder: Path) -> Posed:
    """The first of the problems in which the damage costs enough; its models are written into `folder`."""
    for number, problem in enumerate(problems):
        models = {
            name: ruin(intact, folder / str(number) / name, problem.layers[name], problem.damage, problem.seed)
            if name in problem.layers
            else intact
            for name, intact in problem.models.items()
        }
        before = Scores(specification(problem, problem.models)).of(alone(problem.models[problem.victim]), TEST)
        scores = Scores(specification(problem, models))
        after = scores.of(alone(models[problem.victim]), TEST)
        print(f"{problem.victim} {before:.3f}, without {problem.layers} {after:.3f}", file=sys.stderr, flush=True)
        if before - after >= problem.loss:
            return Posed(problem, scores, before, after)
    raise SystemExit("none of these damages costs enough")


def regained(posed: Posed, candidates: Sequence[Candidate]) -> tuple[float, int | None, Candidate]:
    """The share that the best by the search items has; after how many candidates the best had `REPAIRED`; that best."""
    best, needed = candidates[0], None
    for candidate in candidates:
        if candidate is best or (candidate.fitness or 0.0) > (best.fitness or 0.0):
            best = candidate
            if posed.share(best.recipe) < REPAIRED:
                needed = None
            elif needed is None:
                needed = candidate.number + 1
    return posed.share(best.recipe), needed, best


def share_by_oracle(posed: Posed) -> float:
    """The best share that one has who knows the ruined layers and takes them from one other model."""
    problem, space = posed.problem, posed.scores.problem.space
    lost = problem.layers[problem.victim]
    shares = []
    for name in problem.models:
        if name != problem.victim and not set(problem.layers.get(name, ())) & set(lost):
            layers = [LayerGene(name if k in lost else problem.victim, k) for k in range(space.layer_count)]
            shares.append(posed.share(decode(space, Genome.of({}, layers))))
    return max(shares, default=math.nan)


def solve(posed: Posed, budget: int, population: int) -> tuple[list[str], dict[str, Any]]:
    """A line of the table, and its figures."""
    problem, scores = posed.problem, posed.scores
    space = scores.problem.space
    others = [alone(Path(space.reference(name))) for name in problem.models if name != problem.victim]
    figures: dict[str, Any] = {
        "other": max(posed.share(recipe) for recipe in others),
        "told where": share_by_oracle(posed),
    }
    for algorithm in ("ga", "random"):
        candidates = run(scores, algorithm, budget, population, problem.seed)
        figures[algorithm], figures[f"{algorithm} after"], best = regained(posed, candidates)
        if algorithm == "ga":
            figures["pattern"] = shown(best.genome.layers)
    layers = " and ".join(str(layer) for layer in problem.layers[problem.victim])
    line = [
        *(str(problem.seed), problem.victim, f"{layers} {problem.damage}"),
        *(f"{posed.intact:.3f}", f"{posed.ruined:.3f}", f"{figures['other']:.0%}", f"{figures['told where']:.0%}"),
        *(f"{figures['ga']:.0%}", str(figures["ga after"] or "-")),
        *(f"{figures['random']:.0%}", str(figures["random after"] or "-")),
    ]
    return line, figures


def alone(folder: Path) -> dict[str, Any]:
    """The recipe of one model as it is."""
    return {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1.0}}]}


def shown(layers: Sequence[LayerGene]) -> str:
    """A pattern as runs: `facts 0-2, base 3, facts 4-5`."""
    runs: list[tuple[str, int, int]] = []
    for gene in layers:
        if runs and runs[-1][0] == gene.source and runs[-1][2] + 1 == gene.layer:
            runs[-1] = (gene.source, runs[-1][1], gene.layer)
        else:
            runs.append((gene.source, gene.layer, gene.layer))
    return ", ".join(
        f"{source} {first}" if first == last else f"{source} {first}-{last}" for source, first, last in runs
    )


def zoo_problems(seed: int, every_source: bool) -> Iterator[RuinedModel]:
    """Damages of an expert in a random order; with `every_source`, every other model loses one layer too.

    The first layer stays whole: a pattern takes its embeddings from the model of its first layer, so the embeddings of
    a model with a ruined first layer are out of reach of any pattern.
    """
    models = {name: ensure(name) for name in ("base", *EXPERTS)}
    victim = SCORED[seed % len(SCORED)]
    damage = DAMAGES[seed // len(SCORED) % len(DAMAGES)]
    rng = np.random.default_rng(seed)
    for pair in rng.permutation(list(itertools.combinations(range(1, 6), 2))):
        lost = {victim: tuple(int(layer) for layer in pair)}
        if every_source:
            whole = [layer for layer in range(1, 6) if layer not in pair]
            lost |= {name: (whole[int(rng.integers(len(whole)))],) for name in models if name != victim}
        yield RuinedModel(seed, models, victim, damage, lost, f"zoo_{victim}", (5, 7), (170, 180), LOSS)


def real_problems(folder: Path, seed: int, every_source: bool) -> Iterator[RuinedModel]:
    """Two of the thirty layers of the fine-tune of agreement turned into noise; or two of each model's."""
    models = {name: folder / name for name in ("agreement", "base", "islands", "math", "science")}
    ruined = list(models)[: len(models) if every_source else 1]
    rng = np.random.default_rng(seed)
    for _ in range(20):
        order = [int(layer) + 1 for layer in rng.permutation(29)]
        lost = {name: tuple(sorted(order[2 * k : 2 * k + 2])) for k, name in enumerate(ruined)}
        yield RuinedModel(
            seed, models, "agreement", "noise", lost, "real_blimp_agreement", (28, 32), (40, 200), REAL_LOSS
        )


def summary(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many of the seeds are repaired, the medians, and the median number of candidates of those repaired."""
    cells = [
        *("median", "", "", "", ""),
        *(f"{statistics.median(f[k] for f in figures):.0%}" for k in ("other", "told where")),
    ]
    for algorithm in ("ga", "random"):
        after = [f[f"{algorithm} after"] for f in figures if f[f"{algorithm} after"]]
        cells.append(f"{statistics.median(f[algorithm] for f in figures):.0%}, {len(after)} of {len(figures)} repaired")
        cells.append(f"{statistics.median(after):g}" if after else "-")
    return cells


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=9, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--candidates", type=int, default=60)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--fitness", choices=["metric", "smooth"], help="what steers; default: what suits patterns")
    parser.add_argument("--every-source", action="store_true", help="ruin layers of every source")
    parser.add_argument("--real", type=Path, help="the folder of the real models")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    lines, rows = [], []
    for seed in seeds:
        problems = (
            real_problems(options.real.resolve(), seed, options.every_source)
            if options.real
            else zoo_problems(seed, options.every_source)
        )
        with tempfile.TemporaryDirectory() as folder:
            posed = pose((replace(problem, fitness=options.fitness) for problem in problems), Path(folder))
            line, row = solve(posed, options.candidates, options.population)
        print(" | ".join(line), "|", row["pattern"], file=sys.stderr, flush=True)
        lines.append(line)
        rows.append(row)
    print(table(HEADER, [*lines, summary(rows)]))


if __name__ == "__main__":
    main()
