"""The k-th largest magnitude of values that come in parts, exactly, without sorting and without holding many of them.

Magnitudes are counted by their upper bits; the count names the bin that holds the k-th largest. Where a bin holds one
magnitude only, the count knows it; elsewhere the bin's elements are counted by their lower bits. Then one more pass
finds the index up to which elements equal to it are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.methods.topk import keep_count

FINE, COARSE = 13, 16  # lower bits that a histogram leaves out: of 16-bit models, which take few values, and others

_IN_MEMORY = 1 << 22  # scores that are held rather than computed again: 16 MB
_PART = 1 << 16
INFINITY = 0x7F800000

Floats = NDArray[np.float32]
Bits = NDArray[Any]  # uint16 for bfloat16, uint32 for float32
Parts = Callable[[], Iterator[tuple[int, Any, Any]]]
"""(flat index of the first element, the base, the source): their difference counts. Both are `Bits` of one dtype for
the compiled reductions, float32 tensors for those in torch."""


class Reductions(Protocol):
    """Magnitudes of a delta counted, one part at a time: `evomerge.engine.kernels.reductions`, or the same in torch."""

    def count_magnitudes(
        self, base: Any, source: Any, shift: int, counts: NDArray[np.int64], low: NDArray[np.uint16]
    ) -> None: ...

    def count_low_bits(self, base: Any, source: Any, shift: int, upper: int, counts: NDArray[np.int64]) -> None: ...

    def find_equal(self, base: Any, source: Any, magnitude: int, rank: int) -> tuple[int, int]: ...


def compiled() -> Reductions:
    """Returns the compiled reductions, loaded when they are needed."""
    from evomerge.engine.kernels import reductions

    return reductions


@dataclass(frozen=True)
class Histogram:
    """Magnitudes counted by their upper bits.

    Attributes:
        shift: How many lower bits were left out.
        bins: The bins with anything in them, ascending.
        counts: Elements in each.
        mixed: Whether it holds anything but the one magnitude whose lower bits are all 0.
        total: Elements in all.
    """

    shift: int
    bins: NDArray[np.uint32]
    counts: NDArray[np.unsignedinteger[Any]]
    mixed: NDArray[np.bool_]
    total: int

    def within(self, upper: int) -> tuple[int, bool]:
        """(elements, mixed) of one bin."""
        at = int(np.searchsorted(self.bins, upper))
        if at == len(self.bins) or self.bins[at] != upper:
            return 0, False
        return int(self.counts[at]), bool(self.mixed[at])

    def coarser(self, shift: int) -> Histogram:
        """Returns the same with fewer bins."""
        if shift == self.shift:
            return self
        by = np.uint32(shift - self.shift)
        upper = self.bins >> by
        bins, first = np.unique(upper, return_index=True)
        counts = np.add.reduceat(self.counts, first, dtype=np.uint64)
        mixed = np.logical_or.reduceat(self.mixed | (self.bins != upper << by), first)
        return Histogram(shift, bins, counts, mixed, self.total)


def count_magnitudes(parts: Parts, shift: int, reductions: Reductions | None = None) -> Histogram:
    """Returns the histogram of the magnitudes; what is no number is left out."""
    reductions = reductions or compiled()
    infinity = INFINITY >> shift
    counts, low = np.zeros(1 << (31 - shift), dtype=np.int64), np.zeros(1 << (31 - shift), dtype=np.uint16)
    for _, base_bits, source_bits in parts():
        reductions.count_magnitudes(base_bits, source_bits, shift, counts, low)
    bins = counts[: infinity + 1].nonzero()[0]
    filled = counts[bins]
    small = filled.astype(np.min_scalar_type(int(filled.max(initial=0))))
    return Histogram(shift, bins.astype(np.uint32), small, low[bins] != 0, int(filled.sum()))


@dataclass(frozen=True)
class JointCutoff:
    """What keeps the largest of several tensors: a magnitude's bits, and how many equal to it stay in each."""

    bits: int
    stay: tuple[int, ...]

    @property
    def threshold(self) -> float:
        """The magnitude."""
        return float(np.uint32(self.bits).view(np.float32))


def merge_histograms(histograms: Sequence[Histogram]) -> Histogram:
    """Returns the histogram of all their elements, with as many bins as the coarsest has."""
    if len(histograms) == 1:
        return histograms[0]
    shift = max(h.shift for h in histograms)
    histograms = [h.coarser(shift) for h in histograms]
    bins, where = np.unique(np.concatenate([h.bins for h in histograms]), return_inverse=True)
    counts, mixed = np.zeros(len(bins), dtype=np.uint64), np.zeros(len(bins), dtype=np.bool_)
    np.add.at(counts, where, np.concatenate([h.counts.astype(np.uint64) for h in histograms]))
    np.logical_or.at(mixed, where, np.concatenate([h.mixed for h in histograms]))
    return Histogram(shift, bins, counts, mixed, sum(h.total for h in histograms))


