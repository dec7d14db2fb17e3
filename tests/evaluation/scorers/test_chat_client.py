"""Calls to a server that is slow, busy, broken, rude or dear."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ServiceError
from evomerge.evaluation.scorers.chat_client import ChatClient, ChatOptions
from tests.judge_server import JudgeServer, judge_server

Make = Callable[..., ChatClient]


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server(reply=lambda prompt: f"reply to {prompt}") as running:
        yield running


@pytest.fixture
def make(server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes clients of the server that share what they keep; backoff takes no time."""
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0.0)
    monkeypatch.setattr("evomerge.evaluation.scorers.chat_client._PAUSE", 0.001)

    def client(**options: Any) -> ChatClient:
        chosen = ChatOptions(server.url, "judge", **{"retries": 2, **options})
        return ChatClient(chosen, tmp_path / "kept", tmp_path / "kept" / "spent", "task 'judge'")

    return client


def ask(client: ChatClient, count: int = 1, sample: int = 0) -> list[str | None]:
    return client.ask([(f"question {k}", sample) for k in range(count)], lambda text: text.startswith("reply"))


def test_replies_in_order_and_kept(make: Make, server: JudgeServer) -> None:
    expected = [f"reply to question {k}" for k in range(5)]
    assert ask(make(), 5) == expected
    assert ask(make(), 5) == expected
    assert len(server.prompts) == 5
    assert ask(make(), 1, sample=1) == expected[:1]
    assert len(server.prompts) == 6


def test_a_damaged_reply_is_asked_again(make: Make, server: JudgeServer, tmp_path: Path) -> None:
    ask(make())
    (kept,) = (tmp_path / "kept").glob("*/*.json")
    kept.write_text('{"rep')
    assert ask(make()) == ["reply to question 0"]
    assert len(server.prompts) == 2


def test_questions_that_are_alike_are_asked_once(make: Make, server: JudgeServer) -> None:
    assert make().ask([("reply", 0)] * 3, bool) == ["reply to reply"] * 3
    assert len(server.prompts) == 1


def test_several_calls_are_under_way_at_once(make: Make, server: JudgeServer) -> None:
    server.delay = 0.1
    ask(make(concurrency=8), 24)
    assert 6 <= server.most <= 8


@pytest.mark.parametrize("fault", [429, 500, 503, "close", "rubbish", "no text"])
def test_what_fails_is_tried_again(make: Make, server: JudgeServer, fault: Any) -> None:
    server.faults = [fault, fault]
    assert ask(make()) == ["reply to question 0"]
    assert len(server.prompts) == 3


@pytest.mark.parametrize(("fault", "reply"), [("rubbish", None), ("no text", None), (400, None), (422, None)])
def test_a_reply_that_means_nothing_is_no_reply(make: Make, server: JudgeServer, fault: Any, reply: None) -> None:
    server.faults = [fault] * 20
    assert ask(make()) == [reply]


def test_the_last_of_unreadable_replies_is_kept(make: Make, server: JudgeServer) -> None:
    server.reply = lambda prompt: "I would rather not say"
    assert ask(make()) == ask(make()) == ["I would rather not say"]
    assert len(server.prompts) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (429, "fails: .*status 429"),
        (500, "fails, tried 3 times: .*status 500"),
        ("close", "cannot be reached, tried 3 times"),
        (401, "wants a key; it is read from the variable OPENAI_API_KEY, which has none"),
        (404, "fails: .*status 404"),
    ],
)
def test_a_server_that_goes_on_failing_stops_the_run(
    make: Make, server: JudgeServer, monkeypatch: pytest.MonkeyPatch, fault: Any, message: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.faults = [fault] * 20
    with pytest.raises(ServiceError, match=f"task 'judge': http://127.0.0.1:.*{message}"):
        ask(make())
    server.faults = []
    assert ask(make()) == ["reply to question 0"]


def test_a_server_that_does_not_answer_in_time(make: Make, server: JudgeServer) -> None:
    server.delay = 1.0
    with pytest.raises(ServiceError, match=r"does not answer within 0.05 s, tried 1 times"):
        ask(make(timeout=0.05, retries=0))


def test_nobody_there(tmp_path: Path) -> None:
    client = ChatClient(ChatOptions("http://127.0.0.1:9/v1", "m", retries=0), tmp_path, tmp_path / "spent", "mine")
    with pytest.raises(ServiceError, match=r"mine: http://127.0.0.1:9/v1 cannot be reached"):
        ask(client)


def test_a_failure_does_not_wait_for_the_others(make: Make, server: JudgeServer) -> None:
    server.faults, server.delay = [401], 0.2
    started = time.perf_counter()
    with pytest.raises(ServiceError, match="wants a key"):
        ask(make(concurrency=2), 40)
    assert time.perf_counter() - started < 3
    assert len(server.prompts) < 10


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    make: Make, server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_JUDGE_API_KEY", "quite-a-secret-key")
    ask(make(key="MY_JUDGE_API_KEY"))
    assert server.headers["authorization"] == "Bearer quite-a-secret-key"
    assert all("quite-a-secret" not in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    server.faults = [401]
    with pytest.raises(ServiceError, match="which has one that is refused") as raised:
        make(key="MY_JUDGE_API_KEY").ask([("another", 0)], bool)
    assert "quite-a-secret" not in str(raised.value)


def test_no_more_calls_than_allowed_over_all_sessions(make: Make, server: JudgeServer) -> None:
    with pytest.raises(ServiceError, match=r"max_calls is 7, and so many were made; raise it"):
        ask(make(max_calls=7, concurrency=4), 10)
    assert len(server.prompts) == 7
    with pytest.raises(ServiceError, match="max_calls is 7"):
        ask(make(max_calls=7), 10)
    assert len(server.prompts) == 7
    assert ask(make(max_calls=10), 10) == [f"reply to question {k}" for k in range(10)]
    assert len(server.prompts) == 10


def test_no_more_money_than_allowed(make: Make, server: JudgeServer) -> None:
    limits = {"max_cost": 0.0005, "price": (1.0, 2.0), "concurrency": 1}  # a call is 120 millionths
    with pytest.raises(ServiceError, match=r"max_cost is 0.0005, and 0.0006 is spent"):
        ask(make(**limits), 10)
    assert len(server.prompts) == 5
