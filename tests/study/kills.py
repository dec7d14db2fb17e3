"""Runs that are killed at random moments, resumed, and compared with the run that was never stopped."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna  # noqa: F401  # imported before the fork, not in every child

from evomerge.study.ranking import best
from evomerge.study.record import Record
from tests.algorithms.landscapes import plain
from tests.study.scripted_run import run

#: Starts or goes on with a run in a folder, in a process of its own; returns its id.
Launch = Callable[[Path], int]

TEAR = 0.25  # the share of kills after which the last line is cut as well, as by a power cut
MOST = 3  # kills of one run


def forked(work: Callable[[Path], Any]) -> Launch:
    """A launch that forks: what this process has imported need not be imported again. It must have no threads."""

    def launch(folder: Path) -> int:
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            work(folder)
            code = 0
        finally:
            os._exit(code)

    return launch


def life(launch: Launch, folder: Path) -> float:
    """Seconds of a run from its start to its end."""
    began = time.perf_counter()
    if _wait(launch(folder)) != 0:
        raise RuntimeError(f"{folder}: the run that nobody stops does not end well")
    return time.perf_counter() - began


@dataclass
class Killed:
    """What was done to one run.

    Attributes:
        moments: Seconds after its start (of a session) at which it was killed.
        recorded: Bytes of its journal then.
        torn: How many times its last line was cut off somewhere in the middle afterwards.
        sessions: Processes that it took.
    """

    moments: list[float]
    recorded: list[int]
    torn: int = 0
    sessions: int = 0


def kill_and_resume(launch: Launch, folder: Path, kills: int, length: float, chance: random.Random) -> Killed:
    """Kills a run up to `kills` times, at moments that are uniform over `length` seconds, then lets it end.

    A session that ends before its moment was not killed, and ends the run.
    """
    done = Killed([], [])
    journal = folder / "study.log"
    while len(done.moments) < kills:
        moment = chance.uniform(0.0, length)
        done.sessions += 1
        if not _kill_after(launch(folder), moment):
            return done
        done.moments.append(moment)
        done.recorded.append(journal.stat().st_size if journal.exists() else 0)
        if chance.random() < TEAR:
            done.torn += tear(journal, chance)
    done.sessions += 1
    if _wait(launch(folder)) != 0:
        raise RuntimeError(f"{folder}: does not go on after kills at {done.moments}")
    return done


def tear(journal: Path, chance: random.Random) -> bool:
    """Cuts a journal in the middle of its last line; whether there was one."""
    if not journal.exists() or not (content := journal.read_bytes()):
        return False
    start = content[:-1].rfind(b"\n") + 1
    os.truncate(journal, chance.randrange(start, len(content)))
    return True


def _kill_after(child: int, seconds: float) -> bool:
    """Whether the process could be killed after that time; it may have ended well before."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status != 0:
                raise RuntimeError(f"the process ended with status {status} before it was killed")
            return False
        time.sleep(min(0.001, max(0.0, end - time.perf_counter())))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


def recorded(folder: Path, name: str = "run") -> Any:
    """What must be the same: everything of the candidates but their timings, and the winner."""
    record = Record.find(folder / "study.log", name)
    candidates = record.candidates() if record is not None else ()
    leader = best(candidates)
    return plain(candidates), None if leader is None else leader.number


def campaign(
    launch: Launch, root: Path, kills: int, runs: int | None, seed: int, same: Callable[[Path, Path], bool]
) -> tuple[list[Killed], list[Path], float]:
    """Kills runs until there are so many kills (or runs).

    Returns:
        What was done, the folders that differ from the uninterrupted run's, and the seconds of that.
    """
    chance = random.Random(seed)
    length = life(launch, root / "whole")
    done: list[Killed] = []
    different: list[Path] = []
    while sum(len(k.moments) for k in done) < kills if runs is None else len(done) < runs:
        folder = root / f"killed-{len(done)}"
        left = kills - sum(len(k.moments) for k in done)
        done.append(kill_and_resume(launch, folder, min(left, chance.randint(1, MOST)), length, chance))
        if not same(root / "whole", folder):
            different.append(folder)
    return done, different, length


def scripted_campaign(
    algorithm: str, kills: int, budget: int, seed: int, root: Path
) -> tuple[list[Killed], list[Path], float]:
    """A campaign on the scripted search of one algorithm."""

    def work(folder: Path) -> None:
        run(folder, algorithm, budget, pause=0.001)

    def same(one: Path, other: Path) -> bool:
        return bool(recorded(one) == recorded(other))

    return campaign(forked(work), root, kills, None, seed, same)
