"""Several processes on this machine that score candidates at once: both ends of the connection to them.

A worker knows nothing but what to open, named as ``module:function``. It ends by itself when the other end of its
connection closes, whatever it is doing: with the process that started it.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from evomerge.errors import EvoMergeError
from evomerge.executors.in_process import attempt
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.system.memory import collect_rarely

ATTEMPTS = 2
"""How many workers a candidate may cost, and how many in a row may die before they are ready."""

_EXIT_TIMEOUT = 60.0  # seconds; writing a core file takes some

Opened = tuple[Callable[[Any], None], Callable[[Proposal], Outcome]]
"""What an opener returns: what takes whom to compare candidates with, and what scores one."""

log = logging.getLogger(__name__)


@dataclass
class _Worker:
    """A process, seen from the one that started it.

    Attributes:
        process: The process.
        connection: Our end of the connection to it.
        slot: The worker's number; another that replaces it has the same.
        ready: Whether it has opened what it needs.
        incumbents: Whom it was last given to compare candidates with.
        proposal: What it is scoring.
        attempt: Which attempt at that this is, from 1.
        since: When it got it.
    """

    process: subprocess.Popen[bytes]
    connection: Connection
    slot: int
    ready: bool = False
    incumbents: Any = None
    proposal: Proposal | None = None
    attempt: int = 0
    since: float = 0.0

    def give(self, proposal: Proposal, attempt: int, incumbents: Any) -> None:
        """Has it score a proposal, and compare that with these candidates."""
        if self.incumbents is not incumbents:
            self.send(("begin", incumbents))
            self.incumbents = incumbents
        self.send(("score", proposal))
        self.proposal, self.attempt, self.since = proposal, attempt, time.perf_counter()

    def take(self) -> Proposal | None:
        """Returns what it was scoring, and leaves it with nothing to do."""
        proposal, self.proposal = self.proposal, None
        return proposal

    def opened(self) -> None:
        """Notes that it has opened what it needs."""
        self.ready = True

    def send(self, message: Any) -> None:
        """Sends a message; that the worker is dead will show when its answer is waited for."""
        try:
            self.connection.send(message)
        except OSError as error:
            log.info("worker %d takes no message: %s", self.slot, error)


class LocalWorkers:
    """An executor of worker processes, each started when it is first needed.

    Args:
        count: How many.
        opener: What a worker opens first, as ``module:function``; it returns `Opened`.
        arguments: What the opener is called with.
        summarise: What a worker has to know of a history to compare candidates with; None where that is nothing.
        log_file: Where the workers' logs go, with whatever else they print.
        environment: What the environment of a worker, by its slot, has beside ours.
    """

    def __init__(
        self,
        count: int,
        opener: str,
        arguments: Sequence[Any],
        summarise: Callable[[tuple[Candidate, ...]], Any],
        log_file: Path,
        environment: Callable[[int], Mapping[str, str]] = lambda slot: {},
    ) -> None:
        self._count = count
        self._opener = opener
        self._arguments = tuple(arguments)
        self._summarise = summarise
        self._log_file = log_file
        self._environment = environment
        self._workers: dict[int, _Worker] = {}
        self._incumbents: Any = None
        self._failed_starts = 0

    @property
    def slots(self) -> int:
        """One for each worker."""
        return self._count

    def begin_generation(self, history: tuple[Candidate, ...]) -> None:
        """Keeps what the workers have to know of the history; each is told with its next proposal."""
        incumbents = self._summarise(history)
        if incumbents != self._incumbents:
            self._incumbents = incumbents

    def submit(self, proposal: Proposal) -> None:
        """Gives the proposal to a worker that has none."""
        for slot in range(self._count):
            worker = self._workers.get(slot) or self._start(slot)
            if worker.proposal is None:
                worker.give(proposal, 1, self._incumbents)
                return
        raise ValueError(f"all {self._count} workers are busy")

    def next_finished(self) -> tuple[Proposal, Outcome]:
        """Waits for any worker. A candidate whose worker dies gets another one, once."""
        while True:
            busy = {worker.connection: worker for worker in self._workers.values() if worker.proposal is not None}
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                finished = self._receive(worker)
                if finished is not None:
                    return finished

    def close(self) -> None:
        """Ends the workers at once. Whatever they were writing has a temporary name."""
        for worker in self._workers.values():
            _end(worker)
        self._workers.clear()

    def _receive(self, worker: _Worker) -> tuple[Proposal, Outcome] | None:
        """What the worker's next message means for its proposal."""
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            return self._lost(worker)
        if kind == "error":
            raise content
        if kind == "bug":
            raise RuntimeError(f"worker {worker.slot}:\n{content}")
        if kind == "ready":
            worker.opened()
            self._failed_starts = 0
            return None
        proposal = worker.take()
        if proposal is None:
            raise RuntimeError(f"worker {worker.slot} has scored what nobody asked for")
        return proposal, content

    def _lost(self, worker: _Worker) -> tuple[Proposal, Outcome] | None:
        """Has another worker try, or gives the candidate up."""
        how = _describe_exit(_exit_code(worker.process))
        _end(worker)
        del self._workers[worker.slot]
        if worker.proposal is None:
            return None
        log.warning("worker %d died (%s) with candidate %d", worker.slot, how, worker.proposal.number)
        attempt = worker.attempt
        if not worker.ready:  # which is not the candidate's fault
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS:
                raise EvoMergeError(f"worker {worker.slot} died before it could score: {how}; see {self._log_file}")
            attempt -= 1
        if attempt < ATTEMPTS:
            self._start(worker.slot).give(worker.proposal, attempt + 1, self._incumbents)
            return None
        failure = f"worker died: {how}, {attempt} times; see {self._log_file.name}"
        seconds = {"total": time.perf_counter() - worker.since}
        return worker.proposal, Outcome(None, state="failed", failure=failure, seconds=seconds)

    def _start(self, slot: int) -> _Worker:
        connection, other_end = Pipe()
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        arguments = ["-c", "from evomerge.executors.local import serve; serve()", str(other_end.fileno()), self._opener]
        with other_end, self._log_file.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, "PYTHONPATH": path, **self._environment(slot)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=(other_end.fileno(),),
                start_new_session=True,  # Ctrl-C is for this process, which ends its workers
            )
        worker = self._workers[slot] = _Worker(process, connection, slot)
        worker.send(self._arguments)
        return worker


