"""Racing: a candidate that will not reach the cut-off is stopped before all its items are scored. Imports no torch.

The items come in blocks, the same for every candidate. After each block the candidate is compared with the cut-off
candidate on the items that both have seen, and is stopped when it lies below by more than chance explains. What is
asked is whether it would reach the cut-off on *all* the search items, not on an endless supply of such items; so the
standard error carries the correction for a finite population, and a candidate's fate is sealed as the items run out.

A candidate's fitness on all items is estimated by the difference estimator of survey sampling: that of a candidate with
a full score, plus the mean paired difference to it on the items seen. That control is whichever known candidate answers
most like this one; for a child of good parents, that is rarely the cut-off, and halves the items that are needed.

The test looks once after each block. With the correction, the differences at the looks are jointly normal with the
covariances of any group-sequential trial whose information is the inverse of the corrected variance (Jennison and
Turnbull, 1997, https://doi.org/10.1080/01621459.1997.10473654), so that its bounds come from spending an error rate
over the looks (Lan and DeMets, 1983, https://doi.org/10.1093/biomet/70.3.659), here as ``error * t ** shape`` of the
fraction t of the items (Kim and DeMets, 1987, https://doi.org/10.1093/biomet/74.1.149), computed by the recursive
integration of Armitage, McPherson and Rowe (1969, https://doi.org/10.2307/2343787).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from evomerge.objective.fitness import Fitness, Scores

Array = NDArray[np.float64]

BLOCKS = 24
"""Blocks of items, where there are enough of them: most losers show in the first."""
FEWEST = 4
"""Items of each task in a block: with fewer, nothing is known of their spread."""
LOOKS = (1, 2, 3, 4, 6, 8, 12, 18)
"""Numbers of blocks after which to look."""
PLACE = 1
"""The cut-off candidate's place among those with a full score when a generation starts."""
ERROR, SHAPE = 0.5, 0.5
"""As in `bounds`. bench/results/racing.md says how these were chosen."""
PSEUDO = 0.25
"""Items, over all tasks, that are taken to differ as candidates typically do, beside those that were seen to: two
candidates that agree on the few items of a first block need not agree on all."""
CONTROLS = 32
"""How many of the best candidates with a full score are held ready as controls."""


@dataclass(frozen=True)
class Look:
    """A candidate beside the cut-off, after some of the items.

    Attributes:
        items: Items seen.
        estimate: The candidate's fitness on all items as it now seems.
        difference: The estimate less the cut-off's fitness.
        stderr: The standard error of both.
        lost: Whether the candidate is stopped here.
    """

    items: int
    estimate: float
    difference: float
    stderr: float
    lost: bool


@dataclass(frozen=True)
class _Linear:
    """A fitness and what each item adds to it: one array of influences per goal, weighted as in the fitness."""

    value: float
    influences: tuple[Array, ...]

    @classmethod
    def of(cls, fitness: Fitness, scores: Scores) -> _Linear | None:
        """None where some goal has no value on these items."""
        if not all(np.any(scores[goal.task].metrics[goal.metric][1]) for goal in fitness.goals):
            return None
        total = sum(goal.weight for goal in fitness.goals)
        weighed = fitness.weighed(scores)
        influences = []
        for goal in fitness.goals:
            value, influence = weighed[goal.task].influence(goal.metric)
            influences.append(influence * (goal.value(value)[1] * goal.weight / total))
        return cls(fitness(scores), tuple(influences))


