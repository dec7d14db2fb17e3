"""The command line of lm-eval on a card, and the numbers of the items."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evomerge.evaluation.lm_eval_command import items_by_task, lm_eval_commands
from evomerge.evaluation.tasks.group_task import GroupTask
from evomerge.evaluation.tasks.lm_eval_tasks import find_tasks
from evomerge.evaluation.tasks.task import Task
from evomerge.spec.load import load_spec
from tests.frame import ROOT


class FakeTask(Task):
    @property
    def items(self) -> Any:  # type: ignore[override]
        return tuple(f"{self.name}:{k}" for k in range(4))


def task(name: str, shots: int | None = None) -> Task:
    return FakeTask(name, SimpleNamespace(get_config=lambda key: {"num_fewshot": shots}[key]))


def test_the_items_of_a_group_are_those_of_its_tasks() -> None:
    group = GroupTask("both", None, parts=(task("x"), task("y", 2)))
    tasks = {"both": group, "z": task("z")}
    selection = {"both": (1, 3, 4, 7), "z": (2,)}
    assert items_by_task(tasks, selection) == {"x": [1, 3], "y": [0, 3], "z": [2]}
    commands = [shlex.split(line) for line in lm_eval_commands(tasks, selection, model="OUT", samples="items.json")]
    assert [words[words.index("--tasks") + 1] for words in commands] == ["x,z", "y"]
    assert "--num_fewshot" not in commands[0]
    assert commands[1][-4:] == ["--num_fewshot", "2", "--samples", "items.json"]


def test_what_the_model_is_loaded_with_is_json_where_commas_cannot_say_it() -> None:
    given = {"dtype": "float32", "chat_template_args": {"enable_thinking": False}}
    (line,) = lm_eval_commands({"z": task("z")}, {"z": (0,)}, model="OUT", samples="i", model_args=given)
    assert json.loads(shlex.split(line)[4]) == {"pretrained": "OUT", **given}


def test_folders_are_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my" / "tasks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def folder(*paths: str) -> list[str]:
        lines = lm_eval_commands({"z": task("z")}, {"z": (0,)}, model="OUT", samples="i", include_path=paths)
        return [shlex.split(line)[8] for line in lines]

    assert folder(str(tmp_path / "my" / "tasks")) == ["my/tasks"]
    assert folder("/home/somebody/tasks") == ["tasks"]
    assert folder("a", "b") == []  # lm-eval takes one


def test_the_tasks_of_the_real_search_lie_in_the_repository() -> None:
    spec = load_spec(ROOT / "search_spaces" / "real.yaml")
    assert spec.evaluation.include_paths == [str(ROOT / "examples" / "real" / "tasks")]
    task_set = find_tasks([one.task for one in spec.evaluation.tasks], include_path=spec.evaluation.include_paths)
    assert not task_set.problems
    assert {name: len(one.items) for name, one in task_set.tasks.items()} == {
        "real_blimp_islands": 900,
        "real_blimp_agreement": 900,
        "real_arc_easy": 600,
        "real_gsm8k_bpb": 300,
    }
