"""The Pareto front of a search: how it grew, and which of its members are worth measuring on fresh items."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.space.baselines import PARENT
from evomerge.study import pareto
from evomerge.study.candidate import Candidate, best, objectives_of, pareto_front, ranked


@dataclass(frozen=True)
class Growth:
    """The front after a generation.

    Attributes:
        generation: The generation.
        candidates: How many candidates there were.
        front: How many of them are on the front.
        hypervolume: Its volume above the search's reference point.
    """

    generation: int
    candidates: int
    front: int
    hypervolume: float


def reference_point(history: Iterable[Candidate]) -> pareto.Array | None:
    """Where the search's hypervolume is measured from: a little below the worst of the models it started from.

    All of generation 0 stands in for them where none has a score; None where nothing of it has.
    """
    first = [c for c in history if c.generation == 0 and c.state == "done" and c.objectives is not None]
    parents = [c for c in first if c.operator.startswith(PARENT)]
    return pareto.reference_point(objectives_of(parents or first)) if first else None


def growth(history: Sequence[Candidate]) -> list[Growth]:
    """The front and its hypervolume after each generation; empty while there is no reference point."""
    reference = reference_point(history)
    if reference is None:
        return []
    order = sorted(history, key=lambda c: (c.generation, c.number))
    scored = [c for c in order if c.state == "done" and c.objectives is not None]
    volumes = [0.0, *pareto.growing_hypervolume(objectives_of(scored), reference)]
    found: list[Growth] = []
    front: list[Candidate] = []
    count = done = 0
    for generation, members in itertools.groupby(order, key=lambda c: c.generation):
        new = list(members)
        more = [c for c in new if c.state == "done" and c.objectives is not None]
        front = pareto_front([*front, *more])
        count, done = count + len(new), done + len(more)
        found.append(Growth(generation, count, len(front), float(volumes[done])))
    return found


def latest_improvement(history: Sequence[Candidate]) -> Candidate | None:
    """The last candidate that was better than all before it; with several objectives, that the hypervolume grew by.

    That is the latest member of the front above the reference point: a candidate that added volume is on the front
    still, unless a later one that dominates it, and so added volume too, took its place.
    """
    front = pareto_front(history)
    if not front:
        return best(history)
    reference = reference_point(history)
    inside = front if reference is None else [c for c in front if (np.array(c.objectives) > reference).all()]
    return max(inside, key=lambda c: (c.generation, c.number), default=None)


def finalists(history: Iterable[Candidate], count: int) -> list[Candidate]:
    """The candidates that are worth measuring on fresh items, at most `count`, the fittest first.

    With one objective the best ones. With several the front: where it has more members, its knee, the best of each
    objective, and of the others those that are spread best; where it has fewer, the fronts behind it too.
    """
    left = ranked(history)
    if not any(candidate.objectives for candidate in left):
        return left[:count]
    chosen: list[Candidate] = []
    while left and len(chosen) < count:
        front = pareto_front(left)
        chosen += _spread(front, count - len(chosen))
        behind = {candidate.number for candidate in front}
        left = [candidate for candidate in left if candidate.number not in behind]
    return ranked(chosen)


def _spread(front: Sequence[Candidate], count: int) -> list[Candidate]:
    values = objectives_of(front)
    fitness = np.array([candidate.fitness for candidate in front], dtype=np.float64)
    keep = [pareto.knee(values, fitness), *(int(k) for k in np.argmax(values, axis=0))]
    return [front[k] for k in pareto.thinned(values, count, keep)]
