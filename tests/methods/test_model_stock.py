"""Model stock by hand."""

from __future__ import annotations

import math

import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.registry import METHODS

STOCK = METHODS["model_stock"]


def merge(base: torch.Tensor, sources: list[torch.Tensor], filter_wise: bool = False) -> torch.Tensor:
    return merge_tensors(STOCK, base, sources, STOCK.settings([{} for _ in sources], {"filter_wise": filter_wise}))


def test_two_deltas_at_sixty_degrees() -> None:
    # cos 60° = 1/2: t = 2 · 1/2 / (1 + 1/2) = 2/3 of the way to the average (1.5, √3/2) / ... of (1, 0) and (1/2, √3/2)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.5, math.sqrt(3) / 2])
    merged = merge(torch.zeros(2), [a, b])
    torch.testing.assert_close(merged, (a + b) / 2 * 2 / 3)
    # the lengths do not matter to the angle, only to the average
    torch.testing.assert_close(merge(torch.zeros(2), [5 * a, b]), (5 * a + b) / 2 * 2 / 3)


def test_the_cosine_is_the_mean_over_pairs() -> None:
    # pairs: 1 (a, b), 0 (a, c), 0 (b, c): mean 1/3, t = 3 · 1/3 / (1 + 2/3) = 3/5
    a, c = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    torch.testing.assert_close(merge(torch.zeros(2), [a, a, c]), (2 * a + c) / 3 * 3 / 5)


@pytest.mark.parametrize("other", [[0.0, 1.0], [-1.0, 0.0], [-1.0, 1e-3], [0.0, 0.0]])
def test_deltas_with_nothing_in_common_leave_the_base(other: list[float]) -> None:
    base = torch.tensor([0.3, -0.7])
    assert torch.equal(merge(base, [base + torch.tensor([1.0, 0.0]), base + torch.tensor(other)]), base)


def test_filter_wise_takes_the_angle_of_each_row() -> None:
    # first row parallel: the average; second row orthogonal: the base
    base = torch.ones(2, 2)
    a, b = base + torch.tensor([[1.0, 1.0], [1.0, 0.0]]), base + torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    assert merge(base, [a, b], filter_wise=True).tolist() == [[3.0, 3.0], [1.0, 1.0]]
    vector = merge(base[0], [a[0], b[0]], filter_wise=True)
    assert vector.tolist() == [3.0, 3.0]


def test_one_model_is_too_few() -> None:
    with pytest.raises(RecipeError, match="model_stock: takes 2 or more sources, got 1"):
        merge(torch.zeros(2), [torch.ones(2)])
