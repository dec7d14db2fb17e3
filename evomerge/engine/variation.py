"""What keeps the elements on which the sources differ most, and what the deltas there weigh, without sorting.

Elements are counted by the upper bits of their variance across the sources once per run, together with the squares of
their deltas. For any fraction the count names the bin that holds the threshold; one more look at the tensors splits
that bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.engine.selection import rank_from_top
from evomerge.methods.declaration import Cut
from evomerge.methods.trim import kept_count

SHIFT = 16  # lower bits that are left out: 128 bins for each power of two

Rows = Callable[[], Iterator[tuple[int, NDArray[np.float32]]]]
"""(flat index of the first column, float32 [base and sources, columns]) over a tensor, part by part."""


@dataclass(frozen=True)
class Spread:
    """Elements counted by the upper bits of their variance.

    Attributes:
        bins: The bins with anything in them, ascending.
        counts: Elements in each.
        above: Sum of squares of each delta over all bins above: float64 [bins, sources].
        varying: How many elements have a variance above 0.
        size: Elements in all.
    """

    bins: NDArray[np.uint32]
    counts: NDArray[np.int64]
    above: NDArray[np.float64]
    varying: int
    size: int


def count(rows: Rows, sources: int) -> Spread:
    """Looks at every element once."""
    from evomerge.engine.kernels import spread

    counts = np.zeros(1 << (31 - SHIFT), dtype=np.int64)
    squares = np.zeros((counts.size, sources))
    varying = 0
    for _, x in rows():
        varying += spread.count_spread(x[0], x[1:], SHIFT, counts, squares)
    bins = counts.nonzero()[0]
    from_top = squares[bins][::-1].cumsum(axis=0)[::-1]
    above = np.concatenate([from_top[1:], np.zeros((1, sources))])
    return Spread(bins.astype(np.uint32), counts[bins], above, varying, int(counts.sum()))


def select(rows: Rows, spread: Spread, fraction: float) -> tuple[Cut, list[float]]:
    """The cut of the top `fraction` of the elements that vary, and each delta's sum of squares over them."""
    from evomerge.engine.kernels import spread as kernels

    keep = kept_count(spread.varying, fraction)
    if keep == 0:
        return (math.inf, -1), [0.0] * spread.above.shape[1]
    at, wanted = rank_from_top(spread.counts, keep)
    upper = int(spread.bins[at])
    counts = np.zeros(1 << SHIFT, dtype=np.int64)
    squares = np.zeros((counts.size, spread.above.shape[1]))
    for _, x in rows():
        kernels.count_spread_within(x[0], x[1:], SHIFT, upper, counts, squares)
    lower, wanted = rank_from_top(counts, wanted)
    bits = upper << SHIFT | lower
    energies = spread.above[at] + squares[lower + 1 :].sum(axis=0)
    if wanted == counts[lower]:  # all that equal the threshold are kept, wherever they are
        last = spread.size - 1
        energies += squares[lower]
    else:
        last = _find(rows, bits, wanted, energies)
    return (float(np.uint32(bits).view(np.float32)), last), energies.tolist()


def _find(rows: Rows, bits: int, wanted: int, energies: NDArray[np.float64]) -> int:
    """Flat index of the `wanted`-th element of exactly this variance; the squares up to it join `energies`."""
    from evomerge.engine.kernels import spread

    for start, x in rows():
        index, wanted = spread.find_spread(x[0], x[1:], bits, wanted, energies)
        if index >= 0:
            return start + int(index)
    raise IndexError(f"{wanted} elements of variance {bits:#x} are missing: the tensors changed")
