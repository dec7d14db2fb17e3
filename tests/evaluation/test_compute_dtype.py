"""Which dtype is taken, and how long it takes to find out."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from evomerge.evaluation import compute_dtype
from evomerge.evaluation.compute_dtype import fastest_dtype

SHAPES = [(64,), (64, 32), (32, 64), (1, 64), (64, 32)]


@pytest.mark.parametrize(("ratio", "chosen"), [(0.2, "bfloat16"), (0.95, "float32"), (4.0, "float32")])
def test_bfloat16_has_to_be_clearly_faster(ratio: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Sequence[tuple[int, int]]] = []

    def seconds(matrices: Sequence[tuple[int, int]], rows: int, dtype: str, device: str) -> float:
        timed.append(matrices)
        return ratio if dtype == "bfloat16" else 1.0

    monkeypatch.setattr(compute_dtype, "_seconds", seconds)
    assert fastest_dtype(SHAPES) == chosen
    assert all(sorted(matrices) == [(32, 64), (64, 32)] for matrices in timed)


def test_it_takes_no_time_whatever_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest_dtype([(64,)]) == "float32"
    begin = time.process_time()
    assert fastest_dtype([(4096, 1024), (1024, 4096)]) in compute_dtype.CHOICES
    assert time.process_time() - begin < 5.0
