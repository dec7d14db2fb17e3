"""RAM by hand: what counts, its mean, and what is scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evomerge.engine.statistics.operation_statistics import OperationStatistics
from evomerge.methods.plain_statistics import PlainStatistics, merge_tensors
from evomerge.methods.registry import METHODS
from tests.engine.helpers import inputs, store_for


def merge(name: str, rows: list[list[float]], **shared: Any) -> list[float]:
    """Onto a base of ones."""
    base, method = torch.ones(len(rows[0])), METHODS[name]
    chosen = method.settings([{} for _ in rows], shared)
    return (merge_tensors(method, base, [base + torch.tensor(row) for row in rows], chosen) - base).tolist()


ROWS = [[0.5, 0.0, 0.25, 0.0, 0.25], [0.25, 0.125, 0.0, 0.0, -0.25]]


def test_elements_are_averaged_over_those_that_moved() -> None:
    # (0.5 + 0.25) / 2; 0.125 and 0.25 of one alone; 0 of none; 0.25 − 0.25 of both
    assert merge("ram", ROWS) == [0.375, 0.125, 0.25, 0.0, 0.0]


def test_what_hardly_moved_does_not_count() -> None:
    # above 0.2: 0.125 does not count
    assert merge("ram", ROWS, epsilon=0.2) == [0.375, 0.0, 0.25, 0.0, 0.0]
    assert merge("ram", ROWS, epsilon=0.25) == [0.5, 0.0, 0.0, 0.0, 0.0]  # above, not equal


def test_what_one_moved_alone_is_scaled_by_what_it_shares() -> None:
    # each shares 2 and has 1 alone: ρ = 2. min(2, 4) · 0.5 = 1: twice; min(2, 0.5) · 0.5 = 0.25
    assert merge("ramplus_tl", ROWS, r=0.5, alpha=4.0) == [0.375, 0.25, 0.5, 0.0, 0.0]
    assert merge("ramplus_tl", ROWS, r=0.5, alpha=0.5) == [0.375, 0.125 * 1.25, 0.25 * 1.25, 0.0, 0.0]


def test_ramplus_without_strength_is_ram() -> None:
    assert merge("ramplus_tl", ROWS, r=0.0) == merge("ram", ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_overlaps_are_counted(dtype: torch.dtype) -> None:
    base = torch.zeros(5).to(dtype)
    sources = [torch.tensor(row).to(dtype) for row in (*ROWS, [0.0, 0.0, 0.0, 0.0, 1.0])]
    # element 0 is shared by two, 4 by all three; 1 and 2 are one's alone
    for epsilon, expected in ((1e-5, [(2, 1), (2, 1), (1, 0)]), (0.25, [(0, 1), (0, 0), (0, 1)])):
        assert PlainStatistics(base.float(), [source.float() for source in sources]).overlaps(epsilon) == expected
        of_base, of_sources = inputs(3)
        operation = OperationStatistics(store_for(base, sources), of_base, of_sources, 5, "t", 0)
        assert operation.overlaps(epsilon) == expected
