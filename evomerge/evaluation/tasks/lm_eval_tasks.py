"""Loads lm-eval tasks by name: shipped ones, and those of any include path, with their data files found.

`TaskManager` builds them; `shipped` tells it what it ships.
"""

from __future__ import annotations

import importlib.metadata
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError, suggest
from evomerge.evaluation.programs.pass_at_k import UNASKED, asks_for_programs, code_eval_here, contain
from evomerge.evaluation.scores import Score, ScoreTable
from evomerge.evaluation.tasks.group_task import GroupTask
from evomerge.evaluation.tasks.shipped import add_shipped, shipped_index
from evomerge.evaluation.tasks.strangers import refuse_pipes, sandbox_templates
from evomerge.evaluation.tasks.task import FEWSHOT_SEED, Task
from evomerge.evaluation.tasks.task_data import (
    SingleTask,
    is_path,
    merge_groups,
    plain_groups,
    plain_name,
    single_specs,
)
from evomerge.system.quiet import quiet, seeded


@dataclass(frozen=True)
class TaskSet:
    """What some names of tasks, groups and tags stand for.

    Attributes:
        tasks: Task name to task, in the order of the names.
        members: Each name to the names of its tasks.
        groups: lm-eval's own groups among the names and in them, inner ones before those that hold them; none that
            lacks a task.
        problems: What is wrong with the names that are missing in `members`.
        missing: What is wrong with single tasks of groups, tags and patterns of which others are there.
        twice: What was said of tasks that several names stand for; each is there once.
    """

    tasks: Mapping[str, Task]
    members: Mapping[str, tuple[str, ...]]
    groups: tuple[Any, ...]
    problems: tuple[str, ...]
    missing: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()


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
    if problems := (*task_set.problems, *task_set.missing):
        raise TaskError(problems)
    return dict(task_set.tasks)


def find_tasks(
    names: Sequence[str],
    *,
    include_path: str | Path | Sequence[str | Path] | None = None,
    num_fewshot: int | Mapping[str, int | None] | None = None,
    fewshot_seed: int = FEWSHOT_SEED,
    gen_kwargs: Mapping[str, Any] | None = None,
    unsafe_code: bool = False,
) -> TaskSet:
    """Loads what can be loaded, and says what is wrong with the rest.

    Problems are unknown names (with the nearest known ones), data that is missing or cannot be fetched, empty splits,
    and tasks that need images, sound or, where that is not asked for, to run generated code.

    Args:
        names: Tasks, groups or tags; patterns of such names; YAML files, or a folder of them.
        include_path: Folders with task YAML; they win over the shipped tasks.
        num_fewshot: Examples before each question, for all tasks or by the name given in `names`; None leaves it to
            the task. As in lm-eval, a task that says 0 stays at 0.
        fewshot_seed: Draws the examples.
        gen_kwargs: Settings of generation that replace those of the tasks.
        unsafe_code: Whether programs that models write may be run (`evaluation/programs`).

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
    lacking: list[str] = []
    twice: list[str] = []
    refuse_pipes(folders)
    sandbox_templates()
    manager = _manager(folders)
    load = partial(_load, manager=manager, unsafe_code=unsafe_code)
    for name in dict.fromkeys(names):
        shots = num_fewshot.get(name) if isinstance(num_fewshot, Mapping) else num_fewshot
        try:
            part = load(name, configure=partial(_configure, num_fewshot=shots, seed=fewshot_seed, options=gen_kwargs))
        except TaskError as error:
            problems += error.problems
            continue
        for task in part.tasks:
            if other := next((other for other, own in members.items() if task in own), None):
                twice.append(f"task {task!r} is both in {other!r} and in {name!r}; it is counted once")
        loaded |= {task: Task(task, given, fewshot_seed) for task, given in part.tasks.items() if task not in loaded}
        members[name] = tuple(part.tasks)
        groups |= {group.name: group for group in part.groups}
        lacking += part.missing
    return TaskSet(loaded, members, tuple(groups.values()), tuple(problems), tuple(lacking), tuple(twice))


def groups_as_tasks(task_set: TaskSet) -> TaskSet:
    """Replaces the tasks of every name that is a group with metrics of its own by one task: the group."""
    groups = {group.name: group for group in task_set.groups if group.has_aggregation}
    tasks: dict[str, Task] = {}
    members = dict(task_set.members)
    for name, own in task_set.members.items():
        group = groups.get(name)
        if group is None:
            tasks |= {task: task_set.tasks[task] for task in own}
            continue
        by_size = {part.metric: bool(part.weight_by_size) for part in group.aggregate_metric_list}
        tasks[name] = GroupTask(name, group, parts=tuple(task_set.tasks[task] for task in own), by_size=by_size)
        members[name] = (name,)
    return replace(task_set, tasks=tasks, members=members)


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


def _manager(folders: Sequence[Path]) -> Any:
    """lm-eval's index of the include paths; what it ships is added name by name."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


