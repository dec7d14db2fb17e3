"""A storage that is not the run's own, or that goes away for a while."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.errors import OutputError, RunError
from evomerge.executors.in_process import InProcess
from evomerge.space.baselines import baselines
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, Outcome, Proposal, first_generation
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.journal import Journal, accept_edited
from evomerge.study.loop import search
from evomerge.study.record import Record
from evomerge.study.storage import StorageUnavailable
from tests.algorithms.landscapes import Memory, plain
from tests.study.scripted_run import SPACE, evaluate

PROPOSALS = first_generation(baselines(SPACE), 99)
OURS = {"id": "1", "folder": "/runs/x", "host": "one"}


def candidate(number: int) -> Candidate:
    return Candidate.of(PROPOSALS[number], Outcome(0.25 * number))


def numbers(where: str | Path) -> list[int]:
    """The candidates as they were written, a second writing of one included."""
    record = Record.find(where, "run")
    assert record is not None
    return [trial.user_attrs["number"] for trial in record.study.get_trials()]


def breaking(record: Record, script: list[str]) -> None:
    """Makes the database break off: ``before`` a transaction, or ``after`` its commit."""
    storage: Any = record._store.study()._storage  # type: ignore[attr-defined]
    create = storage.create_new_trial

    def broken(*arguments: Any) -> int:
        what = script.pop(0) if script else "well"
        if what == "before":
            raise StorageUnavailable("connection refused")
        trial = int(create(*arguments))
        if what == "after":
            raise StorageUnavailable("server closed the connection unexpectedly")
        return trial

    storage.create_new_trial = broken


@pytest.mark.parametrize(
    "script",
    [["before"], ["after"], ["before", "after"], ["after", "well"], ["before", "before", "after"], ["well", "after"]],
)
def test_what_is_lost_is_tried_again_and_written_once(tmp_path: Path, script: list[str]) -> None:
    where = f"sqlite:///{tmp_path}/study.db"
    said: list[str] = []
    record = Record.open(where, "run", space=SPACE, report=said.append, waits=(0.0, 0.0, 0.0))
    losses = len(script) - script.count("well")
    breaking(record, script)
    for number in range(4):
        record.append(candidate(number))
    assert numbers(where) == [0, 1, 2, 3]
    assert record.candidates() == Record.open(where, "run", create=False).candidates()
    assert len(said) == losses
    assert all(f"sqlite:///{tmp_path}/study.db cannot be reached" in text and "again in 0 s" in text for text in said)


@pytest.mark.parametrize("end", ["before", "after"])
def test_a_storage_that_stays_away_ends_the_session_and_nothing_is_lost(tmp_path: Path, end: str) -> None:
    where = f"sqlite:///{tmp_path}/study.db"
    record = Record.open(where, "run", space=SPACE, waits=(0.0, 0.0))
    record.append(candidate(0))
    breaking(record, [end, "before", "before"] if end == "before" else ["before", "before", end])
    with pytest.raises(RunError, match=r"did not come back within 0 s \(.*\)\. Candidate 1 is not recorded, but its"):
        record.append(candidate(1))
    assert [c.number for c in record.candidates()] == [0]
    again = Record.open(where, "run", space=SPACE)
    for number in range(len(again), 3):
        again.append(candidate(number))
    assert numbers(where) == [0, 1, 2]


def test_ctrl_c_is_heard_while_it_waits(tmp_path: Path) -> None:
    record = Record.open(f"sqlite:///{tmp_path}/study.db", "run", space=SPACE, waits=(60.0,))
    breaking(record, ["before"])
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        record.append(candidate(0))


def test_of_two_trials_of_one_candidate_the_first_counts(tmp_path: Path) -> None:
    """A commit that the server finishes after it was looked for comes twice."""
    where = f"sqlite:///{tmp_path}/study.db"
    first = Record.open(where, "run", space=SPACE)
    first.append(candidate(0))
    first._candidates.clear()
    first.append(Candidate.of(PROPOSALS[0], Outcome(0.875)))
    assert [c.fitness for c in Record.open(where, "run").candidates()] == [0.0]


@pytest.mark.parametrize("where", ["study.log", "sqlite:///{}/study.db"])
def test_two_writers_of_one_study_are_noticed(tmp_path: Path, where: str) -> None:
    place = where.format(tmp_path) if "://" in where else str(tmp_path / where)
    one, other = Record.open(place, "run", space=SPACE), Record.open(place, "run", space=SPACE)
    one.append(candidate(0))
    with pytest.raises(RunError, match="another process has written to study 'run' meanwhile"):
        other.append(candidate(0))
    if "://" not in where:
        assert numbers(place) == [0]
    assert [c.number for c in Record.open(place, "run").candidates()] == [0]


@pytest.mark.parametrize("where", ["study.log", "sqlite:///{}/study.db"])
def test_a_study_belongs_to_one_run_folder(tmp_path: Path, where: str) -> None:
    place = where.format(tmp_path) if "://" in where else str(tmp_path / where)
    Record.open(place, "run", space=SPACE, owner=OURS).append(candidate(0))
    # The same folder, elsewhere by now.
    assert len(Record.open(place, "run", space=SPACE, owner={**OURS, "folder": "/runs/y"})) == 1
    with pytest.raises(RunError, match=r"study 'run' is the record of the run in /runs/x on one; go on with that one"):
        Record.open(place, "run", space=SPACE, owner={**OURS, "id": "2"})
    assert len(Record.open(place, "another", space=SPACE, owner={**OURS, "id": "2"})) == 0


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is written, and syncing it fails: what is in the file is what is known."""
    journal = tmp_path / "study.log"
    record = Record.open(journal, "run", space=SPACE)
    record.append(candidate(0))
    before = journal.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"study\.log: cannot be written: no space left on the disk"):
            record.append(candidate(1))
    assert journal.read_bytes() == before
    record.append(candidate(1))
    assert numbers(journal) == [0, 1]


