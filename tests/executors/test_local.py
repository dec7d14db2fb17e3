"""Worker processes: what they are told, what they cost when they die, and that they never outlive their driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evomerge.errors import EvoMergeError, OutputError, RunError
from evomerge.executors.pool import Pool
from evomerge.study.candidate import Candidate
from evomerge.study.record import Record
from tests.algorithms.landscapes import plain
from tests.executors.scripted_worker import run, workers
from tests.frame import environment
from tests.study.scripted_run import SPACE
from tests.study.scripted_run import run as run_alone

BUDGET = 34
PATIENCE = 240  # seconds, for a machine that is busy with other things


@contextlib.contextmanager
def working(*arguments: object, **more: object) -> Iterator[Pool]:
    executor = workers(*arguments, **more)  # type: ignore[arg-type]
    try:
        yield executor
    finally:
        executor.close()


def lasting(found: tuple[Candidate, ...]) -> list[object]:
    """Without the process that scored each."""
    return [{**c, "scores": None} for c in plain(sorted(found, key=lambda c: c.number))]


def alive(process: int) -> bool:
    """Whether a process is there, and not merely waiting for its parent to take note of its end."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_two_workers_search_as_one_process_does(tmp_path: Path) -> None:
    with working(tmp_path / "two", 2, {0: "meets 1", 1: "meets 0"}, pause=0.002) as executor:
        found = run(tmp_path / "two", BUDGET, executor)
    assert lasting(found.candidates) == lasting(run_alone(tmp_path / "one", "ga", BUDGET).candidates)
    scored = [c.scores for c in found.candidates if c.state != "failed"]
    assert len({scores["process"] for scores in scored}) == 2
    assert os.getpid() not in {scores["process"] for scores in scored}
    # Each candidate is compared with the earlier generations, and generation 0 with nobody, or with the first of it.
    sizes = {c.generation: sum(other.generation < c.generation for other in found.candidates) for c in found.candidates}
    for c in found.candidates:
        if c.state != "failed":
            known = c.scores["known"]
            assert known is None or (known == tuple(range(len(known))) and len(known) <= c.number)
            assert c.generation == 0 or len(known) == sizes[c.generation]
    for process in {scores["process"] for scores in scored}:
        assert not alive(process)


def test_what_goes_wrong_with_a_candidate(tmp_path: Path) -> None:
    """A worker that dies costs its candidate another attempt; three that die, the candidate."""
    deeds = {2: "killed once", 3: "fails", 4: "out of memory", 5: "killed"}
    with working(tmp_path, 2, deeds) as executor:
        found = run(tmp_path, 13, executor).candidates
    assert [c.number for c in found] == list(range(13))
    by_number = {c.number: c for c in found}
    assert by_number[2].state == "done"
    assert by_number[3].failure == "CandidateError: the logits are not finite"
    assert by_number[4].failure_kind == "MemoryError"
    assert (by_number[5].state, by_number[5].failure_kind) == ("failed", "worker died")
    assert by_number[5].failure == "worker died: signal 9 (SIGKILL, as when memory runs out), 3 times; see log.txt"
    assert by_number[5].seconds["total"] > 0
    assert "CandidateError: the logits are not finite" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("deeds", "kind", "message"),
    [
        ({1: "disk full"}, OutputError, "no space left on the disk"),
        ({-1: "never ready"}, RunError, "the models have changed"),
        ({-1: "dies"}, EvoMergeError, r"worker \d died before it could score: exit code 3; see .*log.txt"),
    ],
)
def test_what_goes_wrong_with_the_run(
    tmp_path: Path, deeds: dict[int, str], kind: type[EvoMergeError], message: str
) -> None:
    with working(tmp_path, 2, deeds) as executor, pytest.raises(kind, match=message):
        run(tmp_path, 13, executor)
    with working(tmp_path, 1) as executor:  # and it can be resumed
        assert len(run(tmp_path, 13, executor).candidates) == 13


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_driver_and_the_run_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    """In the middle of two candidates of generation 1, each of which would take ten minutes."""
    program = [sys.executable, "-c", DRIVER, str(tmp_path), str(BUDGET), "2"]
    driver = subprocess.Popen(program, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        marks = [tmp_path / f"{number}.mark" for number in (15, 16)]
        wait_for(lambda: all(mark.is_file() and mark.read_text() for mark in marks))
        processes = [int(mark.read_text()) for mark in marks]
        assert all(map(alive, processes))
        driver.send_signal(how)
        driver.wait(PATIENCE)
        wait_for(lambda: not any(map(alive, processes)))
    finally:
        driver.kill()
        driver.wait()
    left = Record.open(tmp_path / "study.log", "run", space=SPACE).candidates()
    assert {15, 16}.isdisjoint(c.number for c in left)
    with working(tmp_path, 1) as executor:
        found = run(tmp_path, BUDGET, executor)
    assert lasting(found.candidates) == lasting(run_alone(tmp_path / "one", "ga", BUDGET).candidates)


# A shell that starts the tests in the background has their processes ignore Ctrl-C.
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from tests.executors.scripted_worker import run, workers
folder, budget, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
executor = workers(folder, count, {15: "sleeps", 16: "sleeps"})
try:
    run(folder, budget, executor)
finally:
    executor.close()
"""
