"""Kernels that merge: float32 in, float32 out."""

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
        thresholds, lasts: What is kept of what was not dropped (`Facts.trim`), float32 and int64; -1 keeps all.
        outliers, outlier_lasts: What of that is left out again (`Facts.band`); inf leaves out nothing.
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
def _shrink(delta: Array, bound: np.float32) -> None:
    """Sets magnitudes of at most `bound` to 0."""
    zero = np.float32(0.0)
    for j in range(delta.size):
        delta[j] = delta[j] if abs(delta[j]) > bound else zero


@part
def _trim(delta: Array, threshold: np.float32, last: int, start: int) -> None:
    """`evomerge.methods.topk.shrink` in place."""
    if threshold < np.float32(0.0):
        return
    equals = min(max(last - start + 1, 0), delta.size)
    _shrink(delta[:equals], np.nextafter(threshold, np.float32(0.0)))
    _shrink(delta[equals:], threshold)


@part
def _trimmed(theirs: Array, ours: Array, bound: np.float32, delta: Array) -> None:
    """The delta, its magnitudes of at most `bound` set to 0."""
    zero = np.float32(0.0)
    for j in range(delta.size):
        d = theirs[j] - ours[j]
        delta[j] = d if abs(d) > bound else zero


@part
def _leave_out(delta: Array, threshold: np.float32, last: int, start: int) -> None:
    """Sets to 0 what `evomerge.methods.topk.kept` keeps."""
    if threshold == np.float32(np.inf):
        return
    zero = np.float32(0.0)
    equals = min(max(last - start + 1, 0), delta.size)
    for j in range(equals):
        delta[j] = zero if abs(delta[j]) >= threshold else delta[j]
    for j in range(equals, delta.size):
        delta[j] = zero if abs(delta[j]) > threshold else delta[j]


