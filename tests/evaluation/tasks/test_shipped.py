"""Every name that the installed lm-eval ships, and tasks that only part of can be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from evomerge.errors import TaskError
from evomerge.evaluation.tasks import shipped
from evomerge.evaluation.tasks.lm_eval_tasks import find_tasks
from evomerge.evaluation.tasks.shipped import add_shipped, shipped_folder, shipped_index
from evomerge.system.quiet import quiet
from tests.shipped_data import ROWS, write_shipped_data


def test_every_name_of_lm_eval_is_known_as_lm_eval_knows_it() -> None:
    """Names, kinds, files and the members of tags, beside lm-eval's own index, which parses all of its YAML."""
    with quiet():
        expected = TaskManager().task_index
    index = shipped_index()
    assert set(index) == set(expected)
    for name, (kind, file, tasks) in index.items():
        entry = expected[name]
        assert kind == entry.kind.name, name
        assert (shipped_folder() / file if file else None) == entry.yaml_path, name
        assert kind != "TAG" or set(tasks) == entry.tags, name


def test_a_damaged_index_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(shipped, "_read_names", lambda root: {"one": ("TASK", "one.yaml", ["some"])})
    first = shipped_index.__wrapped__()
    assert first == {"one": ("TASK", "one.yaml", ("some",))}
    (kept,) = tmp_path.rglob("*.json")
    for damage in (kept.read_text()[:-3], "[]", '{"one": 1}'):
        kept.write_text(damage)
        assert shipped_index.__wrapped__() == first
        assert json.loads(kept.read_text()) == {"one": ["TASK", "one.yaml", ["some"]]}


def test_what_a_name_holds_comes_with_it() -> None:
    index: dict[str, object] = {}
    add_shipped(["mmlu", "math_word_problems"], index)
    assert {"mmlu_stem", "mmlu_stem_tasks", "mmlu_abstract_algebra"} <= set(index)
    assert len(shipped_index()["math_word_problems"][2]) == 26
    assert set(shipped_index()["math_word_problems"][2]) <= set(index)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory for data sets, and a cache for what `datasets` makes of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_a_tag_goes_on_with_the_tasks_that_can_be_had_and_says_which_cannot(here: Path) -> None:
    write_shipped_data(here, {"hellaswag": ROWS["hellaswag"]}, 3)
    task_set = find_tasks(["multiple_choice"])
    assert [*task_set.tasks] == ["hellaswag"]
    assert len(task_set.missing) == 2
    assert "task 'darijahellaswag' cannot be loaded" in task_set.missing[0]
    assert task_set.problems == ()


def test_code_is_refused_before_its_metric_is_fetched(here: Path) -> None:
    row = {"task_id": "x/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n", "entry_point": "one"}
    folder = here / "openai" / "openai_humaneval"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text(json.dumps(row | {"test": "def check(candidate):\n    pass\n"}) + "\n")
    (problem,) = find_tasks(["humaneval"]).problems
    assert problem.startswith("task 'humaneval' runs code that the model writes")


def test_a_pattern_stands_for_all_names_like_it(here: Path) -> None:
    write_shipped_data(here, {name: ROWS[name] for name in ("truthfulqa_mc1", "truthfulqa_mc2")}, 3)
    assert set(find_tasks(["truthfulqa_mc?"]).tasks) == {"truthfulqa_mc1", "truthfulqa_mc2"}
    with pytest.raises(TaskError, match="no task has a name like 'nothing_li"):
        raise TaskError(find_tasks(["nothing_li*e"]).problems)


def test_shuffled_choices_are_the_same_in_every_order_of_tasks(here: Path) -> None:
    names = ["gpqa_main_zeroshot", "gpqa_diamond_zeroshot"]
    write_shipped_data(here, dict.fromkeys(names, ROWS["gpqa_main_zeroshot"]), 6)
    orders = [find_tasks(order).tasks for order in (names, names[::-1])]
    for name in names:
        assert [doc["answer"] for doc in orders[0][name].docs] == [doc["answer"] for doc in orders[1][name].docs]
    assert len({doc["answer"] for doc in orders[0][names[0]].docs}) > 1
