"""Kernels that merge edited deltas (trimmed, dropped, pruned) and shrunk ones: float32 in, float32 out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from evomerge.engine.kernels.dropout import drop, drop_unmarked
from evomerge.engine.kernels.jit import TILE, Array, kernel, part
from evomerge.engine.kernels.random_field import philox
from evomerge.methods.random_field import LANES, STEPS


class Edits(NamedTuple):
    """What becomes of the delta of each source that takes part, in this order; [sources] or [sources, ...].

    Attributes:
        keeps, keys: Elements whose number in the source's random field is below this are kept, int64; uint64
            [sources, 2]. 65536 keeps all.
        lines: For elements with levels (`evomerge.methods.della`), float32 [sources, 4]: a and b of the line, a factor,
            and whether that is over the probability to keep. Without levels, [0, 4].
        factors: The delta is multiplied by this after the drop, float32.
        thresholds, lasts: What is kept of what was not dropped (`Statistics.trim`), float32 and int64; -1 keeps all.
        outliers, outlier_lasts: What of that is left out again (`Statistics.band`); inf leaves out nothing.
        marked: Whether what is kept by the field was marked before, bool.
        marks: Then a bit for every element of the tensor (`drop_unmarked`), uint16 [sources, elements / 16].
    """

    keeps: Array
    keys: Array
    lines: Array
    factors: Array
    thresholds: Array
    lasts: Array
    outliers: Array
    outlier_lasts: Array
    marked: Array
    marks: Array


@part
def _zero_up_to(delta: Array, bound: np.float32) -> None:
    """Sets magnitudes of at most `bound` to 0."""
    zero = np.float32(0.0)
    for j in range(delta.size):
        delta[j] = delta[j] if abs(delta[j]) > bound else zero


@part
def _trim(delta: Array, threshold: np.float32, last: int, start: int) -> None:
    """`evomerge.methods.topk.trim` in place."""
    if threshold < np.float32(0.0):
        return
    equals = min(max(last - start + 1, 0), delta.size)
    _zero_up_to(delta[:equals], np.nextafter(threshold, np.float32(0.0)))
    _zero_up_to(delta[equals:], threshold)


@part
def _trimmed_delta(source_tile: Array, base_tile: Array, bound: np.float32, delta: Array) -> None:
    """The delta, its magnitudes of at most `bound` set to 0."""
    zero = np.float32(0.0)
    for j in range(delta.size):
        d = source_tile[j] - base_tile[j]
        delta[j] = d if abs(d) > bound else zero


@part
def _drop_outliers(delta: Array, threshold: np.float32, last: int, start: int) -> None:
    """Sets to 0 what `evomerge.methods.topk.cutoff_mask` keeps."""
    if threshold == np.float32(np.inf):
        return
    zero = np.float32(0.0)
    equals = min(max(last - start + 1, 0), delta.size)
    for j in range(equals):
        delta[j] = zero if abs(delta[j]) >= threshold else delta[j]
    for j in range(equals, delta.size):
        delta[j] = zero if abs(delta[j]) > threshold else delta[j]


@part
def _magprune(
    delta: Array, rank_levels: Array, line: Array, key: Array, start: int, field: Array, words: Array
) -> None:
    """`evomerge.methods.della.magprune` in place."""
    philox(key[0], key[1], start // LANES, words)
    zero, one, unit = np.float32(0.0), np.float32(1.0), np.float32(1.0 / STEPS)
    first, step, scale, rescale = line[0], line[1], line[2], line[3] > zero
    if rescale:
        for j in range(delta.size):
            limit = np.floor(np.float32(rank_levels[j]) * step + first)
            pruned = delta[j] * (one / (limit * unit) * scale)
            delta[j] = pruned if np.float32(field[j]) < limit else zero
    else:
        for j in range(delta.size):
            limit = np.floor(np.float32(rank_levels[j]) * step + first)
            delta[j] = delta[j] * scale if np.float32(field[j]) < limit else zero


@part
def _edit(
    source_tile: Array,
    base_tile: Array,
    rank_levels: Array,
    at: int,
    start: int,
    edits: Edits,
    k: int,
    field: Array,
    words: Array,
    delta: Array,
) -> None:
    """The delta of source k in one tile, after all that is done to it."""
    threshold, last = edits.thresholds[k], edits.lasts[k]
    whole = edits.keeps[k] == STEPS and edits.factors[k] == np.float32(1.0)
    if whole and edits.lines.shape[0] == 0 and threshold >= np.float32(0.0):
        equals = min(max(last - start + 1, 0), delta.size)
        _trimmed_delta(
            source_tile[:equals], base_tile[:equals], np.nextafter(threshold, np.float32(0.0)), delta[:equals]
        )
        _trimmed_delta(source_tile[equals:], base_tile[equals:], threshold, delta[equals:])
        _drop_outliers(delta, edits.outliers[k], edits.outlier_lasts[k], start)
        return
    for j in range(delta.size):
        delta[j] = source_tile[j] - base_tile[j]
    if edits.lines.shape[0] > 0:
        _magprune(delta, rank_levels[k, at : at + delta.size], edits.lines[k], edits.keys[k], start, field, words)
    elif edits.marked[k]:
        drop_unmarked(delta, edits.marks[k, start // LANES :], edits.factors[k], words)
    else:
        drop(delta, edits.keeps[k], edits.keys[k], start, edits.factors[k], field, words)
    _trim(delta, edits.thresholds[k], edits.lasts[k], start)
    _drop_outliers(delta, edits.outliers[k], edits.outlier_lasts[k], start)


@part
def elect_sign(deltas: Array, weights: Array, count: bool, mass: Array, sign: Array) -> None:
    """`evomerge.methods.ties.elect_sign` of one tile."""
    n = sign.size
    one, zero = np.float32(1.0), np.float32(0.0)
    for j in range(n):
        mass[j] = 0.0
    for k in range(weights.size):
        delta, weight = deltas[k, :n], np.float64(weights[k])
        if not count:
            for j in range(n):
                mass[j] += np.float64(delta[j]) * weight
        elif weight > 0:
            for j in range(n):
                mass[j] += np.float64(delta[j] > zero) - np.float64(delta[j] < zero)
        else:
            for j in range(n):
                mass[j] -= np.float64(delta[j] > zero) - np.float64(delta[j] < zero)
    if count:
        first, positive = deltas[0, :n], weights[0] > zero
        for j in range(n):
            majority = np.float32(mass[j])
            tie_break = first[j] if positive else -first[j]
            sign[j] = np.copysign(one, (tie_break if majority == zero else majority) + zero)
    else:
        for j in range(n):
            sign[j] = np.copysign(one, np.float32(mass[j]))


@part
def disjoint_merge(
    deltas: Array, weights: Array, shares: Array, mode: int, sign: Array, total: Array, result: Array
) -> None:
    """`evomerge.methods.ties.disjoint_merge` of one tile. mode 0: sums; 1: mean of all; 2: mean of those that agree."""
    n = sign.size
    zero = np.float32(0.0)
    for j in range(n):
        result[j] = zero
        total[j] = np.float32(1e-30)
    for k in range(weights.size):
        delta, size, share = deltas[k, :n], abs(weights[k]), shares[k]
        flip = np.float32(1.0) if weights[k] > zero else np.float32(-1.0)
        if mode == 0:
            for j in range(n):
                m = delta[j] * sign[j] * flip
                m = m if m > zero else zero
                result[j] += m * size
        elif mode == 1:
            for j in range(n):
                m = delta[j] * sign[j] * flip
                m = m if m > zero else zero
                result[j] += (m - result[j]) * share
        else:
            for j in range(n):
                m = delta[j] * sign[j] * flip
                m = m if m > zero else zero
                part = size if m > zero else zero
                total[j] += part
                result[j] += (m - result[j]) * (part / total[j])


@part
def apply_update(base: Array, sources: Array, at: int, update: Array, result: Array) -> None:
    """`evomerge.methods.arithmetic.apply_update` of one tile."""
    for j in range(base.size):
        result[j] = base[j] + update[j]
    for i in range(sources.shape[0]):
        k = sources.shape[0] - 1 - i
        source_tile = sources[k, at : at + base.size]
        for j in range(base.size):
            result[j] = source_tile[j] if source_tile[j] - base[j] == update[j] else result[j]


@kernel
def ram(base: Array, sources: Array, epsilon: np.float32, factors: Array, scale: np.float32, out: Array) -> None:
    """`evomerge.methods.ram`.

    Args:
        base, sources: float32 [n] and [sources, n].
        epsilon: Deltas larger than this count.
        factors: float64 [sources]: of what a source has moved alone.
        scale: λ.
        out: float32 [n].
    """
    total, count, factor = np.empty(TILE, np.float64), np.empty(TILE, np.float64), np.empty(TILE, np.float64)
    update = np.empty(TILE, np.float32)
    for at in range(0, base.size, TILE):
        base_tile, result = base[at : min(base.size, at + TILE)], out[at : min(base.size, at + TILE)]
        for j in range(base_tile.size):
            total[j] = count[j] = factor[j] = 0.0
        for k in range(sources.shape[0]):
            source_tile, alone = sources[k, at : at + base_tile.size], factors[k]
            for j in range(base_tile.size):
                delta = source_tile[j] - base_tile[j]
                moved = abs(delta) > epsilon
                total[j] += np.float64(delta) if moved else 0.0
                count[j] += 1.0 if moved else 0.0
                factor[j] += alone if moved else 0.0
        for j in range(base_tile.size):
            update[j] = np.float32(total[j] * factor[j] if count[j] == 1.0 else total[j] / max(count[j], 1.0))
        if scale == np.float32(1.0):
            apply_update(base_tile, sources, at, update, result)
        else:
            for j in range(base_tile.size):
                result[j] = update[j] * scale + base_tile[j]


@kernel
def ties(
    base: Array,
    sources: Array,
    start: int,
    edits: Edits,
    rank_levels: Array,
    weights: Array,
    shares: Array,
    scale: np.float32,
    count: bool,
    mode: int,
    out: Array,
) -> None:
    """TIES over deltas dropped at random, then trimmed.

    Args:
        base: The base, float32 [n].
        sources: The sources that take part, float32 [sources, n].
        start: Flat index of the first element, a multiple of 16.
        edits: What becomes of the deltas first.
        levels: The elements' levels where the edits have lines, uint8 [sources, n].
        weights: float32, none of them 0.
        shares: Each weight's part of those up to it, float32, for mode 1.
        scale: λ, float32.
        count: Elect by the majority of signs.
        mode: As for `disjoint_merge`.
        out: The result, float32 [n].
    """
    deltas = np.empty((sources.shape[0], TILE), np.float32)
    words = np.empty(TILE // 4, np.uint64)
    field = words.view(np.uint16)
    mass, sign = np.empty(TILE, np.float64), np.empty(TILE, np.float32)
    total, update = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        base_tile = base[at : at + n]
        for k in range(sources.shape[0]):
            _edit(
                sources[k, at : at + n], base_tile, rank_levels, at, start + at, edits, k, field, words, deltas[k, :n]
            )
        elect_sign(deltas, weights, count, mass, sign[:n])
        disjoint_merge(deltas, weights, shares, mode, sign[:n], total, update)
        result = out[at : at + n]
        for j in range(n):
            update[j] *= sign[j]
        if scale == np.float32(1.0):
            apply_update(base_tile, sources, at, update, result)
        else:
            for j in range(n):
                result[j] = update[j] * scale + base_tile[j]


@kernel
def add(base: Array, sources: Array, start: int, edits: Edits, rank_levels: Array, scales: Array, out: Array) -> None:
    """θ0 + Σ ci δ̃i over edited deltas; arguments as for `ties`, `scales` being the ci, float32."""
    delta = np.empty(TILE, np.float32)
    words = np.empty(TILE // 4, np.uint64)
    field = words.view(np.uint16)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        base_tile, result = base[at : at + n], out[at : at + n]
        for j in range(n):
            result[j] = base_tile[j]
        for k in range(sources.shape[0]):
            _edit(sources[k, at : at + n], base_tile, rank_levels, at, start + at, edits, k, field, words, delta[:n])
            scale = scales[k]
            for j in range(n):
                result[j] += delta[j] * scale


@part
def _certainty(
    base: Array,
    sources: Array,
    at: int,
    shares: Array,
    anchor: int,
    tau: np.float32,
    mean: Array,
    centre: Array,
    variance: Array,
) -> None:
    """`evomerge.methods.dfs`, mode `position`, of one tile: the mean delta, and in `variance` its certainty."""
    zero, one, far = np.float32(0.0), np.float32(1.0), np.float32(1e18)
    count = sources.shape[0]
    equal = np.float32(1.0 / count)
    n = base.size
    first, pivot = sources[0, at : at + n], sources[anchor, at : at + n]
    for j in range(n):
        mean[j] = pivot[j] - base[j]
        centre[j] = first[j] - base[j]
        variance[j] = zero
    for k in range(count):
        source_tile, share = sources[k, at : at + n], shares[k]
        if k != anchor:
            for j in range(n):
                mean[j] += ((source_tile[j] - base[j]) - (pivot[j] - base[j])) * share
        if k != 0:
            for j in range(n):
                centre[j] += ((source_tile[j] - base[j]) - (first[j] - base[j])) * equal
    for k in range(count):
        source_tile = sources[k, at : at + n]
        for j in range(n):
            ratio = ((source_tile[j] - base[j]) - centre[j]) / mean[j]
            ratio = far if ratio > far else ratio
            ratio = -far if ratio < -far else ratio
            variance[j] += ratio * ratio * equal
    for j in range(n):
        certain = one / (variance[j] * tau + one)
        variance[j] = zero if mean[j] == zero else certain


@kernel
def certainty(base: Array, sources: Array, shares: Array, anchor: int, tau: np.float32, out: Array) -> None:
    """How certain each element of the mean delta is, float32 [n]; arguments as for `positions`."""
    mean, centre = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        _certainty(base[at : at + n], sources, at, shares, anchor, tau, mean, centre, out[at : at + n])


@kernel
def positions(
    base: Array,
    sources: Array,
    start: int,
    shares: Array,
    anchor: int,
    tau: np.float32,
    threshold: np.float32,
    last: int,
    scale: np.float32,
    out: Array,
) -> None:
    """`evomerge.methods.dfs.merge_positions`.

    Args:
        base: float32 [n].
        sources: Those that take part, float32 [sources, n].
        start: Flat index of the first element.
        shares: Their weights' shares, float32; a share of 0 adds nothing.
        anchor: The source of the largest share.
        tau: τ over the number of sources.
        threshold, last: Which certainties are kept (`evomerge.methods.topk`).
        scale: λ.
        out: float32 [n].
    """
    mean, centre, certain = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        base_tile, result = base[at : at + n], out[at : at + n]
        _certainty(base_tile, sources, at, shares, anchor, tau, mean, centre, certain)
        for j in range(n):
            mean[j] *= certain[j]
        if threshold >= np.float32(0.0):
            equals = min(max(last - start - at + 1, 0), n)
            for j in range(equals):
                mean[j] *= np.float32(certain[j] >= threshold)
            for j in range(equals, n):
                mean[j] *= np.float32(certain[j] > threshold)
        if scale == np.float32(1.0):
            apply_update(base_tile, sources, at, mean, result)
        else:
            for j in range(n):
                result[j] = mean[j] * scale + base_tile[j]
