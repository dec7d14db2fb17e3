"""Diversity over items: candidates compete for each item, and mate with whom they lack.

Competition and attraction of M2N2 (Abrantes, Lange and Tang, 2025, https://arxiv.org/abs/2508.16204): an item is worth
as much to all candidates together however many solve it, so that one which solves what few others do is kept; and a
partner is sought for what it does better.
"""

from __future__ import annotations

import numpy as np

from evomerge.system.arrays import FloatArray

TINY = 1e-12


def shared_fitness(values: FloatArray) -> FloatArray:
    """Every candidate's share of all the items.

    Args:
        values: [candidates, items], what each item says for each candidate, higher is better.

    Returns:
        Shape [candidates]: the sum over the items of the candidate's part in what all candidates together have there.
    """
    gains = _above_worst(values)
    result: FloatArray = (gains / np.maximum(gains.sum(axis=0), TINY)).sum(axis=1)
    return result


def attraction(values: FloatArray, first: int) -> FloatArray:
    """How much each candidate has to offer to one of them, shape [candidates]; 0 for itself.

    Args:
        values: As for `shared_fitness`.
        first: The candidate that looks for a partner.
    """
    gains = _above_worst(values)
    better = np.maximum(gains - gains[first], 0.0)
    result: FloatArray = (better / np.maximum(gains.sum(axis=0), TINY)).sum(axis=1)
    return result


def _above_worst(values: FloatArray) -> FloatArray:
    """What is gained over the worst of the candidates, item by item."""
    result: FloatArray = values - values.min(axis=0)
    return result
