"""A landscape that costs nothing: per-item results of recorded candidates, and what they say about all others.

    python bench/surrogate.py runs/efficiency-real/*          # how well it predicts candidates that it has not seen

For every item, the log odds of the right choice (or the log of the loss) as a function of the recipe: kernel ridge
regression, one kernel for all items, on the weights that every layer group takes of every source. Widths and ridge are
those with the least error on left-out candidates. `bench/search_efficiency.py --surrogate` searches on it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.evaluation.scores import ItemScores, score_table, table_to_json
from evomerge.objective.fitness import Fitness
from evomerge.report.tables import table
from evomerge.run.folder import RunFolder
from evomerge.space.decode import active
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Outcome, Proposal

Array = NDArray[np.float64]
Scores = Mapping[str, ItemScores]

FOLDS = 5
WIDTHS, RIDGES, ACROSS = (0.3, 0.6, 1.2, 2.4, 4.8), (1e-4, 1e-3, 1e-2, 1e-1), (0.3, 0.7, 0.95)
"""Of the kernel; the ridge; how alike two methods are."""


@dataclass(frozen=True)
class Places:
    """Where a recipe is looked at: one tensor of each layer group, and one outside the layers."""

    sources: tuple[str, ...]
    layers: tuple[int, ...]
    outer: str

    def features(self, recipe: Mapping[str, Any]) -> Array:
        """(weight, density) of every source at every place, λ multiplied in."""
        found = []
        for layer in (*self.layers, None):
            name = self.outer if layer is None else f"model.layers.{layer}.mlp.up_proj.weight"
            piece, wanted = _slice_at(recipe, layer or 0), {}
            for source in piece.get("sources", piece.get("models", ())):
                wanted[source["model"]] = source.get("parameters", {})
            shared = {**recipe.get("parameters", {}), **piece.get("parameters", {})}
            scale = _value(shared.get("lambda", 1.0), name)
            for reference in self.sources:
                own = {**shared, **wanted[reference]} if reference in wanted else {"weight": 0.0}
                found += [scale * _value(own.get("weight", 1.0), name), 0.3 * _value(own.get("density", 0.6), name)]
        return np.array(found)


def _slice_at(recipe: Mapping[str, Any], layer: int) -> Mapping[str, Any]:
    for piece in recipe.get("slices", ()):
        start, stop = piece["sources"][0]["layer_range"]
        if start <= layer < stop:
            return dict(piece)
    return recipe


def _value(given: Any, name: str) -> float:
    """A number, or mergekit's list of conditions (the first match wins)."""
    if not isinstance(given, list):
        return float(given)
    return float(next(entry["value"] for entry in given if "filter" not in entry or entry["filter"] in name))


def _kernel(a: Array, b: Array, methods: tuple[Sequence[str], Sequence[str]], width: float, across: float) -> Array:
    distance = ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)
    same = np.array(methods[0])[:, None] == np.array(methods[1])[None, :]
    rbf: Array = (np.exp(-distance / (2 * width**2)) + 0.05 * (a @ b.T)) * np.where(same, 1.0, across)
    return rbf


@dataclass(frozen=True)
class Surrogate:
    """The fitted landscape.

    Attributes:
        fitness: The fitness, as it steered the recorded runs.
        places: Where recipes are looked at.
        known: Features of the candidates it was fitted to, shape [candidates, features], and their methods.
        weights: [candidates, items], and the items' means [items].
        template: Scores whose items and directions the predictions take.
        settings: (width, ridge, across).
    """

    fitness: Fitness
    places: Places
    known: tuple[Array, tuple[str, ...]]
    weights: tuple[Array, Array]
    template: Scores
    settings: tuple[float, float, float]

    def scores(self, recipe: Mapping[str, Any]) -> dict[str, ItemScores]:
        """Predicted per-item scores of a recipe."""
        x, method = self.places.features(recipe)[None], [recipe["merge_method"]]
        row = _kernel(x, self.known[0], (method, self.known[1]), self.settings[0], self.settings[2])
        return _scores(self.fitness, self.template, (row @ self.weights[0] + self.weights[1])[0])

    def landscape(self, space: SearchSpace, seed: int) -> Landscape:
        """The landscape of a space, with the items that the seed draws to steer; the others are unseen."""
        rng = np.random.default_rng([seed, 17])
        halves: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
        for goal in self.fitness.goals:
            order = rng.permutation(len(self.template[goal.task].items)).tolist()
            halves[0][goal.task], halves[1][goal.task] = sorted(order[::2]), sorted(order[1::2])
        return Landscape(self, space, *halves)


