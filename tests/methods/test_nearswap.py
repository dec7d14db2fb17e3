"""NearSwap by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.registry import METHODS
from tests.methods.helpers import numbers

NEARSWAP = METHODS["nearswap"]


def merge(base: Tensor, sources: Sequence[Tensor], weights: Sequence[float], t: float) -> Tensor:
    return merge_tensors(NEARSWAP, base, sources, NEARSWAP.settings([{"weight": w} for w in weights], {"t": t}))


def test_nearly_equal_weights_are_swapped_and_others_move_by_t() -> None:
    # deltas 0.25, −0.5, 1, −2, 0 against t = 0.5
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    other = torch.tensor([1.25, 0.5, 2.0, -1.0, 1.0])
    assert merge(base, [other], [1.0], 0.5).tolist() == [1.25, 0.5, 1.5, 0.5, 1.0]


def test_several_models_are_their_weighted_mean() -> None:
    # (3 · 2 + 1 · 4) / 4 = 2.5 and (3 · 0 + 1 · 0.4) / 4 = 0.1 from a base of 0, t = 1
    merged = merge(torch.zeros(2), [torch.tensor([2.0, 0.0]), torch.tensor([4.0, 0.4])], [3.0, 1.0], 1.0)
    torch.testing.assert_close(merged, torch.tensor([1.0, 0.1]))


@given(base=numbers(torch.float32, 20), source=numbers(torch.float32, 20), t=st.floats(0.0, 1e30))
def test_nothing_moves_further_than_t_or_past_the_other_model(base: Tensor, source: Tensor, t: float) -> None:
    merged = merge(base, [source], [1.0], t)
    moved = (merged.double() - base.double()).abs()
    rounding = 2e-7 * torch.maximum(base.double().abs(), merged.double().abs()) + 1e-44
    assert (moved <= t * (1 + 1e-6) + rounding).all()
    assert (torch.minimum(base, source) <= merged).all()
    assert (merged <= torch.maximum(base, source)).all()


def test_t_of_zero_is_the_base_and_a_large_one_the_other_model() -> None:
    base, other = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.7, 0.8, -0.9])
    assert torch.equal(merge(base, [other], [1.0], 0.0), base)
    assert torch.equal(merge(base, [other], [1.0], 1e300), other)


def test_weights_of_zero_are_refused() -> None:
    with pytest.raises(RecipeError, match="nearswap: the weights sum to zero"):
        merge(torch.zeros(2), [torch.ones(2)], [0.0], 1.0)
