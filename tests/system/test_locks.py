"""One process at a time; the others are told which."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from evomerge.errors import OutputError, RunError
from evomerge.system import locks
from evomerge.system.locks import exclusive, is_locked


def test_exclusive(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    assert not is_locked(lock)
    with exclusive(lock, "runs/x"):
        assert is_locked(lock)
        with pytest.raises(RunError, match=f"runs/x is in use by process {os.getpid()}"), exclusive(lock, "runs/x"):
            pass
        assert is_locked(lock)
    assert not is_locked(lock)


def test_asking_who_holds_a_lock_takes_it_from_nobody(tmp_path: Path) -> None:
    """Many `status` calls while a run begins: it begins all the same."""
    lock = tmp_path / ".lock"
    lock.touch()
    over = threading.Event()

    def asking() -> None:
        while not over.is_set():
            is_locked(lock)

    threads = [threading.Thread(target=asking) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            with exclusive(lock, "x"):
                time.sleep(0.001)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_the_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    """Which process, since when, where, and what to do."""
    lock = tmp_path / ".lock"
    message = rf"runs/x is in use by process {os.getpid()} since [-\d]{{10}} [:\d]{{8}}; wait for it, or stop it"
    with exclusive(lock, "runs/x"):
        with pytest.raises(RunError, match=rf"{message} with `kill {os.getpid()}`"), exclusive(lock, "runs/x"):
            pass
        with (
            pytest.raises(OutputError, match=r"kill \d+`: start again$"),
            exclusive(lock, "runs/x", error=OutputError, afterwards="start again"),
        ):
            pass
        lock.write_text("17 elsewhere 2026-01-02 03:04:05")
        with pytest.raises(RunError, match="process 17 on elsewhere since 2026-01-02"), exclusive(lock, "runs/x"):
            pass


def test_a_lock_file_removed_by_its_holder_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock file and locking it, the previous holder may have unlinked it."""
    real = fcntl.flock
    removed: list[int] = []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(1)
            (tmp_path / ".out.lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    monkeypatch.setattr(locks, "_PAUSE", 0)
    with exclusive(tmp_path / ".out.lock", "out", remove=True):
        assert (tmp_path / ".out.lock").exists()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(fcntl, "flock", lambda *_: (tmp_path / ".out.lock").unlink())
    with (
        pytest.raises(OutputError, match="out is in use by process unknown"),
        exclusive(tmp_path / ".out.lock", "out", error=OutputError, remove=True),
    ):
        pass
