"""Small files written whole or not at all, where a relative path leads, and where the cache is."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from evomerge.errors import BadInput, OutputError

_REASONS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EFBIG: "it is longer than the file system or this user's limit (ulimit -f) allows",
}


def cache_folder(kind: Literal["fingerprints", "judge", "scores", "tasks", "zoo"]) -> Path:
    """Returns where things of one kind are kept that can be computed again: below $EVOMERGE_CACHE, if it is set.

    fingerprints/   hashes of checkpoints, by the state of their files
    judge/          what judges replied, and what was spent on them
    scores/         per-item scores, by what decides them
    zoo/            the shipped models, unpacked
    """
    given = os.environ.get("EVOMERGE_CACHE")
    root = Path(given).expanduser() if given else user_cache_path("evomerge", appauthor=False)
    return root / kind


MOST_TEXT = 64 * 2**20
"""Bytes of a file that people write or that describes a model: the largest real ones have a fifth of it."""


def read_text(path: Path, error: type[BadInput], *, limit: int = MOST_TEXT) -> str:
    """Reads a text that somebody else may have written, as UTF-8.

    Args:
        path: An ordinary file: a pipe or a device might never end.
        error: Which of our errors to raise.
        limit: Bytes.

    Raises:
        BadInput: `error`, naming the file: it cannot be read, is no ordinary file, too large, or no UTF-8.
    """
    try:
        # A pipe that nobody writes to would keep an ordinary `open` for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{path}: cannot be read: it is not an ordinary file")
            content = file.read(limit + 1)
    except (OSError, ValueError) as problem:  # ValueError: a NUL byte in the name
        raise error(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    if len(content) > limit:
        raise error(f"{path}: cannot be read: larger than {limit / 2**20:g} MiB, which no file of its kind is")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise error(f"{path}, line {line}: is not a text file (UTF-8)") from None


def write_atomic(path: Path, content: bytes | str, *, private: bool = False) -> None:
    """Writes a file under a temporary name, syncs it, and renames it into place.

    Args:
        path: The file.
        content: What it is to hold.
        private: Let nobody else read it.

    Raises:
        OutputError: When the disk is full or the folder cannot be written; the old file is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        mode = 0o600 if private else 0o666
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with open(os.open(partial, flags, mode), "wb") as file:  # noqa: PTH123
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        reason = _REASONS.get(error.errno or 0, error.strerror)
        raise OutputError(f"{path}: cannot be written: {reason}") from error


def resolve_path(text: str, beside: Path | None) -> Path | None:
    """Looks for a path beside a file, then beside the folders above it, then in the working directory.

    Args:
        text: The path as written; ``~`` is expanded where no such name is there, an absolute path is only checked.
        beside: The file that mentions the path, or its folder; None to look in the working directory alone.

    Returns:
        The absolute path of the first that exists, or None.
    """
    if not text.strip() or "\0" in text:
        return None
    for folder in _folders(beside):
        for candidate in dict.fromkeys((folder / text, folder / expand_home(text))):
            if _exists(candidate):
                return candidate.resolve()
    return None


def expand_home(path: str | Path) -> Path:
    """Expands ``~`` as a shell does; a name such as ``~x`` of which there is no user stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _folders(beside: Path | None) -> Iterator[Path]:
    if beside is not None:
        start = beside.resolve()
        if not start.is_dir():
            start = start.parent
        yield start
        yield from start.parents
    yield Path.cwd()


def _exists(path: Path) -> bool:
    """Says whether a path exists; a name that cannot even be looked up (too long, no permission) does not."""
    try:
        return path.exists()
    except OSError:
        return False
