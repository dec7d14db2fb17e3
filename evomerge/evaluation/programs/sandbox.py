"""Runs programs that models wrote, each in a process of its own that `confined.py` shuts in; says what it forbids."""

from __future__ import annotations

import functools
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import TaskError
from evomerge.system.text import printable

_START = 60.0
"""Seconds that a process may take until it is confined: on a machine that is busy, not a program's fault."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Of processor time, and of time on the wall.
        memory: Bytes of address space.
        file_size: Bytes of any one file.
        disk: Bytes of all its files together.
    """

    seconds: float = 3.0
    memory: int = 2**30
    file_size: int = 2**24
    disk: int = 2**26

    def __str__(self) -> str:
        """Says them, and what no program may do."""
        return (
            f"{self.seconds:g} s, {self.memory >> 20} MiB of memory, files of {self.file_size >> 20} MiB in an empty "
            "folder, no process or thread of its own, no network, no environment"
        )


@functools.lru_cache(maxsize=4096)
def run_program(program: str, limits: Limits = Limits()) -> bool:
    """Runs a program and says whether it came to its end without an error and within its limits.

    Args:
        program: Python.
        limits: What it may use.

    Raises:
        TaskError: No process can be confined here.
    """
    return _run(program, limits)[0]


@functools.cache
def not_forbidden() -> tuple[str, ...]:
    """Returns what this system lets a program do in spite of all, by trying an empty one.

    Raises:
        TaskError: As `run_program`.
    """
    return _run("", Limits())[1]


def program_notes(tasks: Iterable[str]) -> list[str]:
    """Says which tasks run programs, within which limits, and what nothing here forbids them.

    Raises:
        TaskError: As `run_program`.
    """
    if not (names := ", ".join(map(repr, tasks))):
        return []
    notes = [f"{names}: programs that the model writes are run, each in a process of its own: {Limits()}"]
    if not_forbidden():
        notes.append(f"{names}: this system forbids programs neither {' nor '.join(not_forbidden())}")
    return notes


def _run(program: str, limits: Limits) -> tuple[bool, tuple[str, ...]]:
    """Whether a program passed, and what could not be forbidden."""
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="evomerge-program-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [*_COMMAND, *map(str, (limits.seconds, limits.memory, limits.file_size, limits.disk)), *_packages()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # until it is confined
            cwd=folder,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        try:
            _send(process, token + b"\n" + program.encode("utf-8", "surrogatepass"))
            first, end, rest = _read(process, _START, until=b"\n").partition(b"\n")
            if not first.startswith(_CONFINED) or not end:
                rest += _read(process, 1.0)  # the traceback
                reason = printable(" ".join((first + b" " + rest).decode(errors="replace").split())[-300:])
                raise TaskError(f"no process can be confined here, so no program is run: {reason}")
            passed = _read(process, limits.seconds, before=rest, most=len(token)) == token
        finally:
            _kill(process)
    lacking = first.removeprefix(_CONFINED).decode()
    return passed, tuple(lacking.split("; ")) if lacking else ()


_CONFINED = b"confined: "
_COMMAND = (sys.executable, "-S", "-s", "-P", "-B", "-X", "utf8", str(Path(__file__).with_name("confined.py")))
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # the same program gives the same result
    **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},  # Python may need it to start
}
"""What Python starts with; the program sees none of it."""


def _packages() -> list[str]:
    """The folders of installed packages: tests of programs use numpy."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _send(process: subprocess.Popen[bytes], content: bytes) -> None:
    if process.stdin is not None:
        with suppress(BrokenPipeError), process.stdin as pipe:  # one that has ended says why itself
            pipe.write(content)


def _read(
    process: subprocess.Popen[bytes],
    seconds: float,
    *,
    before: bytes = b"",
    until: bytes | None = None,
    most: int = 10_000,
) -> bytes:
    """Reads what a process writes to its end, for some seconds, until a text or until it is more than enough.

    Args:
        process: The process.
        seconds: How long.
        before: What was read before.
        until: What ends it.
        most: Bytes that are enough.
    """
    content, deadline = before, time.monotonic() + seconds
    pipe = process.stdout.fileno() if process.stdout is not None else -1
    while len(content) <= most and (until is None or until not in content):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return content
        if not (part := os.read(pipe, 4096)):
            return content
        content += part
    return content


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and whatever is in its group."""
    with suppress(ProcessLookupError, PermissionError):  # macOS: all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
