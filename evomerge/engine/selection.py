"""The k-th largest magnitude of values that come in parts, exactly, without sorting and without holding many of them.

Magnitudes are counted by their upper bits; the count names the bin that holds the k-th largest. Where a bin holds one
magnitude only, the count knows it; elsewhere the bin's elements are counted by their lower bits. Then one more look
finds the index up to which elements equal to it are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.methods.trim import kept_count

FINE, COARSE = 13, 16  # lower bits that a histogram leaves out: of 16-bit models, which take few values, and others

_HELD = 1 << 22  # scores that are held rather than computed again: 16 MB
_PART = 1 << 16
_DEVIATIONS = 6.0  # standard deviations of a sample's threshold: missed about once in a thousand million

Floats = NDArray[np.float32]
Bits = NDArray[Any]  # uint16 for bfloat16, uint32 for float32
Parts = Callable[[], Iterator[tuple[int, Bits, Bits]]]
"""(flat index of the first element, bits of the base, bits of the source), one dtype: their difference counts."""


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
        """The same with fewer bins."""
        if shift == self.shift:
            return self
        by = np.uint32(shift - self.shift)
        upper = self.bins >> by
        bins, first = np.unique(upper, return_index=True)
        counts = np.add.reduceat(self.counts, first, dtype=np.uint64)
        mixed = np.logical_or.reduceat(self.mixed | (self.bins != upper << by), first)
        return Histogram(shift, bins, counts, mixed, self.total)


def count(parts: Parts, shift: int) -> Histogram:
    """The histogram of the magnitudes; what is no number is left out."""
    from evomerge.engine.kernels import looking

    infinity = 0x7F800000 >> shift
    counts, low = np.zeros(1 << (31 - shift), dtype=np.int64), np.zeros(1 << (31 - shift), dtype=np.uint16)
    for _, ours, theirs in parts():
        looking.count_magnitudes(ours, theirs, shift, counts, low)
    bins = counts[: infinity + 1].nonzero()[0]
    held = counts[bins]
    small = held.astype(np.min_scalar_type(int(held.max(initial=0))))
    return Histogram(shift, bins.astype(np.uint32), small, low[bins] != 0, int(held.sum()))


@dataclass(frozen=True)
class Cut:
    """What keeps the largest of several tensors: a magnitude's bits, and how many equal to it stay in each."""

    bits: int
    stay: tuple[int, ...]

    @property
    def threshold(self) -> float:
        """The magnitude."""
        return float(np.uint32(self.bits).view(np.float32))


def cut(parts: list[Parts], histograms: list[Histogram], keep: int) -> Cut:
    """Where to cut so that the `keep` largest of all tensors together stay, with 0 < `keep` < their total.

    At equal magnitude the earlier tensor, and within it the lower index, stays.
    """
    shift = max(h.shift for h in histograms)
    histograms = [h.coarser(shift) for h in histograms]
    upper, wanted = _bin_of(histograms, keep)
    inside = [h.within(upper) for h in histograms]
    lower, equals = 0, [size for size, _ in inside]
    if any(mixed for _, mixed in inside):
        lower, wanted, equals = _split(parts, inside, shift, upper, wanted)
    stay = []
    for equal in equals:
        stay.append(min(wanted, equal))
        wanted -= stay[-1]
    return Cut(upper << shift | lower, tuple(stay))


def last_index(parts: Parts, bits: int, stay: int) -> int:
    """Flat index of the `stay`-th element of exactly this magnitude, -1 for none."""
    from evomerge.engine.kernels import looking

    if stay == 0:
        return -1
    for start, ours, theirs in parts():
        index, stay = looking.find_equal(ours, theirs, bits, stay)
        if index >= 0:
            return start + index
    raise IndexError(f"{stay} elements of magnitude {bits:#x} are missing: the tensor changed")


def top(scores: Callable[[], Iterator[tuple[int, Floats]]], size: int, density: float) -> tuple[float, int]:
    """`evomerge.methods.trim.cutoff` for the top floor(density · n) of n scores.

    Args:
        scores: Gives (flat index of the first, scores) part by part, the same every time; NaN takes no part and is not
            counted in n. Asked for up to three times where there are too many to hold.
        size: How many there are, NaN included.
        density: 0 gives (inf, -1), 1 gives (-1, -1).
    """
    if size <= _HELD:
        whole = np.empty(size, dtype=np.float32)
        for start, values in scores():
            whole[start : start + values.size] = values
        parts = partial(_from_zero, lambda: iter([(0, whole)]))
    else:
        parts = partial(_from_zero, scores)
    histogram = count(parts, FINE)
    keep = kept_count(histogram.total, density)
    if keep == 0:
        return math.inf, -1
    if keep >= histogram.total:
        return -1.0, -1
    found = cut([parts], [histogram], keep)
    return found.threshold, last_index(parts, found.bits, found.stay[0])


