"""Finds the local data files of tasks, and says so to lm-eval's `TaskManager` by groups of our own.

Relative paths are looked for beside the task's YAML file, beside the folders above it, then from the working directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.system.files import MOST_TEXT

_INNER, _OUTER = " with data", " as asked for"
"""What marks the names of groups that we hand to lm-eval in place of registered ones."""

_DEFINING = {"dataset_path", "custom_dataset", "class", "include"}
"""What makes a member of a group a task that is defined there, and no mere name."""

Spec = dict[str, Any]
"""A member of a group as lm-eval reads it."""


@dataclass(frozen=True)
class SingleTask:
    """One task of what a name stands for.

    Attributes:
        name: The task's name.
        config: Its settings as far as YAML says them, functions unresolved.
        load: What `TaskManager.load` should get for it.
        problems: What is wrong with its data files.
    """

    name: str
    config: Mapping[str, Any]
    load: str | Spec
    problems: tuple[str, ...]


def single_specs(name: str, index: Mapping[str, Any]) -> list[SingleTask]:
    """Lists the tasks of a task, group or tag, each within the groups that hold it, with local data files absolute.

    lm-eval would look for data from the working directory alone. Only a group's members may override a task's settings
    and keep its functions, and a registered group hands everything it says about itself on to its members: so a group
    of ours holds groups that are not registered.

    Args:
        name: A task, group or tag of the index.
        index: lm-eval's index of tasks.
    """
    singles = []
    for member in _members(name, index):
        for chain in _chains(member):
            task = chain[-1]
            problems: list[str] = []
            key = str(task["task"])
            entry = index.get(key)
            config = {**((entry.cfg or {}) if entry is not None else {}), **task}
            if entry is None and not config.keys() & _DEFINING:
                problems.append("neither shipped nor in include_path")
            kwargs = config.get("dataset_kwargs")
            if isinstance(kwargs, dict):
                absolute = _absolute(kwargs, entry.yaml_path if entry is not None else None, problems)
                task = {**task, **({} if absolute == kwargs else {"dataset_kwargs": absolute})}
            for group in reversed(chain[:-1]):
                task = {**group, "task": [task]}
            alone = task == {"task": name}
            load: str | Spec = name if alone else {"group": f"{name}{_OUTER}", "task": [task]}
            singles.append(SingleTask(key, config, load, tuple(problems)))
    return singles


def _chains(member: Spec) -> Iterator[list[Spec]]:
    """Each task of a member behind the groups that hold it."""
    if isinstance(member["task"], list):
        yield from ([member, *chain] for inner in member["task"] for chain in _chains(inner))
    else:
        yield [member]


def _members(name: Any, index: Mapping[str, Any]) -> list[Spec]:
    """A member of a group as lm-eval reads it; a tag is all of its tasks."""
    given = name if isinstance(name, dict) else {}
    key = given.get("group", given.get("task")) if given else name
    entry = index.get(key) if isinstance(key, str) else None
    if entry is None:  # defined where it is listed, or unknown, which lm-eval says
        if "group" not in given:
            return [given or {"task": name}]
        listed = [part for member in given.get("task") or [] for part in _members(member, index)]
        return [{**given, "task": listed}]
    config = entry.cfg or {}
    if entry.kind.name == "TAG":
        return [part for task in sorted(entry.tags) for part in _members({**given, "task": task}, index)]
    if entry.kind.name == "GROUP":
        listed = [part for member in config.get("task") or [] for part in _members(member, index)]
        return [{**config, **given, "group": f"{key}{_INNER}", "task": listed}]
    return [{**given, "task": key}]


def merge_groups(groups: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds groups that lm-eval made of single tasks to those that it made before, children to children."""
    for name, group in more.items():
        if name not in groups:
            groups[name] = group
            continue
        for child in group:
            if groups[name].get(child.task_name if hasattr(child, "task_name") else child.name) is None:
                groups[name].add(child)


def plain_groups(groups: Mapping[str, Any]) -> list[Any]:
    """Returns the groups that lm-eval made but for ours, by the names they have without us, inner ones first."""
    kept = [group for name, group in groups.items() if not name.endswith(_OUTER)]
    for group in kept:
        group.name = plain_name(group.name)
    return sorted(kept, key=lambda group: len(group.get_all_groups()))


def plain_name(text: str) -> str:
    """Takes our marks out of a name, or a message: a registered group is called as it is, one inside as lm-eval does.

    "G as asked for::G with data::sub" is G::sub, and "G as asked for::G with data::H with data" is H.
    """
    text = re.sub(rf"[^'\"]*{_OUTER}::", "", text)
    text = re.sub(rf"[^'\"]*{_INNER}::(?=[^'\"]*{_INNER})", "", text)
    return text.replace(_INNER, "").replace(_OUTER, "")


def _absolute(kwargs: dict[str, Any], yaml_path: Path | None, problems: list[str]) -> dict[str, Any]:
    """`dataset_kwargs` with the paths in `data_files` and `data_dir` found and made absolute."""

    def find(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: find(part) for key, part in value.items()}
        if isinstance(value, list):
            return [find(part) for part in value]
        return _find_data(str(value), yaml_path, problems)

    return {key: find(value) if key in ("data_files", "data_dir") else value for key, value in kwargs.items()}


def is_path(name: str) -> bool:
    """Checks whether a name of tasks is a YAML file's, a pattern of such files, or a folder's."""
    return name.endswith((".yaml", ".yml")) or Path(name).expanduser().is_dir()


def _find_data(text: str, yaml_path: Path | None, problems: list[str]) -> str:
    """A local data file: beside the YAML file, beside the folders above it, then from the working directory."""
    if "://" in text:
        return text
    path = Path(text).expanduser()
    fixed = Path(*_before_wildcard(path))
    tried = []
    for folder in _search_folders(yaml_path):
        candidate = fixed if path.is_absolute() else folder / fixed
        if candidate.exists():
            problems += no_rows(candidate) if fixed == path else []
            return str(candidate.resolve() / path.relative_to(fixed)) if fixed != path else str(candidate.resolve())
        tried.append(str(candidate))
    problems.append(f"no data file {text}; looked for {', '.join(dict.fromkeys(tried))}")
    return text


def no_rows(path: Path) -> list[str]:
    """Says why a data file holds no rows: of JSON, where the reader of datasets crashes on what is no table."""
    if path.is_dir():
        return []
    if not path.is_file():
        return [f"{path} is not an ordinary file"]
    if path.suffix not in (".json", ".jsonl", ".ndjson") or path.stat().st_size > MOST_TEXT:
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip() and not _is_row(line):
                return [f"{path}, line {number}: is no JSON object"]
        return []
    rows = whole if isinstance(whole, list) else [whole]
    return [] if all(isinstance(row, dict) for row in rows) else [f"{path}: is no JSON object, nor a list of such"]


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _before_wildcard(path: Path) -> Iterator[str]:
    for part in path.parts:
        if any(sign in part for sign in "*?["):
            return
        yield part


def _search_folders(yaml_path: Path | None) -> list[Path]:
    above = list(yaml_path.resolve().parents) if yaml_path is not None else []
    return [*above, Path.cwd()]
