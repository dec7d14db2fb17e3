"""Prompts are built for the items that are asked about, and are those that lm-eval builds for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import BadInput, TaskError
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.evaluation.tasks.requests import read_template
from evomerge.evaluation.tasks.task import Task
from tests.evaluation.conftest import Bench, documents, write_documents, write_task

UTILS = """
import random

def drawn(doc):
    return doc["question"] + str(random.random())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prompts")
    write_documents(root / "data" / "docs.jsonl", documents(20))
    shots = {"num_fewshot": 3, "fewshot_split": "test"}
    write_task(root / "tasks", "shots", kind="mc", **shots)
    path = write_task(root / "tasks", "drawn", kind="mc", doc_to_text="!function utils.drawn")
    path.write_text(path.read_text().replace("'!function utils.drawn'", "!function utils.drawn"))
    (root / "tasks" / "utils.py").write_text(UTILS)
    return root / "tasks"


def prompts(bench: Bench, task: Task, indices: Sequence[int]) -> list[str]:
    requests = Evaluator([task], bench.tokenizer, bench.model.config).requests(task.name)
    return [requests.by_item[k][0].args[0] for k in indices]


def by_lm_eval(task: Task) -> list[str]:
    """The prompts of all documents, in lm-eval's own way."""
    task.lm_eval_task.set_fewshot_seed(seed=task.fewshot_seed)
    task.lm_eval_task.build_all_requests(rank=0, world_size=1)
    return [instance.args[0] for instance in task.lm_eval_task.instances if instance.idx == 0]


def test_examples_are_those_of_the_whole_however_few_items_are_asked_about(bench: Bench, folder: Path) -> None:
    task = load_tasks(["shots"], include_path=folder)["shots"]
    expected = by_lm_eval(task)
    assert prompts(bench, task, [17, 3]) == [expected[17], expected[3]]
    assert prompts(bench, task, [3]) == [expected[3]]


def test_nothing_is_rendered_for_items_that_nobody_asks_about(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_tasks(["shots"], include_path=folder)["shots"]
    assert task.metrics  # which are those of its first document, asked once
    rendered: list[Any] = []
    original = type(task.lm_eval_task).doc_to_text
    monkeypatch.setattr(
        type(task.lm_eval_task),
        "doc_to_text",
        lambda self, doc, *more: rendered.append(doc) or original(self, doc, *more),
    )
    evaluator = Evaluator([task], bench.tokenizer, bench.model.config)
    evaluator.check({"shots": (4, 9)})
    assert len(rendered) == 2 * 4  # each with its three examples
    evaluator.check({"shots": (4, 9)})
    assert len(rendered) == 2 * 4


def test_prompts_that_are_drawn_are_the_same_whatever_was_asked_first(bench: Bench, folder: Path) -> None:
    one, other = (load_tasks(["drawn"], include_path=folder)["drawn"] for _ in range(2))
    whole = prompts(bench, one, range(20))
    assert len(set(whole)) == 20
    assert prompts(bench, other, [11, 5]) == [whole[11], whole[5]]


def test_a_document_without_a_field_is_named(bench: Bench, tmp_path: Path) -> None:
    docs = documents(5)
    docs[3]["choices"] = [""]
    write_documents(tmp_path / "data" / "docs.jsonl", docs)
    write_task(tmp_path / "tasks", "short", kind="mc", doc_to_target=0, doc_to_choice="{{[choices[0], choices[1]]}}")
    evaluator = Evaluator(load_tasks(["short"], include_path=tmp_path / "tasks"), bench.tokenizer, bench.model.config)
    assert evaluator.check({"short": (0, 1)}) == []
    with pytest.raises(TaskError, match="task 'short', item 3: "):
        evaluator.check()


def test_sampling_at_temperature_0_is_refused(bench: Bench, tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(2))
    write_task(tmp_path / "tasks", "cold", kind="gen", generation_kwargs={"do_sample": True, "temperature": 0.0})
    evaluator = Evaluator(load_tasks(["cold"], include_path=tmp_path / "tasks"), bench.tokenizer, bench.model.config)
    with pytest.raises(TaskError, match=r"task 'cold' samples \(do_sample\) at temperature 0"):
        evaluator.check()


def test_a_chat_template_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "of the tokenizer"}')
    (tmp_path / "empty.json").write_text("[]")
    assert read_template(tmp_path / "chat.jinja") == "{{ messages }}"
    assert read_template(tmp_path / "tokenizer_config.json") == "of the tokenizer"
    for name, reason in (("empty.json", "has no chat_template"), ("none", "cannot be read")):
        with pytest.raises(BadInput, match=reason):
            read_template(tmp_path / name)
