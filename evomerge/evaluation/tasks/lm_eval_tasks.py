"""Loads lm-eval tasks by name: shipped ones, and those of any include path, with their data files found.

Only lm-eval's public classes are used: `TaskManager` finds and builds the tasks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError, suggest
from evomerge.evaluation.scores import Score, ScoreTable
from evomerge.evaluation.tasks.task import FEWSHOT_SEED, Task
from evomerge.evaluation.tasks.task_data import plain_names, with_data
from evomerge.system.quiet import quiet, seeded


@dataclass(frozen=True)
class TaskSet:
    """What some names of tasks, groups and tags stand for.

    Attributes:
        tasks: Task name to task, in the order of the names.
        members: Each name to the names of its tasks.
        groups: lm-eval's own groups among the names and in them, inner ones before those that hold them.
        problems: What is wrong with the names that are missing in `members`.
    """

    tasks: Mapping[str, Task]
    members: Mapping[str, tuple[str, ...]]
    groups: tuple[Any, ...]
    problems: tuple[str, ...]


def load_tasks(names: Sequence[str], **options: Any) -> dict[str, Task]:
    """Loads tasks; groups and tags stand for the tasks in them.

    Args:
        names: Tasks, groups or tags.
        options: As for `find_tasks`.

    Returns:
        Task name to task, in the order of `names`.

    Raises:
        TaskError: Whatever is wrong with any of the names, all at once.
    """
    task_set = find_tasks(names, **options)
    if task_set.problems:
        raise TaskError(task_set.problems)
    return dict(task_set.tasks)


def find_tasks(
    names: Sequence[str],
    *,
    include_path: str | Path | Sequence[str | Path] | None = None,
    num_fewshot: int | Mapping[str, int | None] | None = None,
    fewshot_seed: int = FEWSHOT_SEED,
) -> TaskSet:
    """Loads what can be loaded, and says what is wrong with the rest.

    Problems are unknown names (with the nearest known ones), data that is missing or cannot be fetched, empty splits,
    and tasks that need images, sound or to run generated code.

    Args:
        names: Tasks, groups or tags.
        include_path: Folders with task YAML; they win over the shipped tasks.
        num_fewshot: Examples before each question, for all tasks or by the name given in `names`; None leaves it to
            the task. As in lm-eval, a task that says 0 stays at 0.
        fewshot_seed: Draws the examples.

    Raises:
        TaskError: No names, or an include path that is no folder.
    """
    paths = [include_path] if isinstance(include_path, str | Path) else list(include_path or [])
    folders = [Path(path).expanduser().resolve() for path in paths]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise TaskError([f"include_path: no folder {folder}" for folder in missing])
    if not names:
        raise TaskError("no tasks are asked for")
    loaded: dict[str, Task] = {}
    members: dict[str, tuple[str, ...]] = {}
    groups: dict[str, Any] = {}
    problems: list[str] = []
    manager = _manager(names, folders)
    for name in dict.fromkeys(names):
        shots = num_fewshot.get(name) if isinstance(num_fewshot, Mapping) else num_fewshot
        try:
            tasks, inner = _load(name, manager)
            for task in tasks:
                _configure(task, shots, fewshot_seed)
        except TaskError as error:
            problems += error.problems
            continue
        loaded |= {task.task_name: Task(task.task_name, task, fewshot_seed) for task in tasks}
        members[name] = tuple(task.task_name for task in tasks)
        groups |= {group.name: group for group in inner}
    return TaskSet(loaded, members, tuple(groups.values()), tuple(problems))


def group_scores(task_set: TaskSet, table: ScoreTable) -> dict[str, dict[str, Score]]:
    """Aggregates the tasks' scores by every group that states metrics, with lm-eval's own code.

    Args:
        task_set: The groups and the tasks in them.
        table: The tasks' scores.

    Returns:
        ``{group: {metric: Score}}``; `n` counts the items of the tasks that have the metric.
    """
    results = {name: _to_lm_eval(task_set.tasks[name], row) for name, row in table.items()}
    scores: dict[str, dict[str, Score]] = {}
    for group in task_set.groups:
        if not group.has_aggregation:
            continue
        with quiet():
            whole = group.aggregate(results)
        counts = whole.get("sample_count", {})
        if counts:
            scores[group.name] = _from_lm_eval(whole, counts)
    return scores


def _manager(names: Sequence[str], folders: Sequence[Path]) -> Any:
    """An index of tasks that holds every name that exists: the small one of the include paths if it can be.

    Indexing all that lm-eval ships parses some 15,000 files; the folders in which a name occurs are nearly always
    enough.
    """
    from lm_eval.tasks import TaskManager

    own = [str(folder) for folder in folders]
    with quiet():
        manager = TaskManager(include_path=own, include_defaults=False)
        others = [name for name in names if name not in manager.task_index]
        if not others and _complete(names, manager.task_index):
            return manager
        near = _shipped_folders(others)
        if others and not near and _complete([name for name in names if name not in others], manager.task_index):
            return manager
        manager = TaskManager(include_path=[*near, *own], include_defaults=False)
        if _complete([name for name in names if name in manager.task_index], manager.task_index):
            return manager
        return TaskManager(include_path=own)


def _complete(names: Sequence[str], index: Mapping[str, Any]) -> bool:
    """Whether an index holds these names and, of groups and tags among them, all the members."""
    for name in names:
        if name not in index:
            return False
        members = index[name].cfg.get("task") if index[name].kind.name == "GROUP" else []
        if not _complete([member for member in members or [] if isinstance(member, str)], index):
            return False
    return True


def _shipped_folders(names: Sequence[str]) -> list[str]:
    """The folders of lm-eval's shipped tasks in whose YAML one of the names occurs as the name of anything."""
    if not names:
        return []
    either = b"|".join(re.escape(name).encode() for name in names)
    pattern = re.compile(rb"(?m)^\s*(?:task|group|tag|-):?\s+[\"']?(?:%s)[\"']?\s*(?:#.*)?$" % either)
    root = _shipped()
    folders = set()
    for path in root.rglob("*.yaml"):
        top = path.relative_to(root).parts[0]
        if top not in folders and pattern.search(path.read_bytes()):
            folders.add(top)
    return sorted(str(root / top) for top in folders)


