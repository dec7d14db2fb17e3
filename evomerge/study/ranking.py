"""Orders the candidates of a search: best first, by fronts, and which are worth measuring on fresh items.

Under constraints the feasible come before the others, and of two that are not feasible the one that is less far beyond
the limits (Deb, 2000, https://doi.org/10.1016/S0045-7825(99)00389-8).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.space.baselines import PARENT
from evomerge.study import pareto
from evomerge.study.candidate import Candidate
from evomerge.system.arrays import FloatArray


def fitness_key(candidate: Candidate) -> tuple[float, float, int]:
    """Sorts the feasible first, then the fittest; the earlier one first when equal."""
    return candidate.violation, -(candidate.fitness or 0.0), candidate.number


def penalised(candidates: Sequence[Candidate]) -> FloatArray:
    """Returns the fitness, that of the infeasible replaced by their violation below the worst of the feasible.

    So one number a candidate says what `fitness_key` says.
    """
    fitness = np.array([candidate.fitness or 0.0 for candidate in candidates], dtype=np.float64)
    violation = np.array([candidate.violation for candidate in candidates], dtype=np.float64)
    feasible = violation == 0
    worst = float(fitness[feasible].min()) if feasible.any() else 0.0
    values: FloatArray = np.where(feasible, fitness, worst - violation)
    return values


def ranked(history: Iterable[Candidate]) -> list[Candidate]:
    """Returns the candidates that have a full score, best first; the earlier one first when equal."""
    return sorted((c for c in history if c.state == "done" and c.fitness is not None), key=fitness_key)


def has_fitness(candidate: Candidate) -> bool:
    """Tells whether a candidate has a fitness; a pruned one has the estimate that it was stopped at."""
    return candidate.state != "failed" and candidate.fitness is not None


def best_first(history: Iterable[Candidate], limit: int | None = None) -> list[Candidate]:
    """Returns the candidates that have a fitness, pruned ones included, best first.

    With several objectives: front by front, within a front those with the fewest neighbours first (NSGA-II), then those
    that have no objectives.

    Args:
        history: The candidates.
        limit: How many at most.
    """
    return front_by_front(sorted(filter(has_fitness, history), key=fitness_key), limit)


def front_by_front(fittest: Sequence[Candidate], limit: int | None = None) -> list[Candidate]:
    """Returns the same as `best_first`, of candidates with a fitness that are sorted by `fitness_key`."""
    several = [c for c in fittest if c.objectives is not None and c.violation == 0]
    if not several:
        return list(fittest[:limit])
    rest = [c for c in fittest if c.objectives is None or c.violation > 0]
    return [*_by_fronts(several, limit), *rest][:limit]


def _by_fronts(candidates: list[Candidate], limit: int | None) -> list[Candidate]:
    values = objectives_of(candidates)
    fronts = pareto.ranks(values, limit)
    crowding = np.zeros(len(candidates))
    for front in np.unique(fronts):
        crowding[fronts == front] = pareto.crowding(values[fronts == front])
    return [candidates[k] for k in np.lexsort((-crowding, fronts))]  # stable: the fitter first when equal


def objectives_of(candidates: Sequence[Candidate]) -> FloatArray:
    """Returns their objectives, which each of them must have, shape [candidates, objectives]."""
    return np.array([candidate.objectives for candidate in candidates], dtype=np.float64)


def pareto_front(history: Iterable[Candidate]) -> list[Candidate]:
    """Returns the candidates with a full score that none dominates, by number; of equal ones the first.

    While none is feasible, those that are least far beyond the limits.
    """
    done = sorted((c for c in history if c.state == "done" and c.objectives is not None), key=lambda c: c.number)
    if not done:
        return []
    least = min(c.violation for c in done)
    done = [c for c in done if c.violation == least]
    values = objectives_of(done)
    _, first = np.unique(values, axis=0, return_index=True)
    undominated = pareto.ranks(values[first], 1) == 0
    return [done[k] for k in np.sort(first[undominated])]


def best(history: Iterable[Candidate]) -> Candidate | None:
    """Returns the best candidate, with several objectives the knee of their front; None when nothing is done."""
    candidates = tuple(history)
    front = pareto_front(candidates)
    if front:
        return front[pareto.knee(objectives_of(front), np.array([c.fitness for c in front], dtype=np.float64))]
    return next(iter(ranked(candidates)), None)


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


def reference_point(history: Iterable[Candidate]) -> FloatArray | None:
    """Returns where the search's hypervolume is measured from: a little below the worst of the models it started from.

    All of generation 0 stands in for them where none has a score; None where nothing of it has.
    """
    first = [c for c in history if c.generation == 0 and c.state == "done" and c.objectives is not None]
    parents = [c for c in first if c.operator.startswith(PARENT)]
    return pareto.reference_point(objectives_of(parents or first)) if first else None


def growth(history: Sequence[Candidate]) -> list[Growth]:
    """Returns the front and its hypervolume after each generation; empty while there is no reference point."""
    reference = reference_point(history)
    if reference is None:
        return []
    order = sorted(history, key=lambda c: (c.generation, c.number))
    scored = [c for c in order if _counts(c)]
    volumes = [0.0, *pareto.growing_hypervolume(objectives_of(scored), reference)]
    steps: list[Growth] = []
    front: list[Candidate] = []
    count = done = 0
    for generation, members in itertools.groupby(order, key=lambda c: c.generation):
        new = list(members)
        more = [c for c in new if _counts(c)]
        front = pareto_front([*front, *more])
        count, done = count + len(new), done + len(more)
        steps.append(Growth(generation, count, len(front), float(volumes[done])))
    return steps


def _counts(candidate: Candidate) -> bool:
    """Whether it may add to the volume of a front."""
    return candidate.state == "done" and candidate.objectives is not None and candidate.violation == 0


def latest_improvement(history: Sequence[Candidate]) -> Candidate | None:
    """Returns the last candidate that was better than all before it, or that the hypervolume grew by.

    With several objectives that is the latest member of the front above the reference point: a candidate that added
    volume is on the front still, unless a later one that dominates it, and so added volume too, took its place.
    """
    front = pareto_front(history)
    if not front:
        return best(history)
    reference = reference_point(history)
    inside = front if reference is None else [c for c in front if (np.array(c.objectives) > reference).all()]
    return max(inside, key=lambda c: (c.generation, c.number), default=None)


def unmet_constraints(candidates: Sequence[Candidate]) -> list[str]:
    """Says of each constraint that none of some candidates meets how far off every one of them is."""
    measured = sorted((c for c in candidates if c.constraints), key=lambda c: c.number)
    texts = []
    for name in measured[0].constraints if measured else ():
        if all(c.constraints[name].violation > 0 for c in measured):
            nearest = sorted(measured, key=lambda c: c.constraints[name].violation)
            off = ", ".join(
                f"{c.operator} {c.constraints[name].value:.4g} (limit {c.constraints[name].limit:.4g})" for c in nearest
            )
            texts.append(f"no candidate of generation 0 meets the constraint on {name}; the nearest first: {off}")
    if not texts and measured and all(c.violation > 0 for c in measured):
        texts.append("no candidate of generation 0 meets all constraints together, though each is met by some")
    return texts


def finalists(history: Iterable[Candidate], count: int) -> list[Candidate]:
    """Returns the candidates that are worth measuring on fresh items, at most `count`, the fittest first.

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
    return [front[k] for k in pareto.thin_front(values, count, keep)]
