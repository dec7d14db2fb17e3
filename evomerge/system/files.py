"""Small files written whole or not at all, where a relative path leads, and where the cache is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from evomerge.errors import OutputError


def cache_folder(kind: Literal["fingerprints", "scores", "zoo"]) -> Path:
    """Returns where things of one kind are kept that can be computed again: below $EVOMERGE_CACHE, if it is set.

    fingerprints/   hashes of checkpoints, by the state of their files
    scores/         per-item scores, by what decides them
    zoo/            the shipped models, unpacked
    """
    given = os.environ.get("EVOMERGE_CACHE")
    root = Path(given).expanduser() if given else user_cache_path("evomerge", appauthor=False)
    return root / kind


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


def resolve_path(text: str, beside: Path | None) -> Path | None:
    """Looks for a path beside a file, then beside the folders above it, then in the working directory.

    Args:
        text: The path as written; ``~`` is expanded, an absolute path is only checked.
        beside: The file that mentions the path, or its folder; None to look in the working directory alone.

    Returns:
        The absolute path of the first that exists, or None.
    """
    if not text.strip() or "\0" in text:
        return None
    for folder in _folders(beside):
        candidate = folder / Path(text).expanduser()
        if _exists(candidate):
            return candidate.resolve()
    return None


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
