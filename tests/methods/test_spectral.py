"""The spectral methods: their linear algebra against numpy's SVD, small cases by hand, and what has no direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.methods import spectral
from evomerge.methods.iso_c import isotropic
from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.registry import METHODS
from evomerge.testing.methods import family

SPECTRAL = ["tsv_merge", "iso_c"]


def merge(name: str, base: Tensor, sources: Sequence[Tensor], weights: Sequence[float], **shared: Any) -> Tensor:
    method = METHODS[name]
    return merge_tensors(method, base, sources, method.settings([{"weight": w} for w in weights], shared))


def matrix(seed: int, rows: int, columns: int, decay: float = 0.0) -> Tensor:
    """A random matrix whose singular values fall by 10^-decay from the first to the last."""
    generator = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(generator.normal(size=(rows, columns)), full_matrices=False)
    return torch.from_numpy(u * 10.0 ** -np.linspace(0, decay, len(vt)) @ vt).float()


# ---------------------------------------------------------------- linear algebra


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 30), columns=st.integers(1, 30), decay=st.sampled_from([0.0, 3.0]))
def test_singular_values_and_vectors_are_those_of_an_svd(seed: int, rows: int, columns: int, decay: float) -> None:
    standing = spectral.tall(matrix(seed, rows, columns, decay))
    values, vectors = spectral.right_vectors(standing)
    exact = torch.linalg.svdvals(standing.double())
    torch.testing.assert_close(values, exact, rtol=1e-6, atol=0.0)
    left = spectral.times(standing, vectors / values).double()
    torch.testing.assert_close((left * values) @ vectors.T, standing.double(), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(left.T @ left, torch.eye(len(values), dtype=torch.float64), rtol=0.0, atol=1e-5)


def test_rows_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    standing, small = matrix(1, 23, 5), matrix(2, 5, 3).double()
    gram, product = spectral.gram(standing), spectral.times(standing, small)
    monkeypatch.setattr(spectral, "_ROWS", 4)
    torch.testing.assert_close(spectral.gram(standing), gram, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(spectral.times(standing, small), product)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(3, 30), columns=st.integers(1, 3))
def test_the_nearest_orthonormal_vectors(seed: int, rows: int, columns: int) -> None:
    vectors = matrix(seed, rows, columns, 1.0)
    u, _, vt = torch.linalg.svd(vectors.double(), full_matrices=False)
    torch.testing.assert_close(spectral.orthogonal(vectors).double(), u @ vt, rtol=0.0, atol=1e-5)


def test_vectors_that_depend_share_their_span() -> None:
    # (1, 0) twice: the span is the x axis, and each gets √½ of it
    twice = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(spectral.orthogonal(twice), twice * math.sqrt(0.5))


# ---------------------------------------------------------------- iso_c


def test_iso_c_by_hand() -> None:
    # Σδ = diag(3, 1): σ̄ = 2, U = V = I. Two deltas of diag(1.5, 0.5) are that sum; with λ = 1/2: the base plus I
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    half = torch.diag(torch.tensor([1.5, 0.5]))
    merged = merge("iso_c", base, [base + half, base + half], [1, 1], **{"lambda": 0.5})
    torch.testing.assert_close(merged, base + torch.eye(2))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 20), columns=st.integers(1, 20))
def test_iso_c_has_one_singular_value(seed: int, rows: int, columns: int) -> None:
    delta = matrix(seed, rows, columns, 2.0)
    values = torch.linalg.svdvals(isotropic(delta).double())
    torch.testing.assert_close(values, torch.full_like(values, float(torch.linalg.svdvals(delta.double()).mean())))


def test_iso_c_leaves_directions_alone_that_no_task_uses() -> None:
    # Σδ = 4 e1 e1ᵀ in 2 x 2: σ̄ = (4 + 0) / 2, and the second direction has no vectors to scale
    delta = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(isotropic(delta), delta / 2)
    assert torch.equal(isotropic(torch.zeros(3, 2)), torch.zeros(3, 2))


# ---------------------------------------------------------------- tsv_merge


def test_tsv_merge_by_hand() -> None:
    # K = 2 of 2 x 2: the top one of each. δ1 = diag(3, 1): e1, e1, 3. δ2 = diag(1, 2): e2, e2, 2. They are orthogonal
    # already: the merge is diag(3, 2)
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    sources = [base + torch.diag(torch.tensor([3.0, 1.0])), base + torch.diag(torch.tensor([1.0, 2.0]))]
    torch.testing.assert_close(merge("tsv_merge", base, sources, [1, 1]), base + torch.diag(torch.tensor([3.0, 2.0])))
    # weights 3 : 1 over their mean are 1.5 and 0.5
    merged = merge("tsv_merge", base, sources, [3, 1], **{"lambda": 2.0})
    torch.testing.assert_close(merged, base + torch.diag(torch.tensor([9.0, 2.0])))


def test_tsv_merge_decorrelates() -> None:
    # δ1 = a aᵀ and δ2 = b bᵀ with a at 0° and b at 60°: the nearest orthonormal pair is at −15° and 75°
    def outer(degrees: float) -> Tensor:
        v = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
        return torch.outer(v, v)

    merged = merge("tsv_merge", torch.zeros(2, 2), [outer(0), outer(60)], [1, 1])
    torch.testing.assert_close(merged, outer(-15) + outer(75), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_tsv_merge_of_equal_tasks_is_the_task(shape: tuple[int, int]) -> None:
    base, (source, other) = family(1, 2, shape)
    for weights in ([1.0], [0.4, 0.9], [1.0, 1.0, 1.0]):
        assert torch.equal(merge("tsv_merge", base, [source] * len(weights), weights), source)
    # in pairs they count once, at the mean of their weights
    torch.testing.assert_close(
        merge("tsv_merge", base, [source, other, source], [1.0, 1.0, 1.0]),
        merge("tsv_merge", base, [source, other], [1.0, 1.0]),
    )


def test_a_task_without_a_delta_adds_nothing() -> None:
    # δ2 = 0 has no singular vectors: the top half of δ1 = diag(4, 3, 2, 1) stays
    base = torch.ones(4, 4)
    merged = merge("tsv_merge", base, [base + torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), base], [1, 1])
    torch.testing.assert_close(merged, base + torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0])))


def test_more_tasks_than_dimensions_keep_one_vector_each() -> None:
    base, sources = family(3, 5, (3, 8))
    assert torch.isfinite(merge("tsv_merge", base, sources, [1.0] * 5)).all()


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_the_order_of_tasks_does_not_matter(name: str, shape: tuple[int, int]) -> None:
    base, sources = family(2, 3, shape)
    merged = merge(name, base, sources, [1.0, 0.5, 0.7])
    torch.testing.assert_close(merge(name, base, sources[::-1], [0.7, 0.5, 1.0]), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_transposed_tensor_gives_the_transposed_merge(name: str) -> None:
    base, sources = family(2, 3, (12, 5))
    merged = merge(name, base, sources, [1.0, 0.5, 0.7])
    flipped = merge(name, base.T.contiguous(), [s.T.contiguous() for s in sources], [1.0, 0.5, 0.7])
    torch.testing.assert_close(flipped, merged.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SPECTRAL)
def test_what_is_no_matrix_is_averaged(name: str) -> None:
    # (1 · 4 + 3 · 8) / 4 = 7 times λ = 2
    for shape in ((3,), (2, 1, 2), ()):
        merged = merge(
            name, torch.zeros(shape), [torch.full(shape, 4.0), torch.full(shape, 8.0)], [1, 3], **{"lambda": 2}
        )
        torch.testing.assert_close(merged, torch.full(shape, 14.0))
    base, sources = family(2, 2, (3, 3))
    merged = merge(name, base, sources, [1, 3], spectral=False)
    torch.testing.assert_close(merged, (sources[0] + 3 * sources[1]) / 4)


@pytest.mark.parametrize("name", SPECTRAL)
def test_only_the_ratio_of_weights_counts(name: str) -> None:
    base, sources = family(4, 3, (7, 5))
    merged = merge(name, base, sources, [0.2, 0.5, 0.3])
    torch.testing.assert_close(merge(name, base, sources, [2, 5, 3]), merged)
