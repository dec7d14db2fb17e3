"""Kernels of `evomerge.methods.sce` and `evomerge.methods.della`: variance across sources, ranks within rows."""

from __future__ import annotations

import numpy as np

from evomerge.engine.kernels.dropout import TO_BITS, unpack
from evomerge.engine.kernels.jit import TILE, Array, kernel, part
from evomerge.engine.kernels.merge import apply_update, disjoint_merge, elect_sign
from evomerge.methods.random_field import LANES


@part
def _element_variance(base: Array, sources: Array, at: int, mean: Array, total: Array, out: Array) -> None:
    """`evomerge.methods.sce.element_variance` of one tile: float32 [n]."""
    n, count = base.size, np.float64(sources.shape[0])
    for j in range(n):
        mean[j] = total[j] = 0.0
    for k in range(sources.shape[0]):
        source_tile = sources[k, at : at + n]
        for j in range(n):
            mean[j] += np.float64(source_tile[j] - base[j])
    for j in range(n):
        mean[j] /= count
    for k in range(sources.shape[0]):
        source_tile = sources[k, at : at + n]
        for j in range(n):
            deviation = np.float64(source_tile[j] - base[j]) - mean[j]
            total[j] += deviation * deviation
    for j in range(n):
        out[j] = np.float32(total[j] / count)


@part
def _add_squares(base: Array, sources: Array, at: int, j: int, squares: Array) -> None:
    """Adds the square of each source's delta in one element: float64 [sources]."""
    for k in range(sources.shape[0]):
        delta = np.float64(sources[k, at + j] - base[j])
        squares[k] += delta * delta


@kernel
def count_variances(base: Array, sources: Array, shift: int, counts: Array, squares: Array) -> int:
    """Counts the elements by the upper bits of their variance, and adds up the squares of their deltas.

    Args:
        base: float32 [n].
        sources: float32 [sources, n].
        shift: How many lower bits do not count.
        counts: int64 [2^(31 - shift)], added to.
        squares: float64 [2^(31 - shift), sources], added to.

    Returns:
        How many variances are above 0.
    """
    mean, total, variance = np.empty(TILE, np.float64), np.empty(TILE, np.float64), np.empty(TILE, np.float32)
    bits, by, positive = variance.view(np.uint32), np.uint32(shift), 0
    for at in range(0, base.size, TILE):
        base_tile = base[at : min(base.size, at + TILE)]
        _element_variance(base_tile, sources, at, mean, total, variance)
        for j in range(base_tile.size):
            upper = bits[j] >> by
            counts[upper] += 1
            positive += bits[j] > 0
            _add_squares(base_tile, sources, at, j, squares[upper])
    return positive


