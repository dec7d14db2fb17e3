"""Steps along the gradient of the fitness: what the slopes of a few candidates say about where to go from one of them.

The genes are few, so the gradients at several candidates tell of the curvature between them: limited-memory BFGS
(Liu and Nocedal, 1989, https://doi.org/10.1007/BF01589116) over the candidates whose slopes are known, in place of the
iterates of one descent, with the genes that are held by their bounds left out (Bertsekas, 1982,
https://doi.org/10.1137/0320018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.search.operators import FloatArray

MEMORY = 8
"""Secant pairs: those of the nearest candidates."""
EDGE = 1e-6


@dataclass(frozen=True)
class Known:
    """A point whose slopes are known: genes in [0, 1] and the fitness' derivatives by them, both of shape [genes]."""

    unit: FloatArray
    slopes: FloatArray


def direction(here: Known, others: Sequence[Known]) -> tuple[FloatArray, bool]:
    """Where the fitness rises from a point.

    Args:
        here: The point.
        others: More points with slopes, nearest first.

    Returns:
        The direction, shape [genes]; and whether its length means something (a quasi-Newton step, at most as long as
        the genes' ranges), or only where it points (the gradient).
    """
    free = ~(((here.unit <= EDGE) & (here.slopes < 0)) | ((here.unit >= 1 - EDGE) & (here.slopes > 0)))
    gradient = np.where(free, here.slopes, 0.0)
    pairs = _secants(here, others, free)
    if not pairs:
        return gradient, False
    step = np.where(free, _two_loops(gradient, pairs), 0.0)
    length = float(np.linalg.norm(step))
    if not np.isfinite(length) or length == 0 or float(step @ gradient) <= 0:
        return gradient, False
    return step, True


def _secants(
    here: Known, others: Sequence[Known], free: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
) -> list[tuple[FloatArray, FloatArray]]:
    """Pairs (step, fall of the gradient over it), the farthest first, where the fitness is concave along the step."""
    pairs = []
    for other in others[:MEMORY]:
        step = np.where(free, here.unit - other.unit, 0.0)
        fall = np.where(free, other.slopes - here.slopes, 0.0)
        if float(step @ fall) > 1e-8 * float(np.linalg.norm(step) * np.linalg.norm(fall)):
            pairs.append((step, fall))
    return pairs[::-1]


def _two_loops(gradient: FloatArray, pairs: Sequence[tuple[FloatArray, FloatArray]]) -> FloatArray:
    """The inverse of the curvature times the gradient: algorithm 7.4 of Nocedal and Wright (2006), for a maximum."""
    left = gradient.copy()
    alphas = []
    for step, fall in reversed(pairs):
        alpha = float(step @ left) / float(step @ fall)
        left = left - alpha * fall
        alphas.append(alpha)
    step, fall = pairs[-1]
    result = left * (float(step @ fall) / float(fall @ fall))
    for (step, fall), alpha in zip(pairs, reversed(alphas), strict=True):
        beta = float(fall @ result) / float(step @ fall)
        result = result + (alpha - beta) * step
    return result
