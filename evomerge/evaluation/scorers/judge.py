"""A judge: another model, behind an OpenAI-compatible server, gives marks to what the merge writes.

With a scale every answer gets a mark; in pairs the judge says which of two answers is better, the merge's or another
model's, asked in both orders. How far it agrees with itself is measured by having answers of the models that generation
0 begins with judged twice.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.scorers.chat_client import ChatClient
from evomerge.evaluation.tasks.scorer_task import Item, LiveModel
from evomerge.system.hashing import digest

log = logging.getLogger(__name__)

TWICE = 32
"""Answers of each model that are judged twice."""
_MOST_UNREADABLE = 0.5
"""Of a judge's replies: with more, the prompt is wrong, or the server is."""

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_MARKS = (
    re.compile(rf"\[\[\s*{_NUMBER}\s*(?:/\s*\d+\s*)?\]\]"),
    re.compile(rf"(?i)\b(?:score|rating|mark|grade)\b[\"'*\s]*(?:is|of|[:=])?[\"'*\s]*{_NUMBER}"),
)
_OUT_OF = re.compile(r"(?i)\s*(?:/|out\s+of)\s*\d+(?:\.\d+)?")
_VERDICTS = (re.compile(r"(?i)\[\[\s*(A|B|C|tie)\s*\]\]"), re.compile(r"\b(A|B|[Tt]ie|TIE)\b"))

SCALE_PROMPT = """\
Rate the response to the question below with a number from {{ low }} to {{ high }}; {{ high }} is best.
End your reply with the number in double brackets, such as [[{{ low }}]].

Question:
{{ question }}

Response:
{{ response }}
"""
PAIR_PROMPT = """\
Which of the two responses to the question below is better?
End your reply with [[A]], [[B]], or [[tie]].

Question:
{{ question }}

Response A:
{{ response_a }}

Response B:
{{ response_b }}
"""


@dataclass(frozen=True)
class JudgeOptions:
    """What is asked of the merge, and of the judge.

    Attributes:
        ask: Jinja: what the merge is asked; None for an item's `prompt` or `question`.
        prompt: Jinja: what the judge is asked; None for a short prompt of our own.
        scale: The lowest and the highest mark.
        pairwise: Name of the model whose answers the merge's are compared with; None for marks.
        models: Names of the models whose answers are judged twice.
        max_new_tokens: Tokens of an answer at most.
        stop: What an answer ends before.
        chat: Whether the merge is asked in its chat template.
        system_instruction: What its conversation, or its prompt, begins with.
    """

    ask: str | None = None
    prompt: str | None = None
    scale: tuple[float, float] = (1.0, 10.0)
    pairwise: str | None = None
    models: tuple[str, ...] = ()
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    chat: bool = False
    system_instruction: str | None = None


