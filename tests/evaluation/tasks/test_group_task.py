"""A group as one task: lm-eval's own numbers, every task in its proportion; names without marks of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.errors import TaskError
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.scores import score_table
from evomerge.evaluation.splits import split_items
from evomerge.evaluation.tasks.lm_eval_tasks import find_tasks, group_scores, groups_as_tasks
from evomerge.objective.racing import draw_blocks
from tests.evaluation.conftest import Bench, documents, write_documents, write_task

SIZES = {"small": 6, "middle": 12, "large": 30}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of different sizes, and two groups of them."""
    root = tmp_path_factory.mktemp("groups")
    for name, count in SIZES.items():
        write_documents(root / "data" / f"{name}.jsonl", documents(count))
        write_task(root / "tasks", name, f"data/{name}.jsonl", kind="mc")
    for group, by_size in (("by_size", True), ("by_task", False)):
        metrics = [{"metric": "acc_norm", "weight_by_size": by_size}, {"metric": "acc", "weight_by_size": by_size}]
        config = {"group": group, "task": [*SIZES], "aggregate_metric_list": metrics}
        (root / "tasks" / f"{group}.yaml").write_text(yaml.safe_dump(config))
    return root / "tasks"


@pytest.mark.parametrize("group", ["by_size", "by_task"])
def test_a_group_scores_what_lm_eval_reports_of_it(bench: Bench, tasks: Path, group: str) -> None:
    task_set = find_tasks([group], include_path=tasks)
    by_task = Evaluator(task_set.tasks, bench.tokenizer, bench.model.config).score(bench.model)
    expected = group_scores(task_set, score_table(by_task))[group]
    one = groups_as_tasks(task_set).tasks
    assert list(one) == [group]
    assert one[group].metrics[0] == "acc_norm"  # what the group states first
    whole = Evaluator(one, bench.tokenizer, bench.model.config).score(bench.model)[group]
    for metric in ("acc", "acc_norm"):
        assert whole.score(metric).value == pytest.approx(expected[metric].value)
        assert whole.score(metric).n == sum(SIZES.values())
    assert one[group].smooth_metric("acc") == "prob"


def test_some_items_in_any_order_score_as_the_same_items_of_the_tasks(bench: Bench, tasks: Path) -> None:
    group = groups_as_tasks(find_tasks(["by_size"], include_path=tasks)).tasks["by_size"]
    evaluator = Evaluator([group], bench.tokenizer, bench.model.config)
    whole = evaluator.score(bench.model)["by_size"]
    some = evaluator.score(bench.model, {"by_size": [40, 2, 7, 19]})["by_size"]
    assert some.items == ("large:22", "small:2", "middle:1", "large:1")
    np.testing.assert_allclose(some.values("prob"), whole.take([40, 2, 7, 19]).values("prob"), rtol=1e-4)


def test_splits_and_blocks_hold_every_task_in_its_proportion(tasks: Path) -> None:
    group = groups_as_tasks(find_tasks(["by_size"], include_path=tasks)).tasks["by_size"]
    drawn = split_items({"by_size": group.items}, {"search": 16, "select": 16, "test": 16})
    for split in drawn.values():
        assert [_of(group.items, split["by_size"], name) for name in SIZES] == [2, 4, 10]
    blocks = draw_blocks({"by_size": range(48)}, 0, {"by_size": group.items})
    assert len(blocks) == 12
    for block in blocks:
        assert 2 <= _of(group.items, block["by_size"], "large") <= 3


def _of(items: Any, chosen: Any, name: str) -> int:
    return sum(items[k].startswith(f"{name}:") for k in chosen)


def test_a_metric_that_not_all_tasks_have_is_refused_by_name(tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(4))
    write_task(tmp_path / "tasks", "one", kind="mc")
    write_task(tmp_path / "tasks", "other", kind="ll")
    config = {"group": "both", "task": ["one", "other"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks" / "both.yaml").write_text(yaml.safe_dump(config))
    group = groups_as_tasks(find_tasks(["both"], include_path=tmp_path / "tasks")).tasks["both"]
    assert group.metrics == ("acc", "prob")
    assert group.metric_name("acc,none") == "acc"
    with pytest.raises(TaskError, match="group 'both' has no metric 'acc_norm' in all its tasks; what they share: acc"):
        group.metric_name("acc_norm")


def test_groups_and_tasks_defined_inside_a_group_are_called_as_lm_eval_calls_them(tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(4))
    for name in ("one", "other", "third"):
        write_task(tmp_path / "tasks", name, kind="mc")
    deeper = {"group": "deeper", "task": ["third"], "aggregate_metric_list": [{"metric": "acc"}]}
    inner = {"group": "sub", "task": ["other", deeper], "aggregate_metric_list": [{"metric": "acc"}]}
    known = {"group": "known", "task": [inner], "aggregate_metric_list": [{"metric": "acc"}]}
    outer = {"group": "G", "task": ["one", "known"], "aggregate_metric_list": [{"metric": "acc"}]}
    for config in (known, outer):
        (tmp_path / "tasks" / f"{config['group']}.yaml").write_text(yaml.safe_dump(config))
    task_set = find_tasks(["G"], include_path=tmp_path / "tasks")
    assert [group.name for group in task_set.groups] == ["known::sub::deeper", "known::sub", "known", "G"]
    assert set(task_set.tasks) == {"one", "other", "third"}


def test_a_task_in_two_names_is_counted_once_and_said_to_be(tasks: Path) -> None:
    task_set = find_tasks(["by_size", "small"], include_path=tasks)
    assert list(task_set.tasks) == [*SIZES]
    assert task_set.twice == ("task 'small' is both in 'by_size' and in 'small'; it is counted once",)
