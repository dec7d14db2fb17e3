"""From scores to one number: rows computed by hand, spreads against a bootstrap."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from evomerge.errors import TaskError
from evomerge.evaluation.scores import BITS, ItemScores
from evomerge.objective.fitness import Fitness
from evomerge.objective.goals import Goal


def mean(values: Any, task: str = "mc", metric: str = "acc", start: int = 0) -> ItemScores:
    column = np.asarray(values, dtype=np.float64)
    items = tuple(f"{task}:{start + k}" for k in range(len(column)))
    return ItemScores(task, items, {metric: (column, np.ones(len(column)))}, {metric: True})


def bits(lls: Any, sizes: Any, task: str = "text", start: int = 0) -> ItemScores:
    numerators, denominators = (np.asarray(column, dtype=np.float64) for column in (lls, sizes))
    items = tuple(f"{task}:{start + k}" for k in range(len(numerators)))
    metrics = {"bits_per_byte": (numerators, denominators)}
    return ItemScores(task, items, metrics, {"bits_per_byte": False}, {"bits_per_byte": BITS})


def corpus(value: float, n: int, start: int = 0) -> ItemScores:
    return ItemScores("f", tuple(f"f:{start + k}" for k in range(n)), {}, {"f1": True}, {}, {"f1": value})


ACC = Goal("mc", "acc", 1.0, True)
BPB = Goal("text", "bits_per_byte", 3.0, False)
LN2 = math.log(2)


def test_raw_row() -> None:
    """acc 3/4 weighs 1, two bits per byte (counted downwards) weigh 3: (0.75 - 3 · 2) / 4."""
    scores = {"mc": mean([1, 1, 0, 1]), "text": bits([-6 * LN2, -2 * LN2], [3, 1])}
    assert Fitness((ACC, BPB))(scores) == pytest.approx((0.75 - 3 * 2) / 4)


def test_objectives_row() -> None:
    """acc 3/4; of the group the mean of acc 1/4 and 1/2, whatever its tasks weigh; bits 2, counted downwards."""
    group = [Goal(task, "acc", 0.5, True, group="both") for task in ("one", "two")]
    fitness = Fitness((ACC, *group, BPB))
    scores = {
        "mc": mean([1, 1, 0, 1]),
        "one": mean([1, 0, 0, 0], "one"),
        "two": mean([1, 0], "two"),
        "text": bits([-6 * LN2, -2 * LN2], [3, 1]),
    }
    found = fitness.objectives(scores)
    assert found == pytest.approx({"mc": 0.75, "both": 0.375, "text": -2.0})
    assert list(found) == ["mc", "both", "text"]
    # Pooled with as many items that are all right: 7/8; (5/8 + 3/4) / 2; 2 bits on 4 bytes and none on 4 more: 1.
    more = {
        "mc": mean([1] * 4, start=4),
        "one": mean([1] * 4, "one", start=4),
        "two": mean([1] * 2, "two", start=2),
        "text": bits([0.0], [4], start=2),
    }
    assert fitness.pooled_objectives([scores, more]) == pytest.approx({"mc": 0.875, "both": 0.6875, "text": -1.0})


def test_relative_row() -> None:
    """Sources: acc 1/4 and 1/2, bits 2 and 4. Best: 1/2 and 2. Ours: acc 3/4 -> 1.5, bits 4 -> 0.5."""
    sources = [
        {"mc": mean([1, 0, 0, 0]), "text": bits([-2 * LN2], [1])},
        {"mc": mean([1, 1, 0, 0]), "text": bits([-4 * LN2], [1])},
    ]
    fitness = Fitness((ACC, BPB)).relative_to(sources)
    assert [goal.reference for goal in fitness.goals] == [0.5, pytest.approx(2.0)]
    ours = {"mc": mean([1, 1, 0, 1]), "text": bits([-4 * LN2], [1])}
    assert fitness(ours) == pytest.approx((1.5 + 3 * 0.5) / 4)
    assert fitness({"mc": sources[1]["mc"], "text": sources[0]["text"]}) == pytest.approx(1.0)


def test_stderr_of_a_mean() -> None:
    """0, 1, 1, 1: sample variance 1/4, so the mean's error is sqrt(1/16)."""
    scores = {"mc": mean([0, 1, 1, 1])}
    assert Fitness((ACC,)).stderr(scores) == pytest.approx(0.25)
    relative = Fitness((Goal("mc", "acc", 5.0, True, reference=0.5),))
    assert relative.stderr(scores) == pytest.approx(0.5)


