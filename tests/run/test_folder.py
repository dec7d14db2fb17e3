"""The files of a run: written whole or not at all, held by one process, read by any."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from evomerge.errors import OutputError, RunError
from evomerge.run.folder import RunFolder
from evomerge.run.search import _survived
from evomerge.space.genome import Genome
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.candidate import Outcome, Proposal
from evomerge.system.files import exclusive, held, write_atomic
from tests.algorithms.landscapes import make_space

SPEC = {
    "name": "x",
    "models": {"sources": {"a": "a"}},
    "space": {"methods": ["linear"]},
    "evaluation": {"tasks": ["t"]},
}


@pytest.fixture
def spec() -> SearchSpec:
    return parse_spec(SPEC)


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written: no space left on the disk"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        write_atomic(tmp_path / "none" / "file", "x")


def test_exclusive(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    assert not held(lock)
    with exclusive(lock, "runs/x"):
        assert held(lock)
        with pytest.raises(RunError, match=f"runs/x is in use by process {os.getpid()}"), exclusive(lock, "runs/x"):
            pass
        assert held(lock)
    assert not held(lock)


def test_asking_who_holds_a_lock_takes_it_from_nobody(tmp_path: Path) -> None:
    """Many `status` calls while a run begins: it begins all the same."""
    lock = tmp_path / ".lock"
    lock.touch()
    over = threading.Event()

    def asking() -> None:
        while not over.is_set():
            held(lock)

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


def test_create_and_open(spec: SearchSpec, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "name: x  # as written\n")
    assert (folder.root / "search.yaml").read_text() == "name: x  # as written\n"
    assert RunFolder.existing(folder.root).spec == spec
    assert RunFolder.create(folder.root, spec, "").spec == spec


def test_no_run_names_the_runs_beside_it(spec: SearchSpec, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "first", spec, "")
    with pytest.raises(RunError, match=r"no run here .*; runs beside it: first"):
        RunFolder.existing(tmp_path / "frist")


def test_reading_makes_nothing(spec: SearchSpec, tmp_path: Path) -> None:
    """A status asked for before the first candidate must not make the study that the run is about to make."""
    folder = RunFolder.create(tmp_path / "run", spec, "")
    before = sorted(folder.root.rglob("*"))
    assert folder.candidates() == ()
    assert folder.result() is None
    assert folder.scores.load("plan", "search") is None
    assert sorted(folder.root.rglob("*")) == before
    with pytest.raises(RunError, match="no candidate has been scored yet"):
        folder.winner(())


def test_environment(spec: SearchSpec, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "")
    first = {"content": {"models": {"a": "123"}}, "versions": {"torch": "2.1", "threads": 2}}
    assert folder.settle_environment(first) == []
    assert folder.settle_environment(first) == []
    warnings = folder.settle_environment({**first, "versions": {"torch": "2.2", "threads": 2}})
    assert len(warnings) == 1
    assert "-torch: '2.1'" in warnings[0]
    assert "+torch: '2.2'" in warnings[0]
    with pytest.raises(RunError, match=r"have changed since this run began(.|\n)*\+  a: '456'"):
        folder.settle_environment({**first, "content": {"models": {"a": "456"}}})


def test_a_shared_storage_has_one_folder_a_study(tmp_path: Path) -> None:
    """A second folder of the same name is refused; the first one may be moved, and anybody may read."""
    shared = parse_spec({**SPEC, "run": {"storage": f"sqlite:///{tmp_path}/runs.db"}})
    first = RunFolder.create(tmp_path / "first", shared, "")
    space = make_space()
    first.record(space)
    second = RunFolder.create(tmp_path / "second", shared, "")
    with pytest.raises(RunError, match=f"study 'x' is the record of the run in {tmp_path}/first on ") as caught:
        second.record(space)
    assert caught.value.exit_code == 2
    assert second.candidates() == ()
    moved = first.root.rename(tmp_path / "moved")
    assert len(RunFolder.existing(moved).record(space)) == 0


def test_the_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    """Which process, since when, where, and what to do."""
    lock = tmp_path / ".lock"
    told = rf"runs/x is in use by process {os.getpid()} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; wait for it, or stop it"
    with exclusive(lock, "runs/x"):
        with pytest.raises(RunError, match=rf"{told} with `kill {os.getpid()}`"), exclusive(lock, "runs/x"):
            pass
        lock.write_text("17 elsewhere 2026-01-02 03:04:05")
        with pytest.raises(RunError, match="process 17 on elsewhere since 2026-01-02"), exclusive(lock, "runs/x"):
            pass


def die_scoring(folder: RunFolder, phenotype: str) -> None:
    """A process that dies while it scores a candidate."""
    child = os.fork()
    if child == 0:
        with folder.attempting(phenotype):
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def deaths_of(folder: RunFolder, phenotype: str) -> int:
    with folder.attempting(phenotype) as deaths:
        return deaths


def test_deaths_over_one_candidate_are_counted(tmp_path: Path, spec: SearchSpec) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "")
    assert deaths_of(folder, "one") == 0
    die_scoring(folder, "one")
    die_scoring(folder, "one")
    assert deaths_of(folder, "one") == 2
    assert deaths_of(folder, "one") == 0  # it was lived through


def test_deaths_over_another_candidate_do_not_count(tmp_path: Path, spec: SearchSpec) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "")
    die_scoring(folder, "one")
    die_scoring(folder, "other")
    assert deaths_of(folder, "one") == 0


def test_an_interruption_is_no_death(tmp_path: Path, spec: SearchSpec) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "")
    with pytest.raises(KeyboardInterrupt), folder.attempting("one"):
        raise KeyboardInterrupt
    assert deaths_of(folder, "one") == 0


def test_a_candidate_that_kills_every_process_fails_in_the_end(tmp_path: Path, spec: SearchSpec) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "")
    proposal = Proposal(3, 1, Genome.of({}), {}, "one", (), "random")

    def scored() -> Outcome:
        return _survived(folder, lambda _: Outcome(0.5), proposal)

    for _ in range(3):  # as many as may be kills that are none of its doing
        die_scoring(folder, "one")
    assert scored() == Outcome(0.5)
    for _ in range(4):
        die_scoring(folder, "one")
    found = scored()
    assert found.state == "failed"
    assert "killed: 4 processes in a row died" in (found.failure or "")
