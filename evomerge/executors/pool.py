"""Several workers that score candidates at once, of whatever kind: who scores what, and what a death costs.

A worker knows nothing but what to open, named as ``module:function``.
"""

from __future__ import annotations

import importlib
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from evomerge.errors import EvoMergeError
from evomerge.executors.in_process import attempt
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.system.memory import collect_rarely

ATTEMPTS = 3
"""How many workers a candidate may cost, and how many in a row may die before they are ready."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """What an opener returns.

    Attributes:
        begin: Takes whom to compare candidates with.
        evaluate: Scores a proposal.
        attach: Takes what the driver sends beside a proposal.
        collect: Gives what the driver gets beside the latest outcome.
        versions: What numbers depend on up to rounding.
    """

    begin: Callable[[Any], None]
    evaluate: Callable[[Proposal], Outcome]
    attach: Callable[[Any], None] = lambda attached: None
    collect: Callable[[], Any] = lambda: None
    versions: Mapping[str, Any] = field(default_factory=dict)


Begin = tuple[Any] | None
"""Whom to compare with from now on; None where that has not changed."""

Message = tuple[Literal["ready", "outcome", "refused", "lost", "error", "bug"], Any]
"""What is heard of a worker.

It is ready (with its versions), has an outcome (with what it collected), may not score and why, has died and how, or
has met the run's trouble (an `EvoMergeError`) or a bug (a traceback).
"""


class Scorer:
    """The worker's side: opens what it is told to, and scores."""

    def open(self, opener: str, arguments: Sequence[Any]) -> Message:
        """Opens what is named as ``module:function``."""
        collect_rarely()
        module, _, name = opener.partition(":")
        try:
            self._opened: Opened = getattr(importlib.import_module(module), name)(*arguments)
        except EvoMergeError as error:
            return "error", error
        except Exception:
            return "bug", traceback.format_exc()
        return "ready", dict(self._opened.versions)

    def score(self, proposal: Proposal, begin: Begin, attached: Any) -> Message:
        """Scores a proposal."""
        try:
            if begin is not None:
                self._opened.begin(*begin)
            self._opened.attach(attached)
            outcome = attempt(self._opened.evaluate, proposal)
            return "outcome", (outcome, self._opened.collect())
        except EvoMergeError as error:
            return "error", error
        except Exception:
            return "bug", traceback.format_exc()