@cache
def _shipped_names() -> frozenset[str]:
    """The names that the YAML of lm-eval's shipped tasks gives to tasks, groups and tags."""
    pattern = re.compile(r"(?m)^(?:task|group|tag):\s+[\"']?([\w.-]+)")
    texts = (path.read_text(encoding="utf-8") for path in _shipped().rglob("*.yaml"))
    return frozenset(name for text in texts for name in pattern.findall(text))


def _shipped() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _load(name: str, manager: Any) -> tuple[list[Any], list[Any]]:
    """The lm-eval tasks that `name` stands for, and the groups among them, inner ones first."""
    if name not in manager.task_index:
        names = {*manager.all_tasks, *_shipped_names()}
        raise TaskError(f"unknown task {name!r}{suggest(name, sorted(names))}; neither shipped nor in include_path")
    problems: list[str] = []
    spec = with_data(name, manager.task_index, problems)
    if problems:
        raise TaskError([f"task {name!r}: {problem}" for problem in problems])
    try:
        with quiet(), seeded():
            loaded = manager.load([spec])
    except Exception as error:  # a task's YAML can make lm-eval and datasets raise anything
        raise TaskError(f"task {name!r} cannot be loaded: {_reason(error, manager.task_index[name])}") from error
    return list(loaded["tasks"].values()), plain_names(loaded["groups"])


_EMPTY_SPLIT = ("size 0", "SchemaInferenceError", "no data files", "list index out of range")
"""In the messages of datasets for a file or a split without a document; a StopIteration says the same."""


def _reason(error: Exception, entry: Any) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    config = entry.cfg or {}
    data = (config.get("dataset_kwargs") or {}).get("data_files") or config.get("dataset_path")
    splits = [config.get(f"{kind}_split") for kind in ("test", "validation", "training", "fewshot")]
    if isinstance(error, KeyError) and error.args[0] in splits:
        return f"its data {data} have no split {error.args[0]!r}"
    causes = f"{error!r} {error.__cause__!r}"
    if isinstance(error, StopIteration) or any(sign in causes for sign in _EMPTY_SPLIT):
        return f"a split of its data {data} has no documents"
    offline = isinstance(error, ConnectionError | FileNotFoundError) or "offline" in text.lower()
    hint = f"; its dataset {data!r} is neither here nor in reach" if offline and data else ""
    return f"{type(error).__name__}: {text[:300]}{hint}"


def _configure(task: Any, num_fewshot: int | None, seed: int) -> None:
    """Refuses what cannot be scored here, and sets the examples as `lm_eval.simple_evaluate` does."""
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise TaskError(f"task {name!r} runs code that the model writes; EvoMerge does not")
    if getattr(task, "MULTIMODAL", False):
        raise TaskError(f"task {name!r} needs images or sound; EvoMerge scores text only")
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


def _to_lm_eval(task: Task, row: Mapping[str, Score]) -> dict[str, Any]:
    """A task's scores under lm-eval's keys, "metric,filter"."""
    first = task.filters[0]
    results: dict[str, Any] = {"sample_len": max((score.n for score in row.values()), default=0)}
    for name, score in row.items():
        metric, _, chosen = name.partition(",")
        results[f"{metric},{chosen or first}"] = score.value
        results[f"{metric}_stderr,{chosen or first}"] = "N/A" if score.stderr is None else score.stderr
    return results


def _from_lm_eval(whole: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Score]:
    """A group's scores by metric; by "metric,filter" where its tasks have several filters."""
    plain = [key.partition(",")[0] for key in counts]
    scores = {}
    for key, n in counts.items():
        metric, _, chosen = key.partition(",")
        error = whole[f"{metric}_stderr,{chosen}"]
        name = metric if plain.count(metric) == 1 else key
        scores[name] = Score(float(whole[key]), None if error == "N/A" else float(error), n)
    return scores