def test_lines_of_others_do_not_disturb(tmp_path: Path) -> None:
    """A note made in the dashboard, another study in the file, half a line of a process that was killed."""
    journal = tmp_path / "study.log"
    record = Record.open(journal, "run", space=SPACE)
    record.append(candidate(0))
    record.study.set_user_attr("note", "good")
    other = Record.open(journal, "other", space=SPACE)
    other.append(candidate(0))
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "study')
    record.append(candidate(1))
    assert numbers(journal) == [0, 1]
    assert Record.open(journal, "run").study.user_attrs == {"note": "good"}
    assert len(Record.open(journal, "other")) == 1


def journal_of(path: Path, count: int) -> list[bytes]:
    """The lines of a journal with some candidates."""
    record = Record.open(path, "run", space=SPACE)
    for number in range(count):
        record.append(candidate(number))
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "line", [b"\0\0\n", b"null\n", b"[1]\n", b'"x"\n', b"{}\n", b'{"op_code":"4"}\n', b"[" * 9999 + b"\n"]
)
def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path, line: bytes) -> None:
    lines = journal_of(tmp_path / "study.log", 2)
    (tmp_path / "study.log").write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(RunError, match=r"study\.log, line 3: is damaged"):
        list(Journal(tmp_path / "study.log", "run").read())


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_of_the_record_is_noticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Refused by the line's number; or, in the last line, cut off as one that a kill has torn."""
    journal = tmp_path_factory.mktemp("flip") / "study.log"
    raw = bytearray(b"".join(journal_of(journal, 3)))
    before = Record.open(journal, "run").candidates()
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    journal.write_bytes(raw)
    try:
        assert Record.open(journal, "run", create=False).candidates() in (before, before[:-1])
    except RunError as error:
        line = raw.count(b"\n", 0, bit // 8) + 1
        # The name of the study itself; or the checksum's own key in it, which the next line has after all.
        first = line == 1 and ("holds no study" in str(error) or "study.log, line 2: " in str(error))
        assert first or f"study.log, line {line}: " in str(error)  # noqa: PT017


@pytest.mark.parametrize("change", [lambda a, b, c: [a, c], lambda a, b, c: [a, b, b, c], lambda a, b, c: [a, c, b]])
def test_lines_that_are_gone_or_twice_or_in_another_order_are_noticed(
    tmp_path: Path, change: Callable[[bytes, bytes, bytes], list[bytes]]
) -> None:
    created, *lines = journal_of(tmp_path / "study.log", 3)
    (tmp_path / "study.log").write_bytes(b"".join([created, *change(*lines)]))
    with pytest.raises(RunError, match=r"study\.log, line [34]: was changed .*--accept-edited"):
        Record.open(tmp_path / "study.log", "run")


def test_an_edited_record_is_refused_until_it_is_accepted(tmp_path: Path) -> None:
    """And goes on from there; without its last lines it goes on as it is, as after a kill."""
    journal = tmp_path / "study.log"
    lines = journal_of(journal, 3)
    journal.write_bytes(b"".join(lines).replace(b'"value":0.25', b'"value":0.75'))
    with pytest.raises(RunError, match=r"study\.log, line 3: was changed"):
        Record.open(journal, "run")
    accept_edited(journal)
    record = Record.open(journal, "run", space=SPACE)
    assert [trial.value for trial in record.study.trials] == [0.0, 0.75, 0.5]
    record.append(candidate(3))
    assert len(Record.open(journal, "run")) == 4
    journal.write_bytes(b"".join(lines[:-1]))
    assert len(Record.open(journal, "run")) == 2


# -- PostgreSQL, where it is installed -------------------------------------------------------------------------------


def server_program(name: str) -> str | None:
    """A program of PostgreSQL's server; Debian keeps it off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A cluster of its own, on a port of this machine."""

    def __init__(self, root: Path) -> None:
        self.port = free_port()
        self._root = root
        # The server refuses to be run by root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(root, self._user)
        self._run("initdb", "-D", str(root / "data"), "-A", "trust", "-U", "evo", "--no-sync")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(server_program(program)), *arguments]
        subprocess.run(command, user=self._user, check=True, stdout=subprocess.DEVNULL, cwd=self._root)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        log = str(self._root / "log")
        self._run("pg_ctl", "-D", str(self._root / "data"), "-l", log, "-w", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self._root / "data"), "-m", "immediate", "-w", "stop")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    pytest.importorskip("psycopg")
    if server_program("initdb") is None:
        pytest.skip("PostgreSQL is not installed")
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to other users
        server = Server(Path(root))
        yield server
        server.stop()


