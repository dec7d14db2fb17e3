"""One process at a time: an advisory lock on a file, which says who holds it and is freed when that process dies.

By `flock` rather than the library filelock: that cannot ask whether a lock is taken without taking it.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evomerge.errors import EvoMergeError, RunError

_TRIES, _PAUSE = 10, 0.05  # seconds; another process that only asks whether a lock is taken has it for a moment


@contextmanager
def exclusive(
    path: Path, what: str, *, error: type[EvoMergeError] = RunError, afterwards: str = "", remove: bool = False
) -> Iterator[None]:
    """Holds the lock file `path` for the length of a block; the kernel frees it when the process dies.

    Args:
        path: The file; made where there is none.
        what: What the lock guards, for the message.
        error: What to raise when another process, or another part of this one, holds it.
        afterwards: What happens when the holder has been stopped, for the message.
        remove: Remove the file in the end.

    Raises:
        EvoMergeError: `error`: which process holds it, on which host, since when, and what to do.
    """
    descriptor = _acquire(path)
    if descriptor is None:
        raise error(_in_use(path, what, afterwards))
    try:
        now = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()} {now}".encode(), 0)
        yield
    finally:
        if remove:
            path.unlink(missing_ok=True)  # while held: whoever opened it meanwhile notices and opens anew
        os.close(descriptor)


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Holds the lock file `path` for the length of a block, after waiting for whoever holds it."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Says whether a live process holds a lock file; changes nothing."""
    import fcntl

    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _acquire(path: Path) -> int | None:
    """Takes the lock in a few tries; gives the descriptor that holds it, None when somebody else does."""
    import fcntl  # not where there is no flock: there everything but locking works

    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(descriptor, path):
                return descriptor
        except BlockingIOError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    return None


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Says whether the file is still there: its last holder may have removed it after it was opened here."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _in_use(path: Path, what: str, afterwards: str) -> str:
    """Says who holds a lock; the file is empty for a moment after it was taken."""
    content = ""
    with suppress(FileNotFoundError):  # removed by now
        content = path.read_text()
    note = content.split(maxsplit=2)
    process, host, since = note if len(note) == 3 else ("unknown", socket.gethostname(), "just now")
    elsewhere = "" if host == socket.gethostname() else f" on {host}"
    return (
        f"{what} is in use by process {process}{elsewhere} since {since}; wait for it, or stop it "
        f"{'there ' if elsewhere else ''}with `kill {process}`{afterwards and f': {afterwards}'}"
    )
