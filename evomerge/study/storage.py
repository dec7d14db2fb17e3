"""Where the trials of a study are: in a journal file, or in a database by URL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.errors import RunError
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate
from evomerge.study.journal import Journal, optuna_storage, repair
from evomerge.study.optuna_trials import Parameters, candidate_of_trial, frozen_trial, journal_line
from evomerge.system.quiet import quiet_optuna
from evomerge.system.secrets import masked

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from sqlalchemy.engine import URL


#: Seconds, but for the last one, which is in milliseconds.
_LIBPQ_TIMEOUTS = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60000,
}


class StorageUnavailable(Exception):
    """A database cannot be reached just now, or broke off in the middle: what it was asked may be done or not."""


class Store(Protocol):
    """One study. Reading is for the start; afterwards the record knows its candidates itself."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The study's user attributes, when it was opened."""
        ...

    def read(self) -> Iterator[Candidate]:
        """Reads every recorded candidate, in the order of writing."""
        ...

    def append(self, candidate: Candidate) -> None:
        """Writes a finished candidate; after a `StorageUnavailable`, writes it unless it is there."""
        ...

    def set_attribute(self, key: str, value: Any) -> None:
        """Sets a user attribute of the study."""
        ...

    def study(self) -> Study:
        """Opens the study as Optuna opens it."""
        ...


def open_store(
    where: str | Path, name: str, space: SearchSpace | None, objectives: int, create: bool, names: Sequence[str]
) -> Store | None:
    """Opens the study `name`; None when there is none and it is not to be created.

    Raises:
        RunError: The storage cannot be used.
        StorageUnavailable: It cannot be reached just now.
    """
    if "://" in str(where):
        return DatabaseStore.open(str(where), name, space, objectives, create, names)
    return JournalStore.open(Path(where), name, space, objectives, create, names)


class JournalStore:
    """A study in a journal file."""

    def __init__(self, journal: Journal, space: SearchSpace | None) -> None:
        self._journal = journal
        self._parameters = Parameters(space)
        self._read = [
            candidate_of_trial(line.get("system_attrs", {}), number) for number, line in enumerate(journal.read())
        ]

    @classmethod
    def open(
        cls, path: Path, name: str, space: SearchSpace | None, objectives: int, create: bool, names: Sequence[str]
    ) -> JournalStore | None:
        """Repairs and reads the journal; None when it has no such study and is not to have it."""
        repair(path)
        store = cls(Journal(path, name), space)
        if not store._journal.exists:
            if not create:
                return None
            store._journal.create(objectives, names)
        return store

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The study's user attributes."""
        return self._journal.attributes

    def read(self) -> Iterator[Candidate]:
        """Reads every recorded candidate, in the order of writing."""
        read, self._read = self._read, []
        return iter(read)

    def append(self, candidate: Candidate) -> None:
        """Writes a finished candidate, durably."""
        self._journal.add_trial(journal_line(candidate, self._parameters))

    def set_attribute(self, key: str, value: Any) -> None:
        """Sets a user attribute of the study."""
        self._journal.set_attribute(key, value)

    def study(self) -> Study:
        """Opens the study as Optuna opens it, with every trial in memory."""
        import optuna

        with quiet_optuna():
            return optuna.load_study(storage=optuna_storage(self._journal.path), study_name=self._journal.name)


