"""Kernels of dropout: elements dropped at random, and counts and magnitudes of what is kept."""

from __future__ import annotations

import numpy as np

from evomerge.engine.kernels.jit import TILE, Array, kernel, part
from evomerge.engine.kernels.random_field import philox
from evomerge.engine.kernels.reductions import delta_bits
from evomerge.methods.random_field import LANES, STEPS

# Eight bytes of 0 or 1 and the eight bits of one byte, either way by one product.
TO_BITS = np.uint64(0x0102040810204080)
EVERY_BYTE, EVERY_BIT = np.uint64(0x0101010101010101), np.uint64(0x8040201008040201)


@part
def drop(delta: Array, keep: int, key: Array, start: int, factor: np.float32, field: Array, words: Array) -> None:
    """`evomerge.methods.dare.drop_and_rescale` in place: elements whose number in the field is below `keep` stay."""
    if keep <= 0:
        for j in range(delta.size):
            delta[j] = np.float32(0.0)
        return
    if keep < STEPS:
        philox(key[0], key[1], start // LANES, words)
        one, zero, limit = np.float32(1.0), np.float32(0.0), np.uint16(keep)
        for j in range(delta.size):
            delta[j] *= one if field[j] < limit else zero
    _scale(delta, factor)


@part
def drop_unmarked(delta: Array, marks: Array, factor: np.float32, words: Array) -> None:
    """The same where the field was drawn before: a bit for every element, uint16 [n / 16] from the first on."""
    _unpack(marks, words, delta.size)
    stays = words.view(np.uint8)
    for j in range(delta.size):
        delta[j] *= np.float32(stays[j] != 0)
    _scale(delta, factor)


@part
def unpack(marks: Array, words: Array, stays: Array) -> None:
    """1 where an element of a tile is marked, else 0: float32 [n]; arguments as for `drop_unmarked`."""
    _unpack(marks, words, stays.size)
    marked = words.view(np.uint8)
    for j in range(stays.size):
        stays[j] = np.float32(marked[j] != 0)


@part
def _unpack(marks: Array, words: Array, size: int) -> None:
    """A byte for every element, 0 where it is not marked, into `words`."""
    bits = marks.view(np.uint8)
    for group in range((size + 7) // 8):
        words[group] = (np.uint64(bits[group]) * EVERY_BYTE) & EVERY_BIT


@part
def _scale(delta: Array, factor: np.float32) -> None:
    if factor != np.float32(1.0):
        for j in range(delta.size):
            delta[j] *= factor


@part
def _sizes(base: Array, source: Array, factor: np.float32, sizes: Array, base_bits: Array) -> None:
    """Bits of the magnitudes of a tile's delta times a factor."""
    delta_bits(base, source, sizes, base_bits)
    values = sizes.view(np.float32)
    for j in range(base.size):
        values[j] = abs(values[j] * factor)


@kernel
def mark_kept(
    base: Array,
    source: Array,
    start: int,
    keep: int,
    key: Array,
    factor: np.float32,
    bounds: Array,
    marks: Array,
    equals: Array,
    indices: Array,
    sizes: Array,
) -> tuple[int, int, int]:
    """Marks the elements of a delta that the drop leaves, and counts their magnitudes around one of them.

    Args:
        base, source: Bits, [n], one dtype.
        start: Flat index of the first element, a multiple of 16.
        keep, key, factor: As for `drop`; something is kept.
        bounds: Bits of three magnitudes, ascending, uint32: low, middle and high.
        marks: Filled with a bit for every element, uint16 [n / 16].
        equals: Filled with how many kept elements of each tile have the middle magnitude, int64 [n / `TILE`].
        indices: Indices of the other kept elements from low to high, int64 [n], ascending.
        sizes: Bits of their magnitudes, uint32 [n].

    Returns:
        How many kept elements are numbers, how many of those are larger than high, and how many indices there are.
    """
    words, eight, eighths = (
        np.zeros(TILE // 4, np.uint64),
        np.zeros(TILE // 8, np.uint64),
        np.zeros(TILE // 8, np.uint64),
    )
    field, stays, inside = words.view(np.uint16), eight.view(np.uint8), eighths.view(np.uint8)
    bits = marks.view(np.uint8)
    here, base_bits = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    low, middle, high, infinity = bounds[0], bounds[1], bounds[2], np.uint32(0x7F800000)
    numbers, larger, near_count = 0, 0, 0
    for tile in range((base.size + TILE - 1) // TILE):
        at = tile * TILE
        n = min(TILE, base.size - at)
        _sizes(base[at : at + n], source[at : at + n], factor, here, base_bits)
        if keep < STEPS:
            philox(key[0], key[1], (start + at) // LANES, words)
        for j in range(TILE):
            stays[j] = np.uint8(np.uint32(field[j]) < np.uint32(keep))
        for group in range((n + 7) // 8):
            bits[at // 8 + group] = np.uint8((eight[group] * TO_BITS) >> np.uint64(56))
        for j in range(n):
            here[j] |= np.uint32(stays[j] == 0) << np.uint32(31)  # above all magnitudes
        alive, above, same, near = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
        for j in range(n):
            size = here[j]
            alive += np.uint32(size <= infinity)
            above += np.uint32((size > high) & (size <= infinity))
            same += np.uint32(size == middle)
            near += np.uint32((size >= low) & (size <= high))
        numbers += int(alive)
        larger += int(above)
        equals[tile] = int(same)
        if near == same:
            continue
        for j in range(n):
            inside[j] = np.uint8((here[j] >= low) & (here[j] <= high) & (here[j] != middle))
        for group in range((n + 7) // 8):
            if eighths[group]:
                for j in range(8 * group, min(n, 8 * group + 8)):
                    if inside[j]:
                        indices[near_count] = at + j
                        sizes[near_count] = here[j]
                        near_count += 1
    return numbers, larger, near_count


@kernel
def find_kept(base: Array, source: Array, factor: np.float32, marks: Array, magnitude: int, rank: int) -> int:
    """Index of the `rank`-th kept element (from 1) of exactly this magnitude, in a tile that has as many.

    Args:
        base, source: Bits, [n], one dtype, n at most `TILE`.
        factor, marks: As for `mark_kept`.
        magnitude: Its bits.
        rank: Its rank, from 1.
    """
    sizes, base_bits = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    _sizes(base, source, factor, sizes, base_bits)
    for j in range(base.size):
        marked = (np.uint32(marks[j // LANES]) >> np.uint32(j % LANES)) & np.uint32(1)
        rank -= (sizes[j] == np.uint32(magnitude)) & (marked == np.uint32(1))
        if rank == 0:
            return j
    return -1


@kernel
def delta_after_drop(base: Array, source: Array, factor: np.float32, marks: Array, out: Array) -> None:
    """A delta after the drop, NaN where it is dropped: float32 [n]; arguments as for `mark_kept`."""
    bits, base_bits = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    values, gone = bits.view(np.float32), np.float32(np.nan)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        delta_bits(base[at : at + n], source[at : at + n], bits, base_bits)
        for j in range(n):
            marked = (np.uint32(marks[(at + j) // LANES]) >> np.uint32((at + j) % LANES)) & np.uint32(1)
            out[at + j] = values[j] * factor if marked else gone