class Proxy:
    """Passes connections on to a server, until it is told to break one between a commit and its answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self.break_next_commit = False
        self.broken = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            server = socket.create_connection(("127.0.0.1", self._port))
            lost = threading.Event()
            threading.Thread(target=self._pass, args=(client, server, lost, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, lost, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, lost: threading.Event, from_client: bool) -> None:
        while data := _received(source):
            if from_client and self.break_next_commit and b"COMMIT" in data:
                self.break_next_commit = False
                lost.set()
            if not from_client and lost.is_set():  # the server has committed, and says so to nobody
                self.broken += 1
                break
            target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):  # it is closed already
                end.shutdown(socket.SHUT_RDWR)


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(1 << 16)
    except OSError:
        return b""


def going_on(url: str, disturb: Callable[[Proposal], None], said: list[str], **options: Any) -> Any:
    record = Record.open(url, "run", space=SPACE, report=said.append, **options)

    def disturbed(proposal: Proposal) -> Outcome:
        disturb(proposal)
        return evaluate(proposal)

    settings = AlgorithmSettings(population=7)
    return search(
        SPACE, ALGORITHMS["ga"], InProcess(disturbed), record, StopConditions(40), seed=5, settings=settings
    ).candidates


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    record: Any = Memory()
    return plain(
        search(
            SPACE,
            ALGORITHMS["ga"],
            InProcess(evaluate),
            record,
            StopConditions(40),
            seed=5,
            settings=AlgorithmSettings(7),
        ).candidates
    )


def fresh(server: Server, name: str) -> str:
    import psycopg

    with psycopg.connect(f"postgresql://evo@127.0.0.1:{server.port}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql://evo:secret@127.0.0.1:{server.port}/{name}"


@pytest.mark.slow
def test_postgres_stopped_for_a_while(postgres: Server, undisturbed: Any) -> None:
    """Stopped as by a crash before candidates 3 and 20 are written, and back a second later."""
    url, said = fresh(postgres, "stopped"), list[str]()

    def disturb(proposal: Proposal) -> None:
        if proposal.number in (3, 20):
            postgres.stop()
            threading.Timer(1.0, postgres.start).start()

    found = going_on(url, disturb, said, waits=(0.5,) * 60)
    assert plain(found) == undisturbed
    assert numbers(url) == list(range(40))
    assert said
    assert all("cannot be reached" in text and "secret" not in text for text in said)


@pytest.mark.slow
def test_postgres_that_does_not_come_back(postgres: Server, undisturbed: Any) -> None:
    """The session ends with what to do; the next one goes on, and the run is the one that was never stopped."""
    url, said = fresh(postgres, "gone"), list[str]()

    def disturb(proposal: Proposal) -> None:
        if proposal.number == 17:
            postgres.stop()

    with pytest.raises(RunError, match=r"did not come back within 0 s .* the same command goes on from here"):
        going_on(url, disturb, said, waits=(0.1, 0.2))
    with pytest.raises(RunError, match=r"run\.storage: cannot open postgresql://127\.0\.0\.1"):
        Record.find(url, "run")
    postgres.start()
    assert numbers(url) == list(range(17))
    assert plain(going_on(url, lambda proposal: None, said)) == undisturbed
    assert numbers(url) == list(range(40))


@pytest.mark.slow
def test_postgres_whose_answer_to_a_commit_is_lost(postgres: Server, undisturbed: Any) -> None:
    """Nothing is written twice."""
    url, said = fresh(postgres, "answer"), list[str]()
    proxy = Proxy(postgres.port)

    def disturb(proposal: Proposal) -> None:
        proxy.break_next_commit = proposal.number in (2, 11, 30)

    found = going_on(url.replace(str(postgres.port), str(proxy.port)), disturb, said)
    assert proxy.broken == len(said) == 3
    assert plain(found) == undisturbed
    assert numbers(url) == list(range(40))
