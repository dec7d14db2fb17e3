"""One writer per output folder, by an advisory lock on a file beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import OutputError

_ATTEMPTS = 20


@contextmanager
def output_lock(path: Path, what: Path) -> Iterator[None]:
    """Holds the lock file `path` for writing `what`. It is removed afterwards, and freed when the process dies.

    Raises:
        OutputError: Another process, or another writer of this one, holds it.
    """
    descriptor = _acquire(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while held: whoever opened it meanwhile notices and opens anew
        os.close(descriptor)


def _acquire(path: Path, what: Path) -> int:
    import fcntl

    for _ in range(_ATTEMPTS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(descriptor, path):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError(f"{what} is being written by another process: wait for it, or choose another") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OutputError(f"{what} is being written by other processes: {path} does not stay free")


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