def joint_cutoff(
    parts: Sequence[Parts],
    histograms: Sequence[Histogram],
    whole: Histogram,
    keep: int,
    reductions: Reductions | None = None,
) -> JointCutoff:
    """Finds where to cut so that the `keep` largest of all tensors together stay, with 0 < `keep` <= their total.

    At equal magnitude the earlier tensor, and within it the lower index, stays.

    Args:
        parts: The tensors' magnitudes.
        histograms: Of each.
        whole: Of all `merge_histograms`.
        keep: How many stay.
        reductions: What counts; None for the compiled ones.
    """
    shift = whole.shift
    upper, left = bin_of(whole, keep)
    inside = [h.coarser(shift).within(upper) for h in histograms]
    lower, equals = 0, [size for size, _ in inside]
    if any(mixed for _, mixed in inside):
        lower, left, equals = _count_within_bin(parts, inside, shift, upper, left, reductions or compiled())
    stay = []
    for equal in equals:
        stay.append(min(left, equal))
        left -= stay[-1]
    return JointCutoff(upper << shift | lower, tuple(stay))


def last_index(parts: Parts, bits: int, stay: int, reductions: Reductions | None = None) -> int:
    """Finds the flat index of the `stay`-th element of exactly this magnitude, -1 for none."""
    reductions = reductions or compiled()
    if stay == 0:
        return -1
    for start, base_bits, source_bits in parts():
        index, stay = reductions.find_equal(base_bits, source_bits, bits, stay)
        if index >= 0:
            return start + index
    raise IndexError(f"{stay} elements of magnitude {bits:#x} are missing: the tensor changed")


def density_cutoff(scores: Callable[[], Iterator[tuple[int, Floats]]], size: int, density: float) -> tuple[float, int]:
    """`evomerge.methods.topk.cutoff` for the top floor(density · n) of n scores.

    Args:
        scores: Gives (flat index of the first, scores) part by part, the same every time; NaN takes no part and is not
            counted in n. Asked for up to three times where there are too many to hold.
        size: How many there are, NaN included.
        density: 0 gives (inf, -1), 1 gives (-1, -1).
    """
    parts = _scores(scores, size)
    histogram = count_magnitudes(parts, FINE)
    keep = keep_count(histogram.total, density)
    if keep == 0:
        return math.inf, -1
    if keep >= histogram.total:
        return -1.0, -1
    largest = joint_cutoff([parts], [histogram], histogram, keep)
    return largest.threshold, last_index(parts, largest.bits, largest.stay[0])


def values_at(scores: Callable[[], Iterator[tuple[int, Floats]]], size: int, ranks: Sequence[int]) -> list[float]:
    """Finds the scores at these ranks, from the largest (1) down; `scores` and `size` as for `density_cutoff`."""
    parts = _scores(scores, size)
    histogram = count_magnitudes(parts, FINE)
    return [joint_cutoff([parts], [histogram], histogram, rank).threshold for rank in ranks]


def _scores(scores: Callable[[], Iterator[tuple[int, Floats]]], size: int) -> Parts:
    """Scores as differences from 0, held where they are few enough."""
    if size > _IN_MEMORY:
        return partial(_from_zero, scores)
    whole = np.empty(size, dtype=np.float32)
    for start, values in scores():
        whole[start : start + values.size] = values
    return partial(_from_zero, lambda: iter([(0, whole)]))


def _from_zero(scores: Callable[[], Iterator[tuple[int, Floats]]]) -> Iterator[tuple[int, Bits, Bits]]:
    """Scores as differences from 0, in parts that the caches hold."""
    zeros = np.zeros(_PART, dtype=np.uint32)
    for start, values in scores():
        bits = values.view(np.uint32)
        for first in range(0, bits.size, _PART):
            part = bits[first : first + _PART]
            yield start + first, zeros[: part.size], part


def _count_within_bin(
    parts: Sequence[Parts],
    inside: list[tuple[int, bool]],
    shift: int,
    upper: int,
    rank: int,
    reductions: Reductions,
) -> tuple[int, int, list[int]]:
    """Within a bin: (lower bits of the `rank`-th largest, its rank among its equals, its equals per tensor)."""
    total, counts_of = np.zeros(1 << shift, dtype=np.int64), []
    for part, (size, mixed) in zip(parts, inside, strict=True):
        if not mixed:  # all of them have no lower bits
            total[0] += size
            counts_of.append({0: size})
            continue
        counts = np.zeros(1 << shift, dtype=np.int64)
        for _, base_bits, source_bits in part():
            reductions.count_low_bits(base_bits, source_bits, shift, upper, counts)
        total += counts
        used = counts.nonzero()[0]
        counts_of.append(dict(zip(used.tolist(), counts[used].tolist(), strict=True)))
    lower, rank_of_equals = rank_from_top(total, rank)
    return lower, rank_of_equals, [counts.get(lower, 0) for counts in counts_of]


def bin_of(histogram: Histogram, keep: int) -> tuple[int, int]:
    """Finds the bin that holds the `keep`-th largest magnitude, and its rank within the bin (1: the bin's largest)."""
    at, rank = rank_from_top(histogram.counts.astype(np.int64), keep)
    return int(histogram.bins[at]), rank


def rank_from_top(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Finds the bin of the `rank`-th element from the top, and its rank within that bin."""
    from_top = counts[::-1].cumsum()
    position = int(np.searchsorted(from_top, rank))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, rank - above
