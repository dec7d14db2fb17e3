"""The record of a search: an Optuna study, one trial per candidate, by default a journal file in the run folder.

The journal is locked by the kernel (``flock``), which drops the lock of a killed process, and is repaired when it is
opened: a line torn by a kill is cut off before anything is appended to it.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import RunError
from evomerge.search.candidate import Candidate
from evomerge.search.genome import Genome
from evomerge.search.space import SearchSpace

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_CHUNK = 1 << 16


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna without its log lines and its notes on experimental functions, for the length of the block."""
    import warnings

    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts off Ctrl-C and SIGTERM for the length of the block, so that what is written and what is known agree."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's business
        yield
        return
    met: list[int] = []
    before = {number: signal.signal(number, lambda n, _: met.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for n in dict.fromkeys(met):
            signal.raise_signal(n)


@contextmanager
def _flock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file beside the journal; a killed holder leaves nothing to clean up."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock_path(journal: Path) -> Path:
    return journal.with_name(journal.name + ".flock")


def repair(journal: Path) -> int:
    """Cuts off a last line that a kill left incomplete, so that appending does not join two lines.

    Returns:
        The number of bytes cut off.
    """
    if not journal.exists():
        return 0
    with _flock(_lock_path(journal)), journal.open("r+b") as file:
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
        place = file.read(stop - start).rfind(b"\n")
        if place >= 0:
            return start + int(place) + 1
        stop = start
    return 0


def journal_storage(journal: Path) -> BaseStorage:
    """Optuna's journal storage on a file, behind our lock, repaired."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.storages.journal._file import BaseJournalFileLock

    class KernelLock(BaseJournalFileLock):
        """Optuna's interface to `_flock`."""

        def __init__(self) -> None:
            self._held: Any = None

        def acquire(self) -> bool:
            held = _flock(_lock_path(journal))
            held.__enter__()
            self._held = held
            return True

        def release(self) -> None:
            held, self._held = self._held, None
            if held is not None:
                held.__exit__(None, None, None)

    journal.parent.mkdir(parents=True, exist_ok=True)
    repair(journal)
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=KernelLock()))


def open_storage(where: str | Path) -> BaseStorage:
    """A storage by path (a journal file) or by URL (PostgreSQL, SQLite, ...).

    Raises:
        RunError: The storage cannot be reached.
    """
    import optuna

    text = str(where)
    if "://" not in text:
        return journal_storage(Path(where))
    try:
        return optuna.storages.get_storage(text)
    except Exception as error:
        raise RunError(f"run.storage: cannot open {_without_password(text)}: {error}") from error


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


class Record:
    """The candidates of one run, in an Optuna study. Read once when opened, then kept in memory.

    Attributes:
        study: The Optuna study.
    """

    def __init__(self, study: Study, space: SearchSpace | None = None) -> None:
        self.study = study
        self._space = space
        self._candidates = {c.number: c for c in map(_candidate, study.get_trials(deepcopy=False))}

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
    ) -> Record:
        """Opens the study `name`, or creates it.

        Args:
            where: A journal file, or an Optuna storage URL.
            name: Name of the study.
            space: Gives each trial its parameters and distributions; needed to append.
            objectives: Their number, for a new study; each is maximised.
            names: What Optuna's pictures call them; the study's own numbers where left out.
            create: Whether a missing study is created.

        Raises:
            RunError: The storage cannot be opened, or has no such study and `create` is false.
        """
        import optuna

        text = str(where)
        if not create and "://" not in text and not Path(text).exists():
            raise RunError(f"{text}: no such record")
        with quiet_optuna():
            storage = open_storage(where)
            try:
                # Creating with load_if_exists would write to the journal each time it is opened.
                study = optuna.load_study(storage=storage, study_name=name)
            except KeyError as error:
                if not create:
                    raise RunError(f"{_without_password(text)}: holds no study '{name}'") from error
                study = optuna.create_study(storage=storage, study_name=name, directions=["maximize"] * objectives)
                if names:
                    study.set_metric_names(list(names))
            return cls(study, space)

    @classmethod
    def find(cls, where: str | Path, name: str) -> Record | None:
        """Opens the study `name` to read it; None when there is none yet. Creates nothing.

        Raises:
            RunError: The storage cannot be opened.
        """
        import optuna

        if "://" not in str(where) and not Path(where).exists():
            return None
        with quiet_optuna():
            storage = open_storage(where)
            try:
                return cls(optuna.load_study(storage=storage, study_name=name))
            except KeyError:
                return None

    def candidates(self) -> tuple[Candidate, ...]:
        """Every recorded candidate, by number."""
        return tuple(self._candidates[number] for number in sorted(self._candidates))

    def __len__(self) -> int:
        return len(self._candidates)

    def append(self, candidate: Candidate) -> None:
        """Writes one finished candidate, durably.

        Raises:
            RunError: Its number is recorded already.
        """
        if candidate.number in self._candidates:
            raise RunError(f"candidate {candidate.number} is recorded already")
        with _undisturbed(), quiet_optuna():
            self.study.add_trial(_trial(candidate, self._space))
            self._candidates[candidate.number] = candidate