@dataclass(frozen=True)
class Landscape:
    """What `evomerge.search.search` needs to search on a surrogate."""

    surrogate: Surrogate
    space: SearchSpace
    steering: Mapping[str, Sequence[int]]
    other: Mapping[str, Sequence[int]]

    @property
    def size(self) -> int:
        """The items that steer."""
        return sum(map(len, self.steering.values()))

    def _scores(self, recipe: Mapping[str, Any], part: Mapping[str, Sequence[int]]) -> Scores:
        return {task: scores.take(part[task]) for task, scores in self.surrogate.scores(recipe).items()}

    def fitness(self, recipe: Mapping[str, Any]) -> float:
        """The fitness on the items that steer."""
        return self.surrogate.fitness(self._scores(recipe, self.steering))

    def unseen(self, candidate: Candidate) -> float:
        """A candidate's fitness on the other items."""
        return self.surrogate.fitness(self._scores(candidate.recipe, self.other))

    def __call__(self, proposal: Proposal) -> Outcome:
        """A candidate's outcome."""
        scores = self._scores(proposal.recipe, self.steering)
        value = self.surrogate.fitness(scores)
        told = {"search": table_to_json(score_table(scores))}
        return Outcome(value, told, estimates={self.size: value})

    def items(self, candidate: Candidate) -> Array:
        """What every item says."""
        return self.surrogate.fitness.by_item(self._scores(candidate.recipe, self.steering))

    def slopes(self, candidate: Candidate) -> dict[str, float]:
        """Central differences by every active gene; one-sided at the end of a range."""
        used, genome, found = active(self.space, candidate.genome), candidate.genome, {}
        for gene in self.space.reals:
            if gene.name not in used or gene.low == gene.high:
                continue
            value, step = float(genome.values[gene.name]), 0.02 * (gene.high - gene.low)
            ends = max(gene.low, value - step), min(gene.high, value + step)
            moved = [Genome.of({**genome.values, gene.name: end}, genome.layers) for end in ends]
            low, high = (self.fitness(self.space.recipe(one)) for one in moved)
            found[gene.name] = (high - low) / (float(moved[1].values[gene.name]) - float(moved[0].values[gene.name]))
        return found


def _targets(fitness: Fitness, scores: Scores) -> Array:
    """Log odds (of a probability) or the log (of a loss) of every item, goal by goal."""
    parts = []
    for goal in fitness.goals:
        numerators, denominators = scores[goal.task].columns(goal.metric)
        ratio = np.abs(numerators / denominators)
        clipped = np.clip(ratio, 1e-4, 1 - 1e-4)
        parts.append(np.log(clipped / (1 - clipped)) if goal.higher_is_better else np.log(np.maximum(ratio, 1e-6)))
    return np.concatenate(parts)


def _scores(fitness: Fitness, template: Scores, values: Array) -> dict[str, ItemScores]:
    """The scores that have these targets."""
    found, start = {}, 0
    for goal in fitness.goals:
        like = template[goal.task]
        part = values[start : start + len(like.items)]
        numerators, denominators = like.columns(goal.metric)
        sign = np.sign(numerators.sum())
        ratio = 1 / (1 + np.exp(-part)) if goal.higher_is_better else np.exp(np.clip(part, -20, 20))
        metrics = {goal.metric: (sign * ratio * denominators, denominators)}
        found[goal.task] = ItemScores(goal.task, like.items, metrics, like.higher_is_better, like.transforms)
        start += len(like.items)
    return found


@dataclass(frozen=True)
class Recorded:
    """Candidates with full scores: recipes, per-item scores, and the fitness that steered them."""

    recipes: list[Mapping[str, Any]]
    scores: list[Scores]
    fitness: Fitness
    places: Places


