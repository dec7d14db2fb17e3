"""Constraints: limits as they are written, what is beyond them, and what fresh items tell."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from evomerge.evaluation.scores import ItemScores
from evomerge.objective.constraints import Constraint, Limit, Measurement
from evomerge.objective.fitness import Fitness
from evomerge.objective.goals import Goal
from evomerge.spec.schema import Limits


def scores(values: Any, metric: str = "acc", first: int = 0) -> dict[str, ItemScores]:
    column = np.array(values, dtype=np.float64)
    items = tuple(f"t:{first + k}" for k in range(len(column)))
    return {"t": ItemScores("t", items, {metric: (column, np.ones(len(column)))}, {metric: True})}


def measured(*parts: Any, metric: str = "acc", layers: int = 4) -> Measurement:
    return Measurement(
        tuple(scores(part, metric, 1000 * k) for k, part in enumerate(parts)), {"layers": layers, "parameters": 10}
    )


def constraint(bound: Any, *, upper: bool = False, metric: str = "acc") -> Constraint:
    limit = Limit.of(Limits(**{"at_most" if upper else "at_least": bound}))
    return Constraint("c", limit, Fitness((Goal("t", metric, 1.0, True),)))


@pytest.mark.parametrize(
    ("bound", "limit"),
    [(0.5, 0.5), ("base", 0.4), ("base - 0.01", 0.39), ("base + 0.1", 0.5), ("base * 0.5", 0.2), ("base * 1e0", 0.4)],
)
def test_a_limit_is_a_number_or_relative_to_a_model(bound: Any, limit: float) -> None:
    assert Limit.of(Limits(at_least=bound))(0.4) == pytest.approx(limit)


@pytest.mark.parametrize("bound", ["base-0.01", "base - ", "- 0.01", "base / 2", "", "base - x"])
def test_what_is_no_limit_is_refused(bound: str) -> None:
    with pytest.raises(ValueError, match="a number, or a model's value such as"):
        Limits(at_least=bound)


def test_a_violation_is_a_share_of_the_limit() -> None:
    least, most, none = Limit(False, 0.5), Limit(True, 300.0), Limit(False, 0.0)
    assert least.violation(0.45, 0.5) == pytest.approx(0.1)
    assert least.violation(0.5, 0.5) == 0.0
    assert most.violation(240.0, 300.0) == pytest.approx(-0.2)
    assert none.violation(-0.25, 0.0) == 0.25  # of nothing there is no share


def test_a_value_is_of_all_items_together() -> None:
    assert constraint(0.5).value(measured([1, 1, 0], [0])) == 0.5
    assert Constraint("l", Limit(True, 5.0), size="layers").value(measured([1], layers=6)) == 6.0


def test_the_interval_of_a_share_knows_that_few_items_say_little() -> None:
    """Agresti and Coull: of 10 items, all right: (10 + z²/2) / (10 + z²) = 0.861, and 0.182 up and down."""
    always = constraint(0.9).interval(measured([1] * 10), None)
    assert always == pytest.approx((0.861 - 0.182 - 0.9, 0.861 + 0.182 - 0.9), abs=1e-3)
    assert constraint(0.9).verdict(always) == "not to be told"
    assert constraint(0.9).verdict(constraint(0.9).interval(measured([1] * 400), None)) == "held"
    assert constraint(0.9).verdict(constraint(0.9).interval(measured([1, 0] * 50), None)) == "broken"


def test_the_interval_of_a_paired_share_is_of_the_items_that_differ() -> None:
    """Agresti and Min: 3 wins, 1 loss of 100: (3 - 1) / 102, spread 1.96 √(5 - 4/102) / 102."""
    own, base = np.zeros(100), np.zeros(100)
    own[:3], base[3] = 1.0, 1.0
    low, high = constraint("base - 0.1").interval(measured(own), measured(base)) or (0, 0)
    spread = 1.96 * math.sqrt(5 - 4 / 102) / 102
    assert (low, high) == pytest.approx((2 / 102 - spread + 0.1, 2 / 102 + spread + 0.1), abs=1e-4)
    assert constraint("base - 0.1").verdict((low, high)) == "held"


def test_other_metrics_are_bootstrapped_and_paired() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0.0, 5.0, 200)
    own, base = 30 + difficulty, 28 + difficulty + rng.normal(0.0, 0.1, 200)
    tokens = constraint("base + 1", upper=True, metric="tokens")
    low, high = tokens.interval(measured(own, metric="tokens"), measured(base, metric="tokens")) or (0, 0)
    assert 0.9 < low < 1.0 < high < 1.1
    assert tokens.verdict((low, high)) == "broken"


def test_a_metric_of_the_corpus_has_no_interval() -> None:
    whole = {"t": ItemScores("t", ("t:0", "t:1"), {}, {"f1": True}, corpus={"f1": 0.5})}
    f1 = constraint(0.4, metric="f1")
    assert f1.value(Measurement((whole,), {})) == 0.5
    assert f1.interval(Measurement((whole,), {}), None) is None
    assert f1.verdict(None) == "not to be told"


def test_a_size_is_known() -> None:
    limit = Constraint("layers", Limit.of(Limits(at_most="base * 1.5")), size="layers")
    held, broken = (limit.interval(measured([1], layers=n), measured([1], layers=4)) for n in (6, 7))
    assert (limit.verdict(held), limit.verdict(broken)) == ("held", "broken")
