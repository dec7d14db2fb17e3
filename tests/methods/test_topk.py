"""Keeping exactly the top elements, with many ties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.methods.plain_statistics import PlainStatistics
from evomerge.methods.topk import cutoff, cutoff_mask, density_mask, keep_count, trim
from tests.methods.references import largest

tied = st.lists(st.integers(-3, 3), min_size=1, max_size=60)


@given(n=st.integers(0, 10**9), density=st.floats(0, 1))
def test_the_count_is_the_floor_but_never_nothing(n: int, density: float) -> None:
    count = keep_count(n, density)
    assert count == (min(n, max(1, math.floor(density * n))) if density > 0 else 0)


def test_counts_by_hand() -> None:
    assert keep_count(10, 0.0) == 0
    assert keep_count(10, 0.05) == 1  # floor(0.5) = 0, but at least 1
    assert keep_count(10, 0.39) == 3
    assert keep_count(10, 1.0) == 10


@given(values=tied, density=st.floats(0, 1))
def test_the_lower_index_wins_among_equals(values: list[int], density: float) -> None:
    scores = torch.tensor(values, dtype=torch.float32).abs()
    mask = density_mask(scores, density)
    assert int(mask.sum()) == keep_count(len(values), density)
    assert np.array_equal(mask.numpy(), largest(np.array(values, dtype=float), density))


def test_a_row_by_hand() -> None:
    # magnitudes 2 1 3 1 2 1: the top 4 are 3, 2, 2 and the first of the ones, at index 1
    scores = torch.tensor([2.0, 1.0, 3.0, 1.0, 2.0, 1.0])
    assert cutoff(scores, 4) == (1.0, 1)
    assert density_mask(scores, 4 / 6).tolist() == [True, True, True, False, True, False]
    # the top 2: the 3 and the first 2, at index 0
    assert cutoff(scores, 2) == (2.0, 0)
    assert cutoff(scores, 0) == (math.inf, -1)


@given(values=tied, density=st.floats(0, 1), cuts=st.lists(st.integers(0, 60)))
def test_blocks_know_their_own_kept_elements(values: list[int], density: float, cuts: list[int]) -> None:
    delta = torch.tensor(values, dtype=torch.float32) * 0.1
    threshold, last = PlainStatistics(torch.zeros_like(delta), [delta]).trim(0, density)
    edges = sorted({0, len(values), *(c for c in cuts if c < len(values))})
    spans = list(itertools.pairwise(edges))
    mask = torch.cat([cutoff_mask(delta[a:b].abs(), threshold, last, a) for a, b in spans])
    trimmed = torch.cat([trim(delta[a:b], threshold, last, a) for a, b in spans])
    assert torch.equal(mask, density_mask(delta.abs(), density))
    assert torch.equal(trimmed, delta * mask)


def test_the_mask_has_the_shape_of_the_scores() -> None:
    scores = torch.arange(12.0).reshape(3, 4)
    assert density_mask(scores, 0.25).nonzero().tolist() == [[2, 1], [2, 2], [2, 3]]
    assert density_mask(scores.t(), 0.25).nonzero().tolist() == [[1, 2], [2, 2], [3, 2]]
