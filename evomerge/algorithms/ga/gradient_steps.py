"""Gradient steps: from one of the best candidates to where slopes say that the fitness rises.

A step is the best point within some distance on the surface through what is known around the candidate (`surface`). How
far that is follows what steps did before, as in trust-region methods: a step that turned out well sets the length of
the next ones, and those from a candidate whose steps all failed are shorter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evomerge.algorithms.ga.gaussian_process import Surface, Told
from evomerge.algorithms.ga.parent import Parent
from evomerge.algorithms.history_index import Reading
from evomerge.algorithms.proposals import Draw
from evomerge.space.decode import active_reals
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import GRADIENT, Candidate, find, gradient_parent
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.system.arrays import FloatArray, Mask

CLIMBERS = 3
"""Steps start from so many of the best, at most."""
FIRST = 0.13
"""How far a step goes where nothing is known, as a root mean square of genes."""
FARTHEST = 0.3
"""How far at most."""
LONGER = 1.3
"""The length of a step by that of the one that led to where it starts."""
SHORTER = 0.35
"""What the length is multiplied by for every step that was tried from there."""
NO_STEP = 0.01
"""The share of this length that a step needs to be one."""
VALUES = 24
"""Candidates whose fitness the surface is given, and those whose slopes it is given: the nearest."""
GRADIENTS = 16


class Climbs:
    """The gradient steps of one generation.

    Args:
        space: The space.
        reading: What is known.
        order: Those to learn from, best first.
        settings: With a function that gives slopes.
        favour: How much more often than by default to climb.
    """

    def __init__(
        self,
        space: SearchSpace,
        reading: Reading,
        order: Sequence[Candidate],
        settings: AlgorithmSettings,
        favour: float,
    ) -> None:
        self._space, self._reading, self._settings = space, reading, settings
        self._room = round(favour)
        self._done = [c for c in order if c.state == "done"]
        self._steps = reading.steps
        self._found: dict[int, FloatArray | None] = {}

    @property
    def possible(self) -> bool:
        """Whether to climb at all: not where steps do not pay, nor where nothing has slopes."""
        if self._room == 0:
            return False
        return bool(self._steps) or (bool(self._done) and self._slopes(self._done[0]) is not None)

    def step(self, place: int) -> Draw | None:
        """The step that has this place in a generation: from the best, then from others.

        None where the place has none, or there are no slopes.
        """
        first = self._climber(place) if place < self._room else None
        if first is None:
            return None
        parent = Parent.of(self._space, first)
        mask = active_reals(self._space, first.genome)
        length = self._length(first, parent, mask)
        unit = parent.unit.copy()
        unit[mask] = self._surface(first, mask).best_within(length)
        if np.linalg.norm(unit - parent.unit) < NO_STEP * length:
            return None
        return self._space.genome(unit, parent.choices, parent.layers), (first.number,), GRADIENT

    def _climber(self, rank: int) -> Candidate | None:
        """The leader of this rank among those whose slopes are known, and the best of the others that has any.

        So slopes are asked for of one more at a time, and not before its place in the generation comes.
        """
        fresh = False
        for leader in self._done[:CLIMBERS]:
            if leader.number not in self._steps:
                if fresh or self._slopes(leader) is None:
                    continue
                fresh = True
            if rank == 0:
                return leader if np.any(self._slopes(leader)) else None
            rank -= 1
        return None

    def _slopes(self, candidate: Candidate) -> FloatArray | None:
        """The derivatives by every gene in units of its range, shape [reals]; None where there are none."""
        number = candidate.number
        if number not in self._found:
            told = self._settings.gradients(candidate) if self._settings.gradients is not None else None
            width = self._space.high - self._space.low
            values = None if told is None else [told.get(gene.name, 0.0) for gene in self._space.reals]
            self._found[number] = None if values is None else np.array(values) * width
        return self._found[number]

    def _surface(self, here: Candidate, mask: Mask) -> Surface:
        """The fitness around a candidate, over the genes that count for it."""
        numbers = {here.number, *self._steps}
        known = [c for number in numbers if (c := find(self._reading.history, number)) is not None]
        valued = self._reading.nearest(here, mask, self._done, VALUES)
        with_slopes = [
            (candidate, slopes[mask])
            for candidate in self._reading.nearest(here, mask, known, GRADIENTS)
            if (slopes := self._slopes(candidate)) is not None
        ]
        told = Told(
            self._reading.units(valued, mask),
            np.array([candidate.fitness for candidate in valued]),
            self._reading.units([candidate for candidate, _ in with_slopes], mask),
            np.stack([slopes for _, slopes in with_slopes]),
        )
        return Surface(told)

    def _length(self, first: Candidate, here: Parent, mask: Mask) -> float:
        """How long a step from a candidate should be: somewhat more than the one that led to it, if one did."""
        unit = math.sqrt(mask.sum())
        length = FIRST * unit
        mother = find(self._reading.history, number) if (number := gradient_parent(first)) is not None else None
        if mother is not None:
            length = LONGER * float(np.linalg.norm(self._reading.unit(mother)[mask] - here.unit[mask]))
        return min(length, FARTHEST * unit) * SHORTER ** self._steps[first.number]
