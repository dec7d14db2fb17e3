"""Singular values and vectors of tall matrices through the eigenvectors of their small Gram matrix, in float64.

A float32 matrix has singular values down to about 1e-7 of the largest; the Gram matrix has their squares, which float64
holds. So nothing is lost against a float32 SVD, and it is several times cheaper. Rows are widened a few thousand at a
time: a vocabulary's matrix is never held twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NOTHING = 1e-6
"""A singular value below this part of the largest is rounding: its vectors are arbitrary, and are left out."""

DEPENDENT = 1e-10
"""An eigenvalue of unit vectors' Gram matrix below this part of the largest: that many of them are dependent."""

_ROWS = 4096


def tall(matrix: Tensor) -> Tensor:
    """Returns the matrix, or its transpose where that has more rows than columns."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _widened(matrix: Tensor) -> Iterator[Tensor]:
    for start in range(0, matrix.shape[0], _ROWS):
        yield matrix[start : start + _ROWS].double()


def gram(matrix: Tensor) -> Tensor:
    """AᵀA, float64 [n, n], of A [m, n]."""
    import torch

    result = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in _widened(matrix):
        result.addmm_(rows.T, rows)
    return result


def times(matrix: Tensor, small: Tensor) -> Tensor:
    """Multiplies A · B, added up in float64 and rounded once: float32 [m, k], of A [m, n] and a float64 B [n, k]."""
    result = matrix.new_empty(matrix.shape[0], small.shape[1])
    for start, rows in zip(range(0, matrix.shape[0], _ROWS), _widened(matrix), strict=True):
        result[start : start + _ROWS] = rows @ small
    return result


def right_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and right singular vectors of A [m, n]: float64 [r] and [n, r], r its rank."""
    import torch

    squares, vectors = torch.linalg.eigh(gram(matrix))
    values = squares.clamp(min=0.0).sqrt().flip(0)
    rank = int((values > NOTHING * values[:1]).sum())
    return values[:rank], vectors.flip(1)[:, :rank]


def left_vectors(matrix: Tensor) -> Tensor:
    """Left singular vectors of any matrix [m, n], of its own dtype: [m, r], r its rank."""
    if matrix.numel() == 0:
        return matrix.new_zeros(matrix.shape[0], 0)
    values, vectors = right_vectors(tall(matrix))
    return times(matrix, vectors / values) if matrix.shape[0] >= matrix.shape[1] else vectors.to(matrix.dtype)


def orthogonal(vectors: Tensor) -> Tensor:
    """The orthonormal vectors nearest to these: U Vᵀ of X = U Σ Vᵀ (orthogonal Procrustes), float32 like X [n, k].

    Of vectors that depend on each other it is the part within their span, which unlike U Vᵀ is unique.
    """
    import torch

    squares, basis = torch.linalg.eigh(gram(vectors))
    independent = squares > DEPENDENT * squares[-1:]
    inverse = torch.where(independent, squares, 1.0).rsqrt() * independent
    return times(vectors, (basis * inverse) @ basis.T)
