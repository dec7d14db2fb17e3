"""result.json and its types say the same, and a file of another form is refused by the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import RunError
from evomerge.report.result import Hypervolume, InformativeItems, RunResult
from evomerge.study.ranking import Growth
from evomerge.system.sealed import read_sealed_json, seal_json
from tests.report.test_tables import FINISHED


@pytest.fixture
def written(finished_run: Path) -> Any:
    """The content of a real run's result.json."""
    return read_sealed_json(finished_run / "result.json", dict, "")


def test_a_real_result_read_and_written_is_the_same_text(finished_run: Path) -> None:
    text = (finished_run / "result.json").read_text()
    result = read_sealed_json(finished_run / "result.json", RunResult.from_json, "")
    assert seal_json(result.to_json()) == text
    assert result.winner.scores["test"]["tiny_choice"]["acc"].n > 0
    assert result.candidates.recorded == 18


@pytest.mark.parametrize(
    "result",
    [
        FINISHED,
        replace(FINISHED, hypervolume=Hypervolume({"t": 0.5}, (Growth(0, 4, 1, 0.25),)), objectives=("t", "layers")),
        replace(FINISHED, informative=InformativeItems({}, ())),
        replace(FINISHED, selection_bias=replace(FINISHED.selection_bias, value=float("inf"), stderr=None)),
    ],
    ids=["plain", "several objectives", "informative items", "infinite"],
)
def test_every_part_survives_json(result: RunResult) -> None:
    assert RunResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_mcnemars_numbers_are_left_out_where_there_are_none() -> None:
    tasks = FINISHED.to_json()["baselines"]["parent:a"]["winner_less_this"]["tasks"]
    assert list(tasks["t"]) == ["metric", "value", "stderr", "wins", "losses", "p"]
    assert tasks["u"] == {"metric": "bits", "value": -0.5, "stderr": None}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content.pop("verdict"), "r.json: verdict: is missing"),
        (lambda content: content["winner"].pop("candidate"), "r.json: winner.candidate: is missing"),
        (lambda content: content["ended"].update(by="me"), "r.json: ended.by: is no key that this version knows"),
        (
            lambda content: content["winner"]["fitness"]["test"].update(m=1),
            "r.json: winner.fitness.test.m: is no key that this version knows",
        ),
        (lambda content: content["items"].update(saved="most"), "r.json: items.saved: Input should be a valid number"),
    ],
)
def test_another_form_is_refused_by_the_key(written: Any, change: Callable[[Any], object], problem: str) -> None:
    change(written)
    with pytest.raises(RunError) as raised:
        RunResult.from_json(written, "r.json")
    assert raised.value.problems[0].startswith(problem)
    assert len(raised.value.problems) == 2


def test_what_is_no_result_at_all_is_refused() -> None:
    with pytest.raises(RunError, match=r"result\.json: its content: "):
        RunResult.from_json([])
