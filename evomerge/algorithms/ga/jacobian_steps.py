"""Steps by a model of every item: from the best candidate to where its log-likelihoods say that the fitness rises.

A step is the best point of the model (`LocalModel`) within a radius, which is measured in what changes: nats a token of
the answers. Steps of several radii are tried from a candidate; that of the one that turned out best is where the next
begin. How many genes a step tells apart (one move a source, one a run of layers, one a gene) the model finds by
cross-validation. Where it predicts no gain on items that a step was not made for, there is none to take.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from evomerge.algorithms.ga.selection import Parent
from evomerge.algorithms.history_index import HistoryIndex
from evomerge.algorithms.proposals import Draw
from evomerge.space.decode import active_reals
from evomerge.space.genes import OUTER
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import JACOBIAN_STEP, Candidate
from evomerge.study.interfaces import AlgorithmSettings, LocalModel
from evomerge.system.arrays import IntArray, Mask

FIRST_RADIUS = 0.3
"""Nats a token, where nothing is known."""
FACTORS = (1.0, 0.5, 2.0, 0.25, 0.12)
"""The radii that are tried from one candidate, in this order: factors on that of the step that led to it."""
AT_ONCE = 3
"""So many of them in one generation."""
DEPTHS = (1, 3, 6, 12)
"""Runs of layers that move alike; beside these, every layer group by itself."""


class JacobianSteps:
    """The steps of one generation.

    Args:
        space: The space.
        index: The history.
        order: The candidates, best first.
        settings: With a function that gives models.
    """

    def __init__(
        self, space: SearchSpace, index: HistoryIndex, order: Sequence[Candidate], settings: AlgorithmSettings
    ) -> None:
        self._space, self._index, self._settings = space, index, settings
        self._start = next((candidate for candidate in order if candidate.state == "done"), None)

    def step(self, rank: int) -> Draw | None:
        """Proposes a step; None where there is none to take.

        Args:
            rank: Counts the steps of the generation.
        """
        attempt = self._tried + rank
        if self._start is None or rank >= AT_ONCE or attempt >= len(FACTORS) or self._model is None:
            return None
        mask = active_reals(self._space, self._start.genome) & (self._space.high > self._space.low)
        labels = resolutions(self._space, mask)
        radius = radius_of(self._start) or FIRST_RADIUS
        way, ridge, gain = self._model.resolution(labels, radius)
        if gain <= 0:
            return None
        move, predicted = self._model.step(labels[way], ridge, radius * FACTORS[attempt])
        if predicted <= 0:
            return None
        parent = Parent.of(self._space, self._start)
        genome = self._space.genome(parent.unit + move, parent.choices, parent.layers)
        return genome, (self._start.number,), f"{JACOBIAN_STEP}, {radius * FACTORS[attempt]:.3g} nats a token"

    @cached_property
    def _model(self) -> LocalModel | None:
        """Asked for where a step is: it costs several evaluations."""
        ask = self._settings.local_model
        return None if ask is None or self._start is None else ask(self._start)

    @property
    def _tried(self) -> int:
        return 0 if self._start is None else self._index.steps[self._start.number]


def radius_of(candidate: Candidate) -> float | None:
    """Reads the radius of the step that led to a candidate; None where none did."""
    match = re.search(rf"{JACOBIAN_STEP}, (\S+) nats", candidate.operator)
    return float(match[1]) if match else None


def resolutions(space: SearchSpace, mask: Mask) -> list[IntArray]:
    """Lists ways to move genes together, the coarsest first: labels of the genes, [reals], -1 where one stays.

    Genes of one parameter, source, run of layers and, in the finer ways, tensor group move alike.
    """
    groups = len(space.groups)
    depths = [n for n in DEPTHS if n < groups] + [groups]
    ways: list[IntArray] = []
    for runs in depths:
        for by_tensors in (False, True) if space.tensor_groups else (False,):
            names: dict[tuple[str | int | None, ...], int] = {}
            labels = np.full(len(space.reals), -1, dtype=np.int64)
            for k in np.flatnonzero(mask):
                gene = space.reals[k]
                run = -1 if gene.group == OUTER else int(gene.group[1:]) * runs // groups
                name = (gene.parameter, gene.source, run, gene.tensors if by_tensors else None)
                labels[k] = names.setdefault(name, len(names))
            if not any(np.array_equal(labels, way) for way in ways):
                ways.append(labels)
    return ways
