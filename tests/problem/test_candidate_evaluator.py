"""What candidates are compared by, fixed before the first of them, and what a generation races against."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.evaluation.score_store import RunScores
from evomerge.evaluation.splits import SEARCH
from evomerge.problem.candidate_evaluator import SAMPLED, CandidateEvaluator, Objective
from evomerge.problem.fake_evaluator import FakeRunner, fake_problem
from evomerge.problem.prepare_objective import prepare_objective
from evomerge.problem.problem import Problem
from evomerge.space.baselines import baselines
from evomerge.study.candidate import Candidate, first_generation
from evomerge.study.interfaces import NullTracker
from tests.fakes import fake_spec


def prepared(folder: Path, **changes: Any) -> tuple[Problem, FakeRunner, RunScores, Objective]:
    (folder / "scores").mkdir(exist_ok=True)
    problem, store = fake_problem(fake_spec(**changes)), RunScores(folder)
    runner = FakeRunner(problem)
    return problem, runner, store, prepare_objective(problem, runner, store, NullTracker())


def test_an_objective_is_the_same_in_every_session(tmp_path: Path) -> None:
    for changes in ({}, {"evaluation__racing": True}, {"evaluation__informative": 0.5, "evaluation__racing": True}):
        folder = tmp_path / str(len(changes))
        folder.mkdir()
        first, again = (prepared(folder, **changes)[3] for _ in range(2))
        assert first == again
        assert first.split == (SAMPLED if "evaluation__informative" in changes else SEARCH)
        assert (len(first.blocks) > 1) == ("evaluation__racing" in changes)
        for task, items in first.selection.items():
            assert sorted(k for block in first.blocks for k in block[task]) == list(items)
        with pytest.raises(FrozenInstanceError):
            first.split = "other"  # type: ignore[misc]


def test_on_the_relative_scale_the_best_source_is_one(tmp_path: Path) -> None:
    problem, runner, store, objective = prepared(tmp_path)
    evaluator = CandidateEvaluator(problem, runner, store, objective)
    starts = {start.name: start for start in baselines(problem.space)}
    values = [
        objective.fitness.objectives(evaluator.scores(starts[f"parent:{name}"].recipe, SEARCH)[0]) for name in "abc"
    ]
    assert {task: max(value[task] for value in values) for task in ("choice", "text")} == pytest.approx(
        {"choice": 1.0, "text": 1.0}
    )
    assert problem.steering == replace(objective.fitness, goals=problem.steering.goals)  # the problem is as it was


def test_a_race_stops_losers_early_and_only_against_earlier_generations(tmp_path: Path) -> None:
    problem, runner, store, objective = prepared(tmp_path, evaluation__racing=True)
    evaluator = CandidateEvaluator(problem, runner, store, objective)
    proposals = first_generation(tuple(baselines(problem.space)), 100)
    evaluator.begin_generation(())
    whole = [Candidate.of(proposal, evaluator(proposal)) for proposal in proposals]
    assert {candidate.state for candidate in whole} == {"done"}
    incumbents = evaluator.incumbents(tuple(whole))
    assert incumbents is not None
    assert incumbents.generation == 1
    best = max(whole, key=lambda candidate: candidate.fitness or 0.0)
    assert incumbents.leaders[0][0] == best.number
    evaluator.race_against(incumbents)
    raced = [evaluator(proposal) for proposal in proposals]
    pruned = [outcome for outcome in raced if outcome.state == "pruned"]
    assert pruned
    assert all(max(outcome.estimates) < max(best.estimates) for outcome in pruned)
    done = [(c.fitness, outcome.fitness) for c, outcome in zip(whole, raced, strict=True) if outcome.state == "done"]
    assert all(one == pytest.approx(other) for one, other in done)
