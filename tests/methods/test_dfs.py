"""DFS by hand, and what is claimed of the formula it is named after."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.registry import METHODS
from evomerge.testing.methods import family, run

DFS = METHODS["dfs"]


def merge(rows: list[list[float]], weights: list[float] | None = None, **shared: Any) -> list[float]:
    """DFS of deltas on a base of zeros."""
    sources = [torch.tensor(row, dtype=torch.float32) for row in rows]
    chosen = DFS.settings([{"weight": w} for w in weights or [1.0] * len(rows)], shared)
    return merge_tensors(DFS, torch.zeros_like(sources[0]), sources, chosen).tolist()


@given(st.lists(st.lists(st.floats(-10, 10), min_size=5, max_size=5), min_size=2, max_size=5))
def test_the_published_formula_is_the_plain_mean(rows: list[list[float]]) -> None:
    """importance = 1 / (variance across models) is the same for every model: Σ importance θi / Σ importance = mean."""
    models = np.array(rows)
    importance = np.broadcast_to(1.0 / (models.var(axis=0) + 1e-8), models.shape)
    published = (importance * models).sum(axis=0) / importance.sum(axis=0)
    np.testing.assert_allclose(published, models.mean(axis=0), rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), weights=st.lists(st.floats(0.1, 2.0), min_size=3, max_size=3))
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_gamma_zero_is_the_weighted_mean(scope: str, seed: int, weights: list[float]) -> None:
    base, sources = family(seed, 3, (4, 7))
    merged = run(DFS, base, sources, weights, {"gamma": 0.0, "scope": scope})
    linear = run(METHODS["linear"], base, sources, weights, {})
    torch.testing.assert_close(merged, linear, rtol=1e-5, atol=1e-6)


def test_models_weigh_by_their_own_variance() -> None:
    # deltas ±1 (v = 1) and ±2 (v = 4): α ∝ 1, 1/4, so 0.8 and 0.2: 0.8·1 + 0.2·2 = 1.2
    rows = [[1.0, -1.0], [2.0, -2.0]]
    assert merge(rows) == pytest.approx([1.2, -1.2], rel=1e-6)
    # γ = 2: 1, 1/16: (16·1 + 1·2)/17; γ = 0: 1.5; weights 1, 4 even the variances out: 1.5
    assert merge(rows, gamma=2.0) == pytest.approx([18 / 17, -18 / 17], rel=1e-6)
    assert merge(rows, gamma=0.0) == [1.5, -1.5]
    assert merge(rows, [1.0, 4.0]) == pytest.approx([1.5, -1.5], rel=1e-6)


def test_small_variances_are_floored() -> None:
    # v = 0 and 1, mean 0.5, floor 0.05: α ∝ 20, 1: (20·3 + 1·1)/21 and (20·3 − 1)/21
    assert merge([[3.0, 3.0], [1.0, -1.0]]) == pytest.approx([61 / 21, 59 / 21], rel=1e-6)


def test_without_any_variance_it_is_the_weighted_mean() -> None:
    assert merge([[0.0, 0.0], [0.0, 0.0]]) == [0.0, 0.0]
    # constant deltas have no variance either: (1·2 + 3·6)/4
    assert merge([[2.0, 2.0], [6.0, 6.0]], [1.0, 3.0]) == [5.0, 5.0]


def test_rows_weigh_on_their_own() -> None:
    # row 0: v = 1, 4, so 0.8, 0.2 as above; row 1: v = 4, 1, so 0.2, 0.8: 0.2·2 + 0.8·(−1) = −0.4
    rows: list[list[list[float]]] = [[[1, -1], [2, -2]], [[2, -2], [-1, 1]]]
    merged = merge(rows, scope="row")  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor(merged), torch.tensor([[1.2, -1.2], [-0.4, 0.4]]))
    # a vector is one row
    assert merge([[1.0, -1.0], [2.0, -2.0]], scope="row") == pytest.approx([1.2, -1.2], rel=1e-6)


def test_positions_shrink_where_models_disagree() -> None:
    # element 0: 1 and 3: mean 2, variance 1, s = 4 / (4 + 1/2) = 8/9: 16/9
    # element 1: 2 and 2: variance 0, s = 1: 2. Element 2: 1 and −1: mean 0: 0. Element 3: 0/0 = 0
    rows = [[1.0, 2.0, 1.0, 0.0], [3.0, 2.0, -1.0, 0.0]]
    assert merge(rows, mode="position") == pytest.approx([16 / 9, 2.0, 0.0, 0.0], rel=1e-6)
    # τ = 4: 4 / (4 + 2) = 2/3; τ = 0: no shrinkage
    assert merge(rows, mode="position", tau=4.0) == pytest.approx([4 / 3, 2.0, 0.0, 0.0], rel=1e-6)
    assert merge(rows, mode="position", tau=0.0) == [2.0, 2.0, 0.0, 0.0]
    # weights 3, 1: mean 1.5, s = 2.25 / (2.25 + 0.5): the variance itself is unweighted
    assert merge(rows, [3.0, 1.0], mode="position")[0] == pytest.approx(1.5 * 2.25 / 2.75, rel=1e-6)


def test_positions_keep_the_surest() -> None:
    # s: 8/9, 1, 0, 1 (index order wins): floor(0.5 · 4) = 2 keeps the two ones, floor(0.25 · 4) = 1 the first of them
    rows = [[1.0, 2.0, 1.0, 5.0], [3.0, 2.0, -1.0, 5.0]]
    assert merge(rows, mode="position", density=0.5) == [0.0, 2.0, 0.0, 5.0]
    assert merge(rows, mode="position", density=0.25) == [0.0, 2.0, 0.0, 0.0]


def test_tiny_deltas_do_not_underflow() -> None:
    # squares of 1e-30 are below float32; s = 8/9 all the same
    merged = merge([[1e-30], [3e-30]], mode="position")
    assert merged == pytest.approx([16 / 9 * 1e-30], rel=1e-5)


def test_what_it_has_to_see_at_once() -> None:
    def granularity(**shared: Any) -> str:
        return DFS.granularity(DFS.settings([{}], shared))

    assert granularity() == "element"
    assert granularity(scope="row") == "row"
    assert granularity(mode="position", scope="row") == "element"
    assert granularity(mode="position", density=0.5) == "tensor"