def _end(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.wait()


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process whose connection is closed, and which therefore ends."""
    try:
        return process.wait(_EXIT_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _describe_exit(code: int) -> str:
    """How a process has ended."""
    if code >= 0:
        return f"exit code {code}"
    hint = ", as when memory runs out" if -code == signal.SIGKILL else ""
    return f"signal {-code} ({signal.Signals(-code).name}{hint})"


def serve() -> NoReturn:
    """Runs a worker: serves the connection of file descriptor ``argv[1]`` with what the opener ``argv[2]`` returns."""
    collect_rarely()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("evomerge").setLevel(logging.INFO)
    logging.captureWarnings(True)
    connection = Connection(int(sys.argv[1]))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_fill, args=(connection, inbox), daemon=True).start()
    try:
        _score(connection, inbox, sys.argv[2])
    except EvoMergeError as error:
        connection.send(("error", error))
    except Exception:
        connection.send(("bug", traceback.format_exc()))
    sys.exit(1)


def _fill(connection: Connection, inbox: SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        pass  # nobody is left to score for
    except Exception:
        traceback.print_exc()
    os._exit(1)


def _score(connection: Connection, inbox: SimpleQueue[Any], opener: str) -> NoReturn:
    module, _, name = opener.partition(":")
    begin, evaluate = getattr(importlib.import_module(module), name)(*inbox.get())
    connection.send(("ready", None))
    while True:
        kind, content = inbox.get()
        if kind == "begin":
            begin(content)
        else:
            connection.send(("outcome", attempt(evaluate, content)))
