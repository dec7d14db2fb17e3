"""Scorers in Python of the user's: a function ``score(model, items)``, or a class that has such a method."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from evomerge.errors import TaskError, describe, suggest
from evomerge.evaluation.tasks.scorer_task import Item, LiveModel, Pair, ScorerTask, brief
from evomerge.evaluation.tasks.task_data import no_rows
from evomerge.system.files import read_text
from evomerge.system.hashing import digest

AGGREGATES = ("mean", "ratio")


@dataclass(frozen=True)
class PythonScorer:
    """A scorer in Python.

    Attributes:
        metric: The name of the function or class.
        function: Takes a model and items.
        higher_is_better: As its `higher_is_better` says; True unless it says otherwise.
        ratio: Whether its `aggregate` is "ratio".
        digest: Identity of its source, its declared version and its options.
        python_files: The file that it is in.
        data: The file of the items, if there is one.
    """

    metric: str
    function: Any
    higher_is_better: bool
    ratio: bool
    digest: str
    python_files: tuple[Path, ...]
    data: Path | None = None
    kind = "python"
    references: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    noise = 0.0

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of code and data."""
        return (*self.python_files, *(() if self.data is None else (self.data,)))

    def read(self, name: str, model: LiveModel, items: Sequence[Item]) -> None:
        """Reads nothing: it compares with no other model."""

    def score(self, model: LiveModel, items: Sequence[Item]) -> Sequence[float] | Sequence[Pair]:
        """Returns what the function gives."""
        given: Sequence[float] = self.function(model, items)
        return given


def python_task(name: str, reference: str, data: str | None, options: Mapping[str, Any]) -> ScorerTask:
    """Loads a scorer and its items.

    Args:
        name: What it is called as a task.
        reference: "FILE.py:NAME" or "PACKAGE.MODULE:NAME".
        data: A file of JSON lines, or of a list; None where the class has `items()`.
        options: What the function, or the class, is called with beside.

    Raises:
        TaskError: It cannot be loaded or called, or there are no items.
    """
    where = f"task {name!r}: {reference}"
    file, _, attribute = reference.rpartition(":")
    module = _module(file, where)
    scorer = _attribute(module, attribute, where)
    function, owner = _callable(scorer, options, where)
    aggregate = getattr(owner, "aggregate", "mean")
    if aggregate not in AGGREGATES:
        raise TaskError(f"{where}: aggregate is {describe(aggregate)}; it is one of {', '.join(AGGREGATES)}")
    path = None if data is None else Path(data)
    own_items = getattr(owner, "items", None)
    if (path is None) == (own_items is None):
        raise TaskError(
            f"{where}: it has no items; say data: FILE.jsonl, or give the class a method items()"
            if path is None
            else f"{where}: it has items() of its own, so data: {data} would not be read; leave one of the two out"
        )
    rows = _rows(own_items, where) if path is None else read_rows(path, f"task {name!r}")
    source = inspect.getsourcefile(module)
    python_files = () if source is None else (Path(source),)
    version = str(getattr(owner, "version", ""))
    identity = [path.read_bytes() for path in python_files]
    settings = json.dumps(options, sort_keys=True, default=str)
    return ScorerTask(
        name,
        None,
        scorer=PythonScorer(
            metric=attribute.rpartition(".")[2],
            function=function,
            higher_is_better=bool(getattr(owner, "higher_is_better", True)),
            ratio=aggregate == "ratio",
            digest=digest(*identity, attribute, version, settings),
            python_files=python_files,
            data=path,
        ),
        rows=rows,
    )


def read_rows(path: Path, where: str) -> tuple[Item, ...]:
    """Reads items: JSON lines, or a list in a .json file; every one a mapping.

    Raises:
        TaskError: The file cannot be read, or holds anything else, or nothing.
    """
    if problems := no_rows(path):
        raise TaskError([f"{where}: {problem}" for problem in problems])
    text = read_text(path, TaskError)
    try:
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(k) for k in text.split("\n") if k.strip()]
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: {path} holds no items: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise TaskError(f"{where}: {path} holds no items: JSON objects, one a line, are expected")
    return tuple(rows)


def _module(file: str, where: str) -> ModuleType:
    """Imports what a scorer is in; a file's own folder is where it may import from, after all others."""
    try:
        if not file.endswith(".py"):
            return importlib.import_module(file)
        path = Path(file)
        if not path.is_file():
            raise TaskError(f"{where}: there is no file {file}")
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        name = f"evomerge_scorer_{digest(str(path))[:16]}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # the name ends in .py
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses and pickle look for it
        spec.loader.exec_module(module)
        return module
    except TaskError:
        raise
    except (Exception, SystemExit) as error:  # the user's code can raise anything
        raise TaskError(f"{where}: cannot be imported: {brief(error)}") from error


def _attribute(module: ModuleType, attribute: str, where: str) -> Any:
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = [name for name in vars(value) if not name.startswith("_")]
            raise TaskError(f"{where}: there is no {part!r} in it{suggest(part, names)}")
        value = getattr(value, part)
    return value


def _callable(scorer: Any, options: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    """What scores, the function or the method of an instance that the options make; and what says the rest of it."""
    function = owner = scorer
    if inspect.isclass(scorer):
        _require(scorer, (), options, where, f"{scorer.__name__}({', '.join(options)})")
        try:
            owner = scorer(**options)
        except Exception as error:  # the user's code can raise anything
            raise TaskError(f"{where}: cannot be made: {brief(error)}") from error
        function = getattr(owner, "score", None)
        if not callable(function):
            raise TaskError(f"{where}: the class has no method score(model, items)")
        options = {}
    if not callable(function):
        raise TaskError(f"{where}: it is {describe(function)}, neither a function nor a class")
    _require(function, (None, ()), options, where, f"score({', '.join(['model', 'items', *options])})")
    return (partial(function, **options) if options else function), owner


def _require(function: Any, arguments: Sequence[Any], options: Mapping[str, Any], where: str, call: str) -> None:
    """Refuses what cannot be called so."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled code need not say
        return
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        raise TaskError(f"{where}: takes {signature}, and is called as {call}: {error}") from None


def _rows(items: Any, where: str) -> tuple[Item, ...]:
    """What a class has for items."""
    try:
        rows = list(items())
    except Exception as error:  # the user's code can raise anything
        raise TaskError(f"{where}: items() raised {brief(error)}") from error
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise TaskError(f"{where}: items() gives no items: a list of mappings is expected")
    return tuple(rows)
