"""What a process says when a file is cut short under its memory map, instead of dying of a bus error without a word.

Reading a page that is no longer there raises SIGBUS in whatever thread read it, and nothing can go on from there. The
handler is called in that thread; it never returns.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_EXIT_CODE = 2  # that of `BadInput`
_mapped: dict[Path, int] = {}  # of the process, as the handler is
_handlers: list[object] = []  # kept alive for as long as the process


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
