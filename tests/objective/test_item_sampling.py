"""Drawing the items that tell candidates apart: fair to the whole, whatever the scouts say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.evaluation.scores import ItemScores
from evomerge.objective.item_sampling import Sample, allocate, draw, draw_samples, item_spread


def right(values: Any, task: str = "t") -> ItemScores:
    column = np.asarray(values, dtype=np.float64)
    items = tuple(f"{task}:{k}" for k in range(len(column)))
    return ItemScores(task, items, {"acc": (column, np.ones(len(column)))}, {"acc": True})


def test_item_spread_by_hand() -> None:
    """Three scouts: all right 0; one of three right sqrt(1/3 · 2/3); an item without a value for one of them 0."""
    scouts = [right([1, 1, 1]), right([1, 0, 0]), right([1, 0, 0])]
    counted = np.array([1.0, 1.0, 0.0])
    scouts[2] = ItemScores("t", scouts[2].items, {"acc": (np.array([1.0, 0.0, 0.0]), counted)}, {"acc": True})
    assert item_spread(scouts, "acc") == pytest.approx([0, math.sqrt(2) / 3, 0])
    # All scouts waver at one half: as telling as a disagreement of two who are sure.
    assert item_spread([right([0.5]), right([0.5])], "acc") == pytest.approx(
        item_spread([right([1]), right([0])], "acc")
    )
    # No share: the standard deviation of 1 and 3, of 2 and 2.
    assert item_spread([right([1, 2]), right([3, 2])], "acc") == pytest.approx([1, 0])


def test_allocation_by_hand() -> None:
    """31 of 60 items in three strata of 20, spread 0, 1, 3: a third evenly (1/9 each), two thirds as 0 : 1 : 3.

    Shares 1/9, 1/9 + 1/6, 1/9 + 1/2, which is 3.44, 8.61 and 18.94 of 31.
    """
    assert allocate(np.array([20, 20, 20]), np.array([0.0, 1.0, 3.0]), 31).tolist() == [3, 9, 19]
    # 4.44, 11.1 and 24.4 of 40: the last stratum is full, and what it cannot give is missed equally by the others.
    assert allocate(np.array([20, 20, 20]), np.array([0.0, 1.0, 3.0]), 40).tolist() == [7, 13, 20]
    assert allocate(np.array([20, 20, 20]), np.zeros(3), 30).tolist() == [10, 10, 10]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 2)), min_size=1, max_size=6),
    st.floats(0.01, 1.0),
)
def test_allocation_keeps_its_bounds(strata: list[tuple[int, float]], fraction: float) -> None:
    sizes = np.array([size for size, _ in strata])
    total = round(fraction * sizes.sum())
    counts = allocate(sizes, np.array([spread for _, spread in strata]), total)
    assert np.all(counts >= 1)
    assert np.all(counts <= sizes)
    assert counts.sum() == max(total, len(sizes))


@given(st.integers(0, 2**32), st.integers(5, 60), st.floats(0.1, 1.0))
def test_weights_stand_for_all_items(seed: int, n: int, fraction: float) -> None:
    generator = np.random.default_rng(seed)
    items = [f"t:{k}" for k in range(n)]
    sample = draw(items, generator.random(n).round(1), fraction, generator)
    assert sum(sample.weights) == pytest.approx(n)
    assert list(sample.items) == [item for item in items if item in set(sample.items)]
    assert len(sample.items) == sum(drawn for _, drawn in sample.strata) == max(round(fraction * n), len(sample.strata))
    assert sum(size for size, _ in sample.strata) == n
    assert 1 <= sample.effective <= len(sample.items) + 1e-9
    assert Sample.from_json(sample.to_json()) == sample


def test_effective_size_by_hand() -> None:
    """Weights 1, 1, 4: 36 / 18."""
    assert Sample(("a", "b", "c"), (1.0, 1.0, 4.0), ()).effective == pytest.approx(2)


def test_the_weighted_mean_is_unbiased_and_its_error_is_no_understatement() -> None:
    """A candidate that has nothing to do with the scouts, and one that has: the mean over draws is the mean of all."""
    generator = np.random.default_rng(3)
    hard = generator.random(120)
    spread = np.where((hard > 0.35) & (hard < 0.65), 1.0, 0.1)
    items = [f"t:{k}" for k in range(120)]
    for answers in (generator.random(120) < 0.7, hard < 0.5):
        whole = right(answers)
        found = []
        for seed in range(500):
            sample = draw(items, spread, 0.4, np.random.default_rng(seed))
            part = whole.take([int(item[2:]) for item in sample.items]).weighted(sample.weights)
            found.append((part.score("acc").value, part.score("acc").stderr))
        values, errors = np.array(found, dtype=np.float64).T
        truth = whole.score("acc").value
        assert values.mean() == pytest.approx(truth, abs=4 * values.std() / math.sqrt(500))
        # The stated error is that of the population behind all items: more than the spread of the draws alone.
        assert errors.mean() > math.sqrt(values.var() + truth * (1 - truth) / 120) * 0.97


def test_differences_are_known_better_than_from_as_many_items_at_random() -> None:
    """Two candidates that differ only where the scouts do."""
    generator = np.random.default_rng(5)
    items = [f"t:{k}" for k in range(200)]
    spread = np.where(np.arange(200) < 60, 1.0, 0.0)
    ours, theirs = (right(np.where(np.arange(200) < 60, generator.random(200) < p, 1.0)) for p in (0.7, 0.4))

    def error(spread: np.ndarray[Any, Any]) -> float:
        differences = []
        for seed in range(200):
            sample = draw(items, spread, 0.3, np.random.default_rng(seed))
            index = [int(item[2:]) for item in sample.items]
            left, right_ = (m.take(index).weighted(sample.weights).score("acc").value for m in (ours, theirs))
            differences.append(left - right_)
        return float(np.std(differences))

    assert error(spread) < 0.75 * error(np.ones(200))


def test_draws_depend_on_seed_and_task_alone() -> None:
    generator = np.random.default_rng(0)
    scouts = [{t: right(generator.random(40) < 0.5, t) for t in ("t", "u")} for _ in range(3)]
    metrics = {"t": "acc", "u": "acc"}
    first = draw_samples(scouts, metrics, 0.5, 1)
    assert first == draw_samples(scouts, dict(reversed(metrics.items())), 0.5, 1)
    assert first != draw_samples(scouts, metrics, 0.5, 2)
    assert [k.split(":")[1] for k in first["t"].items] != [k.split(":")[1] for k in first["u"].items]


def test_a_metric_that_is_no_mean_keeps_all_its_items() -> None:
    corpus = ItemScores("f", ("f:0", "f:1"), {}, {"f1": True}, {}, {"f1": 0.5})
    assert draw_samples([{"f": corpus}], {"f": "f1"}, 0.5, 0) == {}
