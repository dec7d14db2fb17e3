"""Small files, written whole or not at all."""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import OutputError, RunError

_TRIES, _PAUSE = 10, 0.05  # seconds; another process that only asks whether a lock is held has it for a moment


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file under a temporary name, syncs it, and renames it into place.

    Raises:
        OutputError: When the disk is full or the folder cannot be written; the old file is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror
        raise OutputError(f"{path}: cannot be written: {reason}") from error


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Holds a lock file for the length of a block; the kernel releases it when the process dies.

    Raises:
        RunError: When another process holds it: which one, on which host, since when, and what to do.
    """
    with path.open("a+") as file:
        if not _taken(file.fileno()):
            file.seek(0)
            raise RunError(_in_use(what, file.read().split(maxsplit=2)))
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()} {datetime.datetime.now():%Y-%m-%d %H:%M:%S}")
        file.flush()
        yield


def _in_use(what: str, holder: Sequence[str]) -> str:
    """What a second process is told of the first; the file is empty for a moment after it was taken."""
    process, host, since = holder if len(holder) == 3 else ("unknown", socket.gethostname(), "just now")
    elsewhere = "" if host == socket.gethostname() else f" on {host}"
    return (
        f"{what} is in use by process {process}{elsewhere} since {since}; wait for it, or stop it "
        f"{'there ' if elsewhere else ''}with `kill {process}`: the same command then goes on from where it was"
    )


def _taken(descriptor: int) -> bool:
    """Whether the lock is ours now, after a few tries."""
    for attempt in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt + 1 < _TRIES:
                time.sleep(_PAUSE)
        else:
            return True
    return False


def held(path: Path) -> bool:
    """Whether a live process holds a lock file; changes nothing."""
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
