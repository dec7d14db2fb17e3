"""MAP-Elites (Mouret and Clune, 2015, https://arxiv.org/abs/1504.04909), by pyribs.

An archive over the tasks' scores, one axis per task, keeps the best candidate of every cell: the best at mathematics
among those that are middling at code, and so on. Parents are elites; of two drawn the fitter one. Children lie on the
line through two of them, with some noise (Vassiliades and Mouret, 2018, https://arxiv.org/abs/1804.03906). With more
than four tasks the cells are those of a centroidal Voronoi tessellation, because a grid would have too many. With
several objectives these are the axes; without scores by task the fitness is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.algorithms import operators
from evomerge.algorithms.ga import layer_operators
from evomerge.algorithms.ga.selection import Parent
from evomerge.algorithms.proposals import Draw, distinct
from evomerge.space.decode import copies_layers
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.ranking import best_first, fitness_key, penalised
from evomerge.system.arrays import FloatArray

if TYPE_CHECKING:
    from ribs.archives import CVTArchive, GridArchive

#: `cells`: about how many the archive has; `iso_sigma`: noise of each gene, in units of its range; `line_sigma`: noise
#: along the line, in units of the parents' distance.
OPTIONS: dict[str, Any] = {"cells": 64, "iso_sigma": 0.03, "line_sigma": 0.3}
#: More axes than this are tessellated.
GRID_AXES = 4
TOURNAMENT_SIZE = 2
CHOICE_MUTATION = 0.1
_SAMPLES = 2000


def check_options(options: Mapping[str, Any]) -> list[str]:
    """Lists what is wrong with options of the right kind."""
    given = {**OPTIONS, **options}
    problems = [
        f"search.options.{n}: at least 0; got {given[n]!r}" for n in ("iso_sigma", "line_sigma") if given[n] < 0
    ]
    if not 2 <= given["cells"] <= _SAMPLES:
        problems.append(f"search.options.cells: a number from 2 to {_SAMPLES}; got {given['cells']!r}")
    return problems


def map_elites(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Proposes children of the archive's elites; random genomes while it is empty."""
    options = {**OPTIONS, **settings.options}
    elites = [Parent.of(space, candidate) for candidate in elites_of(history, options["cells"])]

    def draw(rng: np.random.Generator) -> Draw:
        if not elites:
            return space.sample(rng), (), "random"
        return _child(space, elites, options["iso_sigma"], options["line_sigma"], rng)

    return distinct(space, history, numbers, generation, seed, draw)


def elites_of(history: Sequence[Candidate], cells: int) -> list[Candidate]:
    """Finds the fittest candidate of every cell, the fittest of all first; a pruned one counts by its estimate."""
    fittest = sorted(best_first(history), key=fitness_key)
    if not fittest:
        return []
    measures = measures_of(fittest)
    fitness = penalised(fittest)
    archive = _archive(measures, cells)
    ranks = np.arange(len(fittest))
    archive.add(np.zeros((len(fittest), 1)), fitness, measures, rank=ranks)
    return [fittest[int(rank)] for rank in sorted(archive.data("rank"))]


def measures_of(candidates: Sequence[Candidate]) -> FloatArray:
    """Computes where candidates are in the archive, shape [candidates, axes].

    The axes are the objectives, else the tasks of the first candidate that has scores of any, each by its first metric;
    a candidate without a score of a task counts with its fitness there.
    """
    objectives = next((c.objectives for c in candidates if c.objectives is not None), None)
    if objectives is not None:
        rows = [c.objectives or (c.fitness,) * len(objectives) for c in candidates]
        return np.array(rows, dtype=np.float64)
    tasks = next((list(c.scores["search"]) for c in candidates if c.scores.get("search")), [])
    if not tasks:
        return np.array([[c.fitness] for c in candidates], dtype=np.float64)
    return np.array([[_score(c, task) for task in tasks] for c in candidates], dtype=np.float64)


def _score(candidate: Candidate, task: str) -> float | None:
    for metric in candidate.scores.get("search", {}).get(task, {}).values():
        value = metric["value"]
        return candidate.fitness if value is None else float(value)
    return candidate.fitness


def _archive(measures: FloatArray, cells: int) -> GridArchive | CVTArchive:
    """An empty archive that spans the measures."""
    from ribs.archives import CVTArchive, GridArchive

    axes = measures.shape[1]
    low, high = measures.min(axis=0), measures.max(axis=0)
    high = np.where(high > low, high, low + 1.0)
    shared: dict[str, Any] = {
        "solution_dim": 1,
        "ranges": list(zip(low.tolist(), high.tolist(), strict=True)),
        "extra_fields": {"rank": ((), np.int64)},
    }
    if axes > GRID_AXES:
        return CVTArchive(centroids=cells, samples=_SAMPLES, seed=0, **shared)
    return GridArchive(dims=[max(2, round(cells ** (1 / axes)))] * axes, **shared)


def _child(
    space: SearchSpace, elites: Sequence[Parent], iso_sigma: float, line_sigma: float, rng: np.random.Generator
) -> Draw:
    from ribs.emitters.operators import IsoLineOperator

    first, second = (elites[operators.tournament(len(elites), TOURNAMENT_SIZE, rng)] for _ in range(2))
    operator = IsoLineOperator(iso_sigma, line_sigma, seed=int(rng.integers(2**32)))
    unit = operator.ask(np.stack([first.unit, second.unit])[:, None])[0]
    choices = {name: (first if rng.random() < 0.5 else second).choices[name] for name in first.choices}
    if space.choices and rng.random() < CHOICE_MUTATION:
        choice = space.choices[int(rng.integers(len(space.choices)))]
        choices[choice.name] = choice.options[int(rng.integers(len(choice.options)))]
    layers = first.layers
    if space.pattern is not None and copies_layers(space, space.genome(unit, choices, layers)):
        layers = layer_operators.crossover(first.layers, second.layers, space.pattern, rng)
        move = list(layer_operators.MOVES.values())[int(rng.integers(len(layer_operators.MOVES)))]
        layers = move(layers, space.pattern, rng)
    parents = tuple(dict.fromkeys((first.number, second.number)))
    return space.genome(operators.reflect(unit), choices, layers), parents, "iso + line"
