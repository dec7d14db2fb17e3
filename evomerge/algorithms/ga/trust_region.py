"""Draws from what the fitness may be near the best candidate: steps where there are no gradients.

Thompson sampling within a trust region (Eriksson et al., 2019, "Scalable global optimization via local Bayesian
optimization", https://arxiv.org/abs/1910.01739): a Gaussian process is fitted to the fitness of the candidates around
the best one, those that a race stopped among them, with the error of what was seen of their items. Every child is the
best of some random moves under another draw of the function, so that the children of one generation differ by what is
not known yet. The region grows after a generation that found a better candidate and shrinks after one that did not.

Every constraint has a process of its own: a child is the best of the moves that a draw of each takes for feasible, or
where there is none the one that they take to be the least far beyond the limits (Eriksson and Poloczek, 2021, "Scalable
constrained Bayesian optimization", https://arxiv.org/abs/2002.08526).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evomerge.algorithms.ga.selection import Parent
from evomerge.algorithms.history_index import HistoryIndex
from evomerge.algorithms.proposals import PLANNED_ATTEMPT, Draw, generator
from evomerge.space.decode import active_reals
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import DRAW, Candidate
from evomerge.system.arrays import FloatArray, Mask

LENGTH_SCALES = (0.1, 0.17, 0.25, 0.45, 0.7, 1.1)
"""As root mean squares of genes; the most likely one is taken."""
ITEM_NOISES = (0.02, 0.05, 0.1)
"""Deviation of one item's paired difference between two candidates, in units of fitness; the most likely is taken."""
VALUE_NOISE = 1e-3
"""Error of a full score, in units of how much the fitness varies."""
MAX_BEST, MAX_NEAREST, MAX_FITTED = 512, 200, 100
"""Of so many of the best candidates, the process is given so many of the nearest; its settings fit so many of these."""
MOVES = 256
"""Random moves to choose from."""
GENES_MOVED = 20
"""Genes that a move changes, on average, where there are more."""
FIRST_SIZE, MIN_SIZE, MAX_SIZE = 0.2, 0.01, 0.3
"""The size of a move, as a root mean square of genes: at first, and its bounds."""
GROWTH, SHRINKAGE = 1.5, 0.85
"""What it is multiplied by after a generation with a draw that is the best candidate so far, and after one without."""


class TrustRegion:
    """The draws of one generation.

    Args:
        space: The space.
        index: The history.
        seed: Seed of the run.
    """

    def __init__(self, space: SearchSpace, index: HistoryIndex, seed: int) -> None:
        self._space, self._index, self._seed = space, index, seed
        self._best = index.best_first(MAX_BEST)

    def draw(self, number: int) -> Draw | None:
        """Draws a child of the best candidate; None where that has no real genes, or there is none."""
        center = self._center
        if center is None:
            return None
        rng = generator(self._seed, number, PLANNED_ATTEMPT)
        unit = center.parent.unit.copy()
        moves = self._moves(unit[center.mask], rng)
        fitness = center.posterior.draw(moves, rng)
        violations = (limited.values(limited.draw(moves, rng)) for limited in center.limited)
        beyond = sum((np.maximum(violation, 0.0) for violation in violations), np.zeros(len(moves)))
        unit[center.mask] = moves[np.lexsort((-fitness, beyond))[0]]
        parent = center.parent
        return self._space.genome(unit, parent.choices, parent.layers), (parent.number,), DRAW

    def _moves(self, unit: FloatArray, rng: np.random.Generator) -> FloatArray:
        """Random points around one, shape [moves, genes]."""
        reach = math.sqrt(3.0) * self._size  # of a uniform distribution with this deviation
        moves = rng.uniform(-reach, reach, (MOVES, len(unit)))
        moves *= rng.random(moves.shape) < GENES_MOVED / len(unit)
        return np.clip(unit + moves, 0.0, 1.0)

    @cached_property
    def _size(self) -> float:
        size = FIRST_SIZE
        for improved in self._index.draws.values():
            size = min(max(size * (GROWTH if improved else SHRINKAGE), MIN_SIZE), MAX_SIZE)
        return size

    @cached_property
    def _center(self) -> _Center | None:
        best = next((c for c in self._best if c.state == "done"), None)
        if best is None:
            return None
        mask = active_reals(self._space, best.genome)
        if not mask.any():
            return None
        nearest = self._index.nearest(best, mask, self._best, MAX_NEAREST)
        values = np.array([c.fitness for c in nearest], dtype=np.float64)
        points, errors = self._index.units(nearest, mask), _errors(nearest)
        limited = [
            Posterior(points, np.array([c.constraints[name].violation for c in nearest], dtype=np.float64), errors)
            for name in best.constraints
        ]
        return _Center(Parent.of(self._space, best), mask, Posterior(points, values, errors), limited)


