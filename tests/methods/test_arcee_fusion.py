"""Arcee Fusion by hand."""

from __future__ import annotations

import math

import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.methods.arcee_fusion import divergence, quartile_ranks, relative, threshold
from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.registry import METHODS

FUSION = METHODS["arcee_fusion"]


def test_the_divergence_of_two_coins() -> None:
    # logits (ln 3, 0) are (3/4, 1/4), against (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2); equal rows: 0
    rows, base = torch.tensor([[math.log(3.0), 0.0], [5.0, 5.0]]), torch.zeros(2, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(rows, base).tolist() == pytest.approx([expected, 0.0], abs=1e-7)
    assert relative(divergence(rows, base)).tolist() == [[1.0], [0.0]]


def test_divergences_of_tiny_deltas_are_not_lost() -> None:
    base = torch.linspace(-0.1, 0.1, 500).view(1, -1)
    delta = 1e-5 * torch.linspace(-1.0, 1.0, 500).sin().view(1, -1)
    # half the variance of the delta, to first order
    assert float(divergence(base + delta, base)) == pytest.approx(float(delta.double().var() / 2), rel=0.05)


def test_quartiles_and_threshold() -> None:
    # of 9 values the quartiles are at places 2, 4, 6 from the smallest (0): 7, 5, 3 from the largest (1)
    assert quartile_ranks(9) == [7, 5, 3]
    assert quartile_ranks(1) == [1, 1, 1]
    # of 6 (places 0 to 5): floor(5/4) = 1, floor(10/4) = 2, floor(15/4) = 3
    assert quartile_ranks(6) == [5, 4, 3]
    assert threshold([1.0, 2.0, 4.0]) == 6.5
    assert threshold([0.0, 0.1, 0.0]) >= 0.1


def test_what_stands_out_is_taken() -> None:
    # one row, so importance goes by magnitude: quartiles of 1 .. 9 and 100 (10 values): places 2, 4, 6: 3, 5, 7
    # threshold 5 + 1.5 (7 − 3) = 11: only the 100 is taken
    delta = 1e-3 * torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0, -6.0, 7.0, 8.0, 9.0, -100.0])
    base = torch.zeros(10)
    merged = merge_tensors(FUSION, base, [delta], FUSION.settings([{}]))
    assert merged.tolist() == [0.0] * 9 + [delta[9].item()]


def test_a_row_that_stays_a_distribution_is_not_important() -> None:
    # the second row is shifted as a whole: its softmax, and so its divergence, does not change
    base = torch.zeros(2, 8)
    source = torch.stack([torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, -1.0]), torch.full((8,), 2.0)])
    source[0] += 0.01 * torch.arange(8)
    merged = merge_tensors(FUSION, base, [source], FUSION.settings([{}]))
    assert merged[1].tolist() == [0.0] * 8
    assert merged[0, 6] == source[0, 6]


def test_equal_models_give_that_model() -> None:
    base = torch.linspace(-1.0, 1.0, 12).view(3, 4)
    assert torch.equal(merge_tensors(FUSION, base, [base.clone()], FUSION.settings([{}])), base)


def test_two_fine_tunes_are_too_many() -> None:
    with pytest.raises(RecipeError, match="arcee_fusion: takes 1 to 1 sources, got 2"):
        merge_tensors(FUSION, torch.zeros(2), [torch.ones(2)] * 2, FUSION.settings([{}, {}]))