class Worker(Protocol):
    """A worker, seen from the driver. It opens what it needs by itself."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    def give(self, proposal: Proposal, begin: Begin, attached: Any) -> None:
        """Has it score a proposal; that it is dead will show when its answer is waited for."""
        ...

    def end(self) -> None:
        """Ends it at once."""
        ...


class Workers(Protocol):
    """One kind of workers."""

    logs: str
    """Where people find what workers have printed."""

    def start(self, slot: int) -> Worker:
        """Starts a worker; another that replaces it gets the same slot."""
        ...

    def wait(self, workers: Sequence[Worker]) -> tuple[Worker, Message] | None:
        """Waits for news of any of these workers; may return without."""
        ...

    def close(self) -> None:
        """Gives back what all workers shared; they have ended."""
        ...


@dataclass
class _Member:
    """A worker and what it is doing.

    Attributes:
        worker: The worker.
        slot: Its slot.
        ready: Whether it has opened what it needs.
        incumbents: Whom it was last given to compare candidates with.
        task: What it is scoring.
    """

    worker: Worker
    slot: int
    ready: bool = False
    incumbents: Any = None
    task: _Task | None = None

    def give(self, task: _Task, incumbents: Any) -> None:
        """Has it score a proposal, and compare that with these candidates."""
        self.worker.give(task.proposal, None if incumbents is self.incumbents else (incumbents,), task.attached)
        self.incumbents, self.task = incumbents, task

    def take(self) -> _Task | None:
        """Returns what it was scoring, and leaves it with nothing to do."""
        task, self.task = self.task, None
        return task

    def opened(self) -> None:
        """Notes that it has opened what it needs."""
        self.ready = True


@dataclass(frozen=True)
class _Task:
    """A proposal, what goes with it, which attempt at it this is (from 1), and when it was submitted."""

    proposal: Proposal
    attached: Any
    attempt: int = 1
    since: float = field(default_factory=time.perf_counter)


class Pool:
    """An executor of several workers, each started when it is first needed.

    Args:
        workers: What they are.
        count: How many.
        summarise: What a worker has to know of a history to compare candidates with; None where that is nothing.
        attach: Gives what goes with a proposal.
        deliver: Takes what a worker has collected beside an outcome.
        report: Is told what people should know.
    """

    def __init__(
        self,
        workers: Workers,
        count: int,
        summarise: Callable[[tuple[Candidate, ...]], Any],
        attach: Callable[[Proposal], Any] = lambda proposal: None,
        deliver: Callable[[Any], None] = lambda collected: None,
        report: Callable[[str], None] = log.warning,
    ) -> None:
        self._workers = workers
        self._count = count
        self._summarise = summarise
        self._attach = attach
        self._deliver = deliver
        self._report = report
        self._members: dict[int, _Member] = {}
        self._waiting: deque[_Task] = deque()
        self._incumbents: Any = None
        self._failed_starts = 0
        self._versions: list[Mapping[str, Any]] = []

    @property
    def slots(self) -> int:
        """One for each worker that may be."""
        return self._count

    def begin_generation(self, history: tuple[Candidate, ...]) -> None:
        """Keeps what the workers have to know of the history; each is told with its next proposal."""
        incumbents = self._summarise(history)
        if incumbents != self._incumbents:
            self._incumbents = incumbents

    def submit(self, proposal: Proposal) -> None:
        """Takes a proposal for the next worker that is free."""
        if len(self._waiting) + self._busy >= self._count:
            raise ValueError(f"all {self._count} workers are busy")
        self._waiting.append(_Task(proposal, self._attach(proposal)))
        self._assign()

    def next_finished(self) -> tuple[Proposal, Outcome]:
        """Waits for any worker. A candidate whose worker dies gets another one, `ATTEMPTS` in all."""
        while True:
            self._assign()
            members = {id(member.worker): member for member in self._members.values()}
            news = self._workers.wait([member.worker for member in members.values()])
            if news is None:
                continue
            finished = self._receive(members[id(news[0])], news[1])
            if finished is not None:
                return finished

    def close(self) -> None:
        """Ends the workers at once. Whatever they were writing has a temporary name."""
        for member in self._members.values():
            member.worker.end()
        self._members.clear()
        self._waiting.clear()
        self._workers.close()

    @property
    def _busy(self) -> int:
        return sum(member.task is not None for member in self._members.values())

    def _assign(self) -> None:
        """Gives what waits to whoever is ready, and starts a worker for the rest of it."""
        for member in self._members.values():
            if self._waiting and member.ready and member.task is None:
                member.give(self._waiting.popleft(), self._incumbents)
        opening = sum(not member.ready for member in self._members.values())
        free = [slot for slot in range(self._count) if slot not in self._members]
        for slot in free[: max(0, len(self._waiting) - opening)]:
            self._members[slot] = _Member(self._workers.start(slot), slot)

    def _receive(self, member: _Member, message: Message) -> tuple[Proposal, Outcome] | None:
        """What news of a worker mean for its proposal."""
        kind, content = message
        if kind == "error":
            raise content
        if kind == "bug":
            raise RuntimeError(f"{member.worker.name}:\n{content}")
        if kind == "outcome":
            task = member.take()
            if task is None:
                raise RuntimeError(f"{member.worker.name} has scored what nobody asked for")
            outcome, collected = content
            self._deliver(collected)
            return task.proposal, outcome
        if kind == "ready":
            member.opened()
            self._failed_starts = 0
            self._compare(member.worker.name, content)
            return None
        member.worker.end()
        del self._members[member.slot]
        if kind == "refused":
            self._report(f"{member.worker.name} is refused: {content}")
            return None
        return self._lost(member, content)

    def _lost(self, member: _Member, how: str) -> tuple[Proposal, Outcome] | None:
        """Has another worker try, or gives the candidate up."""
        task = member.take()
        if not member.ready:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS:
                raise EvoMergeError(f"{member.worker.name} died before it could score: {how}; see {self._workers.logs}")
        log.warning("%s died (%s)", member.worker.name, how)
        if task is None:
            return None
        log.warning("it scored candidate %d", task.proposal.number)
        if task.attempt < ATTEMPTS:
            self._waiting.appendleft(replace(task, attempt=task.attempt + 1))
            return None
        failure = f"worker died: {how}, {task.attempt} times; see {self._workers.logs}"
        seconds = {"total": time.perf_counter() - task.since}
        return task.proposal, Outcome(None, state="failed", failure=failure, seconds=seconds)

    def _compare(self, name: str, versions: Mapping[str, Any]) -> None:
        """Says where workers differ in what numbers depend on up to rounding."""
        if not self._versions:
            self._versions.append(versions)
        elif versions not in self._versions:
            first = self._versions[0]
            differ = [
                f"{key} {value} and not {first.get(key)}" for key, value in versions.items() if value != first.get(key)
            ]
            self._versions.append(versions)
            self._report(f"{name} has {', '.join(differ)}: the last digits of its numbers may differ")