def read(folders: Sequence[Path]) -> Recorded:
    """Every candidate of some runs on the same items that has a full score; equal recipes once."""
    from evomerge.evaluation.splits import SEARCH
    from evomerge.problem.candidate_evaluator import Scorer
    from evomerge.problem.problem import Workbench
    from evomerge.study.interfaces import NullTracker

    recipes: dict[str, tuple[Mapping[str, Any], Scores]] = {}
    fitness, places = None, None
    for folder in folders:
        opened = RunFolder.existing(folder)
        bench = Workbench(opened.spec)
        if fitness is None:
            scorer = Scorer(bench, opened)
            scorer.settle(NullTracker())
            fitness = scorer.fitness
            starts = tuple(start for start, _ in bench.space.groups)
            places = Places(tuple(opened.spec.models.sources.values()), starts, bench.space.outer[0])
        for candidate in opened.candidates():
            plan = bench.plan(candidate.recipe)
            scores = opened.scores(plan.digest, SEARCH)
            if candidate.state == "done" and scores is not None:
                recipes.setdefault(plan.digest, (candidate.recipe, scores))
    if fitness is None or places is None:
        raise SystemExit("no run was given")
    return Recorded([r for r, _ in recipes.values()], [s for _, s in recipes.values()], fitness, places)


def fit(recorded: Recorded, rows: Sequence[int] | None = None, settings: tuple[float, ...] | None = None) -> Surrogate:
    """Fits to some of the candidates; without settings, to those with the least error on left-out candidates."""
    chosen = list(range(len(recorded.recipes))) if rows is None else list(rows)
    x = np.stack([recorded.places.features(recorded.recipes[k]) for k in chosen])
    methods = tuple(str(recorded.recipes[k]["merge_method"]) for k in chosen)
    y = np.stack([_targets(recorded.fitness, recorded.scores[k]) for k in chosen])
    mean = y.mean(axis=0)
    best: tuple[float, ...] = settings or min(
        itertools.product(WIDTHS, RIDGES, ACROSS), key=lambda s: _left_out(x, y - mean, methods, s)
    )
    width, ridge, across = best
    kernel = _kernel(x, x, (methods, methods), width, across) + ridge * np.eye(len(x))
    weights = np.linalg.solve(kernel, y - mean)
    places, fitness = recorded.places, recorded.fitness
    return Surrogate(fitness, places, (x, methods), (weights, mean), recorded.scores[chosen[0]], (width, ridge, across))


def _left_out(x: Array, y: Array, methods: tuple[str, ...], settings: tuple[float, ...]) -> float:
    """Mean squared error of every candidate predicted by all others, in closed form."""
    width, ridge, across = settings
    inverse = np.linalg.inv(_kernel(x, x, (methods, methods), width, across) + ridge * np.eye(len(x)))
    errors = (inverse @ y) / np.diag(inverse)[:, None]
    return float(np.mean(errors**2))


def held_back(recorded: Recorded) -> list[str]:
    """How well candidates are predicted that the surrogate was not fitted to."""
    order = np.random.default_rng(0).permutation(len(recorded.recipes))
    wanted, found, items = [], [], []
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        surrogate = fit(recorded, [int(k) for k in order if k not in out])
        for k in out:
            predicted = surrogate.scores(recorded.recipes[k])
            wanted.append(recorded.fitness(recorded.scores[k]))
            found.append(recorded.fitness(predicted))
            errors = _targets(recorded.fitness, predicted) - _targets(recorded.fitness, recorded.scores[k])
            items.append(float(np.mean(errors**2)))
    difference = np.array(found) - np.array(wanted)
    spread = np.array(wanted) - np.mean(wanted)
    ranks = [np.argsort(np.argsort(values)) for values in (wanted, found)]
    top = np.array(wanted) >= np.quantile(wanted, 0.75)
    return [
        str(len(wanted)),
        f"{math.sqrt(float(np.mean(difference**2))):.4f}",
        f"{math.sqrt(float(np.mean(difference[top] ** 2))):.4f}",
        f"{float(np.std(wanted)):.4f}",
        f"{1 - float(np.sum(difference**2) / np.sum(spread**2)):.3f}",
        f"{float(np.corrcoef(*ranks)[0, 1]):.3f}",
        f"{math.sqrt(float(np.mean(items))):.3f}",
    ]


HEADER = [
    *("candidates", "error of the fitness", "of the best quarter", "its spread", "R²", "rank correlation"),
    "error of an item's log odds",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    options = parser.parse_args()
    recorded = read(options.runs)
    print(table(HEADER, [held_back(recorded)]))
    width, ridge, across = fit(recorded).settings
    print(f"width {width:g}, ridge {ridge:g}, likeness of methods {across:g}")


if __name__ == "__main__":
    main()