def _errors(candidates: Sequence[Candidate]) -> FloatArray:
    """The error of every estimate in deviations of one item: of what a race has not seen."""
    items = np.array([c.items for c in candidates], dtype=np.float64)
    whole = items.max()
    unseen: FloatArray = np.where(items > 0, 1.0 / np.maximum(items, 1.0) - 1.0 / max(whole, 1.0), 0.0)
    return np.sqrt(unseen)


@dataclass(frozen=True)
class _Center:
    parent: Parent
    mask: Mask
    posterior: Posterior
    limited: Sequence[Posterior]


class Posterior:
    """A Gaussian process given some values.

    Args:
        points: Where they are, shape [points, genes]; length scale and noise are fitted to the first of them.
        values: The values, shape [points].
        errors: Their errors, in deviations of one item, shape [points].
    """

    def __init__(self, points: FloatArray, values: FloatArray, errors: FloatArray) -> None:
        spread = max(float(values.std()), 1e-9)
        self._center, self._spread = float(np.median(values)), spread
        targets = (values - self._center) / spread
        self._points, self._scale = points, math.sqrt(points.shape[1])
        few = min(MAX_FITTED, len(points))
        fits = []
        for length in LENGTH_SCALES:
            covariance = _squared_exponential(points[:few], points[:few], length * self._scale)
            for noise in ITEM_NOISES:
                variances = (noise / spread * errors[:few]) ** 2 + VALUE_NOISE**2
                fits.append((most_likely_fit(covariance, variances, targets[:few]).log_likelihood, length, noise))
        _, self._length, noise = max(fits)
        covariance = _squared_exponential(points, points, self._length * self._scale)
        fit = most_likely_fit(covariance, (noise / spread * errors) ** 2 + VALUE_NOISE**2, targets)
        self._weights, self._variance, self._whiten = fit.weights, fit.variance, np.linalg.inv(fit.cholesky)

    def draw(self, points: FloatArray, rng: np.random.Generator) -> FloatArray:
        """Draws what is at some points, shape [points] (GPML, eq. 2.25 and 2.26): less the median, in deviations."""
        length = self._length * self._scale
        cross = _squared_exponential(points, self._points, length)
        whitened = self._whiten @ cross.T
        covariance = _squared_exponential(points, points, length) - whitened.T @ whitened
        cholesky = np.linalg.cholesky(covariance + 1e-6 * np.eye(len(points)))
        mean = cross @ self._weights
        drawn: FloatArray = mean + math.sqrt(self._variance) * (cholesky @ rng.standard_normal(len(points)))
        return drawn

    def values(self, drawn: FloatArray) -> FloatArray:
        """Turns a draw into values, which may no longer tell points apart that the draw does."""
        return self._center + self._spread * drawn


@dataclass(frozen=True)
class Fit:
    """A Gaussian process through observations.

    Attributes:
        log_likelihood: With the best variance, less a constant; -inf where there is none.
        variance: That variance.
        cholesky: Of the observations' covariance for a variance of one, lower, shape [observations, observations].
        weights: What every observation counts for, shape [observations].
    """

    log_likelihood: float
    variance: float
    cholesky: FloatArray
    weights: FloatArray


def most_likely_fit(covariance: FloatArray, errors: FloatArray, targets: FloatArray) -> Fit:
    """Fits with the most likely variance (GPML, algorithm 2.1 and eq. 2.30, the variance profiled out).

    Args:
        covariance: Of the observations for a variance of one, shape [observations, observations].
        errors: Variances of their errors, likewise, shape [observations].
        targets: What was observed, with an expectation of zero, shape [observations].
    """
    try:
        cholesky = np.asarray(np.linalg.cholesky(covariance + np.diag(errors)))
    except np.linalg.LinAlgError:
        return Fit(-np.inf, 1.0, np.eye(len(targets)), np.zeros_like(targets))
    whitened = np.linalg.solve(cholesky, targets)
    variance = max(float(whitened @ whitened) / len(targets), 1e-300)
    log_likelihood = -0.5 * len(targets) * np.log(variance) - float(np.log(np.diag(cholesky)).sum())
    return Fit(log_likelihood, variance, cholesky, np.linalg.solve(cholesky.T, whitened))


def _squared_exponential(a: FloatArray, b: FloatArray, length: float) -> FloatArray:
    """The kernel (GPML, eq. 4.9), shape [len(a), len(b)]: from products, many times as fast as from differences."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * (a @ b.T)
    kernel: FloatArray = np.exp(-np.maximum(squares, 0.0) / (2 * length**2))
    return kernel
