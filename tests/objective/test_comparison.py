"""The winner beside its rivals: differences, tests by task, and when the sentence may say better or worse."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from evomerge.objective.comparison import close_rivals, compare, verdict
from evomerge.objective.fitness import Fitness, Goal
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
    found = compare(high, {"low": low, "middle": middle}, fitness)
    for name, rival in (("low", low), ("middle", middle)):
        value, stderr = fitness.difference(high, rival)
        row = found[name]
        assert (row["value"], row["stderr"], row["n"]) == (value, stderr, 500)
        assert row["interval"] == pytest.approx([value - 1.96 * stderr, value + 1.96 * stderr], abs=0.3 * stderr)
        # Two comparisons at once: wider than one, no wider than Bonferroni's (z = 2.24) but for the draws.
        assert row["joint_interval"][0] < row["interval"][0] + 0.1 * stderr
        assert row["joint_interval"][0] > value - 2.5 * stderr
    json.dumps(found)


def test_tasks_are_compared_by_their_own_metric() -> None:
    """Right on 1, 2, 3 against right on 3, 4: two items only ours, one only theirs, p = 1; bits are no yes or no."""
    ours = {"mc": mean([1, 1, 1, 0]), "text": bits([-2.0, -1.0], [2, 1])}
    theirs = {"mc": mean([0, 0, 1, 1]), "text": bits([-4.0, -2.0], [2, 1])}
    row = compare(ours, {"x": theirs}, Fitness((ACC, BPB)))["x"]["tasks"]
    assert row["mc"] == {
        "metric": "acc",
        "value": 0.25,
        "stderr": pytest.approx(math.sqrt((3 - 0.25) / 3 / 4)),
        "wins": 2,
        "losses": 1,
        "p": 1.0,
    }
    assert row["text"] == {
        "metric": "bits_per_byte",
        "value": pytest.approx(-1 / math.log(2)),
        "stderr": pytest.approx(0, abs=1e-12),
    }


def test_a_metric_that_is_no_mean_has_no_interval() -> None:
    goals = Fitness((Goal("f", "f1", 1.0, True),))
    row = compare({"f": corpus(0.75, 4)}, {"x": {"f": corpus(0.5, 4)}}, goals)["x"]
    assert (row["value"], row["stderr"], row["interval"], row["joint_interval"]) == (0.25, None, None, None)
    assert row["tasks"]["f"] == {"metric": "f1", "value": 0.25, "stderr": None}
    assert "its noise is unknown" in verdict({"x": row}, {"x": 0.5})
    assert verdict({"x": row}, {"x": 0.5}).startswith("The winner is within noise of the best baseline (x):")


def spans(value: float, alone: float, joint: float) -> dict[str, Any]:
    return {
        "value": value,
        "stderr": alone / 1.96,
        "interval": [value - alone, value + alone],
        "joint_interval": [value - joint, value + joint],
    }


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        # Beats each: better, although the joint interval of the best reaches below zero.
        ({"a": spans(0.2, 0.1, 0.3), "b": spans(0.4, 0.1, 0.3)}, "better than every baseline"),
        # The best baseline is too near.
        (
            {"a": spans(0.2, 0.3, 0.4), "b": spans(0.4, 0.1, 0.3)},
            "within noise of the best baseline (a): fitness +0.200",
        ),
        # A noisier one may be as good, though the best is beaten.
        (
            {"a": spans(0.2, 0.1, 0.2), "b": spans(0.3, 0.5, 0.6)},
            "within noise of b, though not of the best baseline (a)",
        ),
        # One of two looks better by its own interval alone: with two looks that is still noise.
        ({"a": spans(-0.2, 0.1, 0.3), "b": spans(0.4, 0.1, 0.3)}, "within noise of the best baseline (a)"),
        ({"a": spans(-0.4, 0.1, 0.3), "b": spans(0.4, 0.1, 0.3)}, "worse than the best baseline (a): fitness -0.400"),
    ],
)
def test_verdict(rows: dict[str, Any], sentence: str) -> None:
    found = verdict(rows, {name: -row["value"] for name, row in rows.items()})
    assert found.startswith("The winner is ")
    assert sentence in found
    assert ("better than every" in found) == (not close_rivals(rows))


def test_verdict_without_rivals() -> None:
    assert compare({}, {}, Fitness((ACC,))) == {}
    assert verdict({}, {}) == "There was nothing to compare the winner with."