def test_stderr_of_two_tasks() -> None:
    """Independent errors add as squares, with the weights: sqrt((1/4 · 0.25)² + (3/4 · 0.25)²)."""
    goals = (ACC, Goal("other", "acc", 3.0, True))
    scores = {"mc": mean([0, 1, 1, 1]), "other": mean([0, 1, 1, 1], "other")}
    assert Fitness(goals).stderr(scores) == pytest.approx(0.25 * math.sqrt(1 + 9) / 4)


@pytest.mark.parametrize("relative", [False, True])
def test_stderr_and_difference_against_a_bootstrap(relative: bool) -> None:
    generator = np.random.default_rng(3)
    n, m = 300, 200
    hard, sizes = generator.random(n), generator.integers(20, 200, m)

    def model(skill: float, seed: int) -> dict[str, ItemScores]:
        own = np.random.default_rng(seed)
        answers = (hard + 0.3 * own.random(n) < skill).astype(float)
        return {"mc": mean(answers), "text": bits(-sizes * (0.9 + 0.2 * own.random(m)), sizes)}

    ours, theirs = model(0.8, 1), model(0.7, 2)
    fitness = Fitness((ACC, BPB))
    if relative:
        fitness = fitness.relative_to([theirs])
    picks = [(generator.integers(0, n, n), generator.integers(0, m, m)) for _ in range(1500)]

    def samples(scores: dict[str, ItemScores]) -> np.ndarray[Any, Any]:
        return np.array([fitness({"mc": scores["mc"].take(i), "text": scores["text"].take(j)}) for i, j in picks])

    left, right = samples(ours), samples(theirs)
    assert fitness.stderr(ours) == pytest.approx(left.std(), rel=0.1)
    value, stderr = fitness.difference(ours, theirs)
    assert value == pytest.approx(fitness(ours) - fitness(theirs))
    assert stderr == pytest.approx((left - right).std(), rel=0.1)
    # The same items for both: the difference is known better than either, and than two unpaired ones.
    assert stderr < math.hypot(fitness.stderr(ours), fitness.stderr(theirs))


def test_bootstrap_of_the_fitness_agrees_with_the_delta_method() -> None:
    generator = np.random.default_rng(4)
    models = [
        {
            "mc": mean(generator.random(300) < 0.6 + 0.1 * k),
            "text": bits(-generator.uniform(50, 70, 100), generator.integers(40, 60, 100)),
        }
        for k in range(2)
    ]
    fitness = Fitness((ACC, BPB)).relative_to(models)
    samples = fitness.bootstrap(models)
    assert samples is not None
    assert samples.shape == (2, 2000)
    for scores, row in zip(models, samples, strict=True):
        assert row.mean() == pytest.approx(fitness(scores), abs=0.1 * row.std())
        assert row.std() == pytest.approx(fitness.stderr(scores), rel=0.06)
    spread = (samples[0] - samples[1]).std()
    assert spread == pytest.approx(fitness.difference(*models)[1], rel=0.06)
    again = fitness.bootstrap(models)
    assert again is not None
    np.testing.assert_array_equal(again, samples)
    with pytest.raises(ValueError, match="mc: the two were not scored on the same items"):
        fitness.bootstrap([models[0], {**models[1], "mc": mean([1.0] * 300, start=1)}])