@part
def _prune(delta: Array, levels: Array, line: Array, key: Array, start: int, field: Array, words: Array) -> None:
    """`evomerge.methods.della.pruned` in place."""
    philox(key[0], key[1], start // LANES, words)
    zero, one, unit = np.float32(0.0), np.float32(1.0), np.float32(1.0 / STEPS)
    first, step, scale, rescale = line[0], line[1], line[2], line[3] > zero
    if rescale:
        for j in range(delta.size):
            limit = np.floor(np.float32(levels[j]) * step + first)
            pruned = delta[j] * (one / (limit * unit) * scale)
            delta[j] = pruned if np.float32(field[j]) < limit else zero
    else:
        for j in range(delta.size):
            limit = np.floor(np.float32(levels[j]) * step + first)
            delta[j] = delta[j] * scale if np.float32(field[j]) < limit else zero


@part
def _edit(
    theirs: Array,
    ours: Array,
    levels: Array,
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
        _trimmed(theirs[:equals], ours[:equals], np.nextafter(threshold, np.float32(0.0)), delta[:equals])
        _trimmed(theirs[equals:], ours[equals:], threshold, delta[equals:])
        _leave_out(delta, edits.outliers[k], edits.outlier_lasts[k], start)
        return
    for j in range(delta.size):
        delta[j] = theirs[j] - ours[j]
    if edits.lines.shape[0] > 0:
        _prune(delta, levels[k, at : at + delta.size], edits.lines[k], edits.keys[k], start, field, words)
    elif edits.marked[k]:
        drop_unmarked(delta, edits.marks[k, start // LANES :], edits.factors[k], words)
    else:
        drop(delta, edits.keeps[k], edits.keys[k], start, edits.factors[k], field, words)
    _trim(delta, edits.thresholds[k], edits.lasts[k], start)
    _leave_out(delta, edits.outliers[k], edits.outlier_lasts[k], start)


@part
def elect(deltas: Array, weights: Array, count: bool, mass: Array, sign: Array) -> None:
    """`evomerge.methods.ties.elected_sign` of one tile."""
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
            mine = first[j] if positive else -first[j]
            sign[j] = np.copysign(one, (mine if majority == zero else majority) + zero)
    else:
        for j in range(n):
            sign[j] = np.copysign(one, np.float32(mass[j]))


@part
def agree(deltas: Array, weights: Array, shares: Array, mode: int, sign: Array, total: Array, result: Array) -> None:
    """`evomerge.methods.ties.agreeing` of one tile. mode 0: sums; 1: mean of all; 2: mean of those that agree."""
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
def land(base: Array, sources: Array, at: int, update: Array, result: Array) -> None:
    """`evomerge.methods.arithmetic.land` of one tile."""
    for j in range(base.size):
        result[j] = base[j] + update[j]
    for i in range(sources.shape[0]):
        k = sources.shape[0] - 1 - i
        theirs = sources[k, at : at + base.size]
        for j in range(base.size):
            result[j] = theirs[j] if theirs[j] - base[j] == update[j] else result[j]


@kernel
def ties(
    base: Array,
    sources: Array,
    start: int,
    edits: Edits,
    levels: Array,
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
        mode: As for `agree`.
        out: The result, float32 [n].
    """
    deltas = np.empty((sources.shape[0], TILE), np.float32)
    words = np.empty(TILE // 4, np.uint64)
    field = words.view(np.uint16)
    mass, sign = np.empty(TILE, np.float64), np.empty(TILE, np.float32)
    total, update = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        ours = base[at : at + n]
        for k in range(sources.shape[0]):
            _edit(sources[k, at : at + n], ours, levels, at, start + at, edits, k, field, words, deltas[k, :n])
        elect(deltas, weights, count, mass, sign[:n])
        agree(deltas, weights, shares, mode, sign[:n], total, update)
        result = out[at : at + n]
        for j in range(n):
            update[j] *= sign[j]
        if scale == np.float32(1.0):
            land(ours, sources, at, update, result)
        else:
            for j in range(n):
                result[j] = update[j] * scale + ours[j]


@kernel
def add(base: Array, sources: Array, start: int, edits: Edits, levels: Array, scales: Array, out: Array) -> None:
    """θ0 + Σ ci δ̃i over edited deltas; arguments as for `ties`, `scales` being the ci, float32."""
    delta = np.empty(TILE, np.float32)
    words = np.empty(TILE // 4, np.uint64)
    field = words.view(np.uint16)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        ours, result = base[at : at + n], out[at : at + n]
        for j in range(n):
            result[j] = ours[j]
        for k in range(sources.shape[0]):
            _edit(sources[k, at : at + n], ours, levels, at, start + at, edits, k, field, words, delta[:n])
            scale = scales[k]
            for j in range(n):
                result[j] += delta[j] * scale


@kernel
def affine(pivot: Array, others: Array, coefficients: Array, out: Array) -> None:
    """`evomerge.methods.arithmetic.affine`: xa + Σ ci (xi − xa), with the pivot xa left out of `others`."""
    for at in range(0, pivot.size, TILE):
        n = min(TILE, pivot.size - at)
        ours, result = pivot[at : at + n], out[at : at + n]
        for j in range(n):
            result[j] = ours[j]
        for k in range(others.shape[0]):
            theirs, coefficient = others[k, at : at + n], coefficients[k]
            for j in range(n):
                result[j] += (theirs[j] - ours[j]) * coefficient


@kernel
def weighted_sum(tensors: Array, coefficients: Array, out: Array) -> None:
    """`evomerge.methods.arithmetic.weighted_sum`: Σ ci xi, added in order."""
    for at in range(0, out.size, TILE):
        result = out[at : min(out.size, at + TILE)]
        for j in range(result.size):
            result[j] = np.float32(-0.0)  # so that a first term of -0 stays -0
        for k in range(tensors.shape[0]):
            theirs, coefficient = tensors[k, at : at + result.size], coefficients[k]
            for j in range(result.size):
                result[j] += theirs[j] * coefficient


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
    spread: Array,
) -> None:
    """`evomerge.methods.dfs`, mode `position`, of one tile: the mean delta, and in `spread` its certainty."""
    zero, one, far = np.float32(0.0), np.float32(1.0), np.float32(1e18)
    count = sources.shape[0]
    equal = np.float32(1.0 / count)
    n = base.size
    first, pivot = sources[0, at : at + n], sources[anchor, at : at + n]
    for j in range(n):
        mean[j] = pivot[j] - base[j]
        centre[j] = first[j] - base[j]
        spread[j] = zero
    for k in range(count):
        theirs, share = sources[k, at : at + n], shares[k]
        if k != anchor:
            for j in range(n):
                mean[j] += ((theirs[j] - base[j]) - (pivot[j] - base[j])) * share
        if k != 0:
            for j in range(n):
                centre[j] += ((theirs[j] - base[j]) - (first[j] - base[j])) * equal
    for k in range(count):
        theirs = sources[k, at : at + n]
        for j in range(n):
            ratio = ((theirs[j] - base[j]) - centre[j]) / mean[j]
            ratio = far if ratio > far else ratio
            ratio = -far if ratio < -far else ratio
            spread[j] += ratio * ratio * equal
    for j in range(n):
        certain = one / (spread[j] * tau + one)
        spread[j] = zero if mean[j] == zero else certain


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
    mean, centre, spread = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for at in range(0, base.size, TILE):
        n = min(TILE, base.size - at)
        ours, result = base[at : at + n], out[at : at + n]
        _certainty(ours, sources, at, shares, anchor, tau, mean, centre, spread)
        for j in range(n):
            mean[j] *= spread[j]
        if threshold >= np.float32(0.0):
            equals = min(max(last - start - at + 1, 0), n)
            for j in range(equals):
                mean[j] *= np.float32(spread[j] >= threshold)
            for j in range(equals, n):
                mean[j] *= np.float32(spread[j] > threshold)
        if scale == np.float32(1.0):
            land(ours, sources, at, mean, result)
        else:
            for j in range(n):
                result[j] = mean[j] * scale + ours[j]


@kernel
def by_row(
    pivot: Array, others: Array, start: int, length: int, of_pivot: Array, coefficients: Array, out: Array
) -> None:
    """ca xa + Σ ci (xi − xa) with coefficients of its own for each vector along the last dimension.

    Args:
        pivot: xa, float32 [n].
        others: The xi, float32 [others, n].
        start: Flat index of the first element.
        length: Of a vector.
        of_pivot: ca, float32 [vectors].
        coefficients: ci, float32 [others, vectors].
        out: float32 [n].
    """
    at = 0
    while at < pivot.size:
        vector = (start + at) // length
        n = min(TILE, pivot.size - at, (vector + 1) * length - start - at)
        ours, result, own = pivot[at : at + n], out[at : at + n], of_pivot[vector]
        for j in range(n):
            result[j] = ours[j] * own
        for k in range(others.shape[0]):
            theirs, coefficient = others[k, at : at + n], coefficients[k, vector]
            for j in range(n):
                result[j] += (theirs[j] - ours[j]) * coefficient
        at += n


@kernel
def by_column(pivot: Array, others: Array, start: int, of_pivot: Array, coefficients: Array, out: Array) -> None:
    """As `by_row`, with coefficients for each vector along the first dimension: [vectors] and [others, vectors]."""
    at, columns = 0, of_pivot.size
    while at < pivot.size:
        first = (start + at) % columns
        n = min(TILE, pivot.size - at, columns - first)
        ours, result, own = pivot[at : at + n], out[at : at + n], of_pivot[first : first + n]
        for j in range(n):
            result[j] = ours[j] * own[j]
        for k in range(others.shape[0]):
            theirs, coefficient = others[k, at : at + n], coefficients[k, first : first + n]
            for j in range(n):
                result[j] += (theirs[j] - ours[j]) * coefficient[j]
        at += n


@kernel
def nearswap(base: Array, pivot: Array, others: Array, coefficients: Array, reach: np.float32, out: Array) -> None:
    """`evomerge.methods.nearswap`: towards xa + Σ ci (xi − xa), by at most `reach`.

    Args:
        base, pivot: θ0 and xa, float32 [n].
        others: The xi, float32 [others, n].
        coefficients: ci, float32.
        reach: float32, not negative.
        out: float32 [n].
    """
    affine(pivot, others, coefficients, out)
    for j in range(base.size):
        delta = out[j] - base[j]
        near = base[j] + min(max(delta, -reach), reach)
        out[j] = out[j] if abs(delta) <= reach else near
