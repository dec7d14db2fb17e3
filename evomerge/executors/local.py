"""Worker processes on this machine: both ends of the connection to them.

A worker ends by itself when the other end of its connection closes, whatever it is doing: with the process that started
it. It costs nothing but itself: no daemons, no ports, no shared memory.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from evomerge.executors.pool import Begin, Message, Scorer, Worker
from evomerge.study.candidate import Proposal

_EXIT_TIMEOUT = 60.0  # seconds; writing a core file takes some

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Process:
    """A worker, seen from the process that started it."""

    process: subprocess.Popen[bytes]
    connection: Connection
    name: str

    def give(self, proposal: Proposal, begin: Begin, attached: Any) -> None:
        """Sends the proposal."""
        self.send((proposal, begin, attached))

    def send(self, message: Any) -> None:
        """Sends a message; that the worker is dead will show when its answer is waited for."""
        try:
            self.connection.send(message)
        except OSError as error:
            log.info("%s takes no message: %s", self.name, error)

    def end(self) -> None:
        """Kills it."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


class LocalWorkers:
    """Processes on this machine.

    Args:
        opener: What a worker opens first, as ``module:function``; it returns `evomerge.executors.pool.Opened`.
        arguments: What the opener is called with.
        log_file: Where the workers' logs go, with whatever else they print.
        environment: What the environment of a worker, by its slot, has beside ours.
    """

    def __init__(
        self,
        opener: str,
        arguments: Sequence[Any],
        log_file: Path,
        environment: Callable[[int], Mapping[str, str]] = lambda slot: {},
    ) -> None:
        self.logs = log_file.name
        self._opener = opener
        self._arguments = tuple(arguments)
        self._log_file = log_file
        self._environment = environment

    def start(self, slot: int) -> Worker:
        """Starts a process, and has it open what it needs."""
        connection, other_end = Pipe()
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        arguments = ["-c", "from evomerge.executors.local import serve; serve()", str(other_end.fileno())]
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
        worker = _Process(process, connection, f"worker {slot}")
        worker.send((self._opener, self._arguments))
        return worker

    def wait(self, workers: Sequence[Worker]) -> tuple[Worker, Message] | None:
        """Waits for what any of them says, or for its end."""
        by_connection = {worker.connection: worker for worker in workers if isinstance(worker, _Process)}
        worker = by_connection[wait(list(by_connection))[0]]  # type: ignore[index]
        try:
            message: Message = worker.connection.recv()
        except (EOFError, OSError):
            message = "lost", _describe_exit(_exit_code(worker.process))
        return worker, message

    def close(self) -> None:
        """Has nothing to give back."""


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
    """Runs a worker: serves the connection of file descriptor ``argv[1]``."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("evomerge").setLevel(logging.INFO)
    logging.captureWarnings(True)
    connection = Connection(int(sys.argv[1]))
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_fill, args=(connection, inbox), daemon=True).start()
    scorer = Scorer()
    message = scorer.open(*inbox.get())
    while True:
        connection.send(message)
        if message[0] in ("error", "bug"):
            sys.exit(1)
        message = scorer.score(*inbox.get())


def _fill(connection: Connection, inbox: SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        pass  # nobody is left to score for
    except Exception:
        traceback.print_exc()
    os._exit(1)
