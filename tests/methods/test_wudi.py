"""WUDI: the minimum of the paper's loss, where descent ends, and what is known by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.registry import METHODS
from evomerge.methods.wudi import least_interference
from evomerge.testing.methods import family

WUDI = METHODS["wudi"]


def deltas_of(seed: int, count: int, shape: tuple[int, int]) -> list[Tensor]:
    base, sources = family(seed, count, shape)
    return [source.double() - base.double() for source in sources]


def loss(delta: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """The paper's, of one layer."""
    return torch.stack([((delta - own) @ own.T).square().sum() / own.square().sum() for own in deltas]).sum()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 4), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_nothing_interferes_less(seed: int, count: int, rows: int, columns: int) -> None:
    deltas = deltas_of(seed, count, (rows, columns))
    best = least_interference(deltas).requires_grad_()
    value = loss(best, deltas)
    (gradient,) = torch.autograd.grad(value, best)
    assert float(gradient.abs().max()) < 1e-9
    start = torch.stack(deltas).sum(0)
    assert float(value.detach()) <= float(loss(start, deltas)) + 1e-12


@pytest.mark.parametrize("shape", [(4, 6), (3, 12)])  # the second one has directions that no task uses
def test_descent_from_the_papers_start_ends_there(shape: tuple[int, int]) -> None:
    deltas = deltas_of(5, 3, shape)
    moved = torch.stack(deltas).sum(0).requires_grad_()
    search = torch.optim.LBFGS([moved], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, history_size=50)

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(moved, deltas)
        value.backward()
        return value

    search.step(closure)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(moved.detach(), least_interference(deltas), rtol=0.0, atol=1e-6)


def test_tasks_with_inputs_of_their_own_are_added() -> None:
    # rows (inputs) at right angles: nothing interferes with the sum
    first, second = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 2.0]])
    torch.testing.assert_close(least_interference([first, second]), first + second)


def test_tasks_on_one_input_are_averaged() -> None:
    # one column: Gi / ‖δi‖² = 1 for both
    first, second = torch.tensor([[2.0], [1.0]]), torch.tensor([[4.0], [-1.0]])
    torch.testing.assert_close(least_interference([first, second]), torch.tensor([[3.0], [0.0]]))


def test_equal_tasks_are_the_task_and_one_without_a_delta_adds_nothing() -> None:
    base, (source, other) = family(1, 2, (5, 4))
    assert torch.equal(merge_tensors(WUDI, base, [source, source], WUDI.settings([{}] * 2)), source)
    both = merge_tensors(WUDI, base, [source, other], WUDI.settings([{}] * 2))
    torch.testing.assert_close(merge_tensors(WUDI, base, [source, base, other], WUDI.settings([{}] * 3)), both)
    none = merge_tensors(WUDI, base, [base, base], WUDI.settings([{}] * 2))
    assert torch.equal(none, base)


def test_what_is_no_matrix_is_averaged() -> None:
    sources = [torch.full((3,), 4.0), torch.full((3,), 8.0)]
    merged = merge_tensors(WUDI, torch.zeros(3), sources, WUDI.settings([{}] * 2, {"lambda": 0.5}))
    assert merged.tolist() == [3.0] * 3
