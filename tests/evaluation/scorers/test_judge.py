"""Marks and verdicts: how replies are read, what is asked, what is refused, how far a judge agrees with itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.scorers.chat_client import ChatClient, ChatOptions
from evomerge.evaluation.scorers.judge import Judge, JudgeOptions, read_mark, read_verdict
from evomerge.evaluation.scores import ItemScores
from evomerge.evaluation.tasks.scorer_task import ScorerTask
from tests.judge_server import JudgeServer, judge_server

ROWS = [{"question": f"what is {k}?", "answer": str(k)} for k in range(4)]


class Echo:
    """A model that repeats what it is asked."""

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 0, stop: Any = ()) -> list[str]:
        return [f"echo of {prompt}" for prompt in prompts]

    def chat(self, conversations: Sequence[Any], max_new_tokens: int = 0, stop: Any = ()) -> list[str]:
        return [" | ".join(f"{turn['role']}: {turn['content']}" for turn in turns) for turns in conversations]

    def loglikelihood(self, pairs: Sequence[Any]) -> list[float]:
        raise NotImplementedError


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as running:
        yield running


Make = Callable[..., Judge]


@pytest.fixture
def make(server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr("evomerge.evaluation.scorers.chat_client._PAUSE", 0.001)

    def judge(rows: Sequence[Any] = ROWS, **options: Any) -> Judge:
        client = ChatClient(ChatOptions(server.url, "judge"), tmp_path / "kept", tmp_path / "spent", "mine")
        return Judge(JudgeOptions(**options), client, rows, (), "mine")

    return judge


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("[[7]]", 7),
        ("It is good. [[ 7.5 ]] or, on reflection, [[8]]", 8),
        ("Score: 6", 6),
        ("**Rating**: 6/10", 6),
        ('{"score": 9, "why": "3 points"}', 9),
        ("4", 4),
        ("7/10", 7),
        ("I give it 7 out of 10.", 7),
        ("[[11]]", None),
        ("between 3 and 5", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_marks(reply: str, mark: float | None) -> None:
    assert read_mark(reply, 1, 10) == mark


@pytest.mark.parametrize(
    ("reply", "value"),
    [("[[A]]", 1), ("[[b]]", 0), ("[[C]]", 0.5), ("A is fine, yet [[tie]]", 0.5), ("B", 0), ("neither", None)],
)
def test_verdicts(reply: str, value: float | None) -> None:
    assert read_verdict(reply) == value


def test_a_mark_for_each_answer(make: Make, server: JudgeServer) -> None:
    server.reply = lambda prompt: f"[[{prompt.count('echo')}]]"
    judge = make(prompt="{{ question }} ({{ item.answer }}, {{ answer }}) -> {{ response }} {{ low }}-{{ high }}")
    assert judge.score(Echo(), ROWS[:2]) == [1.0, 1.0]
    assert sorted(server.prompts)[0] == "what is 0? (0, 0) -> echo of what is 0? 1-10"


def test_what_the_merge_is_asked(make: Make, server: JudgeServer) -> None:
    options = {"ask": "Q: {{ question }}", "chat": True, "system_instruction": "Be brief.", "prompt": "{{ response }}"}
    make(**options).score(Echo(), ROWS[:1])
    assert server.prompts == ["system: Be brief. | user: Q: what is 0?"]


def test_pairs_are_asked_in_both_orders(make: Make, server: JudgeServer) -> None:
    server.reply = lambda prompt: "[[A]]"  # whatever comes first is better
    judge = make(pairwise="base", models=("base",))
    judge.read("base", Echo(), ROWS)
    assert judge.metric == "win_rate"
    assert judge.score(Echo(), ROWS) == [0.5] * 4
    better = "echo of what is 1?"
    server.reply = lambda prompt: "[[tie]]"

    class Other(Echo):
        def generate(self, prompts: Sequence[str], max_new_tokens: int = 0, stop: Any = ()) -> list[str]:
            return [f"{better} indeed" for _ in prompts]

    server.reply = lambda prompt: "[[A]]" if prompt.index(better) < prompt.index("Response B:") else "[[B]]"
    assert judge.score(Other(), ROWS[2:]) == [1.0, 1.0]


def test_most_replies_must_mean_something(make: Make, server: JudgeServer) -> None:
    server.reply = lambda prompt: "no" if "what is 0" in prompt else "[[3]]"
    assert make().score(Echo(), ROWS) == [1.0, 3.0, 3.0, 3.0]
    server.reply = lambda prompt: "as a language model"
    with pytest.raises(CandidateError, match=r"have no mark from 2 to 5: 4 of 4, such as 'as a language model'"):
        make(scale=(2, 5)).score(Echo(), ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{{ respnse }}"}, r"mine: prompt: 'respnse' is undefined; it may name .*question, response"),
        ({"prompt": "{{ response"}, r"mine: prompt, line 1: "),
        ({"prompt": "{{ response.__class__.__mro__ }}"}, r"mine: prompt: .*unsafe"),
        ({"prompt": "{% if response %}{% endif %}{{ '' }}"}, r"mine: prompt, item 0: it is empty"),
        ({"ask": "{{ nothing }}"}, r"mine: ask, item 0: 'nothing' is undefined; it may name answer, item, question"),
        ({"ask": "{{ 1 / 0 }}"}, r"mine: ask, item 0: cannot be rendered: division by zero"),
    ],
)
def test_templates_that_do_not_fit(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make(**options)


def test_rows_without_a_question(make: Make) -> None:
    with pytest.raises(TaskError, match=r"mine: ask, item 0: 'question' is undefined; it may name item, text"):
        make([{"text": "x"}])


def test_a_judge_that_disagrees_with_itself(make: Make, server: JudgeServer) -> None:
    turns = iter([4, 4, 4, 4, 6, 4, 4, 6])
    server.reply = lambda prompt: f"[[{next(turns)}]]"
    judge = make(models=("base",))
    judge.read("base", Echo(), ROWS)
    assert judge.noise == pytest.approx((2 * 4 / (2 * 4)) ** 0.5)
    assert judge.notes == (
        "mine: the judge gives an answer the same mark twice in 2 of 4 cases; judged again, it would move by 1 "
        "(standard deviation)",
    )
    server.reply = lambda prompt: "[[5]]"
    scores: ItemScores = ScorerTask("mine", None, scorer=judge, rows=tuple(ROWS)).scores(Echo(), range(4))
    first = scores.score("mark")
    assert (first.value, first.stderr) == (4.0, pytest.approx(1.0 / 4**0.5))
    assert scores.take([0, 1]).score("mark").stderr == pytest.approx(1.0 / 2**0.5)


def test_the_noise_is_the_same_in_every_session(make: Make, server: JudgeServer) -> None:
    turns = iter([1, 2, 3, 4, 5, 6, 7, 8])
    server.reply = lambda prompt: f"[[{next(turns)}]]"
    noises = []
    for _ in range(2):
        judge = make(models=("base",))
        judge.read("base", Echo(), ROWS)
        noises.append(judge.noise)
    assert noises[0] == noises[1] > 0
