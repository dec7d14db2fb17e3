"""Reduction kernels over stored elements: magnitudes counted, products and moments added up."""

from __future__ import annotations

import numpy as np

from evomerge.engine.kernels.jit import TILE, Array, kernel, part

PARTIAL = 16  # sums that run side by side, for the processor's vectors


@part
def _widen(stored: Array, bits: Array) -> None:
    """Stored elements to the bits of their float32 values."""
    shift = np.uint32(32 - 8 * stored.itemsize)
    for j in range(stored.size):
        bits[j] = np.uint32(stored[j]) << shift


@part
def delta_bits(base: Array, source: Array, bits: Array, base_bits: Array) -> None:
    """The delta of one tile, as float32 bits; the base's are left in `base_bits`."""
    _widen(base, base_bits)
    _widen(source, bits)
    delta, base_values = bits.view(np.float32), base_bits.view(np.float32)
    for j in range(base.size):
        delta[j] -= base_values[j]


@kernel
def count_magnitudes(base: Array, source: Array, shift: int, counts: Array, low: Array) -> None:
    """Counts the magnitudes of the delta by their upper bits, and gathers which lower bits occur in each bin.

    Args:
        base, source: Bits, [n], one dtype.
        shift: How many lower bits do not count.
        counts: int64 [2^(31 - shift)], added to.
        low: uint16 [2^(31 - shift)]: or-ed with the lower bits of what falls into the bin.
    """
    bits, base_bits = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    by, magnitude, below = np.uint32(shift), np.uint32(0x7FFFFFFF), np.uint32((1 << shift) - 1)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        delta_bits(base[at : at + n], source[at : at + n], bits, base_bits)
        for j in range(n):
            upper = (bits[j] & magnitude) >> by
            counts[upper] += 1
            low[upper] |= np.uint16(bits[j] & below)


@kernel
def count_low_bits(base: Array, source: Array, shift: int, upper: int, counts: Array) -> None:
    """Counts the magnitudes of the delta within one bin by their lower bits, into `counts`: int64 [2^shift]."""
    bits, base_bits = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    inside = np.zeros(TILE, np.uint8)
    eight = inside.view(np.uint64)
    by, magnitude, below = np.uint32(shift), np.uint32(0x7FFFFFFF), np.uint32((1 << shift) - 1)
    upper_bits = np.uint32(upper)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        delta_bits(base[at : at + n], source[at : at + n], bits, base_bits)
        for j in range(n):
            inside[j] = np.uint8((bits[j] & magnitude) >> by == upper_bits)
        for word in range((n + 7) // 8):
            if eight[word]:
                for j in range(8 * word, min(n, 8 * word + 8)):
                    if inside[j]:
                        counts[bits[j] & below] += 1


@kernel
def find_equal(base: Array, source: Array, magnitude: int, rank: int) -> tuple[int, int]:
    """Index of the `rank`-th element (from 1) whose delta has exactly these magnitude bits.

    Returns:
        (index, wanted), or (-1, how many of the wanted are still to be found) when there are too few.
    """
    bits, base_bits = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    exactly = np.uint32(magnitude)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        delta_bits(base[at : at + n], source[at : at + n], bits, base_bits)
        equal = np.uint32(0)
        for j in range(n):
            equal += np.uint32((bits[j] & np.uint32(0x7FFFFFFF)) == exactly)
        if equal < rank:
            rank -= int(equal)
            continue
        for j in range(n):
            rank -= (bits[j] & np.uint32(0x7FFFFFFF)) == exactly
            if rank == 0:
                return at + j, 0
    return -1, rank


@kernel
def add_gram(base: Array, left: Array, right: Array, based: bool, sums: Array) -> None:
    """Inner products of two tensors, or of their deltas, with themselves and each other.

    Args:
        base, left, right: Bits, [n], one dtype.
        based: Whether the base is subtracted; where not, it is not read.
        sums: float64 [3, `PARTIAL`], added to: left · left, left · right, right · right in partial sums.
    """
    bits, other, base_bits = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    a, b = bits.view(np.float32), other.view(np.float32)
    own, cross, others = np.zeros(PARTIAL), np.zeros(PARTIAL), np.zeros(PARTIAL)
    for at in range(0, left.size, TILE):
        n = min(TILE, left.size - at)
        if based:
            delta_bits(base[at : at + n], left[at : at + n], bits, base_bits)
            delta_bits(base[at : at + n], right[at : at + n], other, base_bits)
        else:
            _widen(left[at : at + n], bits)
            _widen(right[at : at + n], other)
        for j in range(n, TILE):
            a[j] = b[j] = np.float32(0.0)
        for group in range((n + PARTIAL - 1) // PARTIAL):
            for lane in range(PARTIAL):
                j = PARTIAL * group + lane
                x, y = np.float64(a[j]), np.float64(b[j])
                own[lane] += x * x
                cross[lane] += x * y
                others[lane] += y * y
    for lane in range(PARTIAL):
        sums[0, lane] += own[lane]
        sums[1, lane] += cross[lane]
        sums[2, lane] += others[lane]


@kernel
def count_overlaps(base: Array, sources: Array, epsilon: np.float32, counts: Array) -> None:
    """Counts the elements of each delta above `epsilon`.

    Args:
        base, sources: float32 [n] and [sources, n].
        epsilon: float32.
        counts: int64 [2, sources], added to: elements that another source shares, and those that none does.
    """
    for j in range(base.size):
        together = 0
        for k in range(sources.shape[0]):
            together += abs(sources[k, j] - base[j]) > epsilon
        for k in range(sources.shape[0]):
            if abs(sources[k, j] - base[j]) > epsilon:
                counts[0 if together > 1 else 1, k] += 1


@kernel
def add_moments(base: Array, source: Array, start: int, columns: int, means: Array, squares: Array) -> None:
    """Mean and sum of squared deviations of each row of a delta, brought forward by these elements.

    Chan, Golub and LeVeque 1983: a part's own mean and squares are merged into those of what came before.

    Args:
        base, source: Bits, [n], one dtype.
        start: Flat index of the first element; everything before it has been added.
        columns: Length of a row.
        means, squares: float64 [rows].
    """
    bits, base_bits = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    delta = bits.view(np.float32)
    sums = np.empty(PARTIAL, np.float64)
    at = 0
    while at < base.size:
        row, before = (start + at) // columns, (start + at) % columns
        n = min(TILE, base.size - at, columns - before)
        delta_bits(base[at : at + n], source[at : at + n], bits, base_bits)
        for lane in range(PARTIAL):
            sums[lane] = 0.0
        for group in range(n // PARTIAL):
            for lane in range(PARTIAL):
                sums[lane] += np.float64(delta[PARTIAL * group + lane])
        for j in range(n // PARTIAL * PARTIAL, n):
            sums[0] += np.float64(delta[j])
        mean = sums.sum() / n
        for lane in range(PARTIAL):
            sums[lane] = 0.0
        for group in range(n // PARTIAL):
            for lane in range(PARTIAL):
                deviation = np.float64(delta[PARTIAL * group + lane]) - mean
                sums[lane] += deviation * deviation
        for j in range(n // PARTIAL * PARTIAL, n):
            deviation = np.float64(delta[j]) - mean
            sums[0] += deviation * deviation
        step = mean - means[row]
        squares[row] += sums.sum() + step * step * before * n / (before + n)
        means[row] += step * n / (before + n)
        at += n
