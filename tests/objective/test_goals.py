"""What each task counts: values by hand, one unit on the raw scale, goals of a specification."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import SpecError, TaskError
from evomerge.evaluation.tasks.task import Task
from evomerge.objective.goals import Goal, mixed_units, reported_goals, smooth_goals
from evomerge.spec.schema import Evaluation


def test_a_loss_of_zero_is_better_than_any() -> None:
    goal = Goal("x", "loss", 1.0, False, reference=0.5)
    value, derivative = goal.value(0.0)
    assert math.isfinite(value)
    assert math.isfinite(derivative)
    assert value > goal.value(1e-6)[0] > goal.value(0.1)[0] == 5.0


@given(
    st.floats(0.01, 10),
    st.floats(0.01, 10),
    st.booleans(),
    st.one_of(st.none(), st.floats(0.01, 10)),
    st.floats(0.1, 9),
)
def test_better_scores_are_fitter(one: float, two: float, up: bool, reference: float | None, weight: float) -> None:
    goal = Goal("x", "m", weight, up, reference)
    left, right = goal.value(one)[0], goal.value(two)[0]
    if one != two:
        assert (left >= right) == ((one > two) == up) or left == right
    step = 1e-6 * one
    assert goal.value(one)[1] == pytest.approx((goal.value(one + step)[0] - left) / step, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("metrics", "mixed"),
    [
        (["acc", "acc_norm", "exact_match"], False),
        (["acc", "exact_match,strict-match"], False),
        (["bits_per_byte", "bits_per_byte"], False),
        (["acc", "pass@1", "pass_at_1,none"], False),
        (["acc", "bits_per_byte"], True),
        (["nll", "perplexity"], True),
    ],
)
def test_raw_refuses_mixed_units(metrics: list[str], mixed: bool) -> None:
    goals = [Goal(f"t{k}", metric, 1.0, True) for k, metric in enumerate(metrics)]
    assert bool(mixed_units(goals, "raw")) == mixed
    assert mixed_units(goals, "relative") == []
    if mixed:
        assert "raw cannot add up" in mixed_units(goals, "raw")[0]


def task(name: str, output_type: str, **higher_is_better: bool) -> Task:
    """A task as far as goals need it."""
    filters = [SimpleNamespace(name="none")]
    return Task(
        name,
        SimpleNamespace(OUTPUT_TYPE=output_type, higher_is_better=lambda: higher_is_better, _filters=filters),
    )


CHOICE = task("choice", "multiple_choice", acc=True, acc_norm=True)
OTHER = task("other", "multiple_choice", acc=True)
TEXT = task("text", "loglikelihood_rolling", bits_per_byte=False)
TASKS = {"choice": CHOICE, "other": OTHER, "text": TEXT}


def test_a_group_shares_its_weight_and_a_goal_without_a_metric_takes_the_first() -> None:
    evaluation = Evaluation(tasks=[{"task": "both", "weight": 3}, {"task": "text", "metric": "bits_per_byte"}])
    goals = reported_goals(evaluation, TASKS, {"both": ("choice", "other"), "text": ("text",)})
    assert goals == (
        Goal("choice", "acc", 1.5, True, group="both"),
        Goal("other", "acc", 1.5, True, group="both"),
        Goal("text", "bits_per_byte", 1.0, False),
    )
    more = (Goal("choice", "acc_norm", 1.0, True), Goal("choice", "nll_byte", 1.0, False))
    smooth = smooth_goals((*goals, *more), TASKS)
    assert [goal.metric for goal in smooth] == ["prob", "prob", "bits_per_byte", "prob_norm", "nll_byte"]
    assert [goal.higher_is_better for goal in smooth] == [True, True, False, True, False]


def test_problems_of_goals_come_together() -> None:
    evaluation = Evaluation(tasks=[{"task": "choice", "metric": "f2"}, {"task": "unknown"}])
    with pytest.raises(TaskError) as caught:
        reported_goals(evaluation, TASKS, {"choice": ("choice",)}, ["unknown task 'unknown'"])
    assert len(caught.value.problems) == 2
    evaluation = Evaluation(tasks=["choice", "text"], scale="raw")
    with pytest.raises(SpecError, match="raw cannot add up a share of items, bits_per_byte"):
        reported_goals(evaluation, TASKS, {"choice": ("choice",), "text": ("text",)})
