"""The errors that a user can cause or meet.

    EvoMergeError                exit code 1: the work failed
    ├── CandidateError           one candidate could not be scored; recorded, never ends a run
    ├── OutputError              writing failed (disk full, no permission); nothing half-written is left
    └── BadInput                 exit code 2: something given to us is wrong
        ├── CheckpointError      a model: not found, truncated, corrupt, missing tensors, wrong shapes
        ├── RecipeError          a recipe: unknown key, impossible merge
        ├── SpecError            a search.yaml: unknown key, value out of range
        ├── TaskError            a benchmark: unknown task or metric, no data, empty split
        ├── RunError             a run folder: another spec's, held by another process, missing
        └── ServiceError         a server: not to be reached, or what may be spent on it is spent; a run can go on later

The command line catches these and nothing else: a bug keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


class EvoMergeError(Exception):
    """Base of every error that EvoMerge raises on purpose."""

    exit_code = 1


class CandidateError(EvoMergeError):
    """A candidate has no score: its logits are not finite, or it could not be materialised."""


class OutputError(EvoMergeError):
    """Writing failed; what was there before is intact."""


class BadInput(EvoMergeError):
    """Something given to us is wrong.

    Args:
        problems: One message, or all that were found. Each names the file and key, states the rule and the
            value got, and says what to do.
    """

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(BadInput):
    """A model that cannot be read, or that does not fit the others."""


class RecipeError(BadInput):
    """A recipe that means nothing, or that cannot be carried out."""


class SpecError(BadInput):
    """A search.yaml that means nothing."""


class TaskError(BadInput):
    """A benchmark that cannot be used."""


class RunError(BadInput):
    """A run folder that cannot be used."""


class ServiceError(BadInput):
    """A server that scores need cannot be asked, or may not be asked any more."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the nearest known name, or ``""`` when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


@dataclass
class ErrorCollector:
    """Collects every problem of an input, so that one error tells them all.

    As a context manager it also carries out steps (`attempt`) and raises what was wrong with any of them at the end of
    the block.

    Attributes:
        where: The file, or what else the input is called in messages.
        problems: Messages for errors.
        warnings: Messages for what is possible but probably not meant.
    """

    where: str = ""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _raised: list[BadInput] = field(default_factory=list)

    def error(self, path: str, text: str) -> None:
        """Records an error at a path such as ``slices[0].sources[1].model``."""
        self.problems.append(self._message(path, text))

    def warn(self, path: str, text: str) -> None:
        """Records a warning."""
        self.warnings.append(self._message(path, text))

    def attempt(self, step: Callable[..., Any], *needs: Any) -> Any:
        """Returns what a step returns; None when it fails, or when something that it needs is None."""
        if any(need is None for need in needs):
            return None
        try:
            return step(*needs)
        except BadInput as error:
            self._raised.append(error)
            return None

    def raise_problems(self, kind: type[BadInput]) -> None:
        """Raises an error of a kind with the problems, each once; nothing where there are none."""
        if self.problems:
            raise kind(dict.fromkeys(self.problems))

    def __enter__(self) -> ErrorCollector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and len(self._raised) == 1:
            raise self._raised[0]
        if kind is None and self._raised:
            raise BadInput([problem for each in self._raised for problem in each.problems])

    def _message(self, path: str, text: str) -> str:
        return ": ".join(part for part in (self.where, path, text) if part)


def is_number(value: object) -> bool:
    """Returns whether a value is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def show(value: Any) -> str:
    """Shows a value as a message does, on one short line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def describe(value: Any) -> str:
    """Says what a value is, in YAML's words: "the text 'x'", "a list", "nothing"."""
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
