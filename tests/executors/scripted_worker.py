"""What workers open in the tests of `evomerge.executors`, in place of models, and a search by such workers."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.errors import CandidateError, OutputError, RunError
from evomerge.executors.local import LocalWorkers
from evomerge.executors.pool import Opened, Pool
from evomerge.executors.ray import RayWorkers
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.loop import SearchResult, search
from evomerge.study.record import Record
from tests.study.scripted_run import SPACE, evaluate

OPENER = "tests.executors.scripted_worker:open_scripted"


def open_scripted(folder: Path, deeds: dict[int, str], pause: float) -> Opened:
    """Scores as the scripted run does, and says in the scores which process did, and whom it compared with.

    Args:
        folder: Where a deed leaves a mark, so that it can be done once only.
        deeds: Candidate number to what happens instead; "never ready" at -1.
        pause: Seconds that a candidate takes.
    """
    if deeds.get(-1) == "never ready":
        raise RunError("the models have changed")
    if deeds.get(-1, "").startswith("refuses "):
        import ray

        if ray.get_runtime_context().get_node_id() in deeds[-1]:
            raise RunError("the models have changed")
    if deeds.get(-1) == "dies":
        os._exit(3)
    begun: list[Any] = [None]

    def begin(known: Any) -> None:
        begun[0] = known

    def score(proposal: Proposal) -> Outcome:
        do(deeds.get(proposal.number, ""), folder / f"{proposal.number}.mark")
        outcome = evaluate(proposal, pause)
        return replace(outcome, scores={"process": os.getpid(), "known": begun[0]})

    return Opened(begin, score)


def do(deed: str, mark: Path) -> None:
    """Something that can go wrong."""
    if deed == "killed once" and not mark.exists():
        mark.touch()
        deed = "killed"
    if deed == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "fails":
        raise CandidateError("the logits are not finite")
    if deed == "out of memory":
        raise MemoryError
    if deed == "disk full":
        raise OutputError("scores: cannot be written: no space left on the disk")
    if deed.startswith("meets "):  # another candidate, which another worker scores at the same time
        mark.touch()
        end = time.monotonic() + 300
        while not (mark.parent / f"{deed.removeprefix('meets ')}.mark").exists() and time.monotonic() < end:
            time.sleep(0.01)
    if deed == "sleeps":
        mark.write_text(str(os.getpid()))
        time.sleep(600)


def numbers(history: tuple[Candidate, ...]) -> tuple[int, ...] | None:
    """What the scripted workers are told of a history."""
    return tuple(c.number for c in history) or None


def workers(folder: Path, count: int, deeds: dict[int, str] | None = None, pause: float = 0.0) -> Pool:
    """The executor; its log is `folder`/log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    return Pool(LocalWorkers(OPENER, (folder, deeds or {}, pause), folder / "log.txt"), count, numbers)


def actors(folder: Path, count: int, deeds: dict[int, str] | None = None, pause: float = 0.0, **more: Any) -> Pool:
    """The same with actors of Ray."""
    folder.mkdir(parents=True, exist_ok=True)
    report = more.pop("report", lambda text: None)
    ray_workers = RayWorkers(OPENER, (folder, deeds or {}, pause), count, {"CPU": 1}, **more)
    return Pool(ray_workers, count, numbers, report=report)


def run(folder: Path, budget: int, executor: Pool) -> SearchResult:
    """Starts or goes on with the search in `folder`."""
    record = Record.open(folder / "study.log", "run", space=SPACE)
    settings = AlgorithmSettings(population=7)
    return search(SPACE, ALGORITHMS["ga"], executor, record, StopConditions(budget), seed=5, settings=settings)