@dataclass(frozen=True)
class _Loaded:
    """The tasks of one name, lm-eval's groups among them, and what is wrong with tasks that are not there."""

    tasks: dict[str, Any]
    groups: list[Any]
    missing: list[str]


def _load(name: str, manager: Any, configure: Callable[[Any], None], *, unsafe_code: bool) -> _Loaded:
    """What a name, a pattern of names or a file stands for.

    Every task is loaded by itself, so that chance in how it prepares its documents is the same whatever else is
    loaded, and so that one that cannot be had does not hide the others.
    """
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    problems: list[str] = []
    for spec in [one for entry in _matches(name, manager) for one in single_specs(entry, manager.task_index)]:
        if len(problems) > _FEW and not tasks:
            problems.append(f"task {name!r}: the others are not tried")
            break
        try:
            loaded = _load_one(spec, manager, unsafe_code=unsafe_code)
            for task in loaded["tasks"].values():
                configure(task)
        except TaskError as error:
            problems += error.problems
            continue
        tasks |= {task.task_name: task for task in loaded["tasks"].values()}
        merge_groups(groups, loaded["groups"])
    if not tasks:
        raise TaskError(problems)
    return _Loaded(tasks, [] if problems else plain_groups(groups), problems)


_FEW = 20
"""Tasks of a group that may fail before any has loaded: where the network is gone, each takes its time."""


def _matches(name: str, manager: Any) -> list[str]:
    """The names in the index that a name, a pattern or the path of a YAML file or folder stands for; there then.

    Raises:
        TaskError: There is none.
    """
    from lm_eval.utils import pattern_match

    index = manager.task_index
    if name not in index and name not in shipped_index() and is_path(name):
        listed = _from_files(name, index)
    elif any(sign in name for sign in "*?["):
        listed = list(pattern_match([name], [*index, *shipped_index()]))
        if not listed:
            raise TaskError(f"no task has a name like {name!r}")
    else:
        listed = [name]
    add_shipped(listed, index)
    for entry in listed:
        if entry not in index:
            names = sorted({*index, *shipped_index()})
            raise TaskError(f"unknown task {entry!r}{suggest(entry, names)}; neither shipped nor in include_path")
    return listed


