"""The winner beside the baselines: differences, intervals, tests by task, and when the sentence says better or worse.

Rows by hand, references by enumeration, coverage on data that is known.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import TaskError
from evomerge.evaluation.scores import ItemScores, bootstrap_sums
from evomerge.objective.comparison import (
    Difference,
    TaskDifference,
    bootstrap_intervals,
    compare,
    mcnemar,
    verdict,
    within_noise,
)
from evomerge.objective.fitness import Fitness
from evomerge.objective.goals import Goal
from tests.objective.test_fitness import ACC, BPB, bits, corpus, mean


def models(count: int = 3, n: int = 400) -> list[dict[str, Any]]:
    """Models of rising skill on the same items."""
    generator = np.random.default_rng(5)
    hard, sizes = generator.random(n), generator.integers(20, 200, n // 4)
    return [
        {
            "mc": mean((hard + 0.2 * generator.random(n) < 0.5 + 0.1 * k).astype(float)),
            "text": bits(-sizes * (1.0 - 0.05 * k + 0.1 * generator.random(n // 4)), sizes),
        }
        for k in range(count)
    ]


def test_differences_agree_with_the_delta_method() -> None:
    low, middle, high = models()
    fitness = Fitness((ACC, BPB)).relative_to([low])
    rows = compare(high, {"low": low, "middle": middle}, fitness)
    for name, baseline in (("low", low), ("middle", middle)):
        value, stderr = fitness.difference(high, baseline)
        row = rows[name]
        assert (row.value, row.stderr, row.n) == (value, stderr, 500)
        assert row.interval is not None
        assert row.joint_interval is not None
        assert row.interval == pytest.approx((value - 1.96 * stderr, value + 1.96 * stderr), abs=0.3 * stderr)
        # Two comparisons at once: wider than one, no wider than Bonferroni's (z = 2.24) but for the draws.
        assert row.joint_interval[0] < row.interval[0] + 0.1 * stderr
        assert row.joint_interval[0] > value - 2.5 * stderr


def test_tasks_are_compared_by_their_own_metric() -> None:
    """Right on 1, 2, 3 against right on 3, 4: two wins, one loss, p = 1; bits are no yes or no."""
    winner = {"mc": mean([1, 1, 1, 0]), "text": bits([-2.0, -1.0], [2, 1])}
    other = {"mc": mean([0, 0, 1, 1]), "text": bits([-4.0, -2.0], [2, 1])}
    row = compare(winner, {"x": other}, Fitness((ACC, BPB)))["x"].tasks
    assert row["mc"] == TaskDifference("acc", 0.25, pytest.approx(math.sqrt((3 - 0.25) / 3 / 4)), wins=2, losses=1, p=1)
    assert row["text"] == TaskDifference("bits_per_byte", pytest.approx(-1 / math.log(2)), pytest.approx(0, abs=1e-12))


def test_a_metric_that_is_no_mean_has_no_interval() -> None:
    goals = Fitness((Goal("f", "f1", 1.0, True),))
    row = compare({"f": corpus(0.75, 4)}, {"x": {"f": corpus(0.5, 4)}}, goals)["x"]
    assert (row.value, row.stderr, row.interval, row.joint_interval) == (0.25, None, None, None)
    assert row.tasks["f"] == TaskDifference("f1", 0.25, None)
    assert "its noise is unknown" in verdict({"x": row}, {"x": 0.5})
    assert verdict({"x": row}, {"x": 0.5}).startswith("The winner is within noise of the best baseline (x):")


def spans(value: float, alone: float, joint: float) -> Difference:
    return Difference(
        value=value,
        stderr=alone / 1.96,
        n=10,
        interval=(value - alone, value + alone),
        joint_interval=(value - joint, value + joint),
        tasks={},
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        # Beats each: better, although the joint interval of the best reaches below zero.
        ({"a": spans(0.2, 0.1, 0.3), "b": spans(0.4, 0.1, 0.3)}, "better than every baseline"),
        # The best baseline is too near.
        (
            {"a": spans(0.2, 0.3, 0.4), "b": spans(0.4, 0.1, 0.3)},
            "within noise of the best baseline (a): overall score +0.200",
        ),
        # A noisier one may be as good, though the best is beaten.
        (
            {"a": spans(0.2, 0.1, 0.2), "b": spans(0.3, 0.5, 0.6)},
            "within noise of b, though not of the best baseline (a)",
        ),
        # One of two looks better by its own interval alone: with two looks that is still noise.
        ({"a": spans(-0.2, 0.1, 0.3), "b": spans(0.4, 0.1, 0.3)}, "within noise of the best baseline (a)"),
        (
            {"a": spans(-0.4, 0.1, 0.3), "b": spans(0.4, 0.1, 0.3)},
            "worse than the best baseline (a): overall",
        ),
    ],
)
def test_verdict(rows: dict[str, Difference], sentence: str) -> None:
    text = verdict(rows, {name: -row.value for name, row in rows.items()})
    assert text.startswith("The winner is ")
    assert sentence in text
    assert ("better than every" in text) == (not within_noise(rows))


def test_what_breaks_a_constraint_is_not_to_be_beaten() -> None:
    better = Difference(0.1, 0.01, 100, (0.08, 0.12), (0.07, 0.13), {})
    worse = Difference(-0.1, 0.01, 100, (-0.12, -0.08), (-0.13, -0.07), {})
    rows, test = {"a": better, "b": worse}, {"a": 0.4, "b": 0.6}
    assert verdict(rows, test).startswith("The winner is worse than the best baseline (b)")
    text = verdict(rows, test, ["b"])
    assert text.startswith("The winner is better than every baseline. Compared with the best baseline (a)")
    assert text.endswith("b breaks a constraint, and did not count here.")
    assert verdict({"b": worse}, test, ["b"]).startswith("There was nothing to compare the winner with. b breaks")


def test_verdict_without_baselines() -> None:
    assert compare({}, {}, Fitness((ACC,))) == {}
    assert verdict({}, {}) == "There was nothing to compare the winner with."


def right(values: Any, task: str = "t", scored: Any = None) -> ItemScores:
    column = np.asarray(values, dtype=np.float64)
    counted = np.ones(len(column)) if scored is None else np.asarray(scored, dtype=np.float64)
    items = tuple(f"{task}:{k}" for k in range(len(column)))
    return ItemScores(task, items, {"acc": (column * counted, counted)}, {"acc": True})


def test_mcnemar_by_hand() -> None:
    """5 wins, 1 loss: P(at most 1 of 6) = (1 + 6) / 64; doubled 7/32. Items that both have right do not count."""
    first = right([1] * 5 + [0] + [1] * 4 + [0] * 3)
    second = right([0] * 5 + [1] + [1] * 4 + [0] * 3)
    discordant = mcnemar(first, second, "acc")
    assert discordant is not None
    assert (discordant.wins, discordant.losses) == (5, 1)
    assert discordant.p == pytest.approx(7 / 32)


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_against_enumeration(wins: int, losses: int) -> None:
    """All 2^n ways in which n coins fall; at least as uneven as what was seen, on either side."""
    discordant = mcnemar(right([1] * wins + [0] * losses + [1]), right([0] * wins + [1] * losses + [1]), "acc")
    assert discordant is not None
    n = wins + losses
    heads = Counter({k: math.comb(n, k) for k in range(n + 1)})
    uneven = sum(count for k, count in heads.items() if abs(2 * k - n) >= abs(wins - losses))
    assert discordant.p == pytest.approx(min(1.0, uneven / 2**n))


def test_mcnemar_of_many_items_does_not_underflow() -> None:
    discordant = mcnemar(right([1] * 3000 + [0] * 2800), right([0] * 3000 + [1] * 2800), "acc")
    assert discordant is not None
    # Normal approximation with continuity correction: z = 199 / sqrt(5800) = 2.613, two-sided 0.00898.
    assert discordant.p == pytest.approx(0.00898, rel=0.01)


def test_mcnemar_passes_over_items_without_a_value_and_refuses_shares() -> None:
    discordant = mcnemar(right([1, 1, 0], scored=[1, 0, 1]), right([0, 0, 0]), "acc")
    assert discordant is not None
    assert (discordant.wins, discordant.losses) == (1, 0)
    assert mcnemar(right([0.5, 1.0]), right([1.0, 0.0]), "acc") is None
    with pytest.raises(TaskError, match="the same items"):
        mcnemar(right([1, 0]), right([1, 0, 1]), "acc")


def test_intervals_cover_what_they_say() -> None:
    """Five differences that are all truly zero, 300 times: each interval misses 5% of the time, the joint ones all
    together 5% of the time, where five single ones miss at least once in up to 23%."""
    generator = np.random.default_rng(2)
    single, together = 0, 0
    for _ in range(300):
        values = generator.normal(size=(60, 5))
        sums = bootstrap_sums(values, 400, generator) / 60
        intervals = bootstrap_intervals(values.mean(axis=0).tolist(), sums.T)
        single += sum(not span.low <= 0 <= span.high for span in intervals)
        together += any(not span.joint_low <= 0 <= span.joint_high for span in intervals)
    assert 0.035 <= single / 1500 <= 0.075
    assert 0.02 <= together / 300 <= 0.09


def test_intervals_without_noise_and_with_samples_that_say_nothing() -> None:
    intervals = bootstrap_intervals([0.5, 0.0], np.array([[0.5, 0.5, math.nan, 0.5], [0.0, -1.0, 0.0, 1.0]]))
    assert (intervals[0].low, intervals[0].high, intervals[0].joint_low, intervals[0].joint_high) == (
        0.5,
        0.5,
        0.5,
        0.5,
    )
    assert intervals[1].low < 0 < intervals[1].high
