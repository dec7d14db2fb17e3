"""SVC, the stage: against the formula by an SVD, by hand, and where it is off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.methods import svc
from evomerge.methods.contract import Settings
from evomerge.methods.plain_statistics import PlainStatistics
from evomerge.testing.methods import family


def calibrated(base: Tensor, sources: list[Tensor], merged: Tensor, **values: float) -> Tensor:
    shared: dict[str, Any] = {"svc_strength": 1.0, "svc_alpha": 1.0} | values
    block = PlainStatistics(base, sources).block("tensor")
    return svc.apply(block, merged.clone(), Settings(shared))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 4),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    alpha=st.sampled_from([1.0, 0.5, 0.2]),
    scale=st.sampled_from([0.3, 1.0, 2.0]),
)
def test_singular_values_are_divided_by_how_often_the_sources_are_in_them(
    seed: int, count: int, shape: tuple[int, int], alpha: float, scale: float
) -> None:
    """In float64, from an SVD: the paper's equations."""
    base, sources = family(seed, count, shape)
    base, sources = base.double(), [source.double() for source in sources]
    deltas = [(source - base).numpy() for source in sources]
    merged = base + scale * torch.from_numpy(sum(deltas))
    left, values, right = np.linalg.svd((merged - base).numpy(), full_matrices=False)
    factors = []
    for k in range(len(values)):
        own = [left[:, k] @ delta for delta in deltas]
        parts = [max(alpha, values[k] * right[k] @ a / (a @ a)) for a in own]
        factors.append(count / sum(parts))
    expected = base.numpy() + left * (values * factors) @ right
    got = calibrated(base, sources, merged, svc_alpha=alpha)
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_what_two_sources_share_is_halved_and_what_is_ones_own_stays() -> None:
    # both deltas have diag(1, ·); their sum has diag(2, ·): s = 2 for both, γ = 2 / (2 + 2). In the second direction
    # only the first one moves: s = 1, and the other, that does not, counts as alpha = 1
    base = torch.zeros(2, 2)
    first, second = torch.diag(torch.tensor([1.0, 0.5])), torch.diag(torch.tensor([1.0, 0.0]))
    got = calibrated(base, [first, second], first + second)
    torch.testing.assert_close(got, torch.diag(torch.tensor([1.0, 0.5])), rtol=1e-6, atol=1e-7)
    half = calibrated(base, [first, second], first + second, svc_strength=0.5)
    torch.testing.assert_close(half, torch.diag(torch.tensor([1.5, 0.5])), rtol=1e-6, atol=1e-7)


def test_a_small_alpha_lets_grow_what_an_average_has_shrunk() -> None:
    # the mean of diag(1, 0) and diag(0, 1): s = 1/2 for the one that moves, alpha for the other: γ = 2 / (1/2 + 1/4)
    base = torch.zeros(2, 2)
    first, second = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    got = calibrated(base, [first, second], (first + second) / 2, svc_alpha=0.25)
    torch.testing.assert_close(got, torch.eye(2) * 0.5 * 2 / 0.75)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 4)])
def test_a_source_that_is_the_merge_stays_as_it_is(shape: tuple[int, int]) -> None:
    base, (source,) = family(3, 1, shape)
    assert torch.equal(calibrated(base, [source], source), source)
    assert torch.equal(calibrated(base, [base], base), base)  # no direction at all


def test_it_leaves_alone_what_is_no_matrix() -> None:
    assert [svc.STAGE.shapes(shape) for shape in ((), (3,), (3, 4), (2, 3, 4))] == [False, False, True, False]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), strength=st.floats(0.0, 1.0))
def test_the_strength_mixes(seed: int, strength: float) -> None:
    base, sources = family(seed, 3, (7, 5))
    merged = base + sum(source - base for source in sources)
    whole = calibrated(base, sources, merged)
    got = calibrated(base, sources, merged, svc_strength=strength)
    torch.testing.assert_close(got, merged + strength * (whole - merged), rtol=1e-5, atol=1e-5)
