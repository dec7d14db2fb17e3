"""Racing: stops a candidate before all its items are scored, once it is clear that it will not reach the cutoff.

The items come in blocks, the same for every candidate. At each interim analysis the candidate is compared with the
incumbent at the cutoff rank, on the items that both have seen, and is stopped when it lies below by more than chance
explains. What is asked is whether it would reach the cutoff on *all* the search items, not on an endless supply of such
items; so the standard error carries the correction for a finite population, and a candidate's fate is sealed as the
items run out.

A candidate's fitness on all items is estimated by the difference estimator of survey sampling: that of a candidate with
a full score, plus the mean paired difference to it on the items seen. That control is whichever of the best candidates
answers most like this one; for a child of good parents, that is rarely the incumbent, and halves the items needed.

With the correction, the differences at the interim analyses are jointly normal with the covariances of any
group-sequential trial whose information is the inverse of the corrected variance (Jennison and Turnbull, 1997,
https://doi.org/10.1080/01621459.1997.10473654): `stopping_boundary` needs no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from evomerge.evaluation.splits import balanced_order
from evomerge.objective.fitness import Fitness, Scores
from evomerge.objective.stopping_boundary import stopping_boundary
from evomerge.system.arrays import FloatArray
from evomerge.system.hashing import digest_bytes

BLOCKS = 24
"""Blocks of items, where there are enough of them: most losers show in the first."""
MIN_BLOCK_ITEMS = 4
"""Items of each task in a block: with fewer, nothing is known of their variance."""
ANALYSES = (1, 2, 3, 4, 6, 8, 12, 18)
"""Numbers of blocks after which there is an interim analysis."""
CUTOFF_RANK = 1
"""Rank of the incumbent to be reached, among the candidates with a full score when a generation starts."""
ERROR, POWER = 0.5, 0.5
"""As in `stopping_boundary`. bench/results/racing.md says how these were chosen."""
PRIOR_ITEMS = 0.25
"""Items, over all tasks, that are taken to differ as candidates typically do, beside those that were seen to: two
candidates that agree on the few items of a first block need not agree on all."""
CONTROLS = 32
"""How many of the best candidates with a full score are kept as controls."""


@dataclass(frozen=True)
class InterimAnalysis:
    """A candidate compared with the incumbent, after some of the items.

    Attributes:
        items: Items seen.
        estimate: The estimated fitness of the candidate on all items.
        difference: The estimate less the incumbent's fitness.
        stderr: The standard error of both.
        stopped: Whether the difference is below the stopping boundary.
    """

    items: int
    estimate: float
    difference: float
    stderr: float
    stopped: bool


@dataclass(frozen=True)
class _LinearisedFitness:
    """A fitness and what each item adds to it: one array of influences per goal, weighted as in the fitness."""

    value: float
    influences: tuple[FloatArray, ...]

    @classmethod
    def of(cls, fitness: Fitness, scores: Scores) -> _LinearisedFitness | None:
        """Linearises the fitness at some scores; None where some goal has no value on these items."""
        if not all(np.any(scores[goal.task].metrics[goal.metric][1]) for goal in fitness.goals):
            return None
        total = sum(goal.weight for goal in fitness.goals)
        weighted = fitness.weighted(scores)
        influences = []
        for goal in fitness.goals:
            value, influence = weighted[goal.task].influence(goal.metric)
            influences.append(influence * (goal.value(value)[1] * goal.weight / total))
        return cls(fitness(scores), tuple(influences))


@dataclass(frozen=True)
class Race:
    """What a generation's candidates are compared with; fixed when the generation starts.

    Attributes:
        fitness: The fitness.
        incumbent: The number of the candidate at the cutoff rank.
        cutoff: Its fitness on all items.
        controls: Candidates that have seen all items, each at every analysis; None where it has no fitness there.
        sizes: At every analysis, the items of each goal.
        seen: At every analysis, the items of all tasks, those that only a constraint is about among them.
        typical_squares: For each goal, the squared difference on an item on which two candidates differ.
        boundary: How many standard errors below the cutoff a candidate is stopped, at every analysis but the last.
    """

    fitness: Fitness
    incumbent: int
    cutoff: float
    controls: tuple[tuple[_LinearisedFitness | None, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    seen: tuple[int, ...]
    typical_squares: tuple[float, ...]
    boundary: tuple[float, ...]

    @classmethod
    def against(cls, fitness: Fitness, incumbent: int, controls: Mapping[int, Sequence[Scores]]) -> Race:
        """Prepares a race.

        Args:
            fitness: The fitness.
            incumbent: The number of the candidate at the cutoff rank, one of `controls`.
            controls: Candidate number to its scores at every analysis, the last of them on all items.
        """
        rows = {n: tuple(_LinearisedFitness.of(fitness, scores) for scores in seen) for n, seen in controls.items()}
        sizes = tuple(tuple(len(scores[g.task].items) for g in fitness.goals) for scores in controls[incumbent])
        seen = tuple(sum(len(part.items) for part in scores.values()) for scores in controls[incumbent])
        complete = [row[-1].influences for row in rows.values() if row[-1] is not None]
        best = _LinearisedFitness.of(fitness, controls[incumbent][-1])
        if best is None:
            raise ValueError("the incumbent has no fitness")
        typical = tuple(
            _typical_square([terms[g] - best.influences[g] for terms in complete]) for g in range(len(fitness.goals))
        )
        fractions = [sum(size) / sum(sizes[-1]) for size in sizes[:-1]]
        boundary = stopping_boundary(fractions, ERROR, POWER)
        return cls(fitness, incumbent, best.value, tuple(rows.values()), sizes, seen, typical, boundary)

    @property
    def items(self) -> int:
        """All items."""
        return self.seen[-1]

    def analyse(self, number: int, scores: Scores) -> InterimAnalysis | None:
        """Compares a candidate with the cutoff at analysis `number`, counted from 0. At the last one none is stopped.

        None where the items that were seen give no fitness.
        """
        seen = _LinearisedFitness.of(self.fitness, scores)
        variances = [(self._variance(number, seen, row[number]), k) for k, row in enumerate(self.controls)]
        variance, nearest = min(variances)
        control, control_on_all = self.controls[nearest][number], self.controls[nearest][-1]
        if seen is None or control is None or control_on_all is None:
            return None
        estimate = control_on_all.value + seen.value - control.value
        stderr = math.sqrt(variance)
        stopped = number < len(self.boundary) and estimate - self.cutoff < -self.boundary[number] * stderr
        return InterimAnalysis(self.seen[number], estimate, estimate - self.cutoff, stderr, stopped)

    def _variance(self, number: int, candidate: _LinearisedFitness | None, control: _LinearisedFitness | None) -> float:
        """Of the difference on the items seen, as an estimate of that on all items; infinite where there is none."""
        if candidate is None or control is None:
            return math.inf
        variance = 0.0
        prior = PRIOR_ITEMS / len(self.typical_squares)
        for g, (a, b) in enumerate(zip(candidate.influences, control.influences, strict=True)):
            n = self.sizes[number][g]
            squares = float(np.sum((a - b) ** 2)) + prior * self.typical_squares[g]
            variance += squares / (n - 1 + prior) / n * (1 - n / self.sizes[-1][g])
        return variance

    def reason(self, analysis: InterimAnalysis) -> str:
        """Says why a candidate was stopped, beginning with a kind and a colon."""
        return (
            f"raced out: after {analysis.items} of {self.items} items {-analysis.difference:.4f} ± "
            f"{analysis.stderr:.4f} below candidate {self.incumbent}, the cut-off"
        )


def _typical_square(differences: Sequence[FloatArray]) -> float:
    """The mean square of some differences, each weighed by its own square: those of 0 do not count."""
    squares = np.concatenate(differences) ** 2 if differences else np.zeros(1)
    total = float(squares.sum())
    return float((squares**2).sum()) / total if total > 0 else 0.0


def draw_blocks(
    items: Mapping[str, Sequence[int]], seed: int, ids: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, tuple[int, ...]], ...]:
    """Cuts a selection of items into up to `BLOCKS` blocks, every task in every block in its proportion.

    Args:
        items: Task to positions of its items.
        seed: Another seed gives another draw.
        ids: Task to the ids of all its items, so that the tasks of a group are in every block in their proportion.

    Returns:
        ``({task: positions, ascending}, ...)``: disjoint, together all the items; a single block where there are few.
    """
    count = max(1, min(BLOCKS, *(len(positions) // MIN_BLOCK_ITEMS for positions in items.values())))
    blocks: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
    for task, positions in items.items():
        keys = [_random_key(seed, task, position) for position in positions]
        named = [ids[task][position] if ids else "" for position in positions]
        order = [positions[k] for k in balanced_order(named, keys)]
        edges = [round(k * len(order) / count) for k in range(count + 1)]
        for block, (start, stop) in zip(blocks, pairwise(edges), strict=True):
            block[task] = tuple(sorted(order[start:stop]))
    return tuple(blocks)


def block_order(count: int, seed: int, generation: int) -> tuple[int, ...]:
    """Draws the order in which a generation's candidates see the blocks.

    The blocks, and so the batches and their rounding, stay the same; but if the same one came first in every
    generation, an incumbent that happens to do well in it would keep good candidates out for the rest of the search.
    """
    return tuple(sorted(range(count), key=lambda block: _random_key(seed, f"generation {generation}", block)))


def blocks_at_analyses(count: int) -> tuple[int, ...]:
    """Lists the numbers of blocks seen at each interim analysis, of `count` of them; the last is of all."""
    return (*(k for k in ANALYSES if k < count), count)


def _random_key(seed: int, task: str, position: int) -> bytes:
    """An item's key in the random order of its task's items."""
    return digest_bytes(f"block\0{seed}\0{task}\0{position}")
