"""Reading typed values out of plain YAML data, collecting every problem instead of stopping at the first."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evomerge.errors import suggest
from evomerge.recipe.settings import is_number


@dataclass
class Findings:
    """What is wrong, and what is odd, with the recipe being read.

    Attributes:
        where: The file, or what else the recipe is called in messages.
        problems: Messages for errors.
        warnings: Messages for what is possible but probably not meant.
    """

    where: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def error(self, path: str, text: str) -> None:
        """Records an error at a place such as ``slices[0].sources[1].model``."""
        self.problems.append(self._message(path, text))

    def warn(self, path: str, text: str) -> None:
        """Records a warning."""
        self.warnings.append(self._message(path, text))

    def _message(self, path: str, text: str) -> str:
        return f"{self.where}: {path}: {text}" if path else f"{self.where}: {text}"


def join(path: str, key: str) -> str:
    """The path of a key inside the mapping at `path`."""
    return f"{path}.{key}" if path else key


def show(value: Any) -> str:
    """A value as a message shows it, on one short line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(value: Any) -> str:
    """What a value is, in YAML's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if is_number(value):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {show(value)}"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"{type(value).__name__} {show(value)}"


def mapping_at(found: Findings, path: str, value: Any, known: Iterable[str]) -> dict[str, Any]:
    """The mapping at a path without its empty entries; reports anything else, and keys that are not known."""
    if not isinstance(value, Mapping):
        found.error(path, f"expected a mapping, got {kind_of(value)}")
        return {}
    names = tuple(known)
    for key in value:
        if key not in names:
            found.error(
                join(path, str(key)), f"unknown key{suggest(str(key), names) or ': known are ' + ', '.join(names)}"
            )
    return {key: entry for key, entry in value.items() if key in names and entry is not None}


def list_at(found: Findings, path: str, value: Any) -> list[Any]:
    """The list at a path, which has to have entries."""
    if not isinstance(value, list | tuple):
        found.error(path, f"expected a list, got {kind_of(value)}")
        return []
    if not value:
        found.error(path, "is empty: give at least one entry")
    return list(value)


def text_at(found: Findings, path: str, value: Any) -> str | None:
    """The text at a path, which must not be empty."""
    if not isinstance(value, str):
        found.error(path, f"expected text, got {kind_of(value)}")
        return None
    if not value.strip():
        found.error(path, "is empty text")
        return None
    return value


def number_at(found: Findings, path: str, value: Any) -> float | int | None:
    """The finite number at a path."""
    if not is_number(value):
        hint = ": remove the quotes" if isinstance(value, str) and _is_numeric(value) else ""
        found.error(path, f"expected a number, got {kind_of(value)}{hint}")
        return None
    if not abs(value) <= sys.float_info.max:
        found.error(path, f"expected a finite number, got {value}")
        return None
    number: float | int = value
    return number


def integer_at(found: Findings, path: str, value: Any, low: int) -> int | None:
    """The whole number at a path, at least `low`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        found.error(path, f"expected a whole number, got {kind_of(value)}")
        return None
    if value < low:
        found.error(path, f"must be at least {low}, got {value}")
        return None
    return value


def choice_at(found: Findings, path: str, value: Any, choices: tuple[str, ...]) -> str | None:
    """One of a few words."""
    if not isinstance(value, str):
        found.error(path, f"expected one of {', '.join(choices)}, got {kind_of(value)}")
        return None
    if value not in choices:
        hint = suggest(value, choices)
        found.error(path, f"expected one of {', '.join(choices)}, got '{value}'{hint}")
        return None
    return value


def _is_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
