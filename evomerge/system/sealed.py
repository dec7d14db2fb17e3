"""The small files of a run: each with a checksum, and read in one way that names the file, the line and what to do.

A checksum finds what a disk, a crash or a slip of an editor has changed. It is no signature: whoever can write the
folder can write a checksum too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from evomerge.errors import BadInput, RunError
from evomerge.system.files import read_text, write_atomic
from evomerge.system.hashing import digest

T = TypeVar("T")

_KEY = "checksum"
_LAST_LINE = re.compile(r"# checksum: ([0-9a-f]{32})\n\Z")


class Damaged(RunError):
    """A file of a run that is not what was written: it cannot be read at all, or it was changed since."""

    def __init__(self, problem: str, *, edited: bool = False) -> None:
        super().__init__(problem)
        self.edited = edited


def edited(path: Path, advice: str, where: str = "", *, sealed: bool = True) -> Damaged:
    """Makes the error for a file whose content is well-formed but not what was written.

    Args:
        path: The file.
        advice: What to do where it is of no use.
        where: The line, where known.
        sealed: Whether there is a checksum at all.
    """
    how = "was changed after it was written, by hand or by a fault of the disk (its checksum differs)"
    missing = "has no checksum: cut off, edited, or written by an older version"
    return Damaged(
        f"{path}{where}: {how if sealed else missing}: `evomerge run` and `resume` with --accept-edited take it as it "
        f"is; {advice}",
        edited=True,
    )


def seal_json(content: Mapping[str, Any]) -> str:
    """Writes a JSON object with a checksum of what else is in it."""
    plain = json.loads(json.dumps(content))
    return json.dumps({**plain, _KEY: _checksum(plain)}, indent=2) + "\n"


def seal_lines(text: str) -> str:
    """Adds a last line with the checksum of those before it, as a comment."""
    text = text if text.endswith("\n") else f"{text}\n"
    return f"{text}# {_KEY}: {digest(text)}\n"


def read_sealed_json(path: Path, convert: Callable[[Any], T], advice: str) -> T:
    """Reads what `seal_json` wrote.

    Args:
        path: The file.
        convert: Makes a typed value of the content, or raises.
        advice: What to do where the file is of no use.

    Raises:
        Damaged: It cannot be read, is of another type, or was changed.
    """
    text = _text(path, advice)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise Damaged(f"{path}{line}: is damaged ({error}): {advice}") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path}: is damaged (no JSON object): {advice}")
    seal = content.pop(_KEY, None)
    try:
        value = convert(content)
    except BadInput:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Damaged(f"{path}: is damaged ({type(error).__name__}: {reason}): {advice}") from None
    if seal != _checksum(content):
        raise edited(path, advice, sealed=seal is not None)
    return value


def read_sealed_lines(path: Path, advice: str) -> str:
    """Reads what `seal_lines` wrote, without the checksum.

    Raises:
        Damaged: It cannot be read, or was changed.
    """
    text = _text(path, advice)
    match = _LAST_LINE.search(text)
    if match is None:
        raise edited(path, advice, sealed=False) if text.strip() else Damaged(f"{path}: is damaged (empty): {advice}")
    if digest(text[: match.start()]) != match[1]:
        raise edited(path, advice)
    return text[: match.start()]


def accept_json(path: Path) -> None:
    """Gives a JSON object the checksum of what is in it now; leaves alone what is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(content, dict):
        write_atomic(path, seal_json({key: value for key, value in content.items() if key != _KEY}))


def accept_lines(path: Path) -> None:
    """Gives a text the checksum of what is in it now."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith(f"# {_KEY}")]
    write_atomic(path, seal_lines("".join(lines)), private=path.stat().st_mode & 0o077 == 0)


def _text(path: Path, advice: str) -> str:
    try:
        return read_text(path, RunError)
    except RunError as error:
        raise Damaged(f"{error}: {advice}") from None


def _checksum(content: Mapping[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True, separators=(",", ":")))
