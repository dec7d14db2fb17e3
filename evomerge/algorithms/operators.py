"""Variation of real genes: pure functions of arrays in [0, 1] (shape [genes]), masks, and a generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evomerge.system.arrays import FloatArray, IntArray, Mask


def reflect(unit: FloatArray) -> FloatArray:
    """Folds values that left [0, 1] back into it, so that a bound does not collect everything that passes it."""
    folded = np.mod(unit, 2.0)
    return np.where(folded > 1.0, 2.0 - folded, folded)


MIN_STEP, MAX_STEP = 0.01, 0.3
"""Bounds of a mutation's step, in units of a gene's range."""


def step_size(rng: np.random.Generator) -> float:
    """Draws the step of one child, log-uniformly: small ones refine, large ones leave a plateau."""
    return float(np.exp(rng.uniform(np.log(MIN_STEP), np.log(MAX_STEP))))


def gaussian(unit: FloatArray, mask: Mask, sigma: float, rng: np.random.Generator) -> FloatArray:
    """Adds independent normal noise where `mask` holds, reflected at the bounds."""
    noise = rng.normal(0.0, sigma, size=unit.shape)
    return reflect(np.where(mask, unit + noise, unit))


def shift(unit: FloatArray, mask: Mask, sigma: float, rng: np.random.Generator) -> FloatArray:
    """Moves all genes of `mask` together by one normal step, clipped at the bounds: their differences are kept."""
    return np.clip(np.where(mask, unit + rng.normal(0.0, sigma), unit), 0.0, 1.0)


def toward_mean(unit: FloatArray, mask: Mask, share: float) -> FloatArray:
    """Draws the genes of `mask` toward their mean; share 1 makes them equal."""
    if not mask.any():
        return unit
    return np.where(mask, unit + share * (float(unit[mask].mean()) - unit), unit)


def line(first: FloatArray, second: FloatArray, rng: np.random.Generator, reach: float = 0.25) -> FloatArray:
    """Draws a point on the line through two parents, up to `reach` beyond either.

    Extended line recombination (Mühlenbein and Schlierkamp-Voosen, 1993, https://doi.org/10.1162/evco.1993.1.1.25).
    """
    return np.clip(first + rng.uniform(-reach, 1.0 + reach) * (second - first), 0.0, 1.0)


def blend(first: FloatArray, second: FloatArray, rng: np.random.Generator, reach: float = 0.25) -> FloatArray:
    """Draws each gene anew between two parents, or up to `reach` beyond (BLX-α, Eshelman and Schaffer, 1993)."""
    return reflect(first + rng.uniform(-reach, 1.0 + reach, size=first.shape) * (second - first))


def uniform(first: FloatArray, second: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Draws each gene from either parent."""
    return np.where(rng.random(first.shape) < 0.5, first, second)


def centroid(parents: Sequence[FloatArray]) -> FloatArray:
    """Computes the weighted mean of parents given best first; the noise of their scores averages out.

    Log-rank weights as in the (μ/μ_w, λ) evolution strategy (Hansen and Ostermeier, 2001,
    https://doi.org/10.1162/106365601750190398).
    """
    count = len(parents)
    weights = np.log(count + 0.5) - np.log(np.arange(1, count + 1))
    return np.average(np.stack(parents), axis=0, weights=weights)


def by_label(first: FloatArray, second: FloatArray, labels: IntArray, taken: Sequence[int]) -> FloatArray:
    """Takes genes whose label is in `taken` from the second parent, the others from the first."""
    return np.where(np.isin(labels, np.asarray(taken, dtype=np.int64)), second, first)


def contiguous_block(count: int, rng: np.random.Generator) -> list[int]:
    """Draws a run of 1 to count - 1 neighbours out of `count` (all when there is one)."""
    if count < 2:
        return list(range(count))
    length = int(rng.integers(1, count))
    start = int(rng.integers(0, count - length + 1))
    return list(range(start, start + length))


def tail_block(count: int, rng: np.random.Generator) -> list[int]:
    """Draws everything from a split point on, out of `count`; never all, unless there is one."""
    return list(range(int(rng.integers(1, count)) if count > 1 else 0, count))


def tournament(count: int, size: int, rng: np.random.Generator) -> int:
    """Draws `size` entrants and returns the best of them, from 0 (best) to count - 1."""
    return int(rng.integers(0, count, size=size).min())
