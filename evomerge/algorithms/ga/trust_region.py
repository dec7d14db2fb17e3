"""Draws from what the fitness may be near the best candidate: steps where nobody knows slopes.

Thompson sampling within a trust region (Eriksson et al., 2019, "Scalable global optimization via local Bayesian
optimization", https://arxiv.org/abs/1910.01739): a Gaussian process is told the fitness of the candidates around the
best one, those that a race stopped among them, with the error of what was seen of their items. Every child is the best
of some random moves under another draw of the function, so that the children of one generation differ by what is not
known yet. The region grows after a generation that found a better candidate and shrinks after one that did not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evomerge.algorithms.ga.gaussian_process import likeliest
from evomerge.algorithms.ga.parent import Parent
from evomerge.algorithms.history_index import Reading
from evomerge.algorithms.proposals import OWN, Draw, generator
from evomerge.space.decode import active_reals
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import DRAW, Candidate
from evomerge.system.arrays import FloatArray, Mask

LENGTHS = (0.1, 0.17, 0.25, 0.45, 0.7, 1.1)
"""Over which the fitness changes its course, as a root mean square of genes; the likeliest is taken."""
NOISES = (0.02, 0.05, 0.1)
"""Deviation of one item's paired difference between two candidates, in units of fitness; the likeliest is taken."""
VALUE_NOISE = 1e-3
"""Error of a full score, in units of how much the fitness varies."""
KNOWN, NEAREST, FITTED = 512, 200, 100
"""Of so many of the best candidates, the process is told so many of the nearest; its settings fit so many of these."""
MOVES = 256
"""Random moves to choose from."""
MOVED = 20
"""Genes that a move changes, on average, where there are more."""
FIRST, SMALLEST, LARGEST = 0.2, 0.01, 0.3
"""The size of a move, as a root mean square of genes: at first, and its bounds."""
LARGER, SMALLER = 1.5, 0.85
"""What it is multiplied by after a generation with a draw that is the best candidate so far, and after one without."""


class Draws:
    """The draws of one generation.

    Args:
        space: The space.
        reading: What is known.
        seed: Seed of the run.
    """

    def __init__(self, space: SearchSpace, reading: Reading, seed: int) -> None:
        self._space, self._reading, self._seed = space, reading, seed
        self._known = reading.best_first(KNOWN)

    def draw(self, number: int) -> Draw | None:
        """A child of the best candidate; None where that has no real genes, or there is none."""
        region = self._region
        if region is None:
            return None
        rng = generator(self._seed, number, OWN)
        unit = region.here.unit.copy()
        unit[region.mask] = region.process.best_of(self._moves(unit[region.mask], rng), rng)
        return self._space.genome(unit, region.here.choices, region.here.layers), (region.here.number,), DRAW

    def _moves(self, here: FloatArray, rng: np.random.Generator) -> FloatArray:
        """Random points around one, shape [moves, genes]."""
        reach = math.sqrt(3.0) * self._size  # of a uniform distribution with this deviation
        moves = rng.uniform(-reach, reach, (MOVES, len(here)))
        moves *= rng.random(moves.shape) < MOVED / len(here)
        return np.clip(here + moves, 0.0, 1.0)

    @cached_property
    def _size(self) -> float:
        size = FIRST
        for won in self._reading.draws.values():
            size = min(max(size * (LARGER if won else SMALLER), SMALLEST), LARGEST)
        return size

    @cached_property
    def _region(self) -> _Region | None:
        best = next((c for c in self._known if c.state == "done"), None)
        if best is None:
            return None
        mask = active_reals(self._space, best.genome)
        if not mask.any():
            return None
        told = self._reading.nearest(best, mask, self._known, NEAREST)
        values = np.array([c.fitness for c in told], dtype=np.float64)
        process = Process(self._reading.units(told, mask), values, self._errors(told))
        return _Region(Parent.of(self._space, best), mask, process)

    def _errors(self, candidates: Sequence[Candidate]) -> FloatArray:
        """The error of every estimate in deviations of one item: of what a race has not seen."""
        items = np.array([c.items for c in candidates], dtype=np.float64)
        whole = items.max()
        unseen: FloatArray = np.where(items > 0, 1.0 / np.maximum(items, 1.0) - 1.0 / max(whole, 1.0), 0.0)
        return np.sqrt(unseen)


@dataclass(frozen=True)
class _Region:
    here: Parent
    mask: Mask
    process: Process


class Process:
    """A Gaussian process through some values.

    Args:
        points: Where they are, shape [points, genes]; lengths and noise are fitted to the first of them.
        values: The values, shape [points].
        errors: Their errors, in deviations of one item, shape [points].
    """

    def __init__(self, points: FloatArray, values: FloatArray, errors: FloatArray) -> None:
        spread = max(float(values.std()), 1e-9)
        targets = (values - np.median(values)) / spread
        self._points, self._scale = points, math.sqrt(points.shape[1])
        few = min(FITTED, len(points))
        fits = []
        for length in LENGTHS:
            kernel = _gaussian(points[:few], points[:few], length * self._scale)
            for noise in NOISES:
                fit = likeliest(kernel, (noise / spread * errors[:few]) ** 2 + VALUE_NOISE**2, targets[:few])
                fits.append((fit.likelihood, length, noise))
        _, self._length, noise = max(fits)
        kernel = _gaussian(points, points, self._length * self._scale)
        fit = likeliest(kernel, (noise / spread * errors) ** 2 + VALUE_NOISE**2, targets)
        self._weights, self._variance, self._whiten = fit.weights, fit.variance, np.linalg.inv(fit.root)

    def best_of(self, points: FloatArray, rng: np.random.Generator) -> FloatArray:
        """The best of some points under a draw of the function, shape [genes]."""
        length = self._length * self._scale
        across = _gaussian(points, self._points, length)
        told = self._whiten @ across.T
        left = _gaussian(points, points, length) - told.T @ told
        root = np.linalg.cholesky(left + 1e-6 * np.eye(len(points)))
        drawn = across @ self._weights + math.sqrt(self._variance) * (root @ rng.standard_normal(len(points)))
        best: FloatArray = points[int(np.argmax(drawn))]
        return best


def _gaussian(a: FloatArray, b: FloatArray, length: float) -> FloatArray:
    """As `surface` has it, from products: of hundreds of points many times as fast as from differences."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * (a @ b.T)
    found: FloatArray = np.exp(-np.maximum(squares, 0.0) / (2 * length**2))
    return found