def test_pooled_difference_is_that_of_all_items() -> None:
    ours, theirs = (
        [{"mc": mean(rows[:3])}, {"mc": mean(rows[3:], start=3)}] for rows in ([1, 0, 1, 1, 1], [0, 0, 1, 1, 0])
    )
    whole = Fitness((ACC,)).difference({"mc": mean([1, 0, 1, 1, 1])}, {"mc": mean([0, 0, 1, 1, 0])})
    assert Fitness((ACC,)).pooled_difference(ours, theirs) == pytest.approx(whole)


def test_difference_needs_the_same_items() -> None:
    with pytest.raises(ValueError, match="mc: the two were not scored on the same items"):
        Fitness((ACC,)).difference({"mc": mean([1, 0])}, {"mc": mean([1, 0], start=1)})


def test_difference_from_itself_is_nothing() -> None:
    scores = {"mc": mean([0, 1, 1, 1]), "text": bits([-3.0, -1.0, -2.0], [2, 1, 1])}
    assert Fitness((ACC, BPB)).difference(scores, scores) == (0.0, 0.0)


def test_one_item_has_no_error() -> None:
    assert math.isnan(Fitness((ACC,)).stderr({"mc": mean([1])}))


def test_pooled_is_the_score_of_all_items() -> None:
    """acc over 1 + 3 items is 3/4, not the mean of 1 and 2/3; bits over the sums, not the mean of the ratios."""
    one = {"mc": mean([1]), "text": bits([-8 * LN2], [2])}
    two = {"mc": mean([1, 1, 0], start=1), "text": bits([-6 * LN2], [5], start=1)}
    assert Fitness((ACC,)).pooled([one, two]) == pytest.approx(0.75)
    assert Fitness((BPB,)).pooled([one, two]) == pytest.approx(-14 / 7)


def test_a_metric_that_is_no_mean_of_items_steers_without_an_error() -> None:
    goals = Fitness((Goal("f", "f1", 1.0, True),))
    scores = {"f": corpus(0.5, 4)}
    assert goals(scores) == 0.5
    assert math.isnan(goals.stderr(scores))
    value, stderr = goals.difference({"f": corpus(0.75, 4)}, scores)
    assert value == 0.25
    assert math.isnan(stderr)
    assert goals.bootstrap([scores]) is None
    assert math.isnan(goals.pooled_difference([{"f": corpus(0.75, 4)}], [scores])[1])
    # 1 item at 1.0 and 3 items at 0.5, by their numbers.
    assert goals.pooled([{"f": corpus(1.0, 1)}, {"f": corpus(0.5, 3, start=1)}]) == pytest.approx(0.625)


def test_where_there_is_no_ratio_a_filter_that_is_not_zero_is_named() -> None:
    columns = {"em": [0, 0, 0, 0], "em,strict": [0, 0, 0, 0], "em,loose": [1, 0, 0, 0], "f1": [1, 1, 1, 1]}
    metrics = {name: (np.array(values, dtype=float), np.ones(4)) for name, values in columns.items()}
    scores = ItemScores("sums", tuple(f"sums:{k}" for k in range(4)), metrics, dict.fromkeys(columns, True))
    with pytest.raises(TaskError, match=r"use `metric: em,loose`, where it is 0\.25, or `scale: raw`") as caught:
        Fitness((Goal("sums", "em,strict", 1.0, True),)).relative_to([{"sums": scores}])
    assert "f1" not in str(caught.value)


def test_no_ratio_to_nothing() -> None:
    sources = [{"mc": mean([0, 0]), "text": bits([-1.0], [1])}]
    with pytest.raises(
        TaskError, match="mc: the best source's acc is 0, so there is no ratio to it; use `scale: raw`"
    ) as caught:
        Fitness((ACC, BPB)).relative_to(sources)
    assert len(caught.value.problems) == 1
