"""Where a relative path in a YAML file points to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


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
    """A name that the file system cannot even look up (too long, no permission) does not exist for us."""
    try:
        return path.exists()
    except OSError:
        return False
