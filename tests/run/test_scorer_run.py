"""Searches that scorers of the user's steer, beside lm-eval's tasks or alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import BadInput, EvoMergeError, SpecError, TaskError
from evomerge.run.check import check_search
from evomerge.run.search import resume, start
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.candidate import Candidate
from evomerge.study.interfaces import LogTracker
from tests.frame import search_spec

METRIC = """
def score(model, items):
    texts = model.generate([item["question"] for item in items], max_new_tokens=6)
    likely = model.loglikelihood([(item["question"], " " + item["answer"]) for item in items])
    return [len(set(text)) - value / 10 for text, value in zip(texts, likely)]

def nothing(model, items):
    raise KeyError("of the metric's own")

calls = 0

def once(model, items):
    global calls
    calls += 1
    if calls > 5:
        raise KeyError("of the metric's own")
    return [float(k) for k in range(len(items))]
"""
Spec = Callable[..., SearchSpec]


@pytest.fixture
def spec(tiny_family: dict[str, Path], tmp_path: Path) -> Spec:
    """A small search with a scorer among its tasks."""
    (tmp_path / "metric.py").write_text(METRIC)
    rows = [{"question": f"what is {k} and {k % 3}", "answer": f"{k % 5}"} for k in range(24)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str = "score", **changes: Any) -> SearchSpec:
        changes = {
            "evaluation__tasks": [{"python": f"metric.py:{name}", "data": "items.jsonl"}, "tiny_choice"],
            "evaluation__guard": [{"python": "metric.py:score", "data": "items.jsonl", "task": "guarded"}],
            "search__candidates": 7,
            "run__keep": 0,
            "space": {"methods": ["linear", "task_arithmetic"], "layer_groups": 1},
            **changes,
        }
        return parse_spec(search_spec(tiny_family, **changes), beside=tmp_path)

    return make


class Stop(LogTracker):
    """Presses Ctrl-C after some candidates."""

    def __init__(self, after: int) -> None:
        self.left = after

    def candidate(self, candidate: Candidate) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_as_if_it_had_not_been(spec: Spec, tmp_path: Path) -> None:
    changes = {"evaluation__racing": True, "evaluation__cache": True, "run__keep": 1}
    whole = start(spec(**changes), folder=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
        with pytest.raises(KeyboardInterrupt):
            start(spec(**changes), folder=tmp_path / "stopped", tracker=Stop(6))
        assert resume(tmp_path / "stopped") == whole
    assert whole.winner.scores["test"]["metric"]["score"].n == 6
    assert whole.winner.scores["guard"]["guarded"]["score"].n == 6
    card = next((tmp_path / "whole" / "best").glob("*/README.md")).read_text()
    assert "metric" in card
    assert "--tasks tiny_choice" in card


def test_objectives_of_both_kinds(spec: Spec, tmp_path: Path) -> None:
    result = start(spec(search__objectives="pareto", search__algorithm="nsga2"), folder=tmp_path / "run")
    assert result.objectives == ("metric", "tiny_choice")
    assert result.front


def test_check_tries_the_scorer(spec: Spec) -> None:
    assert "tasks run Python of yours" in check_search(spec())
    with pytest.raises(TaskError, match=r"task 'metric.nothing': its scorer raised KeyError.*metric.py, line 8"):
        check_search(spec("nothing"))


def test_ten_failures_in_a_row_stop_the_run(spec: Spec, tmp_path: Path) -> None:
    with pytest.raises(EvoMergeError, match=r"10 candidates in a row failed with not scored.*raised KeyError"):
        start(spec("once", search__candidates=40, evaluation__guard=[]), folder=tmp_path / "run")
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


def test_a_scorer_that_has_changed_does_not_go_on(spec: Spec, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        start(spec(), folder=tmp_path / "run", tracker=Stop(3))
    (tmp_path / "metric.py").write_text(METRIC.replace("/ 10", "/ 20"))
    with pytest.raises(BadInput, match="the models or the data have changed"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"python": "absent.py:score", "data": "items.jsonl"}, "evaluation.tasks.0.python: no file absent.py"),
        ({"python": "metric.py", "data": "items.jsonl"}, "'metric.py' is not FILE.py:NAME or PACKAGE.MODULE:NAME"),
        ({"python": "metric.py:score", "data": "absent.jsonl"}, "evaluation.tasks.0.data: no file absent.jsonl"),
        ({"task": "tiny_choice", "data": "items.jsonl"}, "data is a scorer's"),
        ({"task": "tiny_choice", "options": {"a": 1}}, "options are a Python scorer's"),
        ({"python": "metric.py:score", "dat": "items.jsonl"}, r"tasks.0.dat: unknown key \(did you mean 'data'"),
        ({"data": "items.jsonl"}, "evaluation.tasks.0.task: missing"),
    ],
)
def test_entries_that_mean_nothing(spec: Spec, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec(evaluation__tasks=[entry])


def test_what_is_wrong_with_scorers_and_tasks_is_told_at_once(spec: Spec) -> None:
    tasks = [{"python": "metric.py:scores", "data": "items.jsonl"}, {"task": "tiny_choice", "metric": "absent"}]
    with pytest.raises(TaskError) as raised:
        check_search(spec(evaluation__tasks=tasks))
    assert len(raised.value.problems) == 2


def test_names_of_scorers(spec: Spec) -> None:
    entries = [{"python": f"metric.py:{name}", "data": "items.jsonl"} for name in ("score", "nothing")]
    entries += [
        {"python": "a.b.c:d", "data": "items.jsonl"},
        {"python": "x:score", "task": "own", "data": "items.jsonl"},
    ]
    named = spec(evaluation__tasks=entries).evaluation.tasks
    assert [part.task for part in named] == ["metric", "metric.nothing", "c.d", "own"]
    assert SearchSpec.model_validate(spec().model_dump()) == spec()
