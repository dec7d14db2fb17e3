"""Searches that a judge steers: killed, out of money, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ServiceError, SpecError, TaskError
from evomerge.run.check import check_search
from evomerge.run.search import resume, start
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from tests.frame import files, search_spec
from tests.judge_server import JudgeServer, judge_server
from tests.run.test_scorer_run import Stop

Spec = Callable[..., SearchSpec]


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    """A judge that likes variety."""
    with judge_server(reply=lambda prompt: f"[[{1 + len(set(prompt.partition('Response:')[2])) % 10}]]") as running:
        yield running


@pytest.fixture
def spec(server: JudgeServer, tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """A small search that a judge steers; its replies are kept in a folder of this test."""
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0.0)
    rows = [{"question": f"what is {k} and {k % 3}", "answer": f"{k % 5}"} for k in range(16)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(judge: dict[str, Any] | None = None, **changes: Any) -> SearchSpec:
        options = {"endpoint": server.url, "model": "judge", "max_new_tokens": 5, "retries": 1, **(judge or {})}
        changes = {
            "evaluation__tasks": [{"judge": options, "data": "items.jsonl"}],
            "evaluation__guard": [],
            "search__candidates": 6,
            "search__finalists": 2,
            "run__keep": 0,
            "space": {"methods": ["linear", "task_arithmetic"], "layer_groups": 1},
            **changes,
        }
        return parse_spec(search_spec(tiny_family, **changes), beside=tmp_path)

    return make


def test_a_judge_steers_and_a_stopped_run_goes_on_the_same(
    spec: Spec, server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "quite-a-secret-key")
    whole = start(spec(), folder=tmp_path / "whole")
    assert whole.winner.scores["test"]["judge"]["mark"].n == 4
    asked = len(server.prompts)
    with pytest.raises(KeyboardInterrupt):
        start(spec(), folder=tmp_path / "stopped", tracker=Stop(4))
    assert resume(tmp_path / "stopped") == whole
    assert len(server.prompts) == asked  # all of it was on the disk
    assert all(b"quite-a-secret" not in content for _, content in files(tmp_path))


def test_a_judge_that_likes_what_comes_first_finds_no_better_answer(
    spec: Spec, server: JudgeServer, tmp_path: Path
) -> None:
    server.reply = lambda prompt: "[[A]]"
    changes = {"search__candidates": 2, "evaluation__scale": "raw"}
    result = start(spec({"pairwise": "base"}, **changes), folder=tmp_path / "run")
    assert result.winner.scores["test"]["judge"]["win_rate"].value == 0.5


def test_a_run_whose_limit_is_reached_goes_on_with_a_higher_one(
    spec: Spec, server: JudgeServer, tmp_path: Path
) -> None:
    whole = start(spec(), folder=tmp_path / "whole")
    needed = len(server.prompts)
    for path in (tmp_path / "cache" / "judge").rglob("*"):
        if path.is_file():
            path.unlink()
    for limit in (needed - 4, needed - 2):
        with pytest.raises(ServiceError, match=f"task 'judge': max_calls is {limit}, and so many were made"):
            start(spec({"max_calls": limit}), folder=tmp_path / "run")
    assert start(spec({"max_calls": needed}), folder=tmp_path / "run") == whole


def test_check_asks_the_judge(spec: Spec, server: JudgeServer) -> None:
    server.reply = lambda prompt: "[[5]]"
    assert "the judge gives an answer the same mark twice in 64 of 64 cases" in check_search(spec())
    server.faults = [401] * 100
    with pytest.raises(ServiceError, match="wants a key"):
        check_search(spec({"model": "another"}))
    with pytest.raises(ServiceError, match=r"http://127.0.0.1:9/v1 cannot be reached"):
        check_search(spec({"endpoint": "http://127.0.0.1:9/v1"}))
    with pytest.raises(TaskError, match="'respons' is undefined"):
        check_search(spec({"prompt": "{{ respons }}"}))


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"endpoint": "127.0.0.1:80"}, "'127.0.0.1:80' is no URL"),
        ({"endpoint": "http://me:secret123@h/v1"}, "without a key"),
        ({"key": "HOME"}, "a variable whose name ends in API_KEY"),
        ({"scale": [5, 5]}, r"low \(5\) is not below high \(5\)"),
        ({"max_cost": 1}, "max_cost: needs price"),
        ({"prompt": "absent.jinja"}, "tasks.0.judge.prompt: no file absent.jinja"),
        ({"pairwise": "bas"}, r"judge.pairwise: no model 'bas' \(did you mean 'base'"),
        ({"pairwse": "base"}, r"judge.pairwse: unknown key \(did you mean 'pairwise'"),
    ],
)
def test_judges_that_mean_nothing(spec: Spec, judge: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as raised:
        spec(judge)
    assert "secret123" not in str(raised.value)


def test_a_judge_needs_items_and_is_no_python(spec: Spec) -> None:
    judge = {"endpoint": "http://h/v1", "model": "m"}
    with pytest.raises(SpecError, match="a judge needs items"):
        spec(evaluation__tasks=[{"judge": judge}])
    with pytest.raises(SpecError, match="python, judge or agreement, not several"):
        spec(evaluation__tasks=[{"judge": judge, "python": "a.py:score", "data": "items.jsonl"}])
