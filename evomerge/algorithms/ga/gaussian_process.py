"""A Gaussian process of the fitness near a candidate, given values and gradients.

Solak et al., 2002, "Derivative observations in Gaussian process models of dynamic systems"; equations are numbered as
in Rasmussen and Williams, 2006, "Gaussian processes for machine learning" (GPML). The kernel depends on distances only,
so whatever the observations say lies in the span of the gradients and of the differences between the points, and the
linear algebra is of the size of that span, whatever the number of genes (de Roos et al., 2021,
https://arxiv.org/abs/2102.07542).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evomerge.system.arrays import FloatArray

LENGTH_SCALES = (0.06, 0.1, 0.17, 0.25, 0.45, 0.7)
"""As root mean squares of genes; the most likely one is taken."""
GRADIENT_NOISES = (0.0, 0.05, 0.1, 0.2, 0.5)
"""Errors of a derivative, in units of how much derivatives vary; the most likely one is taken."""
VALUE_NOISE = 1e-4
_JITTER = 1e-8
_MAX_ASCENT_STEPS = 200


@dataclass(frozen=True)
class Observations:
    """What is known of the function.

    Attributes:
        points: Genes in [0, 1], shape [points, genes]; steps start from the first.
        values: The fitness there, shape [points].
        gradient_points: Points whose gradients are known, shape [gradients, genes].
        gradients: The fitness' derivatives there, shape [gradients, genes].
    """

    points: FloatArray
    values: FloatArray
    gradient_points: FloatArray
    gradients: FloatArray


class GaussianProcess:
    """The most likely Gaussian process through some observations.

    Args:
        observations: At least one value and one gradient.
    """

    def __init__(self, observations: Observations) -> None:
        self._origin = observations.points[0]
        offsets = observations.points - self._origin, observations.gradient_points - self._origin
        _, sizes, rows = np.linalg.svd(np.vstack([*offsets, observations.gradients]), full_matrices=False)
        self._basis: FloatArray = rows[sizes > 1e-9 * max(sizes[0], 1e-300)].T
        self._points, self._gradient_points = (offset @ self._basis for offset in offsets)
        self._mean = float(observations.values.mean())
        targets = np.concatenate([observations.values - self._mean, (observations.gradients @ self._basis).ravel()])
        scale = np.sqrt(observations.points.shape[1])
        fits = (fit for length in LENGTH_SCALES for fit in self._fits(length * scale, targets))
        _, self._length, weights = max(fits, key=lambda fit: fit[0])
        self._value_weights = weights[: len(self._points)]
        self._gradient_weights = weights[len(self._points) :].reshape(self._gradient_points.shape)

    def _fits(self, length: float, targets: FloatArray) -> Iterator[tuple[float, float, FloatArray]]:
        """For every noise the log likelihood with the best variance, the length, and the observations' weights."""
        covariance = self._covariance(length)
        values, derivatives = len(self._points), self._gradient_points.size
        for noise in GRADIENT_NOISES:
            errors = np.concatenate([np.full(values, VALUE_NOISE**2), np.full(derivatives, (noise / length) ** 2)])
            fit = most_likely_fit(covariance, errors + _JITTER, targets)
            yield fit.log_likelihood, length, fit.weights

    def _covariance(self, length: float) -> FloatArray:
        """Covariances of all values, then all derivatives, for a variance of one (GPML, eq. 9.1)."""
        a, b, square = self._points, self._gradient_points, length**2
        value_gradient = _squared_exponential(a, b, length)[..., None] * (a[:, None] - b[None]) / square
        difference = b[:, None] - b[None]
        hessian = np.eye(b.shape[1]) / square - difference[..., :, None] * difference[..., None, :] / square**2
        gradient_gradient = (_squared_exponential(b, b, length)[..., None, None] * hessian).transpose(0, 2, 1, 3)
        cross = value_gradient.reshape(len(a), b.size)
        return np.block(
            [[_squared_exponential(a, a, length), cross], [cross.T, gradient_gradient.reshape(b.size, b.size)]]
        )

    def predict(self, point: FloatArray) -> tuple[float, FloatArray]:
        """Computes the posterior mean at a point of shape [genes] (GPML, eq. 2.25), and its derivatives."""
        x, square = (point - self._origin) @ self._basis, self._length**2
        from_values, from_gradients = x - self._points, x - self._gradient_points
        values = self._value_weights * np.exp(-(from_values**2).sum(1) / (2 * square))
        near = np.exp(-(from_gradients**2).sum(1) / (2 * square))
        along = near * (from_gradients * self._gradient_weights).sum(1)
        value = self._mean + float(values.sum() + along.sum() / square)
        gradient: FloatArray = (
            near @ self._gradient_weights - values @ from_values - along @ from_gradients / square
        ) / square
        return value, np.asarray(self._basis @ gradient)

    def maximum_within(self, radius: float) -> FloatArray:
        """Finds the best genes in [0, 1] that are at most `radius` from where steps start, by projected ascent."""
        best, step = self._origin, radius / 4
        value, gradient = self.predict(best)
        for _ in range(_MAX_ASCENT_STEPS):
            norm = float(np.linalg.norm(gradient))
            if norm == 0 or step < 1e-4 * radius:
                break
            point = self._projected(best + step * gradient / norm, radius)
            value_there, gradient_there = self.predict(point)
            if value_there > value:
                best, value, gradient, step = point, value_there, gradient_there, 1.3 * step
            else:
                step /= 2
        maximum: FloatArray = best
        return maximum

    def _projected(self, point: FloatArray, radius: float) -> FloatArray:
        move = np.clip(point, 0.0, 1.0) - self._origin
        return np.asarray(self._origin + move * min(1.0, radius / max(float(np.linalg.norm(move)), 1e-300)))


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
    """The kernel (GPML, eq. 4.9), shape [len(a), len(b)]."""
    kernel: FloatArray = np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * length**2))
    return kernel
