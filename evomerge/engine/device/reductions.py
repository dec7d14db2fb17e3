"""`evomerge.engine.kernels.reductions` in torch, over float32 tensors on any device; counts are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.engine.statistics.exact_topk import FINE, Parts, count_magnitudes, joint_cutoff

_MAGNITUDE = 0x7FFFFFFF


class TorchReductions:
    """What `evomerge.engine.statistics.exact_topk` counts magnitudes by."""

    def count_magnitudes(
        self, base: Tensor, source: Tensor, shift: int, counts: NDArray[np.int64], low: NDArray[np.uint16]
    ) -> None:
        """Counts the magnitudes of the delta by their upper bits; `low` tells which bins have any lower bits."""
        bits = magnitudes(base, source)
        paired = (bits >> shift).mul_(2).add_((bits & ((1 << shift) - 1)) != 0)
        pairs = torch.bincount(paired, minlength=2 * counts.size).cpu().numpy().reshape(-1, 2)
        counts += pairs.sum(axis=1)
        low |= (pairs[:, 1] > 0).astype(np.uint16)

    def count_low_bits(self, base: Tensor, source: Tensor, shift: int, upper: int, counts: NDArray[np.int64]) -> None:
        """Counts the magnitudes of the delta within one bin by their lower bits."""
        bits = magnitudes(base, source)
        inside = bits[(bits >> shift) == upper].bitwise_and_((1 << shift) - 1)
        counts += torch.bincount(inside, minlength=counts.size).cpu().numpy()

    def find_equal(self, base: Tensor, source: Tensor, magnitude: int, rank: int) -> tuple[int, int]:
        """(index of the `rank`-th element of this magnitude, 0), or (-1, how many are still to be found)."""
        equal = magnitudes(base, source) == magnitude
        count = int(equal.sum())
        if count < rank:
            return -1, rank - count
        return int(equal.nonzero()[rank - 1]), 0


REDUCTIONS = TorchReductions()


def magnitudes(base: Tensor, source: Tensor) -> Tensor:
    """Returns the bits of the magnitudes of a delta: int32, [n]."""
    return (source - base).view(torch.int32).bitwise_and_(_MAGNITUDE)


def from_zero(scores: Callable[[], Iterator[tuple[int, Tensor]]]) -> Parts:
    """Scores as differences from 0: (flat index of the first, zero, scores) part by part."""
    return lambda: ((start, values.new_zeros(()), values) for start, values in scores())


def values_at(scores: Callable[[], Iterator[tuple[int, Tensor]]], ranks: Sequence[int]) -> list[float]:
    """`evomerge.engine.statistics.exact_topk.values_at`."""
    parts = from_zero(scores)
    histogram = count_magnitudes(parts, FINE, REDUCTIONS)
    return [joint_cutoff([parts], [histogram], histogram, rank, REDUCTIONS).threshold for rank in ranks]