@dataclass(frozen=True)
class Race:
    """What a generation's candidates are compared with; frozen when the generation starts.

    Attributes:
        fitness: The fitness.
        rival: The cut-off candidate's number.
        cutoff: Its fitness on all items.
        controls: Candidates that have seen all items, each at every look; None where it has no fitness on these items.
        sizes: At every look, the items of each goal.
        typical: For each goal, the squared difference on an item on which two candidates differ.
        bounds: How many standard errors below it a candidate is stopped, at every look but the last.
    """

    fitness: Fitness
    rival: int
    cutoff: float
    controls: tuple[tuple[_Linear | None, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    typical: tuple[float, ...]
    bounds: tuple[float, ...]

    @classmethod
    def against(cls, fitness: Fitness, rival: int, looks: Mapping[int, Sequence[Scores]]) -> Race:
        """A race.

        Args:
            fitness: The fitness.
            rival: The number of the cut-off candidate, one of `looks`.
            looks: Candidate number to its scores at every look, the last of them on all items.
        """
        rows = {n: tuple(_Linear.of(fitness, scores) for scores in seen) for n, seen in looks.items()}
        sizes = tuple(tuple(len(scores[g.task].items) for g in fitness.goals) for scores in looks[rival])
        whole = [row[-1].influences for row in rows.values() if row[-1] is not None]
        best = _Linear.of(fitness, looks[rival][-1])
        if best is None:
            raise ValueError("the cut-off candidate has no fitness")
        typical = tuple(_typical([terms[g] - best.influences[g] for terms in whole]) for g in range(len(fitness.goals)))
        fractions = [sum(size) / sum(sizes[-1]) for size in sizes[:-1]]
        return cls(fitness, rival, best.value, tuple(rows.values()), sizes, typical, bounds(fractions, ERROR, SHAPE))

    @property
    def items(self) -> int:
        """All items."""
        return sum(self.sizes[-1])

    def look(self, number: int, scores: Scores) -> Look | None:
        """Compares a candidate at look `number`, counted from 0, with the cut-off. At the last look none is stopped.

        None where the items that were seen give no fitness.
        """
        seen = _Linear.of(self.fitness, scores)
        near = [(self._variance(number, seen, row[number]), k) for k, row in enumerate(self.controls)]
        spread, control = min(near)
        at, whole = self.controls[control][number], self.controls[control][-1]
        if seen is None or at is None or whole is None:
            return None
        estimate = whole.value + seen.value - at.value
        stderr = math.sqrt(spread)
        lost = number < len(self.bounds) and estimate - self.cutoff < -self.bounds[number] * stderr
        return Look(sum(self.sizes[number]), estimate, estimate - self.cutoff, stderr, lost)

    def _variance(self, number: int, ours: _Linear | None, theirs: _Linear | None) -> float:
        """Of the difference on the items seen, as an estimate of that on all items; infinite where there is none."""
        if ours is None or theirs is None:
            return math.inf
        variance = 0.0
        share = PSEUDO / len(self.typical)
        for g, (a, b) in enumerate(zip(ours.influences, theirs.influences, strict=True)):
            n = self.sizes[number][g]
            squares = float(np.sum((a - b) ** 2)) + share * self.typical[g]
            variance += squares / (n - 1 + share) / n * (1 - n / self.sizes[-1][g])
        return variance

    def reason(self, look: Look) -> str:
        """Why a candidate was stopped, beginning with a kind and a colon."""
        return (
            f"raced out: after {look.items} of {self.items} items {-look.difference:.4f} ± {look.stderr:.4f} below "
            f"candidate {self.rival}, the cut-off"
        )


def _typical(differences: Sequence[Array]) -> float:
    """The mean square of some differences, each weighed by its own square: those of 0 do not count."""
    squares = np.concatenate(differences) ** 2 if differences else np.zeros(1)
    total = float(squares.sum())
    return float((squares**2).sum()) / total if total > 0 else 0.0


def draw_blocks(items: Mapping[str, Sequence[int]], seed: int) -> tuple[dict[str, tuple[int, ...]], ...]:
    """Cuts a selection of items into up to `BLOCKS` blocks, every task in every block in its proportion.

    Args:
        items: Task to positions of its items.
        seed: Another seed gives another draw.

    Returns:
        ``({task: positions, ascending}, ...)``: disjoint, together all the items; a single block where there are few.
    """
    count = max(1, min(BLOCKS, *(len(positions) // FEWEST for positions in items.values())))
    blocks: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
    for task, positions in items.items():
        order = sorted(positions, key=lambda position, task=task: _place(seed, task, position))  # type: ignore[misc]
        edges = [round(k * len(order) / count) for k in range(count + 1)]
        for block, (start, stop) in zip(blocks, pairwise(edges), strict=True):
            block[task] = tuple(sorted(order[start:stop]))
    return tuple(blocks)


def block_order(count: int, seed: int, generation: int) -> tuple[int, ...]:
    """The order in which a generation's candidates see the blocks.

    The blocks, and so the batches and their rounding, stay the same; but if the same one came first in every
    generation, a cut-off that happens to do well in it would keep good candidates out for the rest of the search.
    """
    return tuple(sorted(range(count), key=lambda block: _place(seed, f"generation {generation}", block)))


def look_after(count: int) -> tuple[int, ...]:
    """The numbers of blocks after which to look, of `count` of them; the last look is at all."""
    return (*(k for k in LOOKS if k < count), count)


def _place(seed: int, task: str, position: int) -> bytes:
    """An item's key in the random order of its task's items."""
    return hashlib.blake2b(f"block\0{seed}\0{task}\0{position}".encode(), digest_size=16).digest()


def bounds(fractions: Sequence[float], error: float, shape: float) -> tuple[float, ...]:
    """How far below the cut-off, in standard errors, a candidate is stopped at each look.

    Args:
        fractions: The share of all items seen at each look, ascending, each between 0 and 1.
        error: Probability that a candidate is stopped at any look that would come out equal to the cut-off.
        shape: How early the error is spent: 1 evenly over the items, more for later.

    Returns:
        A positive number for each look.
    """
    information = [t / (1 - t) for t in fractions]
    spent = [error * t**shape for t in fractions]
    found: list[float] = []
    grid, weights, before = np.zeros(1), np.ones(1), 0.0
    for look, now in enumerate(information):
        step = math.sqrt(now - before)
        wanted = spent[look] - (spent[look - 1] if look else 0.0)
        edge = _solve(grid, weights, step, wanted)
        found.append(-edge / math.sqrt(now))
        grid, weights = _advance(grid, weights, step, edge, 9 * math.sqrt(now))
        before = now
    return tuple(found)


def _solve(grid: Array, weights: Array, step: float, wanted: float) -> float:
    """The edge below which a step leads from the weighted points with the probability wanted, by bisection."""
    low, high = float(grid[0]) - 9 * step, float(grid[-1]) + 9 * step
    for _ in range(60):
        middle = (low + high) / 2
        below = float(weights @ _normal((middle - grid) / step))
        low, high = (middle, high) if below < wanted else (low, middle)
    return (low + high) / 2


_POINTS = 401


def _advance(grid: Array, weights: Array, step: float, edge: float, top: float) -> tuple[Array, Array]:
    """The weighted points (Simpson's rule) after one more step, of those paths that have stayed above the edge."""
    points = np.linspace(edge, top, _POINTS)
    rule = np.full(_POINTS, 2.0)
    rule[1::2] = 4.0
    rule[[0, -1]] = 1.0
    z = (points[:, None] - grid[None, :]) / step
    density = np.exp(-0.5 * z**2) @ weights / (step * math.sqrt(2 * math.pi))
    return points, density * rule * (points[1] - points[0]) / 3


@np.vectorize
def _normal(z: float) -> float:
    """The normal distribution function."""
    return 0.5 * math.erfc(-z / math.sqrt(2))
