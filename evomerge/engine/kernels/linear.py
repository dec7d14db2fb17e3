"""Kernels of linear combinations: float32 in, float32 out."""

from __future__ import annotations

import numpy as np

from evomerge.engine.kernels.jit import TILE, Array, kernel


@kernel
def affine(pivot: Array, others: Array, coefficients: Array, out: Array) -> None:
    """`evomerge.methods.arithmetic.affine`: xa + Σ ci (xi − xa), with the pivot xa left out of `others`."""
    for at in range(0, pivot.size, TILE):
        n = min(TILE, pivot.size - at)
        pivot_tile, result = pivot[at : at + n], out[at : at + n]
        for j in range(n):
            result[j] = pivot_tile[j]
        for k in range(others.shape[0]):
            other_tile, coefficient = others[k, at : at + n], coefficients[k]
            for j in range(n):
                result[j] += (other_tile[j] - pivot_tile[j]) * coefficient


@kernel
def weighted_sum(tensors: Array, coefficients: Array, out: Array) -> None:
    """`evomerge.methods.arithmetic.weighted_sum`: Σ ci xi, added in order."""
    for at in range(0, out.size, TILE):
        result = out[at : min(out.size, at + TILE)]
        for j in range(result.size):
            result[j] = np.float32(-0.0)  # so that a first term of -0 stays -0
        for k in range(tensors.shape[0]):
            tile, coefficient = tensors[k, at : at + result.size], coefficients[k]
            for j in range(result.size):
                result[j] += tile[j] * coefficient


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
        pivot_tile, result, own = pivot[at : at + n], out[at : at + n], of_pivot[vector]
        for j in range(n):
            result[j] = pivot_tile[j] * own
        for k in range(others.shape[0]):
            other_tile, coefficient = others[k, at : at + n], coefficients[k, vector]
            for j in range(n):
                result[j] += (other_tile[j] - pivot_tile[j]) * coefficient
        at += n


@kernel
def by_column(pivot: Array, others: Array, start: int, of_pivot: Array, coefficients: Array, out: Array) -> None:
    """As `by_row`, with coefficients for each vector along the first dimension: [vectors] and [others, vectors]."""
    at, columns = 0, of_pivot.size
    while at < pivot.size:
        first = (start + at) % columns
        n = min(TILE, pivot.size - at, columns - first)
        pivot_tile, result, own = pivot[at : at + n], out[at : at + n], of_pivot[first : first + n]
        for j in range(n):
            result[j] = pivot_tile[j] * own[j]
        for k in range(others.shape[0]):
            other_tile, coefficient = others[k, at : at + n], coefficients[k, first : first + n]
            for j in range(n):
                result[j] += (other_tile[j] - pivot_tile[j]) * coefficient[j]
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