class Judge:
    """A scorer that asks a judge.

    Args:
        options: What is asked.
        client: Asks the judge.
        rows: The items.
        files: What prompts and items were read from.
        name: What it is called, for messages.

    Attributes:
        noise: Standard deviation of an item's value, were it judged again.

    Raises:
        TaskError: A template is wrong, or names what an item does not have.
    """

    kind = "judge"
    higher_is_better = True
    ratio = False
    python_files: tuple[Path, ...] = ()

    def __init__(
        self, options: JudgeOptions, client: ChatClient, rows: Sequence[Item], files: tuple[Path, ...], name: str
    ) -> None:
        self._options = options
        self._client = client
        self._name = name
        self.files = files
        self.metric = "mark" if options.pairwise is None else "win_rate"
        self.digest = digest(client.options.identity, repr(replace(options, models=())))
        self.references = options.models
        self.noise = 0.0
        self.notes: tuple[str, ...] = ()
        self._other_answers: dict[str, str] = {}
        self._judged_twice: list[tuple[float, float]] = []
        prompt = options.prompt or (SCALE_PROMPT if options.pairwise is None else PAIR_PROMPT)
        field = "prompt" if all("prompt" in row for row in rows) else "question"
        self._ask = _template(options.ask or f"{{{{ {field} }}}}", f"{name}: ask")
        self._prompt = _template(prompt, f"{name}: prompt")
        for k, row in enumerate(rows):
            self._render(self._ask, {"item": row, **row}, f"ask, item {k}")
            for text in self._prompts(row, "a response", "another"):
                if not text.strip():
                    raise TaskError(f"{name}: prompt, item {k}: it is empty")

    def read(self, name: str, model: LiveModel, items: Sequence[Item]) -> None:
        """Takes what a model that generation 0 begins with answers: to compare with, and to be judged twice."""
        if name == self._options.pairwise:
            answers = self._answers(model, items)
            self._other_answers = {_key(row): answer for row, answer in zip(items, answers, strict=True)}
        few = items[:TWICE]
        answers = self._answers(model, few)
        questions = [text for row, answer in zip(few, answers, strict=True) for text in self._asked(row, answer)]
        first, second = (self._values(questions, few, sample) for sample in (0, 1))
        self._judged_twice += zip(first, second, strict=True)
        differences = [a - b for a, b in self._judged_twice]
        self.noise = math.sqrt(sum(d * d for d in differences) / (2 * len(differences)))
        same = sum(d == 0 for d in differences)
        self.notes = (
            f"{self._name}: the judge gives an answer the same {self.metric} twice in {same} of {len(differences)} "
            f"cases; judged again, it would move by {self.noise:.3g} (standard deviation)",
        )

    def score(self, model: LiveModel, items: Sequence[Item]) -> list[float]:
        """Returns each answer's mark; in pairs its share of wins, a tie being half of one.

        Raises:
            ServiceError: The judge cannot be asked.
            CandidateError: Most of its replies mean nothing.
        """
        answers = self._answers(model, items)
        questions = [text for row, answer in zip(items, answers, strict=True) for text in self._asked(row, answer)]
        return self._values(questions, items, 0)

    def _answers(self, model: LiveModel, items: Sequence[Item]) -> list[str]:
        options = self._options
        prompts = [self._render(self._ask, {"item": row, **row}, "ask") for row in items]
        system = options.system_instruction
        if not options.chat:
            prompts = [(system or "") + prompt for prompt in prompts]
            return model.generate(prompts, options.max_new_tokens, options.stop)
        first = [{"role": "system", "content": system}] if system else []
        turns = [[*first, {"role": "user", "content": prompt}] for prompt in prompts]
        return model.chat(turns, options.max_new_tokens, options.stop)

    def _asked(self, row: Item, answer: str) -> list[str]:
        """What the judge is asked about an answer: one question, or one for each order."""
        return self._prompts(row, answer, self._other_answers.get(_key(row), ""))

    def _prompts(self, row: Item, answer: str, other: str) -> list[str]:
        low, high = self._options.scale
        asked = self._render(self._ask, {"item": row, **row}, "ask")
        given = {"question": asked, "low": f"{low:g}", "high": f"{high:g}", **row, "item": row}
        if self._options.pairwise is None:
            return [self._render(self._prompt, {**given, "response": answer}, "prompt")]
        orders = ((answer, other), (other, answer))
        return [self._render(self._prompt, {**given, "response_a": a, "response_b": b}, "prompt") for a, b in orders]

    def _values(self, questions: Sequence[str], items: Sequence[Item], sample: int) -> list[float]:
        """The items' values, by the replies to what is asked about them."""
        replies = self._client.ask([(text, sample) for text in questions], lambda text: self._read(text) is not None)
        values = [None if reply is None else self._read(reply) for reply in replies]
        unread = [reply for reply, value in zip(replies, values, strict=True) if value is None]
        if len(unread) > _MOST_UNREADABLE * len(replies):
            expected = (
                "A, B or tie" if self._options.pairwise else "mark from {:g} to {:g}".format(*self._options.scale)
            )
            sample_reply = next((reply for reply in unread if reply is not None), "")[:200]
            raise CandidateError(
                f"the judge's replies have no {expected}: {len(unread)} of {len(replies)}, such as {sample_reply!r}"
            )
        if unread:
            log.warning(
                "%s: %d of %d replies mean nothing and count as the lowest", self._name, len(unread), len(replies)
            )
        if self._options.pairwise is None:
            return [self._options.scale[0] if value is None else value for value in values]
        wins = [0.0 if value is None else value if k % 2 == 0 else 1.0 - value for k, value in enumerate(values)]
        return [(wins[2 * k] + wins[2 * k + 1]) / 2 for k in range(len(items))]

    def _read(self, reply: str) -> float | None:
        """A reply's mark; in pairs 1 for A, 0 for B, and half for a tie."""
        if self._options.pairwise is None:
            return read_mark(reply, *self._options.scale)
        return read_verdict(reply)

    def _render(self, template: jinja2.Template, given: Mapping[str, Any], where: str) -> str:
        try:
            return template.render(given)
        except jinja2.UndefinedError as error:
            names = ", ".join(sorted(given))
            raise TaskError(f"{self._name}: {where}: {error.message}; it may name {names}") from None
        except Exception as error:  # a template can raise anything
            raise TaskError(f"{self._name}: {where}: cannot be rendered: {error}") from None


def read_mark(reply: str, low: float, high: float) -> float | None:
    """Reads the mark in a reply: the last in double brackets, or behind "score:"; or the only number of the scale.

    None where there is none, or it is not on the scale.
    """
    for pattern in _MARKS:
        if marks := pattern.findall(reply):
            mark = float(marks[-1])
            return mark if low <= mark <= high else None
    numbers = {float(text) for text in re.findall(_NUMBER, _OUT_OF.sub("", reply))}
    on_scale = [number for number in numbers if low <= number <= high]
    return on_scale[0] if len(on_scale) == 1 else None


def read_verdict(reply: str) -> float | None:
    """Reads which response won: 1 for A, 0 for B, half for a tie; None where the reply does not say."""
    for pattern in _VERDICTS:
        if verdicts := pattern.findall(reply):
            return {"A": 1.0, "B": 0.0}.get(verdicts[-1].upper(), 0.5)
    return None


def _key(row: Item) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _template(text: str, where: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise TaskError(f"{where}, line {error.lineno}: {error.message}") from None