def _trial(candidate: Candidate, space: SearchSpace | None) -> FrozenTrial:
    import optuna

    states = {
        "done": optuna.trial.TrialState.COMPLETE,
        "failed": optuna.trial.TrialState.FAIL,
        "pruned": optuna.trial.TrialState.PRUNED,
    }
    params = space.params(candidate.genome) if space is not None else {}
    known = space.distributions() if space is not None else {}
    values: list[float] | None = None
    if candidate.state == "done" and candidate.fitness is not None:
        values = list(candidate.objectives or (candidate.fitness,))
    now = datetime.datetime.now()
    spent = datetime.timedelta(seconds=float(candidate.seconds.get("total", 0.0)))
    return optuna.trial.FrozenTrial(
        number=-1,
        trial_id=-1,
        state=states[candidate.state],
        value=None,
        values=values,
        datetime_start=now - spent,
        datetime_complete=now,
        params=params,
        distributions={name: known[name] for name in params},
        user_attrs=_attributes(candidate),
        system_attrs={},
        intermediate_values=dict(candidate.estimates) if candidate.objectives is None else {},
    )


def _attributes(candidate: Candidate) -> dict[str, Any]:
    # Optuna has intermediate values for one objective only.
    several = {} if candidate.objectives is None else {"estimates": list(candidate.estimates.items())}
    return {
        **several,
        "number": candidate.number,
        "generation": candidate.generation,
        "operator": candidate.operator,
        "parents": list(candidate.parents),
        "phenotype": candidate.phenotype,
        "state": candidate.state,
        "fitness": candidate.fitness,
        "objectives": None if candidate.objectives is None else list(candidate.objectives),
        "failure": candidate.failure,
        "seconds": dict(candidate.seconds),
        "scores": dict(candidate.scores),
        "genome": candidate.genome.to_json(),
        "recipe": dict(candidate.recipe),
    }


def _candidate(trial: FrozenTrial) -> Candidate:
    saved = trial.user_attrs
    try:
        return Candidate(
            number=saved["number"],
            generation=saved["generation"],
            genome=Genome.from_json(saved["genome"]),
            recipe=saved["recipe"],
            phenotype=saved["phenotype"],
            parents=tuple(saved["parents"]),
            operator=saved["operator"],
            state=saved["state"],
            fitness=saved["fitness"],
            objectives=None if saved["objectives"] is None else tuple(saved["objectives"]),
            scores=saved["scores"],
            failure=saved["failure"],
            seconds=saved["seconds"],
            estimates=dict(saved["estimates"]) if "estimates" in saved else dict(trial.intermediate_values),
        )
    except KeyError as error:
        raise RunError(f"trial {trial.number} of the study is not evomerge's: no attribute {error}") from error
