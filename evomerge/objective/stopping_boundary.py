"""The boundary at which a group-sequential trial stops, from an error rate that is spent over its analyses.

Lan and DeMets, 1983, https://doi.org/10.1093/biomet/70.3.659, here with ``error * t ** power`` spent by the fraction t
of the items (Kim and DeMets, 1987, https://doi.org/10.1093/biomet/74.1.149); computed by the recursive integration of
Armitage, McPherson and Rowe, 1969, https://doi.org/10.2307/2343787.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evomerge.system.arrays import FloatArray


def stopping_boundary(fractions: Sequence[float], error: float, power: float) -> tuple[float, ...]:
    """Computes how far below the cutoff, in standard errors, a candidate is stopped at each interim analysis.

    Args:
        fractions: The share of all items seen at each analysis, ascending, each between 0 and 1.
        error: Probability that a candidate is stopped at any analysis that would come out equal to the cutoff.
        power: How early the error is spent: 1 evenly over the items, more for later.

    Returns:
        A positive number for each analysis.
    """
    information = [t / (1 - t) for t in fractions]
    spent = [error * t**power for t in fractions]
    boundary: list[float] = []
    grid: FloatArray = np.zeros(1)
    weights: FloatArray = np.ones(1)
    before = 0.0
    for analysis, now in enumerate(information):
        step = math.sqrt(now - before)
        target = spent[analysis] - (spent[analysis - 1] if analysis else 0.0)
        edge = _solve(grid, weights, step, target)
        boundary.append(-edge / math.sqrt(now))
        grid, weights = _advance(grid, weights, step, edge, 9 * math.sqrt(now))
        before = now
    return tuple(boundary)


def _solve(grid: FloatArray, weights: FloatArray, step: float, probability: float) -> float:
    """The edge below which a step leads from the weighted points with this probability, by bisection."""
    low, high = float(grid[0]) - 9 * step, float(grid[-1]) + 9 * step
    for _ in range(60):
        middle = (low + high) / 2
        below = float(weights @ _normal_cdf((middle - grid) / step))
        low, high = (middle, high) if below < probability else (low, middle)
    return (low + high) / 2


_POINTS = 401


def _advance(
    grid: FloatArray, weights: FloatArray, step: float, edge: float, top: float
) -> tuple[FloatArray, FloatArray]:
    """The weighted points (Simpson's rule) after one more step, of those paths that have stayed above the edge."""
    points = np.linspace(edge, top, _POINTS)
    rule = np.full(_POINTS, 2.0)
    rule[1::2] = 4.0
    rule[[0, -1]] = 1.0
    z = (points[:, None] - grid[None, :]) / step
    density = np.exp(-0.5 * z**2) @ weights / (step * math.sqrt(2 * math.pi))
    return points, density * rule * (points[1] - points[0]) / 3


@np.vectorize
def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))
