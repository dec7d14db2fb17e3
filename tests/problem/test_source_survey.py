"""What is said of sources before a search: against differences of the score, and of models that are known to agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evomerge.evaluation.splits import SEARCH
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import Problem, open_problem
from evomerge.problem.source_survey import _average, survey_sources
from evomerge.spec.load import parse_spec
from tests.frame import search_spec


@pytest.fixture(scope="module")
def problem(tiny_family: dict[str, Path]) -> Problem:
    spec = search_spec(tiny_family, evaluation__dtype="float32")
    spec["models"]["sources"] = {name: str(tiny_family[name]) for name in ("a", "b")} | {"same": str(tiny_family["a"])}
    return open_problem(parse_spec(spec))


def test_the_worth_of_a_source_is_how_the_score_grows(problem: Problem) -> None:
    runner = ModelRunner(problem)
    survey = survey_sources(problem, runner, items=6)
    selection = {task: positions[:6] for task, positions in problem.splits[SEARCH].items()}
    goals = tuple(
        replace(goal, metric=problem.tasks[goal.task].smooth_metric(goal.metric)) for goal in problem.steering.goals
    )

    def logs(weight: float) -> float:
        """The mean of the logarithms of what steers, of which a share of growth is the derivative."""
        recipe = dict(_average(problem))
        first, *others = recipe["models"]  # type: ignore[misc]
        recipe["models"] = [{**first, "parameters": {"weight": weight}}, *others]
        scores = runner.scores(runner.plan(recipe), selection)[0]
        values = [goal.value(scores[goal.task].score(goal.metric).value)[0] for goal in goals]
        assert all(values)
        return float(
            sum(g.weight * np.sign(v) * np.log(abs(v)) for g, v in zip(goals, values, strict=True))
            / sum(g.weight for g in goals)
        )

    step = 0.02
    measured = (logs(1 / 3 + step) - logs(1 / 3 - step)) / (2 * step)
    assert survey.worth[:, 0].sum() == pytest.approx(measured, rel=0.1, abs=5e-3)


def test_the_same_source_twice_agrees_with_itself(problem: Problem) -> None:
    survey = survey_sources(problem, ModelRunner(problem), items=4)
    assert survey.sources == ("a", "b", "same")
    assert survey.items == 4 * len(problem.splits[SEARCH])
    for cosines in (survey.agreement, survey.alike):
        assert cosines[0, 2] == pytest.approx(1.0, abs=1e-6)
        assert abs(cosines[0, 1]) < 0.999
    assert survey.moved[0] == pytest.approx(survey.moved[2])
    assert (survey.moved > 0).all()
    assert survey.worth.shape == (problem.reference_model.layout.layer_count + 1, 3)
    assert np.allclose(survey.worth[:, 0], survey.worth[:, 2])