class DatabaseStore:
    """A study in a database that SQLAlchemy knows: PostgreSQL, SQLite, ..."""

    def __init__(self, study: Study, url: str, space: SearchSpace | None) -> None:
        self._study = study
        self._url = url
        self._parameters = Parameters(space)
        self._trials = len(study.get_trials(deepcopy=False))
        self._in_doubt = False
        self.attributes: Mapping[str, Any] = study.user_attrs

    @classmethod
    def open(
        cls, url: str, name: str, space: SearchSpace | None, objectives: int, create: bool, names: Sequence[str]
    ) -> DatabaseStore | None:
        """Connects; None when there is no such study and it is not to be created."""
        import optuna

        with quiet_optuna(), _translate_errors(url):
            storage = connect(url)
            try:
                study = optuna.load_study(storage=storage, study_name=name)
            except KeyError:
                if not create:
                    return None
                study = optuna.create_study(storage=storage, study_name=name, directions=["maximize"] * objectives)
                if names:
                    study.set_metric_names(list(names))
            return cls(study, url, space)

    def read(self) -> Iterator[Candidate]:
        """Reads every recorded candidate, in the order of writing."""
        for trial in self._study.get_trials(deepcopy=False):
            yield candidate_of_trial(trial.system_attrs, trial.number)

    def append(self, candidate: Candidate) -> None:
        """Writes a finished candidate, in one transaction.

        Raises:
            RunError: Another process has written to the study since it was read.
            StorageUnavailable: The database broke off. Whether it has the candidate is looked up at the next try.
        """
        with quiet_optuna(), _translate_errors(self._url):
            try:
                if not (self._in_doubt and self._has(candidate.number)):
                    self._add(candidate)
            except StorageUnavailable:
                self._in_doubt = True
                raise
            self._in_doubt = False

    def _has(self, number: int) -> bool:
        """Whether a candidate was committed although the answer never came."""
        trials = self._study.get_trials(deepcopy=False)
        new, self._trials = trials[self._trials :], len(trials)
        return any(candidate_of_trial(trial.system_attrs, trial.number).number == number for trial in new)

    def _add(self, candidate: Candidate) -> None:
        storage = self._study._storage
        trial_id = storage.create_new_trial(self._study._study_id, frozen_trial(candidate, self._parameters))
        self._trials += 1
        if storage.get_trial_number_from_id(trial_id) != self._trials - 1:
            raise RunError(
                f"{masked(self._url)}: another process has written to study '{self._study.study_name}' "
                "meanwhile: one run folder was copied, and both are being run? Stop one, and resume the other"
            )

    def set_attribute(self, key: str, value: Any) -> None:
        """Sets a user attribute of the study."""
        with quiet_optuna(), _translate_errors(self._url):
            self._study.set_user_attr(key, value)

    def study(self) -> Study:
        """Returns the study."""
        return self._study


def connect(url: str) -> RDBStorage:
    """Opens a database by URL, which raises `StorageUnavailable` as soon as the connection is.

    Optuna would try again by itself; but where the connection broke after the commit, that writes a trial twice.

    Raises:
        RunError: The URL or its driver is of no use.
    """
    import optuna
    import sqlalchemy

    try:
        options = {"pool_pre_ping": True, "connect_args": _libpq_timeouts(sqlalchemy.engine.make_url(url))}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
    except ImportError as error:
        hint = '; pip install "evomerge[postgres]"' if url.startswith("postgres") else ""
        raise RunError(f"run.storage: {masked(url)}: {masked(str(error), url)}{hint}") from error
    except (sqlalchemy.exc.ArgumentError, optuna.exceptions.OptunaError, RuntimeError) as error:
        if isinstance(error, optuna.exceptions.StorageInternalError):
            raise
        raise RunError(f"run.storage: cannot open {masked(url)}: {masked(str(error), url)}") from error
    sqlalchemy.event.listen(storage.engine, "handle_error", partial(_raise_unavailable, url))
    return storage


def _libpq_timeouts(url: URL) -> dict[str, Any]:
    """Returns settings of libpq that let a connection to a host that is gone fail, where it would wait for hours."""
    uses_libpq = url.drivername in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2")
    return {name: value for name, value in _LIBPQ_TIMEOUTS.items() if name not in url.query} if uses_libpq else {}


def _raise_unavailable(url: str, context: Any) -> None:
    """Raises `StorageUnavailable` instead where the connection is the trouble, and not the statement."""
    import sqlalchemy

    transient = sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError
    if not context.is_pre_ping and (context.is_disconnect or isinstance(context.sqlalchemy_exception, transient)):
        raise StorageUnavailable(_first_line(context.original_exception, url)) from context.original_exception


@contextmanager
def _translate_errors(url: str) -> Iterator[None]:
    """Translates what Optuna and SQLAlchemy raise for a database that cannot be reached to `StorageUnavailable`."""
    import optuna
    import sqlalchemy

    transient = sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError
    try:
        yield
    except transient as error:
        raise StorageUnavailable(_first_line(error.orig, url)) from error
    except optuna.exceptions.StorageInternalError as error:
        if not isinstance(error.__cause__, transient):
            raise
        raise StorageUnavailable(_first_line(error.__cause__.orig, url)) from error


def _first_line(error: BaseException | None, url: str) -> str:
    """What a driver says, without the secrets of the URL, which some repeat."""
    return masked((str(error).strip().splitlines() or ["no reason given"])[0], url)
