"""What a search.yaml says of tasks, metrics, groups, guards and chat templates, as far as it shows before a search."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import BadInput, SpecError, TaskError
from evomerge.evaluation.splits import GUARD, SEARCH, SELECT, TEST
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import Problem, open_problem
from evomerge.run.preflight import check_metrics
from evomerge.spec.load import parse_spec
from tests.evaluation.conftest import documents, write_documents, write_task
from tests.frame import search_spec

UTILS = """
import math

def graded(references, predictions):
    return {"right": float(references[0] == predictions[0]), "starts": float(predictions[0][:1] == "t")}

def mass(doc, results):
    return {"acc": math.exp(results[0][0]) + math.exp(results[1][0])}

def of_some(doc, results):
    return {"length": 1.0, **({"rare": 1.0} if doc["question"].startswith("first") else {})}
"""
FUNCTIONS = {
    "graded": {"kind": "gen", "filter_list": None, "metric_list": [{"metric": "graded", "aggregation": "mean"}]},
    "mass": {"kind": "mc", "process_results": "mass", "metric_list": [{"metric": "acc", "aggregation": "mean"}]},
    "rare": {
        "kind": "gen",
        "process_results": "of_some",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("length", "rare")],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search_tasks")
    docs = documents(24)
    docs[0]["question"] = "first " + docs[0]["question"]
    write_documents(root / "data" / "docs.jsonl", docs)
    for name in ("quiz", "other", "third"):
        write_task(root / "tasks", name, kind="mc", fewshot_split="test", num_fewshot=None, tag="pair")
    write_task(root / "tasks", "gen")
    for name, changes in FUNCTIONS.items():
        path = write_task(root / "tasks", name, **changes)
        text = path.read_text().replace("metric: graded", "metric: !function utils.graded\n  higher_is_better: true")
        for function in ("mass", "of_some"):
            text = text.replace(f"process_results: {function}", f"process_results: !function utils.{function}")
        path.write_text(text)
    (root / "tasks" / "utils.py").write_text(UTILS)
    group = {"group": "both", "task": ["quiz", "other"], "aggregate_metric_list": [{"metric": "acc"}]}
    (root / "tasks" / "both.yaml").write_text(yaml.safe_dump(group))
    return root / "tasks"


@pytest.fixture
def opened(tiny_family: dict[str, Path], tasks: Path) -> Callable[..., Problem]:
    def open_with(*steering: Any, guard: tuple[str, ...] = (), **evaluation: Any) -> Problem:
        changes = {f"evaluation__{key}": value for key, value in evaluation.items()}
        spec = search_spec(
            tiny_family,
            **{
                "evaluation__include_path": str(tasks),
                "evaluation__tasks": list(steering),
                "evaluation__guard": [*guard],
            },
            **changes,
        )
        return open_problem(parse_spec(spec))

    return open_with


@pytest.mark.parametrize(
    ("task", "metric", "name"),
    [
        ("quiz", None, "acc"),
        ("quiz", "acc,none", "acc"),
        ("quiz", "prob,none", "prob"),
        ("gen", "exact_match,low", "exact_match,low"),
        ("graded", None, "right"),
        ("graded", "starts", "starts"),
        ("rare", "rare", "rare"),
    ],
)
def test_each_name_that_lm_eval_prints_can_be_written(
    opened: Callable[..., Problem], task: str, metric: str | None, name: str
) -> None:
    problem = opened({"task": task, **({"metric": metric} if metric else {})}, scale="raw")
    assert [goal.metric for goal in problem.reported.goals] == [name]
    assert problem.reported.goals[0].higher_is_better


def test_a_functions_own_name_is_no_metric(opened: Callable[..., Problem]) -> None:
    with pytest.raises(TaskError, match=r"task 'graded' has no metric 'graded'.*it has right, starts"):
        opened({"task": "graded", "metric": "graded"})


def test_what_a_task_computes_itself_steers_itself(opened: Callable[..., Problem]) -> None:
    problem = opened("quiz", "mass", fitness="smooth")
    assert {goal.task: goal.metric for goal in problem.steering.goals} == {"quiz": "prob", "mass": "acc"}


def test_a_metric_that_no_item_of_a_split_has_is_found_before_a_model_is_run(opened: Callable[..., Problem]) -> None:
    problem = opened({"task": "rare", "metric": "rare"}, scale="raw")
    with pytest.raises(TaskError, match=r"task 'rare': none of its [0-9]+ [a-z]+ items has a value for rare") as caught:
        check_metrics(problem, ModelRunner(problem).evaluator)
    assert len(caught.value.problems) == 2  # one of the three splits has the one document
    problem = opened({"task": "rare", "metric": "length"}, scale="raw")
    check_metrics(problem, ModelRunner(problem).evaluator)


def test_a_group_is_one_task(opened: Callable[..., Problem]) -> None:
    problem = opened("both", splits={"search": 16, "select": 16, "test": 16})
    assert list(problem.tasks) == ["both"]
    assert {split: len(problem.splits[split]["both"]) for split in (SEARCH, SELECT, TEST)} == dict.fromkeys(
        (SEARCH, SELECT, TEST), 16
    )
    assert [goal.task for goal in problem.steering.goals] == ["both"]


def test_a_guard_keeps_the_steering_tasks_examples_and_items_apart(opened: Callable[..., Problem]) -> None:
    apart = opened({"task": "quiz", "num_fewshot": 2}, guard=("other",))
    within = opened({"task": "quiz", "num_fewshot": 2}, guard=("pair",))
    assert set(within.splits[GUARD]) == {"pair::quiz", "other", "third"}
    assert within.splits[SEARCH] == apart.splits[SEARCH]
    shots = {name: task.lm_eval_task.get_config("num_fewshot") for name, task in within.tasks.items()}
    assert shots == {"quiz": 2, "pair::quiz": 0, "other": 0, "third": 0}
    choosing = {*within.splits[SEARCH]["quiz"], *within.splits[SELECT]["quiz"]}
    assert not choosing & set(within.splits[GUARD]["pair::quiz"])
    scored = ModelRunner(within).evaluator.requests("pair::quiz").by_item[0]
    assert scored[0].task_name == "quiz"


@pytest.mark.parametrize("guard", ["quiz", "both", "pair"])
def test_a_guard_may_not_be_all_that_steers(opened: Callable[..., Problem], guard: str) -> None:
    with pytest.raises(BadInput, match=r"quiz|both"):
        opened("both", "quiz", guard=(guard,))


def test_a_task_beside_a_group_that_holds_it_is_refused(opened: Callable[..., Problem]) -> None:
    with pytest.raises(TaskError, match="task 'quiz' is both in 'both' and in 'quiz'; name it once"):
        opened("both", "quiz")


def test_a_task_file_is_found_beside_the_search(tiny_family: dict[str, Path], tasks: Path) -> None:
    spec = search_spec(tiny_family, evaluation__tasks=["tasks/quiz.yaml"], evaluation__guard=[])
    parsed = parse_spec(spec, beside=tasks.parent)
    assert parsed.evaluation.tasks[0].task == str(tasks / "quiz.yaml")
    assert list(open_problem(parsed).tasks) == ["quiz"]


def test_a_chat_template_comes_from_a_source(
    tiny_family: dict[str, Path], tasks: Path, tmp_path: Path, opened: Callable[..., Problem]
) -> None:
    chatty = Path(shutil.copytree(tiny_family["c"], tmp_path / "c"))
    (chatty / "chat_template.jinja").write_text("{% for m in messages %}<{{ mood }}>{{ m.content }}{% endfor %}")
    family = {**tiny_family, "c": chatty}
    changes: dict[str, Any] = {"evaluation__include_path": str(tasks), "evaluation__tasks": ["quiz"]}
    changes |= {"evaluation__guard": [], "evaluation__apply_chat_template": True}
    own = search_spec(family, **changes)
    with pytest.raises(TaskError, match=r"evaluation.chat_template: \{from: SOURCE\}"):
        ModelRunner(open_problem(parse_spec(own)))
    changes |= {"evaluation__chat_template": {"from": "c"}, "evaluation__chat_template_args": {"mood": "calm"}}
    problem = open_problem(parse_spec(search_spec(family, **changes)))
    prompt = ModelRunner(problem).evaluator.requests("quiz").by_item[0][0].args[0]
    assert prompt.startswith("<calm>")
    for source, reason in (("a", "a has no chat template"), ("d", "no model 'd'")):
        with pytest.raises(SpecError, match=reason):
            open_problem(parse_spec(search_spec(family, **changes | {"evaluation__chat_template": {"from": source}})))
