"""The journal of a study: Optuna's own file format, written and read a line at a time.

Optuna's storage keeps every trial in memory with a copy of every distribution: 3 GB at 10,000 candidates of 200 genes,
where the candidates themselves need a tenth. So lines are appended and read here; `optuna_storage` opens the same file
as the ordinary storage that it is, and so does the dashboard.

Each line of ours ends with a checksum of itself and of the line before it, under a key that Optuna passes over: a
flipped bit, an edit, and a line that is gone or came twice are noticed, and told by the line's number.

The journal is locked by the kernel (``flock``), which drops the lock of a killed process, and is repaired when it is
opened: a line torn by a kill is cut off before anything is appended to it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import OutputError, RunError
from evomerge.system.files import write_atomic
from evomerge.system.hashing import digest
from evomerge.system.locks import wait_for_lock
from evomerge.system.sealed import Damaged, edited

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

_CHUNK = 1 << 16

# Optuna's operations that matter here (`optuna.storages.journal._storage.JournalOperation`).
CREATE_STUDY, DELETE_STUDY, SET_STUDY_USER_ATTR, SET_STUDY_SYSTEM_ATTR, CREATE_TRIAL = 0, 1, 2, 3, 4
METRIC_NAMES = "study:metric_names"  # where `Study.set_metric_names` puts them
MAXIMIZE = 2

_SEAL = re.compile(rb',"checksum":"([0-9a-f]{32})"}\r?\n\Z')


def locked(journal: Path) -> AbstractContextManager[None]:
    """Holds an exclusive lock on a file beside the journal; a killed holder leaves nothing to clean up."""
    return wait_for_lock(journal.with_name(journal.name + ".flock"))


def repair(journal: Path) -> int:
    """Cuts off a last line that a kill left incomplete, so that appending does not join two lines.

    Returns:
        The number of bytes cut off.
    """
    if not journal.is_file():  # what else it may be is told when it is read
        return 0
    with locked(journal), journal.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        kept = _complete_length(file, size)
        if kept < size:
            file.truncate(kept)
            file.flush()
            os.fsync(file.fileno())
        return size - kept


def _complete_length(file: Any, size: int) -> int:
    """Bytes up to the end of the last line that is whole and JSON."""
    end = _after_last_newline(file, size)
    start = _after_last_newline(file, end - 1) if end else 0
    file.seek(start)
    try:
        json.loads(file.read(end - start) or b"{}")
    except ValueError:
        return start
    return end


def _after_last_newline(file: Any, stop: int) -> int:
    """The position after the last newline before `stop`, 0 when there is none."""
    while stop > 0:
        start = max(stop - _CHUNK, 0)
        file.seek(start)
        newline = file.read(stop - start).rfind(b"\n")
        if newline >= 0:
            return start + int(newline) + 1
        stop = start
    return 0


class Journal:
    """One study in a journal file.

    Attributes:
        attributes: The study's user attributes.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.attributes: dict[str, Any] = {}
        self._study: int | None = None
        self._names: list[str] = []  # of the studies in the file: Optuna numbers them, and skips a name that is taken
        self._read = 0  # bytes of the file that are known here
        self._lines = 0
        self._seal = b""  # of the last line that has one
        self._worker = f"{uuid.uuid4()}-0"

    @property
    def exists(self) -> bool:
        """Whether the study has been created, as far as the file was read."""
        return self._study is not None

    def read(self) -> Iterator[Mapping[str, Any]]:
        """Reads the lines of the study's trials that were not read before, oldest first.

        Raises:
            Damaged: A line is not what was written, or no line of a journal.
        """
        if not self.path.exists():
            return
        if not self.path.is_file():
            raise Damaged(f"{self.path}: is no file")
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # somebody is writing it
                    return
                self._read += len(line)
                self._lines += 1
                entry = self._checked(line)
                if self._about_trial(entry):
                    yield entry

    def _checked(self, line: bytes) -> Mapping[str, Any]:
        """What a line says, if it is what was written."""
        where = f", line {self._lines}"
        advice = "without that line and those after it, the same command scores their candidates again"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{self.path}{where}: is damaged ({error}): {advice}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("op_code"), int):
            raise Damaged(f"{self.path}{where}: is damaged (no operation of a study): {advice}")
        match = _SEAL.search(line)
        if match is not None:
            if digest(self._seal, line[: match.start()]).encode() != match[1]:
                raise edited(self.path, advice, where)
            self._seal = match[1]
        elif entry["op_code"] == CREATE_TRIAL and entry.get("study_id") == self._study:  # Optuna writes notes, too
            raise edited(self.path, advice, where, sealed=False)
        return entry

    def _about_trial(self, entry: Mapping[str, Any]) -> bool:
        """Takes in what a line says of the studies; whether it is a trial of this one."""
        kind = entry["op_code"]
        if kind == CREATE_STUDY and entry["study_name"] not in self._names:
            self._names.append(entry["study_name"])
            if entry["study_name"] == self.name:
                self._study = len(self._names) - 1
        if self._study is None or entry.get("study_id") != self._study:
            return False
        if kind == DELETE_STUDY:
            raise RunError(f"{self.path}: study '{self.name}' was deleted; begin the run in a new folder")
        if kind == SET_STUDY_USER_ATTR:
            self.attributes.update(entry["user_attr"])
        return bool(kind == CREATE_TRIAL)

    def create(self, objectives: int, names: Sequence[str] = ()) -> None:
        """Creates the study, each of whose objectives is maximised; `names` is what Optuna's pictures call them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write({"op_code": CREATE_STUDY, "study_name": self.name, "directions": [MAXIMIZE] * objectives})
        if names:
            named = {METRIC_NAMES: list(names)}
            self._write({"op_code": SET_STUDY_SYSTEM_ATTR, "study_id": self._study, "system_attr": named})

    def set_attribute(self, key: str, value: Any) -> None:
        """Sets a user attribute of the study."""
        self._write({"op_code": SET_STUDY_USER_ATTR, "study_id": self._study, "user_attr": {key: value}})

    def add_trial(self, fields: Mapping[str, Any]) -> None:
        """Appends a finished trial, durably.

        Raises:
            RunError: Another process has written a trial of this study since it was read.
            OutputError: The disk is full, or the file cannot be written.
        """
        self._write({"op_code": CREATE_TRIAL, "study_id": self._study, **fields})

    def _write(self, entry: Mapping[str, Any]) -> None:
        body = json.dumps({"worker_id": self._worker, **entry}, separators=(",", ":")).encode()
        try:
            with locked(self.path), self.path.open("ab") as file:
                if file.tell() != self._read:
                    self._catch_up(file.fileno())
                line, seal = _sealed(self._seal, body)
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), self._read)  # half a line would spoil the next one
                    raise
        except OSError as error:
            reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror
            raise OutputError(f"{self.path}: cannot be written: {reason}") from error
        self._read += len(line)
        self._lines += 1
        self._seal = seal
        self._about_trial(entry)

    def _catch_up(self, descriptor: int) -> None:
        """Takes in what others have written since, such as a note in the dashboard; call it under the lock."""
        if any(True for _ in self.read()):
            raise RunError(f"{self.path}: another process has written to study '{self.name}' meanwhile")
        os.ftruncate(descriptor, self._read)  # what is behind the last whole line is of a process that was killed


def _sealed(before: bytes, body: bytes) -> tuple[bytes, bytes]:
    """A line of the journal with its checksum, and that; `before` is the one of the line before."""
    body = body.removesuffix(b"}")
    seal = digest(before, body).encode()
    return body + b',"checksum":"' + seal + b'"}\n', seal


def accept_edited(journal: Path) -> None:
    """Gives every line that is JSON the checksum of what is in it now; leaves out the others."""
    if not journal.is_file():
        return
    with locked(journal):
        lines, seal = [], b""
        for line in journal.read_bytes().splitlines():
            with suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    entry.pop("checksum", None)
                    sealed, seal = _sealed(seal, json.dumps(entry, separators=(",", ":")).encode())
                    lines.append(sealed)
        write_atomic(journal, b"".join(lines))


def optuna_storage(journal: Path) -> BaseStorage:
    """Opens the file as Optuna's journal storage, behind the same lock, repaired."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.storages.journal._file import BaseJournalFileLock

    class KernelLock(BaseJournalFileLock):
        """Optuna's interface to `locked`."""

        def __init__(self) -> None:
            self._stack = ExitStack()

        def acquire(self) -> bool:
            self._stack.enter_context(locked(journal))
            return True

        def release(self) -> None:
            self._stack.close()

    journal.parent.mkdir(parents=True, exist_ok=True)
    repair(journal)
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=KernelLock()))
