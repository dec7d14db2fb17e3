"""The record of a search: an Optuna study, one trial per candidate, by default a journal file in the run folder.

The trials are read once; from then on the record knows its candidates itself, and only writes.
"""

from __future__ import annotations

import gc
import logging
import signal
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from evomerge.errors import RunError
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, find, number_of
from evomerge.study.storage import StorageUnavailable, Store, open_store
from evomerge.system.secrets import masked

if TYPE_CHECKING:
    from optuna.study import Study

log = logging.getLogger("evomerge.record")

T = TypeVar("T")

#: Seconds between the tries to reach a database: when a run opens it, and when a candidate waits to be written.
TO_OPEN = (1.0, 2.0, 4.0)
TO_APPEND = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 60.0, 60.0)


@contextmanager
def _defer_signals() -> Iterator[None]:
    """Puts off Ctrl-C and SIGTERM for the length of the block, so that what is written and what is known agree."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's business
        yield
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for n in dict.fromkeys(received):
            signal.raise_signal(n)


@contextmanager
def _pause_garbage_collection() -> Iterator[None]:
    """Pauses garbage collection: reading makes millions of objects and no garbage, and going through them all again
    and again takes as long as reading."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class Record:
    """The candidates of one run, in an Optuna study.

    Args:
        store: Where they are.
        where: Its path or URL, for messages.
        report: Is told when the storage cannot be reached, and is tried again.
        waits: Seconds between the tries to append.
    """

    def __init__(
        self,
        store: Store,
        where: str | Path = "",
        *,
        report: Callable[[str], None] = log.warning,
        waits: Sequence[float] = TO_APPEND,
    ) -> None:
        self._store = store
        self._where = masked(str(where))
        self._report = report
        self._waits = waits
        # The first one of a number counts: a commit whose answer was lost may have been made twice.
        by_number: dict[int, Candidate] = {}
        for candidate in store.read():
            by_number.setdefault(candidate.number, candidate)
        self._candidates = sorted(by_number.values(), key=number_of)

    @classmethod
    def open(
        cls,
        where: str | Path,
        name: str,
        *,
        space: SearchSpace | None = None,
        objectives: int = 1,
        names: Sequence[str] = (),
        create: bool = True,
        owner: Mapping[str, str] | None = None,
        report: Callable[[str], None] = log.warning,
        waits: Sequence[float] = TO_APPEND,
    ) -> Record:
        """Opens the study `name`, or creates it.

        Args:
            where: A journal file, or an Optuna storage URL.
            name: Name of the study.
            space: Gives each trial its parameters and distributions; needed to append.
            objectives: Their number, for a new study; each is maximised.
            names: What Optuna's pictures call them; the study's own numbers where left out.
            create: Whether a missing study is created.
            owner: Who writes to it, in a storage that others may use: an ``id`` of the run folder, and where it is.
            report: Is told when the storage cannot be reached, and is tried again.
            waits: Seconds between the tries to append.

        Raises:
            RunError: The storage cannot be opened, has no such study and `create` is false, or has another run's.
        """
        record = cls._open_if_any(where, name, space, objectives, names, create, report, waits)
        if record is None:
            missing = "://" not in str(where) and not Path(where).exists()
            raise RunError(f"{where}: no such record" if missing else f"{masked(str(where))}: holds no study '{name}'")
        if owner is not None:
            record.claim(name, owner)
        return record

    @classmethod
    def find(cls, where: str | Path, name: str) -> Record | None:
        """Opens the study `name` to read it; None when there is none yet. Creates nothing.

        Raises:
            RunError: The storage cannot be opened.
        """
        if "://" not in str(where) and not Path(where).exists():
            return None
        return cls._open_if_any(where, name, None, 1, (), False, log.warning, ())

    @classmethod
    def _open_if_any(
        cls,
        where: str | Path,
        name: str,
        space: SearchSpace | None,
        objectives: int,
        names: Sequence[str],
        create: bool,
        report: Callable[[str], None],
        waits: Sequence[float],
    ) -> Record | None:
        def work() -> Record | None:
            with _pause_garbage_collection():
                store = open_store(where, name, space, objectives, create, names)
                return None if store is None else cls(store, where, report=report, waits=waits)

        try:
            return _retry(work, TO_OPEN, report, masked(str(where)))
        except StorageUnavailable as error:
            raise RunError(
                f"run.storage: cannot open {masked(str(where))}: {masked(str(error), str(where))}"
            ) from error

    @property
    def study(self) -> Study:
        """The study as Optuna opens it, with its trials up to now."""
        return self._store.study()

    def claim(self, name: str, owner: Mapping[str, str]) -> None:
        """Makes the study this run's, where it is nobody's yet.

        Raises:
            RunError: It is another run's.
        """
        other = self._store.attributes.get("run")
        if other is None:
            _retry(lambda: self._store.set_attribute("run", dict(owner)), TO_OPEN, self._report, self._where)
        elif other["id"] != owner["id"]:
            raise RunError(
                f"{self._where}: study '{name}' is the record of the run in {other['folder']} on {other['host']}; "
                "go on with that one, or give this one another name. Where that folder is gone, delete the study: "
                f"optuna delete-study --study-name {name} --storage ..."
            )

    def candidates(self) -> tuple[Candidate, ...]:
        """Returns every recorded candidate, by number."""
        return tuple(self._candidates)

    def __len__(self) -> int:
        return len(self._candidates)

    def append(self, candidate: Candidate) -> None:
        """Writes one finished candidate, durably; waits for a database that cannot be reached.

        Raises:
            RunError: Its number is recorded already; or the database did not come back.
            OutputError: The journal cannot be written.
        """
        if find(self._candidates, candidate.number) is not None:
            raise RunError(f"candidate {candidate.number} is recorded already")

        def write() -> None:
            with _defer_signals():
                self._store.append(candidate)
                insort(self._candidates, candidate, key=number_of)

        try:
            _retry(write, self._waits, self._report, self._where)
        except StorageUnavailable as error:
            raise RunError(
                f"run.storage: {self._where} did not come back within {sum(self._waits):.0f} s ({error}). Candidate "
                f"{candidate.number} is not recorded, but its scores are kept in the run's folder: when the storage "
                "is there again, the same command goes on from here and scores nothing twice"
            ) from error


def _retry(work: Callable[[], T], waits: Sequence[float], report: Callable[[str], None], where: str) -> T:
    """Does the work, again after each of the waits while the storage is unavailable.

    Raises:
        StorageUnavailable: It stayed so.
    """
    for wait in waits:
        try:
            return work()
        except StorageUnavailable as error:
            report(f"run.storage: {where} cannot be reached ({error}); trying again in {wait:g} s")
        time.sleep(wait)  # where Ctrl-C is heard
    return work()
