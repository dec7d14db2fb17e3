"""Gradient steps: from one of the best candidates to where the gradients say that the fitness rises.

A step is the best point within some distance of a candidate under a Gaussian process of the fitness around it
(`gaussian_process`). How far that is follows what steps did before, as in trust-region methods: a step that turned out
well sets the length of the next ones, and those from a candidate whose steps all failed are shorter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evomerge.algorithms.ga.gaussian_process import GaussianProcess, Observations
from evomerge.algorithms.ga.selection import Parent
from evomerge.algorithms.history_index import HistoryIndex
from evomerge.algorithms.proposals import Draw
from evomerge.space.decode import active_reals
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import GRADIENT, Candidate, find, gradient_parent
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.system.arrays import FloatArray, Mask

MAX_STARTS = 3
"""So many of the best are asked for a gradient, at most."""
FIRST_LENGTH = 0.13
"""The length of a step where nothing is known, as a root mean square of genes."""
MAX_LENGTH = 0.3
GROWTH = 1.3
"""The length of a step by that of the one that led to where it starts."""
SHRINKAGE = 0.35
"""What the length is multiplied by for every step that was tried from there."""
MIN_STEP = 0.01
"""The share of this length that a step needs to be one."""
MAX_VALUES = 24
"""Candidates whose fitness the Gaussian process is given, and those whose gradients it is given: the nearest."""
MAX_GRADIENTS = 16


class GradientSteps:
    """The gradient steps of one generation.

    Args:
        space: The space.
        index: The history.
        order: The candidates to learn from, best first.
        settings: With a function that gives gradients.
    """

    def __init__(
        self, space: SearchSpace, index: HistoryIndex, order: Sequence[Candidate], settings: AlgorithmSettings
    ) -> None:
        self._space, self._index, self._settings = space, index, settings
        self._done = [c for c in order if c.state == "done"]
        self._steps = index.steps
        self._gradients: dict[int, FloatArray | None] = {}

    @property
    def possible(self) -> bool:
        """Whether there is a gradient to step along."""
        return bool(self._steps) or (bool(self._done) and self._gradient(self._done[0]) is not None)

    def step(self) -> Draw | None:
        """Takes a step from the best candidate that has a gradient; None where there is none to take."""
        start = self._start()
        if start is None:
            return None
        parent = Parent.of(self._space, start)
        mask = active_reals(self._space, start.genome)
        length = self._length(start, parent, mask)
        unit = parent.unit.copy()
        unit[mask] = self._posterior(start, mask).maximum_within(length)
        if np.linalg.norm(unit - parent.unit) < MIN_STEP * length:
            return None
        return self._space.genome(unit, parent.choices, parent.layers), (start.number,), GRADIENT

    def _start(self) -> Candidate | None:
        """The first of the best candidates that has a gradient."""
        for candidate in self._done[:MAX_STARTS]:
            if candidate.number in self._steps or self._gradient(candidate) is not None:
                return candidate if np.any(self._gradient(candidate)) else None
        return None

    def _gradient(self, candidate: Candidate) -> FloatArray | None:
        """The derivatives by every gene in units of its range, shape [reals]; None where there are none."""
        number = candidate.number
        if number not in self._gradients:
            by_gene = self._settings.gradients(candidate) if self._settings.gradients is not None else None
            width = self._space.high - self._space.low
            values = None if by_gene is None else [by_gene.get(gene.name, 0.0) for gene in self._space.reals]
            self._gradients[number] = None if values is None else np.array(values) * width
        return self._gradients[number]

    def _posterior(self, center: Candidate, mask: Mask) -> GaussianProcess:
        """The fitness around a candidate, over the genes that count for it."""
        numbers = {center.number, *self._steps}
        stepped_from = [c for number in numbers if (c := find(self._index.history, number)) is not None]
        with_value = self._index.nearest(center, mask, self._done, MAX_VALUES)
        with_gradient = [
            (candidate, gradient[mask])
            for candidate in self._index.nearest(center, mask, stepped_from, MAX_GRADIENTS)
            if (gradient := self._gradient(candidate)) is not None
        ]
        return GaussianProcess(
            Observations(
                self._index.units(with_value, mask),
                np.array([candidate.fitness for candidate in with_value]),
                self._index.units([candidate for candidate, _ in with_gradient], mask),
                np.stack([gradient for _, gradient in with_gradient]),
            )
        )

    def _length(self, start: Candidate, parent: Parent, mask: Mask) -> float:
        """How long a step from a candidate should be: somewhat more than the one that led to it, if one did."""
        unit = math.sqrt(mask.sum())
        length = FIRST_LENGTH * unit
        number = gradient_parent(start)
        previous = find(self._index.history, number) if number is not None else None
        if previous is not None:
            length = GROWTH * float(np.linalg.norm(self._index.unit(previous)[mask] - parent.unit[mask]))
        return min(length, MAX_LENGTH * unit) * SHRINKAGE ** self._steps[start.number]
