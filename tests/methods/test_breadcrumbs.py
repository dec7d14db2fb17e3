"""Breadcrumbs by hand, and how many elements its band keeps."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.methods.plain_statistics import PlainStatistics, merge_tensors
from evomerge.methods.registry import METHODS
from evomerge.methods.topk import band_counts, cutoff_mask

CRUMBS, TIES = METHODS["breadcrumbs"], METHODS["breadcrumbs_ties"]


def merge(rows: list[list[float]], density: float, gamma: float, name: str = "breadcrumbs", **shared: Any) -> Any:
    sources = [torch.tensor(row) for row in rows]
    method = METHODS[name]
    own = [{"weight": 1.0, "density": density, "gamma": gamma} for _ in rows]
    return merge_tensors(method, torch.zeros_like(sources[0]), sources, method.settings(own, shared)).tolist()


def test_the_largest_and_the_smallest_are_left_out() -> None:
    # of ten, floor(0.2 · 10) = 2 outliers (9, −8) are left out, then floor(0.3 · 10) = 3 kept: 7, −6, 5
    row = [1.0, -8.0, 3.0, 7.0, 0.5, 5.0, 9.0, -6.0, 2.0, 4.0]
    assert merge([row], 0.3, 0.2) == [0.0, 0.0, 0.0, 7.0, 0.0, 5.0, 0.0, -6.0, 0.0, 0.0]
    # density 0.9 leaves room for one outlier only; density 1 for none
    assert merge([row], 0.9, 0.2) == [*row[:6], 0.0, *row[7:]]
    assert merge([row], 1.0, 0.2) == row


def test_of_equals_the_lower_index_counts_as_larger() -> None:
    # order: the four 2s by index, then the 1: one outlier (index 0), two kept (indices 1 and 2)
    assert merge([[2.0, 2.0, 2.0, 1.0, 2.0]], 0.4, 0.2) == [0.0, 2.0, 2.0, 0.0, 0.0]


def test_what_is_left_is_added_up_or_elected() -> None:
    rows = [[9.0, 2.0, -1.0, 0.0], [-9.0, -3.0, 1.0, 0.0]]
    # each keeps its second largest (one outlier, one kept): 2 and −3
    assert merge(rows, 0.25, 0.25, **{"lambda": 0.5}) == [0.0, -0.5, 0.0, 0.0]
    assert merge(rows, 0.25, 0.25, normalize=True) == [0.0, -0.5, 0.0, 0.0]
    assert merge(rows, 0.25, 0.25, "breadcrumbs_ties") == [0.0, -3.0, 0.0, 0.0]


@given(
    steps=st.lists(st.integers(-3, 3), min_size=1, max_size=40), density=st.floats(0.0, 1.0), gamma=st.floats(0.0, 1.0)
)
def test_the_band_is_exact_and_nested(steps: list[int], density: float, gamma: float) -> None:
    delta = torch.tensor(steps, dtype=torch.float32)
    statistics = PlainStatistics(torch.zeros_like(delta), [delta])

    def band(density: float) -> torch.Tensor:
        outliers, inside = statistics.band(0, density, gamma)
        return cutoff_mask(delta.abs(), *inside) & ~cutoff_mask(delta.abs(), *outliers)

    n, mask = len(steps), band(density)
    keep = math.floor(density * n)  # as mergekit: none at all where that is less than one
    assert int(mask.sum()) == keep
    outliers, inside = band_counts(n, density, gamma)
    assert (outliers, inside) == (min(math.floor(gamma * n), n - keep), outliers + keep)
    assert not (mask & ~band(min(1.0, density + 0.1))).any()
