"""The `lm_eval` command lines that give a checkpoint's numbers again: the same items, examples and prompts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.evaluation.splits import Selection
from evomerge.evaluation.tasks.group_task import GroupTask
from evomerge.evaluation.tasks.scorer_task import ScorerTask
from evomerge.evaluation.tasks.task import Task

Items = dict[str, list[int]]
"""Task of lm-eval's to the numbers of its documents, as `lm_eval --samples` takes them."""


def items_by_task(tasks: Mapping[str, Task], selection: Selection) -> Items:
    """Returns the chosen items of every task by number; those of a group under the tasks that they are of.

    Tasks that have a scorer are left out: lm-eval does not know them.
    """
    chosen: Items = {}
    for name, positions in _of_lm_eval(tasks, selection).items():
        for position in positions:
            part, number = _locate(tasks[name], position)
            chosen.setdefault(part.name, []).append(number)
    return chosen


def lm_eval_commands(
    tasks: Mapping[str, Task],
    selection: Selection,
    *,
    model: str,
    samples: str,
    include_path: Sequence[str] = (),
    model_args: Mapping[str, Any] | None = None,
    flags: Sequence[str] = (),
) -> list[str]:
    """Writes the command lines: one for each number of examples that tasks have.

    Args:
        tasks: The tasks by name.
        selection: Their items.
        model: The checkpoint, as the command should name it.
        samples: The file with `items_by_task`, as the command should name it.
        include_path: Folders with task files; `lm_eval` takes one, so with several there is no command.
        model_args: What the model is loaded with.
        flags: Further arguments.
    """
    if len(include_path) > 1:
        return []
    by_shots: dict[int, list[Task]] = {}
    for name in _of_lm_eval(tasks, selection):
        for part in _parts(tasks[name]):
            by_shots.setdefault(_shots(part), []).append(part)
    given = {"pretrained": model, **(model_args or {})}
    plain = all(isinstance(value, str | int) and not set(str(value)) & set(",= ") for value in given.values())
    arguments = ",".join(f"{key}={value}" for key, value in given.items()) if plain else json.dumps(given)
    commands = []
    for shots, parts in by_shots.items():
        names = ",".join(part.name for part in parts)
        words = ["lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", names]
        words += ["--num_fewshot", str(shots)] if shots else []
        words += [word for folder in include_path for word in ("--include_path", _from_here(folder))]
        programs = any(part.runs_programs for part in parts)
        words += ["--confirm_run_unsafe_code"] if programs else []
        command = shlex.join([*words, *flags, "--samples", samples])
        commands.append(f"HF_ALLOW_CODE_EVAL=1 {command}" if programs else command)
    return commands


def _of_lm_eval(tasks: Mapping[str, Task], selection: Selection) -> Selection:
    """Those of the tasks that are lm-eval's."""
    return {name: items for name, items in selection.items() if not isinstance(tasks[name], ScorerTask)}


def _locate(task: Task, position: int) -> tuple[Task, int]:
    if isinstance(task, GroupTask):
        part, number = task.locate(position)
        return task.parts[part], number
    return task, position


def _parts(task: Task) -> tuple[Task, ...]:
    return task.parts if isinstance(task, GroupTask) else (task,)


def _shots(task: Task) -> int:
    return int(task.lm_eval_task.get_config("num_fewshot") or 0)


def _from_here(folder: str) -> str:
    """A folder as seen from the working directory; of another one only the name, which is all that others have."""
    path, here = Path(folder).resolve(), Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else path.name
