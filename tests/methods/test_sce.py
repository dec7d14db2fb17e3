"""SCE by hand: select, calculate, erase."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.methods.plain_statistics import PlainStatistics, merge_tensors
from evomerge.methods.registry import METHODS
from evomerge.methods.sce import element_variance

SCE = METHODS["sce"]


def merge(rows: list[list[float]], fraction: float = 1.0) -> list[float]:
    sources = [torch.tensor(row) for row in rows]
    chosen = SCE.settings([{} for _ in rows], {"select_topk": fraction})
    return merge_tensors(SCE, torch.zeros_like(sources[0]), sources, chosen).tolist()


def test_weights_are_shares_of_squares_and_minorities_are_erased() -> None:
    # squares: 1 + 4 = 5 and 9 + 1 = 10, weights 1/3 and 2/3
    # element 0: 1 + 3 > 0, both agree: 1/3 + 2 = 7/3; element 1: −2 + 1 < 0, the first alone: −2
    assert merge([[1.0, -2.0], [3.0, 1.0]]) == pytest.approx([7 / 3, -2.0], rel=1e-6)
    # the vote has no weights: 2 − 3 < 0 however small the second model's share is
    assert merge([[2.0, 90.0], [-3.0, 0.0]])[0] == pytest.approx(-3.0)


def test_only_elements_on_which_the_models_differ_are_selected() -> None:
    # variances 0, 1, 4, 0.25: three differ; floor(0.7 · 3) = 2 selected, the ones of variance 4 and 1
    rows = [[5.0, 3.0, 4.0, 1.0], [5.0, 1.0, 0.0, 2.0]]
    # squares of what is selected: 9 + 16 = 25, and 1: weights 25/26 and 1/26
    assert merge(rows, 0.7) == pytest.approx([0.0, (25 * 3 + 1) / 26, 4.0, 0.0], rel=1e-6)
    assert merge(rows, 0.01) == [0.0, 0.0, 4.0, 0.0]  # at least one
    assert merge(rows, 0.0) == [0.0] * 4


def test_of_equal_variances_the_lower_index_is_selected() -> None:
    assert merge([[2.0, 2.0, 2.0, 2.0], [0.0] * 4], 0.5) == [2.0, 2.0, 0.0, 0.0]


def test_one_model_has_no_variance_to_select_by() -> None:
    assert merge([[1.0, 2.0]], 0.5) == [0.0, 0.0]
    assert merge([[1.0, 2.0]]) == [1.0, 2.0]


def test_small_deltas_are_weighed_like_large_ones() -> None:
    """mergekit weighs all models alike where the mean squares sum to less than 1e-6, as those of fine-tunes do."""
    large = merge([[1.0, -2.0], [3.0, 1.0]])
    small = merge([[2.0**-14, -(2.0**-13)], [3 * 2.0**-14, 2.0**-14]])
    assert small == [2.0**-14 * value for value in large]


@given(value=st.floats(-1e4, 1e4, width=32), count=st.integers(1, 7))
def test_equal_deltas_have_no_variance(value: float, count: int) -> None:
    assert element_variance([torch.tensor([value])] * count).tolist() == [0.0]


def test_the_selection_weighs_what_it_keeps() -> None:
    sources = [torch.tensor([2.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])]
    cut, squares = PlainStatistics(torch.zeros(3), sources).selection(0.5)  # variances 1, 0, 0.25: one of two
    assert cut == (1.0, 0)
    assert squares == [4.0, 0.0]
