"""The fitness near a candidate, as values and slopes tell it: where to go from there.

A Gaussian process given values of a function and noisy derivatives of it (Solak et al., 2002, "Derivative observations
in Gaussian process models of dynamic systems"). Its kernel depends on distances only, so whatever the observations say
lies in the span of the slopes and of the differences between the points, and the linear algebra is of the size of that
span, whatever the number of genes (de Roos et al., 2021, https://arxiv.org/abs/2102.07542).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evomerge.system.arrays import FloatArray

LENGTHS = (0.06, 0.1, 0.17, 0.25, 0.45, 0.7)
"""Over which the fitness changes its course, as a root mean square of genes; the likeliest is taken."""
NOISES = (0.0, 0.05, 0.1, 0.2, 0.5)
"""Errors of a slope, in units of how much slopes vary; the likeliest is taken."""
VALUE_NOISE = 1e-4
_JITTER = 1e-8
_ASCENT = 200


@dataclass(frozen=True)
class Told:
    """What is known of the function.

    Attributes:
        points: Genes in [0, 1], shape [points, genes]; steps start from the first.
        values: The fitness there, shape [points].
        sloped: Points whose slopes are known, shape [sloped, genes].
        slopes: The fitness' derivatives there, shape [sloped, genes].
    """

    points: FloatArray
    values: FloatArray
    sloped: FloatArray
    slopes: FloatArray


class Surface:
    """The likeliest surface through what is told.

    Args:
        told: The observations, at least one value and the slopes of one point.
    """

    def __init__(self, told: Told) -> None:
        self._origin = told.points[0]
        offsets = told.points - self._origin, told.sloped - self._origin
        _, sizes, rows = np.linalg.svd(np.vstack([*offsets, told.slopes]), full_matrices=False)
        self._span: FloatArray = rows[sizes > 1e-9 * max(sizes[0], 1e-300)].T
        self._points, self._sloped = (offset @ self._span for offset in offsets)
        self._mean = float(told.values.mean())
        targets = np.concatenate([told.values - self._mean, (told.slopes @ self._span).ravel()])
        scale = np.sqrt(told.points.shape[1])
        fits = (fit for length in LENGTHS for fit in self._fits(length * scale, targets))
        _, self._length, weights = max(fits, key=lambda fit: fit[0])
        self._of_values = weights[: len(self._points)]
        self._of_slopes = weights[len(self._points) :].reshape(self._sloped.shape)

    def _fits(self, length: float, targets: FloatArray) -> Iterator[tuple[float, float, FloatArray]]:
        """For every noise the log likelihood with the best variance, the length, and the observations' weights."""
        kernel = self._kernel(length)
        values, slopes = len(self._points), self._sloped.size
        for noise in NOISES:
            errors = np.concatenate([np.full(values, VALUE_NOISE**2), np.full(slopes, (noise / length) ** 2)])
            fit = likeliest(kernel, errors + _JITTER, targets)
            yield fit.likelihood, length, fit.weights

    def _kernel(self, length: float) -> FloatArray:
        """Covariances of all values, then all slopes, for a variance of one."""
        a, b, square = self._points, self._sloped, length**2
        between = _gaussian(a, b, length)[..., None] * (a[:, None] - b[None]) / square
        apart = b[:, None] - b[None]
        curved = np.eye(b.shape[1]) / square - apart[..., :, None] * apart[..., None, :] / square**2
        of_slopes = (_gaussian(b, b, length)[..., None, None] * curved).transpose(0, 2, 1, 3)
        cross = between.reshape(len(a), b.size)
        return np.block([[_gaussian(a, a, length), cross], [cross.T, of_slopes.reshape(b.size, b.size)]])

    def at(self, point: FloatArray) -> tuple[float, FloatArray]:
        """The expected fitness at a point of shape [genes], and its derivatives."""
        x, square = (point - self._origin) @ self._span, self._length**2
        from_values, from_slopes = x - self._points, x - self._sloped
        values = self._of_values * np.exp(-(from_values**2).sum(1) / (2 * square))
        near = np.exp(-(from_slopes**2).sum(1) / (2 * square))
        along = near * (from_slopes * self._of_slopes).sum(1)
        value = self._mean + float(values.sum() + along.sum() / square)
        slope: FloatArray = (near @ self._of_slopes - values @ from_values - along @ from_slopes / square) / square
        return value, np.asarray(self._span @ slope)

    def best_within(self, radius: float) -> FloatArray:
        """The best genes within [0, 1] that are at most `radius` from where steps start: projected ascent."""
        here, pace = self._origin, radius / 4
        value, slope = self.at(here)
        for _ in range(_ASCENT):
            steepness = float(np.linalg.norm(slope))
            if steepness == 0 or pace < 1e-4 * radius:
                break
            there = self._allowed(here + pace * slope / steepness, radius)
            found, slope_there = self.at(there)
            if found > value:
                here, value, slope, pace = there, found, slope_there, 1.3 * pace
            else:
                pace /= 2
        best: FloatArray = here
        return best

    def _allowed(self, point: FloatArray, radius: float) -> FloatArray:
        move = np.clip(point, 0.0, 1.0) - self._origin
        return np.asarray(self._origin + move * min(1.0, radius / max(float(np.linalg.norm(move)), 1e-300)))


@dataclass(frozen=True)
class Fit:
    """A Gaussian process through observations.

    Attributes:
        likelihood: The log likelihood with the best variance, less a constant; -inf where there is none.
        variance: That variance.
        root: Cholesky factor of the observations' covariance for a variance of one, shape [observations, observations].
        weights: What every observation counts for, shape [observations].
    """

    likelihood: float
    variance: float
    root: FloatArray
    weights: FloatArray


def likeliest(kernel: FloatArray, errors: FloatArray, targets: FloatArray) -> Fit:
    """The fit with the likeliest variance.

    Args:
        kernel: Covariances of the observations for a variance of one, shape [observations, observations].
        errors: Variances of their errors, likewise, shape [observations].
        targets: What was observed, with an expectation of zero, shape [observations].
    """
    try:
        root = np.asarray(np.linalg.cholesky(kernel + np.diag(errors)))
    except np.linalg.LinAlgError:
        return Fit(-np.inf, 1.0, np.eye(len(targets)), np.zeros_like(targets))
    whitened = np.linalg.solve(root, targets)
    variance = max(float(whitened @ whitened) / len(targets), 1e-300)
    likelihood = -0.5 * len(targets) * np.log(variance) - float(np.log(np.diag(root)).sum())
    return Fit(likelihood, variance, root, np.linalg.solve(root.T, whitened))


def _gaussian(a: FloatArray, b: FloatArray, length: float) -> FloatArray:
    found: FloatArray = np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * length**2))
    return found
