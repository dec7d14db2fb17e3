"""Paired bootstrap and McNemar's test: rows by hand, references by enumeration, coverage on data that is known."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import TaskError
from evomerge.evaluation.scores import ItemScores
from evomerge.evaluation.statistics import intervals, mcnemar, resampled_sums


def right(values: Any, task: str = "t", known: Any = None) -> ItemScores:
    column = np.asarray(values, dtype=np.float64)
    counted = np.ones(len(column)) if known is None else np.asarray(known, dtype=np.float64)
    items = tuple(f"{task}:{k}" for k in range(len(column)))
    return ItemScores(task, items, {"acc": (column * counted, counted)}, {"acc": True})


def test_mcnemar_by_hand() -> None:
    """5 wins, 1 loss: P(at most 1 of 6) = (1 + 6) / 64; doubled 7/32. Items that both have right do not count."""
    ours = right([1] * 5 + [0] + [1] * 4 + [0] * 3)
    theirs = right([0] * 5 + [1] + [1] * 4 + [0] * 3)
    found = mcnemar(ours, theirs, "acc")
    assert found is not None
    assert (found.wins, found.losses) == (5, 1)
    assert found.p == pytest.approx(7 / 32)


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_against_enumeration(wins: int, losses: int) -> None:
    """All 2^n ways in which n coins fall; at least as uneven as what was seen, on either side."""
    found = mcnemar(right([1] * wins + [0] * losses + [1]), right([0] * wins + [1] * losses + [1]), "acc")
    assert found is not None
    n = wins + losses
    heads = Counter({k: math.comb(n, k) for k in range(n + 1)})
    uneven = sum(count for k, count in heads.items() if abs(2 * k - n) >= abs(wins - losses))
    assert found.p == pytest.approx(min(1.0, uneven / 2**n))


def test_mcnemar_of_many_items_does_not_underflow() -> None:
    found = mcnemar(right([1] * 3000 + [0] * 2800), right([0] * 3000 + [1] * 2800), "acc")
    assert found is not None
    # Normal approximation with continuity correction: z = 199 / sqrt(5800) = 2.613, two-sided 0.00898.
    assert found.p == pytest.approx(0.00898, rel=0.01)


def test_mcnemar_passes_over_items_without_a_value_and_refuses_shares() -> None:
    found = mcnemar(right([1, 1, 0], known=[1, 0, 1]), right([0, 0, 0]), "acc")
    assert found is not None
    assert (found.wins, found.losses) == (1, 0)
    assert mcnemar(right([0.5, 1.0]), right([1.0, 0.0]), "acc") is None
    with pytest.raises(TaskError, match="the same items"):
        mcnemar(right([1, 0]), right([1, 0, 1]), "acc")


def test_resampled_sums_by_enumeration() -> None:
    """Rows 0, 1, 3 of one column: the 27 equally likely samples of three rows, and their sums."""
    expected = Counter(sum(rows) for rows in itertools.product([0.0, 1.0, 3.0], repeat=3))
    sums = resampled_sums(np.array([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]]), 20_000, np.random.default_rng(0))
    assert np.all(sums[:, 1] == 3)
    seen = Counter(sums[:, 0].tolist())
    assert set(seen) == set(expected)
    for total, count in expected.items():
        assert seen[total] / 20_000 == pytest.approx(count / 27, abs=0.015)


def test_resampled_sums_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.random.default_rng(1).random((50, 3))
    whole = resampled_sums(columns, 40, np.random.default_rng(0))
    monkeypatch.setattr("evomerge.evaluation.statistics._CELLS", 300)
    np.testing.assert_allclose(resampled_sums(columns, 40, np.random.default_rng(0)), whole, rtol=1e-12)


def test_intervals_cover_what_they_say() -> None:
    """Five differences that are all truly zero, 300 times: each interval misses 5% of the time, the joint ones all
    together 5% of the time, where five single ones miss at least once in up to 23%."""
    generator = np.random.default_rng(2)
    single, together = 0, 0
    for _ in range(300):
        values = generator.normal(size=(60, 5))
        sums = resampled_sums(values, 400, generator) / 60
        found = intervals(values.mean(axis=0).tolist(), sums.T)
        single += sum(not span.low <= 0 <= span.high for span in found)
        together += any(not span.joint_low <= 0 <= span.joint_high for span in found)
    assert 0.035 <= single / 1500 <= 0.075
    assert 0.02 <= together / 300 <= 0.09


def test_intervals_without_noise_and_with_samples_that_say_nothing() -> None:
    found = intervals([0.5, 0.0], np.array([[0.5, 0.5, math.nan, 0.5], [0.0, -1.0, 0.0, 1.0]]))
    assert (found[0].low, found[0].high, found[0].joint_low, found[0].joint_high) == (0.5, 0.5, 0.5, 0.5)
    assert found[1].low < 0 < found[1].high


def test_statistics_need_no_torch() -> None:
    code = "import sys, evomerge.evaluation.statistics, evomerge.objective.comparison; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