@kernel
def count_variances_within(
    base: Array, sources: Array, shift: int, upper: int, counts: Array, squares: Array, variance_bits: Array
) -> None:
    """As `count_variances` by the lower bits, of the variances with these upper bits: arrays of 2^shift.

    `variance_bits`, uint32 [n], is filled with the bits of all variances.
    """
    mean, total, variance = np.empty(TILE, np.float64), np.empty(TILE, np.float64), np.empty(TILE, np.float32)
    bits, by, below = variance.view(np.uint32), np.uint32(shift), np.uint32((1 << shift) - 1)
    upper_bits = np.uint32(upper)
    inside = np.zeros(TILE, np.uint8)
    eight = inside.view(np.uint64)
    for at in range(0, base.size, TILE):
        base_tile = base[at : min(base.size, at + TILE)]
        n = base_tile.size
        _element_variance(base_tile, sources, at, mean, total, variance)
        for j in range(n):
            variance_bits[at + j] = bits[j]
            inside[j] = np.uint8(bits[j] >> by == upper_bits)
        for word in range((n + 7) // 8):
            if eight[word]:
                for j in range(8 * word, min(n, 8 * word + 8)):
                    if inside[j]:
                        lower = bits[j] & below
                        counts[lower] += 1
                        _add_squares(base_tile, sources, at, j, squares[lower])


@kernel
def look_up_variance_levels(base: Array, sources: Array, shift: int, table: Array, levels: Array) -> None:
    """The level of each element's variance, uint8 [n], by its upper bits; arguments as for `count_variances`."""
    mean, total, variance = np.empty(TILE, np.float64), np.empty(TILE, np.float64), np.empty(TILE, np.float32)
    bits, by = variance.view(np.uint32), np.uint32(shift)
    for at in range(0, base.size, TILE):
        base_tile = base[at : min(base.size, at + TILE)]
        _element_variance(base_tile, sources, at, mean, total, variance)
        for j in range(base_tile.size):
            levels[at + j] = table[bits[j] >> by]


@kernel
def split_levels(levels: Array, level: int, marks: Array, indices: Array) -> int:
    """Marks what is above a level, and finds what is at it.

    Args:
        levels: uint8 [n].
        level: The one.
        marks: Filled with a bit for every element, uint16 [n / 16].
        places: Filled with the indices of elements at the level, int32 [n].

    Returns:
        How many those are.
    """
    above, equal = np.zeros(TILE // 8, np.uint64), np.zeros(TILE // 8, np.uint64)
    over, at_it, bits = above.view(np.uint8), equal.view(np.uint8), marks.view(np.uint8)
    exactly, equal_count = np.uint8(level), 0
    for at in range(0, levels.size, TILE):
        here = levels[at : at + TILE]
        for j in range(here.size):
            over[j] = np.uint8(here[j] > exactly)
            at_it[j] = np.uint8(here[j] == exactly)
        for j in range(here.size, TILE):
            over[j] = at_it[j] = np.uint8(0)
        for group in range((here.size + 7) // 8):
            bits[at // 8 + group] = np.uint8((above[group] * TO_BITS) >> np.uint64(56))
            if equal[group]:
                for j in range(8 * group, 8 * group + 8):
                    if at_it[j]:
                        indices[equal_count] = at + j
                        equal_count += 1
    return equal_count


@kernel
def mark(indices: Array, marks: Array) -> None:
    """Marks the elements at these places."""
    bits = marks.view(np.uint8)
    for index in indices:
        bits[index >> 3] |= np.uint8(1 << (index & 7))


@kernel
def add_squares(base: Array, sources: Array, squares: Array) -> None:
    """Adds up the squares of each source's delta: float64 [sources]."""
    for j in range(base.size):
        _add_squares(base, sources, 0, j, squares)


@kernel
def sce(
    base: Array,
    sources: Array,
    start: int,
    marks: Array,
    chosen: Array,
    weights: Array,
    votes: Array,
    out: Array,
) -> None:
    """`evomerge.methods.sce.merge`.

    Args:
        base: float32 [n].
        sources: float32 [sources, n].
        start: Flat index of the first element.
        marks: A bit for every element of the tensor, set where it is kept, uint16 [elements / 16]; empty keeps all.
        chosen: The sources with a weight above 0, int64.
        weights: Theirs, float32.
        votes: A 1 for every source, float32.
        out: float32 [n].
    """
    count = sources.shape[0]
    deltas, chosen_deltas = np.empty((count, TILE), np.float32), np.empty((chosen.size, TILE), np.float32)
    chosen_sources = np.empty((chosen.size, TILE), np.float32)
    mass, words, stays = np.empty(TILE, np.float64), np.empty(TILE // 8, np.uint64), np.empty(TILE, np.float32)
    sign, weight, update = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        base_tile = base[at : at + n]
        for k in range(count):
            source_tile, delta = sources[k, at : at + n], deltas[k, :n]
            for j in range(n):
                delta[j] = source_tile[j] - base_tile[j]
        if marks.size > 0:
            unpack(marks[(start + at) // LANES :], words, stays[:n])
            for k in range(count):
                delta = deltas[k, :n]
                for j in range(n):
                    delta[j] *= stays[j]
        elect_sign(deltas, votes, False, mass, sign[:n])
        if chosen.size == count:
            disjoint_merge(deltas, weights, weights, 2, sign[:n], weight, update)
        else:
            for k in range(chosen.size):
                chosen_deltas[k, :n] = deltas[chosen[k], :n]
                chosen_sources[k, :n] = sources[chosen[k], at : at + n]
            disjoint_merge(chosen_deltas, weights, weights, 2, sign[:n], weight, update)
        for j in range(n):
            update[j] *= sign[j]
        if chosen.size == count:
            apply_update(base_tile, sources, at, update, out[at : at + n])
        else:
            apply_update(base_tile, chosen_sources, 0, update, out[at : at + n])


@kernel
def rank_levels(magnitudes: Array, order: Array, top: int, out: Array) -> None:
    """`evomerge.methods.della.rank_levels`, given the order of each row.

    Args:
        magnitudes: float32 [rows, columns], 2 columns or more.
        order: Indices that sort each row in ascending order, [rows, columns].
        top: The level of the largest.
        out: uint8 [rows, columns].
    """
    columns = magnitudes.shape[1]
    for row in range(magnitudes.shape[0]):
        values, ascending, levels = magnitudes[row], order[row], out[row]
        first = 0
        while first < columns:
            after = first + 1
            while after < columns and values[ascending[after]] == values[ascending[first]]:
                after += 1
            level = np.uint8((top * (first + after - 1) + columns - 2) // (2 * (columns - 1)))
            for position in range(first, after):
                levels[ascending[position]] = level
            first = after
