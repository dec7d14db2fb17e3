"""Finds the local data files of tasks, and says so to lm-eval's `TaskManager` by groups of our own.

Relative paths are looked for beside the task's YAML file, beside the folders above it, then from the working directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_INNER, _OUTER = " with data", " as asked for"
"""What marks the names of groups that we hand to lm-eval in place of registered ones."""


def with_data(name: str, index: Mapping[str, Any], problems: list[str]) -> str | dict[str, Any]:
    """Returns what `TaskManager.load` should get for `name`: the name, or a group with local data files made absolute.

    lm-eval would look for them from the working directory alone. Only a group's members may override a task's settings
    and keep its functions, and a registered group hands everything it says about itself on to its members: so a group
    of ours holds groups that are not registered.

    Args:
        name: A task, group or tag of the index.
        index: lm-eval's index of tasks.
        problems: Gets a message for every file that is nowhere.
    """
    members = _members(name, index, problems)
    return {"group": f"{name}{_OUTER}", "task": members} if any(map(_has_local_data, members)) else name


def _has_local_data(member: Mapping[str, Any]) -> bool:
    """Whether a member's data, or those of any member of it, have to be said."""
    inner = member["task"]
    return "dataset_kwargs" in member or (isinstance(inner, list) and any(map(_has_local_data, inner)))


def _members(name: Any, index: Mapping[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """A member of a group as lm-eval reads it, with its data found; a tag is all of its tasks."""
    given = name if isinstance(name, dict) else {}
    key = given.get("group", given.get("task")) if given else name
    entry = index.get(key) if isinstance(key, str) else None
    if entry is None:  # defined where it is listed, or unknown, which lm-eval says
        if "group" not in given:
            return [given or {"task": name}]
        listed = [part for member in given.get("task") or [] for part in _members(member, index, problems)]
        return [{**given, "task": listed}]
    config = entry.cfg or {}
    if entry.kind.name == "TAG":
        return [part for task in sorted(entry.tags) for part in _members({**given, "task": task}, index, problems)]
    if entry.kind.name == "GROUP":
        listed = [part for member in config.get("task") or [] for part in _members(member, index, problems)]
        return [{**config, **given, "group": f"{key}{_INNER}", "task": listed}]
    kwargs = given.get("dataset_kwargs", config.get("dataset_kwargs"))
    absolute = _absolute(kwargs, entry.yaml_path, problems) if isinstance(kwargs, dict) else kwargs
    return [{**given, "task": key, **({} if absolute == kwargs else {"dataset_kwargs": absolute})}]


def plain_names(groups: Mapping[str, Any]) -> list[Any]:
    """Returns the registered groups among those that lm-eval made, by their own names, inner ones first."""
    kept = [group for name, group in groups.items() if not name.endswith(_OUTER)]
    for group in kept:
        if group.name.endswith(_INNER):
            group.name = group.name.rpartition("::")[2].removesuffix(_INNER)
    return sorted(kept, key=lambda group: len(group.get_all_groups()))


def _absolute(kwargs: dict[str, Any], yaml_path: Path | None, problems: list[str]) -> dict[str, Any]:
    """`dataset_kwargs` with the paths in `data_files` and `data_dir` found and made absolute."""

    def find(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: find(part) for key, part in value.items()}
        if isinstance(value, list):
            return [find(part) for part in value]
        return _find_data(str(value), yaml_path, problems)

    return {key: find(value) if key in ("data_files", "data_dir") else value for key, value in kwargs.items()}


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
            return str(candidate.resolve() / path.relative_to(fixed)) if fixed != path else str(candidate.resolve())
        tried.append(str(candidate))
    problems.append(f"no data file {text}; looked for {', '.join(dict.fromkeys(tried))}")
    return text


def _before_wildcard(path: Path) -> Iterator[str]:
    for part in path.parts:
        if any(sign in part for sign in "*?["):
            return
        yield part


def _search_folders(yaml_path: Path | None) -> list[Path]:
    above = list(yaml_path.resolve().parents) if yaml_path is not None else []
    return [*above, Path.cwd()]