def top_sampled(
    scores: Callable[[], Iterator[tuple[int, Floats]]],
    density: float,
    population: Histogram,
    chance: float,
    factor: float,
) -> tuple[float, int] | None:
    """As `top`, where the scores are a random sample of magnitudes that were counted: looked at once.

    The sample's threshold is near the population's. Scores above a bracket around it are counted, those within it are
    held and ranked.

    Args:
        scores: As for `top`.
        density: As for `top`.
        population: The magnitudes that were drawn from.
        chance: Probability to be drawn.
        factor: What a drawn magnitude is multiplied by, in float32.

    Returns:
        None where the bracket misses the threshold, which chance alone hardly ever does.
    """
    from evomerge.engine.kernels import looking

    low, high = (np.float32(bound) * np.float32(factor) for bound in _bracket(population, density, chance))
    held, alive, above = [(np.empty(0, np.float32), np.empty(0, np.int64))], 0, 0
    for start, values in scores():
        inside, index = np.empty(values.size, np.float32), np.empty(values.size, np.int64)
        size, more, larger = looking.collect(values, start, low, high, inside, index)
        held.append((inside[:size].copy(), index[:size].copy()))
        alive, above = alive + more, above + larger
    keep = kept_count(alive, density)
    if keep == 0:
        return math.inf, -1
    if keep >= alive:
        return -1.0, -1
    inside, index = (np.concatenate(columns) for columns in zip(*held, strict=True))
    wanted = keep - above
    if not 0 < wanted <= inside.size:
        return None
    threshold = np.partition(inside, inside.size - wanted)[inside.size - wanted]
    equal = index[inside == threshold]
    return float(threshold), int(equal[wanted - int((inside > threshold).sum()) - 1])


def _bracket(population: Histogram, density: float, chance: float) -> tuple[float, float]:
    """Magnitudes between which the top `density` of a random sample nearly surely ends."""
    sample = max(1.0, chance * population.total)
    apart = _DEVIATIONS * math.sqrt(density * (1.0 - density) / sample) + 2.0 / sample
    ranks = (math.ceil((density + apart) * population.total), math.floor((density - apart) * population.total))
    low, high = 0, 0x7F800000
    if ranks[0] < population.total:
        low = _bin_of([population], ranks[0])[0] << population.shift
    if ranks[1] > 0:
        high = ((_bin_of([population], ranks[1])[0] + 1) << population.shift) - 1
    bounds = np.array([low, min(high, 0x7F800000)], dtype=np.uint32).view(np.float32)
    return float(bounds[0]), float(bounds[1])


def _from_zero(scores: Callable[[], Iterator[tuple[int, Floats]]]) -> Iterator[tuple[int, Bits, Bits]]:
    """Scores as differences from 0, in parts that the caches hold."""
    zeros = np.zeros(_PART, dtype=np.uint32)
    for start, values in scores():
        bits = values.view(np.uint32)
        for first in range(0, bits.size, _PART):
            part = bits[first : first + _PART]
            yield start + first, zeros[: part.size], part


def _split(
    parts: list[Parts], inside: list[tuple[int, bool]], shift: int, upper: int, wanted: int
) -> tuple[int, int, list[int]]:
    """Within a bin: (lower bits of the `wanted`-th largest, its rank among its equals, its equals per tensor)."""
    from evomerge.engine.kernels import looking

    total, found = np.zeros(1 << shift, dtype=np.int64), []
    for part, (size, mixed) in zip(parts, inside, strict=True):
        counts = np.zeros(1 << shift, dtype=np.int64)
        if mixed:
            for _, ours, theirs in part():
                looking.count_low_bits(ours, theirs, shift, upper, counts)
        else:
            counts[0] = size
        total += counts
        used = counts.nonzero()[0]
        found.append(dict(zip(used.tolist(), counts[used].tolist(), strict=True)))
    lower, rank = _rank(total, wanted)
    return lower, rank, [counts.get(lower, 0) for counts in found]


def _bin_of(histograms: list[Histogram], keep: int) -> tuple[int, int]:
    """The bin that holds the `keep`-th largest magnitude, and its rank within the bin (1: the bin's largest)."""
    if len(histograms) == 1:
        bins, counts = histograms[0].bins, histograms[0].counts.astype(np.int64)
    else:
        bins, where = np.unique(np.concatenate([h.bins for h in histograms]), return_inverse=True)
        counts = np.zeros(len(bins), dtype=np.int64)
        np.add.at(counts, where, np.concatenate([h.counts.astype(np.int64) for h in histograms]))
    at, rank = _rank(counts, keep)
    return int(bins[at]), rank


def _rank(counts: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """Counting from the top: the bin of the `wanted`-th element, and its rank within that bin."""
    from_top = counts[::-1].cumsum()
    position = int(np.searchsorted(from_top, wanted))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, wanted - above
