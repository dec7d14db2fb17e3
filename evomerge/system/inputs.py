"""Files that work rests on, watched from the moment they are opened until the work is done.

That a file could be read says nothing about what it holds an hour later. So its signature is looked at again before
anything that rests on it is kept; where that has changed, its content is compared; at the end all of it is, whatever
the signature says. A file that was replaced under its name is still open here, as it was, and is no trouble.

One that is cut short under its memory map ends the process: reading a page that is no longer there raises SIGBUS in
whatever thread read it, and nothing can go on from there. The handler is called in that thread, says which file it was,
and never returns.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import RunError
from evomerge.system.hashing import digest

_PAGE = 4096
_SAMPLED = 32  # pages of a file, spread evenly, the first and the last among them
_SMALL = 1 << 20  # bytes of a file of which every page is compared, every time

_EXIT_CODE = 2  # that of `BadInput`
_mapped: dict[Path, int] = {}  # of the process, as the handler is
_handlers: list[object] = []  # kept alive for as long as the process

Signature = tuple[int, int, int, int]


class ChangedInput(RunError):
    """A file has changed under the work that rests on it."""


@dataclass(frozen=True)
class _File:
    """An open file, and the pages of it that were sampled."""

    path: Path
    descriptor: int
    sample: str


class Inputs:
    """Some files as they are now, and what tells whether they still are.

    Args:
        files: The files. One that is not there is not watched.
        contents: What each of several parts of them holds, computed from all of it; compared with what it says later.

    Raises:
        RunError: A file that is there cannot be opened.
    """

    def __init__(self, files: Iterable[Path], contents: Mapping[str, tuple[str, Callable[[], str]]] = {}) -> None:
        self._contents = dict(contents)
        self._files: list[_File] = []
        for path in sorted(dict.fromkeys(path for path in files if path.is_file())):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise RunError(f"{path}: cannot be read: {error.strerror}") from error
            self._files.append(_File(path, descriptor, _sample(descriptor)))
        self._signatures = self._looked_at()

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            os.close(file.descriptor)

    def renew(self, *, sampled: bool = False) -> None:
        """Checks that the files are as they were: by their signatures, and by content where these have changed.

        Args:
            sampled: Compare some pages of every file too, whatever the signatures say.

        Raises:
            ChangedInput: With every file that has changed.
        """
        signatures = self._looked_at()
        touched = [file for file in self._files if signatures[file.path] != self._signatures[file.path]]
        self._compare(touched)
        if touched:
            self._compare_contents()
            self._signatures = signatures
        if sampled:
            self._compare(self._files, unseen=True)

    def verify(self) -> None:
        """Checks all of every file against what it held at first.

        Raises:
            ChangedInput: With every file that has changed.
        """
        self.renew(sampled=True)
        self._compare_contents(unseen=True)

    def _compare(self, files: Iterable[_File], *, unseen: bool = False) -> None:
        changed = [str(file.path) for file in files if _sample(file.descriptor) != file.sample]
        if changed:
            raise _changed(changed, unseen)

    def _compare_contents(self, *, unseen: bool = False) -> None:
        changed = [name for name, (before, content) in self._contents.items() if content() != before]
        if changed:
            raise _changed(changed, unseen)

    def _looked_at(self) -> dict[Path, Signature]:
        return {file.path: _signature(os.fstat(file.descriptor)) for file in self._files}


def _changed(names: Iterable[str], unseen: bool) -> ChangedInput:
    """The error for files that have changed; `unseen` where their signatures never said so."""
    seen = "Nothing that was scored with it is kept; with the file as it was, the same command goes on from here"
    doubt = "Since when, its times of change do not say: what was scored is in doubt. Begin in a new folder"
    return ChangedInput([f"{name}: has changed while it was in use. {doubt if unseen else seen}" for name in names])


def _signature(status: os.stat_result) -> Signature:
    """What changes when a file is written to: the last part even where somebody puts the time back."""
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns


def _sample(descriptor: int) -> str:
    """A hash of a file's size and of pages spread over it; of all pages where it is small."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return ""
    size = status.st_size
    if size <= _SMALL:
        parts = [os.pread(descriptor, size, 0)]
    else:
        last = size - _PAGE
        parts = [os.pread(descriptor, _PAGE, last * k // (_SAMPLED - 1)) for k in range(_SAMPLED)]
    return digest(str(size), *parts)


def watch_map(path: Path, size: int) -> None:
    """Notes that a file of this size is mapped into memory, so that its truncation can be told."""
    _mapped[path] = size
    if not _handlers and sys.platform != "win32":
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_tell)
        _handlers.append(handler)
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.signal(int(signal.SIGBUS), ctypes.cast(handler, ctypes.c_void_p))


def truncated_maps() -> list[str]:
    """Describes the mapped files that are shorter than they were."""
    shorter = []
    for path, size in _mapped.items():
        try:
            now = path.stat().st_size
        except OSError as error:
            shorter.append(f"{path}: cannot be read any more: {error.strerror}")
            continue
        if now < size:
            shorter.append(f"{path}: was truncated while it was in use: it had {size} bytes and has {now}")
    return shorter


def _tell(number: int) -> None:
    """Says which file it was, and ends the process."""
    problems = truncated_maps() or [f"a file could not be read through its memory map; one of: {_listed()}"]
    for problem in problems:
        line = f"error: {problem}. The work stopped; with the file as it was, the same command goes on from here\n"
        os.write(2, line.encode(errors="replace"))
    os._exit(_EXIT_CODE)


def _listed() -> str:
    return ", ".join(map(str, _mapped))
