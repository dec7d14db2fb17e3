"""Knows every task, group and tag that lm-eval ships, without parsing its 14,000 files each time.

lm-eval finds names by parsing all its YAML. Here the few lines that name things are read instead, by the rules of
lm-eval's own index, once for an installation; what is needed is then handed to `TaskManager`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.system.files import cache_folder, write_atomic
from evomerge.system.hashing import digest

Index = Mapping[str, tuple[str, str | None, tuple[str, ...]]]
"""Name to (kind, YAML file under lm-eval's folder of tasks, the tasks that have it as a tag)."""

_NAMING = re.compile(r"""(?m)^["']?(task|group|tag|include|class)["']?[ \t]*:[ \t]*(.*)$""")
_PLAIN = re.compile(r"(['\"]?)([A-Za-z0-9_][\w.+/-]*)\1[ \t]*(?:[ \t]#.*)?$")
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}


def shipped_folder() -> Path:
    """Returns the folder of lm-eval's own tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


@functools.cache
def shipped_index() -> Index:
    """Returns every name that lm-eval ships; read from its files once for a version, and kept in the user's cache."""
    root, version = shipped_folder(), importlib.metadata.version("lm_eval")
    path = cache_folder("tasks") / f"{digest(f'2 {version} {root}')[:16]}.json"
    if (kept := _kept(path)) is not None:
        return kept
    names = _read_names(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(names))
    return _index(names)


def _kept(path: Path) -> Index | None:
    """The index that was kept; None where there is none, or it is damaged."""
    try:
        return _index(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _index(names: Mapping[str, Any]) -> Index:
    return {name: (kind, file, tuple(tasks)) for name, (kind, file, tasks) in names.items()}


def add_shipped(names: Iterable[str], index: dict[str, Any]) -> None:
    """Adds to a `TaskManager`'s index what some names stand for, and all that these hold; what is there stays.

    Args:
        names: Tasks, groups and tags.
        index: lm-eval's index, with what include paths have.
    """
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in index and (entry := _shipped_entry(name)) is not None:
            index[name] = entry
        if name in index:
            waiting += _members(index[name])


def _shipped_entry(name: str) -> Any:
    """lm-eval's own entry of a name; None for one that is not shipped."""
    from lm_eval.tasks._index import Entry, Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    if name not in shipped_index():
        return None
    kind, file, tasks = shipped_index()[name]
    path = shipped_folder() / file if file is not None else None
    config = load_yaml(path, resolve_func=False) if path is not None else None
    return Entry(name=name, kind=Kind[kind], yaml_path=path, cfg=config, tags=set(tasks))


def _members(entry: Any) -> list[str]:
    """The names that a group or a tag stands for, those of groups defined inside it too."""
    return sorted(entry.tags) if entry.kind.name == "TAG" else _listed((entry.cfg or {}).get("task"))


def _listed(members: Any) -> list[str]:
    names: list[str] = []
    for member in members if isinstance(members, list) else []:
        given = member if isinstance(member, dict) else {"task": member}
        names += [name for key in ("group", "task") if isinstance(name := given.get(key), str)]
        names += _listed(given.get("task"))
    return names


def _read_names(root: Path) -> dict[str, tuple[str, str | None, list[str]]]:
    """Every name, as lm-eval's `TaskIndex.process_cfg` registers them file by file."""
    read = functools.cache(_naming)
    names: dict[str, tuple[str, str | None, list[str]]] = {}
    paths = (path for path in root.rglob("*.yaml") if not _IGNORED & set(path.parts))
    for path in sorted(paths, key=lambda path: path.as_posix()):
        config = _with_includes(path, read, ())
        kind = next((kind for kind in ("class", "group", "task") if kind in config), None)
        name = config.get("group" if kind == "group" else "task")
        if not isinstance(name, str) or name in names:
            continue
        names[name] = ({"class": "PY_TASK"}.get(str(kind), str(kind).upper()), str(path.relative_to(root)), [])
        tags = config.get("tag") if kind != "group" else None
        for tag in [tags] if isinstance(tags, str) else tags or []:
            names.setdefault(tag, ("TAG", None, []))[2].append(name)
    return names


def _with_includes(path: Path, read: Any, above: tuple[Path, ...]) -> dict[str, Any]:
    """What names things in a file and in the files it includes, where its own keys win; {} for one that is broken."""
    config = read(path)
    merged: dict[str, Any] = {}
    for include in [given] if isinstance(given := config.get("include"), str) else given or []:
        included = (path.parent / include).resolve()
        if included in above or not included.is_file():
            return {}
        merged |= _with_includes(included, read, (*above, path))
    return {**merged, **{key: value for key, value in config.items() if key != "include"}}


def _naming(path: Path) -> dict[str, Any]:
    """The keys of a file that name things. Where they are more than plain words, the file is parsed."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = {}
    lines = _NAMING.findall(path.read_text(encoding="utf-8"))
    keys = {key for key, _ in lines}
    for key, text in lines:
        plain = _PLAIN.match(text)
        if plain is not None:
            config[key] = plain[2]
        elif key == "class" or (key == "task" and "group" in keys):  # what it is does not matter to the name
            config[key] = None
        else:
            try:
                whole = load_yaml(path, resolve_func=False, recursive=False)
            except Exception:  # lm-eval passes over files that cannot be read, too
                return {}
            return {key: whole[key] for key in keys if key in whole}
    return config
