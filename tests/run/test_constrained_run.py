"""Searches under constraints: a feasible winner by any algorithm, what the record and the result say, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from evomerge.errors import BadInput, SpecError
from evomerge.problem.fake_evaluator import fake_problem
from evomerge.report.result import RunResult
from evomerge.report.tables import result_table
from evomerge.run.folder import RunFolder
from evomerge.run.search import resume, start
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.interfaces import NullTracker
from tests.fakes import FAKE, fake_spec
from tests.frame import search_spec

LIMITS: list[dict[str, Any]] = [
    {"task": "answer", "metric": "acc", "at_least": "base + 0.1"},
    {"task": "choice", "at_most": "a"},
]


def constrained(algorithm: str = "ga", **changes: Any) -> SearchSpec:
    options = {"search__algorithm": algorithm, "evaluation__constraints": LIMITS, "search__candidates": 14}
    return fake_spec(**{**options, **changes})


class Lines(NullTracker):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def report(self, text: str, level: Any = "info") -> None:
        self.lines.append(text)


@pytest.mark.parametrize("algorithm", ["cmaes", "ga", "map_elites", "tpe"])
def test_the_winner_of_any_algorithm_is_feasible_and_a_resumed_search_the_same(tmp_path: Path, algorithm: str) -> None:
    result = start(constrained(algorithm), folder=tmp_path / "whole", parts=FAKE)
    searched = RunFolder.existing(tmp_path / "whole").candidates()
    assert all(set(c.constraints) == {"answer acc >= base + 0.1", "choice acc <= a"} for c in searched)
    assert any(c.violation > 0 for c in searched)
    for constraint in result.constraints:  # on the 20 search and 10 select items together
        search, select = constraint.values["search"], constraint.values["select"]
        room = 2 * (search.value - search.limit) + select.value - select.limit
        assert room <= 1e-9 if "<=" in constraint.name else room >= -1e-9
    start(constrained(algorithm), folder=tmp_path / "parts", candidates=11, parts=FAKE)
    resume(tmp_path / "parts", candidates=14, parts=FAKE)
    again = RunFolder.existing(tmp_path / "parts").candidates()
    assert [(c.recipe_hash, c.fitness, c.constraints) for c in again] == [
        (c.recipe_hash, c.fitness, c.constraints) for c in searched
    ]


def test_a_race_goes_against_the_best_that_is_feasible(tmp_path: Path) -> None:
    spec = constrained(evaluation__racing=True, evaluation__splits={"search": 32, "select": 4, "test": 4})
    start(spec, folder=tmp_path / "run", parts=FAKE)
    searched = RunFolder.existing(tmp_path / "run").candidates()
    stopped = [c for c in searched if c.state == "pruned"]
    assert stopped
    assert all(c.constraints for c in stopped)
    for candidate in stopped:
        incumbent = next(c for c in searched if f"below candidate {c.number}," in (candidate.failure or ""))
        assert incumbent.violation == 0


def test_the_result_says_of_each_limit_whether_it_holds(tmp_path: Path) -> None:
    result = start(constrained(), folder=tmp_path / "run", parts=FAKE)
    answer, choice = result.constraints
    assert answer.name == "answer acc >= base + 0.1"
    assert set(answer.values) == {"search", "select", "test"}
    assert answer.interval is not None
    assert answer.interval[0] < answer.interval[1]
    assert {answer.verdict, choice.verdict} <= {"held", "broken", "not to be told"}
    broken = set(result.verdict.partition(" did not count here")[0].rpartition(". ")[2].replace(",", "").split())
    assert "parent:base" in broken  # it has less than itself and 0.1
    assert "parent:base" not in result.within_noise_of
    text = result_table(result)
    assert "| answer acc >= base + 0.1 |" in text
    assert f"{answer.verdict}" in text
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["constraints"][0]["values"]["test"] == {
        "value": answer.values["test"].value,
        "limit": answer.values["test"].limit,
        "violation": answer.values["test"].violation,
    }
    assert RunResult.from_json(result.to_json()) == result


def test_optuna_reads_the_constraints_of_the_record(tmp_path: Path) -> None:
    start(constrained(search__candidates=6), folder=tmp_path / "run", parts=FAKE)
    folder = RunFolder.existing(tmp_path / "run")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder.root / "study.log")))
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    for trial, candidate in zip(trials, folder.candidates(), strict=True):
        assert trial.constraints == {name: value.violation for name, value in candidate.constraints.items()}


def test_a_limit_that_generation_0_does_not_meet_is_told(tmp_path: Path) -> None:
    tracker = Lines()
    impossible = [{"task": "choice", "metric": "acc", "at_least": 2.0}]
    result = start(
        constrained(evaluation__constraints=impossible), folder=tmp_path / "run", tracker=tracker, parts=FAKE
    )
    told = [line for line in tracker.lines if "meets the constraint" in line]
    assert len(told) == 1
    assert "choice acc >= 2" in told[0]
    assert "parent:a 0." in told[0]
    assert "(limit 2)" in told[0]
    assert result.constraints[0].verdict == "broken"
    assert not any(c.state == "pruned" for c in RunFolder.existing(tmp_path / "run").candidates())


def test_a_front_is_of_what_is_feasible(tmp_path: Path) -> None:
    spec = constrained("nsga2", search__objectives="pareto")
    result = start(spec, folder=tmp_path / "run", parts=FAKE)
    searched = {c.number: c for c in RunFolder.existing(tmp_path / "run").candidates()}
    assert result.front
    assert all(searched[row.candidate].violation == 0 for row in result.front[:1])


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"task": "choice", "metric": "acc"}, "say either at_least or at_most"),
        ({"task": "choice", "at_least": 0.1, "tokens": {"at_most": 3}}, "each entry limits one thing"),
        ({"tokens": {"at_most": 3}, "metric": "acc"}, "go with a task"),
        ({"layers": {"at_most": 3, "at_least": 1}}, "say either at_least or at_most"),
        ({"task": "choice", "at_least": "basis - 0.1"}, "no model is called 'basis'.*'base'"),
        ({"task": "choice", "at_least": "base-0.1"}, "a number, or a model's value such as"),
        ({"task": "choice", "at_least": 0.1, "num_fewshot": 2}, "'choice' steers; its splits and num_fewshot"),
        ({"task": "choice", "at_leest": 0.1}, "unknown key.*at_least"),
    ],
)
def test_what_is_wrong_in_a_constraint_is_told(constraint: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        constrained(evaluation__constraints=[constraint])


def test_a_metric_that_a_task_lacks_and_tokens_of_none_are_told_together() -> None:
    wrong = [{"task": "choice", "metric": "akk", "at_least": 0.1}, {"tokens": {"at_most": 300}}, LIMITS[1], LIMITS[1]]
    with pytest.raises(BadInput) as caught:
        fake_problem(constrained(evaluation__constraints=wrong))
    text = str(caught.value)
    assert "evaluation.constraints: task 'choice' has no metric 'akk'" in text
    assert "acc" in text
    assert "evaluation.constraints: tokens: none of the tasks generates text (choice, text)" in text
    assert "evaluation.constraints: 'choice acc <= a' is listed twice" in text


def test_tokens_are_an_objective_and_limited_beside_any_generated_task(
    tiny_family: dict[str, Path], tmp_path: Path
) -> None:
    spec = parse_spec(
        search_spec(
            tiny_family,
            space__methods=["linear"],
            evaluation__tasks=["tiny_choice", {"task": "tiny_answer", "metric": "exact_match"}],
            evaluation__scale="raw",
            evaluation__guard=["tiny_text"],
            evaluation__constraints=[
                {"tokens": {"at_most": "base * 1.5"}},
                {"task": "tiny_text", "metric": "bits_per_byte", "at_most": "base + 5"},
            ],
            search__objectives="pareto",
            search__also_minimize=["tokens"],
            search__candidates=8,
            run__keep=0,
        )
    )
    result = start(spec, folder=tmp_path / "run")
    searched = {c.operator: c for c in RunFolder.existing(tmp_path / "run").candidates()}
    base = searched["parent:base"]
    tokens = base.scores["search"]["tiny_answer"]["tokens"]["value"]
    assert 1 <= tokens <= 8
    assert base.constraints["tokens <= base * 1.5"].value == tokens
    assert base.constraints["tokens <= base * 1.5"].limit == pytest.approx(1.5 * tokens)
    assert base.objectives is not None
    assert base.objectives[2] == 1.0
    assert set(result.front[0].sizes) == {"tokens", "layers", "parameters"}
    assert [c.name for c in result.constraints] == ["tokens <= base * 1.5", "tiny_text bits_per_byte <= base + 5"]
    assert result.constraints[1].verdict == "held"
    assert "guard" in result.winner.scores