def _from_files(name: str, index: dict[str, Any]) -> list[str]:
    """Adds task files to the index, and gives their names."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(name).expanduser()
    files = (
        sorted(path.glob("*.yaml"))
        if path.is_dir()
        else sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    )
    if not files:
        raise TaskError(f"no task file {name}")
    listed = []
    for file in files:
        own: dict[str, Any] = {}
        try:
            TaskIndex.process_cfg(load_yaml(file, resolve_func=False), file.resolve(), own)
        except Exception as error:  # whatever YAML can be wrong in
            raise TaskError(f"{file}: no task or group: {' '.join(str(error).split())[:300]}") from error
        named = [entry for entry in own.values() if entry.yaml_path is not None]
        index |= {entry.name: entry for entry in named}
        listed += [entry.name for entry in named]
    return listed


def _load_one(spec: SingleTask, manager: Any, *, unsafe_code: bool) -> Any:
    """One task, in the groups that hold it, as `TaskManager.load` gives it; named without marks of ours."""
    if spec.problems:
        raise TaskError([f"task {spec.name!r}: {problem}" for problem in spec.problems])
    _require_supported(spec, unsafe_code=unsafe_code)
    try:
        with quiet(), seeded(), code_eval_here() if asks_for_programs(spec.config) else nullcontext():
            loaded = manager.load([spec.load])
    except Exception as error:  # a task's YAML can make lm-eval and datasets raise anything
        raise TaskError(f"task {spec.name!r} cannot be loaded: {_reason(error, spec.config)}") from error
    for task in loaded["tasks"].values():
        _require_contained(task, unsafe_code=unsafe_code)
        if (plain := plain_name(task.task_name)) != task.task_name:
            task.set_config(key="task", value=plain)
    return loaded


def _require_supported(spec: SingleTask, *, unsafe_code: bool) -> None:
    """Refuses what cannot be scored here, before its data and functions are fetched."""
    config = spec.config
    if asks_for_programs(config) and not unsafe_code:
        raise TaskError(f"task {spec.name!r} {UNASKED}")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise TaskError(f"task {spec.name!r} needs images or sound; EvoMerge scores text only")


def _require_contained(task: Any, *, unsafe_code: bool) -> None:
    """Refuses a task that runs programs unasked, or where they are not shut in; its own classes say so themselves."""
    if not getattr(task, "UNSAFE_CODE", False):
        return
    if not unsafe_code:
        raise TaskError(f"task {plain_name(task.task_name)!r} {UNASKED}")
    contain(task)


_EMPTY_SPLIT = ("size 0", "SchemaInferenceError", "no data files", "list index out of range")
"""In the messages of datasets for a file or a split without a document; a StopIteration says the same."""


def _reason(error: Exception, config: Mapping[str, Any]) -> str:
    said = error.args[0] if isinstance(error, KeyError) and error.args else error  # of which str() is a repr()
    text = plain_name(" ".join(str(said).split()) or "no reason given")
    if isinstance(error, ModuleNotFoundError):
        return f"it needs {error.name}, which is not installed; run pip install {_package_with(str(error.name))}"
    data = (config.get("dataset_kwargs") or {}).get("data_files") or config.get("dataset_path")
    splits = [config.get(f"{kind}_split") for kind in ("test", "validation", "training", "fewshot")]
    if isinstance(error, KeyError) and (unknown := _unknown_metric(config)) is not None:
        return f"lm-eval has no metric {unknown}, and there is none of that name in the evaluate library within reach"
    if isinstance(error, KeyError) and error.args[0] in splits:
        return f"its data {data} have no split {error.args[0]!r}"
    causes = f"{error!r} {error.__cause__!r}"
    if (of_choices := _of_choices(error)) is not None:
        return of_choices
    if isinstance(error, StopIteration) or any(sign in causes for sign in _EMPTY_SPLIT):
        return f"a split of its data {data} has no documents"
    frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    offline = isinstance(error, ConnectionError | FileNotFoundError) or "offline" in text.lower()
    hint = f"; its dataset {data!r} is neither here nor in reach" if offline and data and "download" in frames else ""
    if offline and not hint:
        hint = "; a metric or another file that it needs is neither here nor in reach"
    return f"{type(error).__name__}: {text[:300]}{hint}"


def _unknown_metric(config: Mapping[str, Any]) -> str | None:
    """The first metric of a task's file that lm-eval does not have, with the nearest that it has."""
    from lm_eval.api.registry import metric_registry

    parts = config.get("metric_list")
    names = [part.get("metric") for part in parts or [] if isinstance(part, dict)]
    unknown = next((name for name in names if isinstance(name, str) and name not in metric_registry), None)
    return None if unknown is None else f"{unknown!r}{suggest(unknown, list(metric_registry.keys()))}"


def _of_choices(error: Exception) -> str | None:
    """What is wrong with the label or the choices of the first document, where lm-eval stumbles over them."""
    line = str(traceback.extract_tb(error.__traceback__)[-1].line)
    if isinstance(error, IndexError) and "test_choice[" in line:
        return "the label (doc_to_target) of its first document is none of its choices (doc_to_choice)"
    if isinstance(error, IndexError) and "choice[0]" in line:
        return "a choice (doc_to_choice) of its first document is empty"
    return None


def _package_with(module: str) -> str:
    """What pip installs a module with: lm-eval's own extra for it, where there is one."""
    top = module.partition(".")[0].replace("_", "-").lower()
    for requirement in importlib.metadata.requires("lm_eval") or []:
        named = re.match(r"([\w.-]+).*extra == [\"']([\w-]+)[\"']", requirement)
        if named and named[2] not in ("dev", "testing", "all"):
            package = named[1].replace("_", "-").lower()
            if package == top or package.startswith(f"{top}-"):
                return f'"lm-eval[{named[2]}]"'
    return module


def _configure(task: Any, num_fewshot: int | None, seed: int, options: Mapping[str, Any] | None) -> None:
    """Refuses what cannot be scored here; sets examples and generation as `lm_eval.simple_evaluate` does."""
    name = task.task_name
    if getattr(task, "MULTIMODAL", False):
        raise TaskError(f"task {name!r} needs images or sound; EvoMerge scores text only")
    if options and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(options), update=True)
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
