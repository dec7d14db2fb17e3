"""What keeps the elements on which the sources differ most, and what the deltas there weigh, without sorting.

Elements are counted by the upper bits of their variance across the sources once per run, together with the squares of
their deltas; and each is given a level, one of 256, that rises with its variance. For any fraction the count names the
bin that holds the threshold, and only the elements of that bin's level are read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.engine.statistics.exact_topk import rank_from_top
from evomerge.methods.contract import Cutoff
from evomerge.methods.random_field import LANES
from evomerge.methods.topk import keep_count

SHIFT = 16  # lower bits that are left out: 128 bins for each power of two

_TOP = 255  # the highest level
_SCAN = 1 << 20  # elements whose levels are split at once

Floats = NDArray[np.float32]
Levels = NDArray[np.uint8]
Marks = NDArray[np.uint16]
Rows = Callable[[], Iterator[tuple[int, Floats]]]
"""(flat index of the first column, float32 [base and sources, columns]) over a tensor, part by part."""
Gather = Callable[[int, NDArray[np.int32]], Floats]
"""float32 [base and sources, columns] of the elements at these indices from a flat index on."""


@dataclass(frozen=True)
class VarianceCounts:
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

    @property
    def levels(self) -> Levels:
        """The level of each bin: what share of all elements is below it."""
        below = self.counts.cumsum() - self.counts
        return (below * _TOP // max(1, self.size)).astype(np.uint8)


@dataclass(frozen=True)
class Selection:
    """The elements on which the sources differ most.

    Attributes:
        cut: What keeps them, of all variances.
        energies: Each delta's sum of squares over them.
        marks: A bit for every element of the tensor, the lowest for the first of 16; None where nothing is selected,
            and where everything is.
    """

    cut: Cutoff
    energies: list[float]
    marks: Marks | None


def count_variances(rows: Rows, sources: int) -> VarianceCounts:
    """Counts the variances of all elements, each read once."""
    from evomerge.engine.kernels import sce_della

    counts = np.zeros(1 << (31 - SHIFT), dtype=np.int64)
    squares = np.zeros((counts.size, sources))
    varying = 0
    for _, x in rows():
        varying += sce_della.count_variances(x[0], x[1:], SHIFT, counts, squares)
    bins = counts.nonzero()[0]
    from_top = squares[bins][::-1].cumsum(axis=0)[::-1]
    above = np.concatenate([from_top[1:], np.zeros((1, sources))])
    return VarianceCounts(bins.astype(np.uint32), counts[bins], above, varying, int(counts.sum()))


def variance_levels(rows: Rows, variances: VarianceCounts) -> Levels:
    """Returns the level of every element: uint8, flat."""
    from evomerge.engine.kernels import sce_della

    table, levels = np.zeros(1 << (31 - SHIFT), dtype=np.uint8), np.empty(variances.size, dtype=np.uint8)
    table[variances.bins] = variances.levels
    for start, x in rows():
        sce_della.look_up_variance_levels(x[0], x[1:], SHIFT, table, levels[start : start + x.shape[1]])
    return levels


def select(variances: VarianceCounts, levels: Callable[[], Levels], gather: Gather, fraction: float) -> Selection:
    """Returns the top `fraction` of the elements that vary.

    Args:
        variances: The elements, counted.
        levels: Gives their levels.
        gather: Reads some of them.
        fraction: Below 1.
    """
    keep = keep_count(variances.varying, fraction)
    if keep == 0:
        return Selection((math.inf, -1), [0.0] * variances.above.shape[1], None)
    at, rank = rank_from_top(variances.counts, keep)
    marks = np.empty(-(-variances.size // LANES), dtype=np.uint16)
    level_elements = _LevelElements(levels(), int(variances.levels[at]), gather, marks)
    counts, squares = level_elements.count_variances(int(variances.bins[at]), variances.above.shape[1])
    used = counts.nonzero()[0]
    position, rank = rank_from_top(counts[used], rank)
    lower = int(used[position])
    bits = int(variances.bins[at]) << SHIFT | lower
    energies = variances.above[at] + squares[used[position + 1 :]].sum(axis=0)
    if rank == counts[lower]:  # all that equal the threshold are kept, wherever they are
        energies += squares[lower]
        level_elements.keep(bits, variances.size)
        last = variances.size - 1
    else:
        last = level_elements.keep(bits, rank, energies)
    return Selection((float(np.uint32(bits).view(np.float32)), last), energies.tolist(), marks)


class _LevelElements:
    """The elements of one level; those of higher ones are marked.

    Args:
        levels: Of all elements.
        level: Which one.
        gather: Reads some elements.
        marks: Filled: a bit for every element.
    """

    def __init__(self, levels: Levels, level: int, gather: Gather, marks: Marks) -> None:
        from evomerge.engine.kernels import sce_della

        self._gather = gather
        self._marks = marks
        self._parts: list[tuple[int, NDArray[np.int32], NDArray[np.uint32]]] = []
        indices = np.empty(min(_SCAN, levels.size), dtype=np.int32)
        for start in range(0, levels.size, _SCAN):
            equal_count = sce_della.split_levels(levels[start : start + _SCAN], level, marks[start // LANES :], indices)
            if equal_count:
                self._parts.append((start, indices[:equal_count].copy(), np.empty(equal_count, dtype=np.uint32)))

    def count_variances(self, upper: int, sources: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Counts the variances in a bin, by their lower bits, and the sums of squares of their deltas."""
        from evomerge.engine.kernels import sce_della

        counts = np.zeros(1 << SHIFT, dtype=np.int64)
        squares = np.zeros((counts.size, sources))
        for start, indices, variances in self._parts:
            x = self._gather(start, indices)
            sce_della.count_variances_within(x[0], x[1:], SHIFT, upper, counts, squares, variances)
        return counts, squares

    def keep(self, bits: int, equal_count: int, energies: NDArray[np.float64] | None = None) -> int:
        """Marks the variances above these bits and the first `equal_count` that equal them.

        Returns:
            Flat index of the last of the latter, whose squares join `energies`.
        """
        from evomerge.engine.kernels import sce_della

        last = -1
        for start, indices, variances in self._parts:
            sce_della.mark(indices[variances > bits], self._marks[start // LANES :])
            equal = indices[variances == bits][:equal_count]
            sce_della.mark(equal, self._marks[start // LANES :])
            equal_count -= equal.size
            if equal.size and energies is not None:
                last = start + int(equal[-1])
                x = self._gather(start, equal)
                sce_della.add_squares(x[0], x[1:], energies)
        return last
