"""Keeping exactly the largest elements of a tensor: how many, which, and the mask for any part of it.

What is kept is described by two numbers, (threshold, last): the elements above the threshold, and of those equal to it
the ones at a flat index of at most `last`. So any block of the tensor can tell its own kept elements, and the count is
exact however many elements tie.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


SMALLEST_MASS = 1e-7
NONE = (math.inf, -1)
"""The cut that keeps nothing."""


def keep_count(size: int, density: float) -> int:
    """floor(density · size), at least 1 when density > 0 and there is an element."""
    if density <= 0.0:
        return 0
    return min(size, max(1, math.floor(density * size)))


def band_counts(size: int, density: float, gamma: float) -> tuple[int, int]:
    """(how many of the largest are left out, how many come before the first that is too small).

    floor(gamma · size) are left out, but never so many that fewer than floor(density · size) of the rest would stay.
    """
    keep = min(size, max(0, math.floor(density * size)))
    outliers = min(math.floor(gamma * size), size - keep)
    return outliers, outliers + keep


def cutoff(scores: Tensor, count: int) -> tuple[float, int]:
    """(threshold, last) that keeps exactly the top `count` scores; among equals the lower index wins.

    Args:
        scores: Flat, finite, not negative: [n].
        count: 0 gives (inf, -1), n or more gives (-1, -1), which keeps all.
    """
    if count <= 0:
        return math.inf, -1
    if count >= scores.numel():
        return -1.0, -1
    threshold = scores.kthvalue(scores.numel() - count + 1).values
    rank = count - int((scores > threshold).sum())
    equal = (scores == threshold).nonzero()
    return float(threshold), int(equal[rank - 1])


def mass_factor(masses: tuple[float, float]) -> float:
    """What is kept, times this, has the mass of the whole; 1 where either is next to nothing, as in mergekit."""
    whole, kept = masses
    return whole / kept if min(masses) >= SMALLEST_MASS else 1.0


def cutoff_mask(scores: Tensor, threshold: float, last: int, start: int = 0) -> Tensor:
    """Returns the mask of a block whose first element has flat index `start`: bool, shaped like `scores`."""
    mask = scores > threshold
    flat, ties = mask.view(-1), scores.reshape(-1)
    equals = min(max(last - start + 1, 0), ties.numel())
    flat[:equals] |= ties[:equals] == threshold
    return mask


def trim(delta: Tensor, threshold: float, last: int, start: int = 0) -> Tensor:
    """A block of a delta with what is not kept set to 0: the same as multiplying by `cutoff_mask`, in one pass."""
    import torch

    if threshold < 0.0:
        return delta.clone()
    equals = min(max(last - start + 1, 0), delta.numel())
    number = np.float64 if delta.dtype.itemsize == 8 else np.float32
    below = float(np.nextafter(number(threshold), number(0.0)))
    result = torch.empty_like(delta)
    torch.hardshrink(delta[:equals], below, out=result[:equals])  # keeps magnitudes above its bound
    torch.hardshrink(delta[equals:], threshold, out=result[equals:])
    return result


def density_mask(scores: Tensor, density: float) -> Tensor:
    """Returns the mask of exactly the top floor(density · n) of a whole tensor of scores, shaped like it."""
    flat = scores.reshape(-1)
    return cutoff_mask(scores.contiguous(), *cutoff(flat, keep_count(flat.numel(), density)))
