"""Scorers of the user's: what is loaded, how it is called, what is refused and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.scorers.python_scorer import python_task
from evomerge.evaluation.tasks.scorer_task import ScorerTask
from tests.evaluation.conftest import Bench

ROWS = [{"text": f"number {k}", "value": k} for k in range(6)]

GOOD = """
from dataclasses import dataclass

def score(model, items, scale=1.0):
    return [scale * item["value"] for item in items]

class Loss:
    higher_is_better = False
    version = 3
    aggregate = "ratio"

    def __init__(self, offset=0):
        self.offset = offset

    def items(self):
        return [{"value": k} for k in range(4)]

    def score(self, model, items):
        return [(item["value"] + self.offset, 2) for item in items]

class Plain:
    def score(self, model, items):
        return [1] * len(items)
"""

Make = Callable[..., ScorerTask]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Loads a scorer out of some code."""

    def load(code: str, name: str = "score", data: Any = ROWS, **options: Any) -> ScorerTask:
        (tmp_path / "metric.py").write_text(code)
        if data is not None:
            (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        path = None if data is None else str(tmp_path / "items.jsonl")
        return python_task("mine", f"{tmp_path / 'metric.py'}:{name}", path, options)

    return load


def values(task: ScorerTask, indices: tuple[int, ...] = (0, 1, 2)) -> list[float]:
    """What a scorer that asks no model gives."""
    scores = task.scores(None, indices)  # type: ignore[arg-type]
    assert scores.items == tuple(f"mine:{k}" for k in indices)
    return scores.values(task.metrics[0]).tolist()


def test_a_function_gets_the_rows_and_its_options(make: Make) -> None:
    assert values(make(GOOD), (4, 1)) == [4.0, 1.0]
    task = make(GOOD, scale=0.5)
    assert values(task) == [0.0, 0.5, 1.0]
    assert task.higher_is_better == {"score": True}


def test_a_class_says_direction_items_and_ratio(make: Make) -> None:
    task = make(GOOD, "Loss", None, offset=1)
    scores = task.scores(None, (0, 3))  # type: ignore[arg-type]
    assert task.higher_is_better == {"Loss": False}
    assert scores.score("Loss").value == (1 + 4) / (2 + 2)
    assert len(task.items) == 4
    assert make(GOOD, "Plain").higher_is_better == {"Plain": True}


def test_the_digest_follows_source_version_options_and_data(make: Make) -> None:
    tasks = [
        make(GOOD),
        make(GOOD, scale=2.0),
        make(GOOD, data=[*ROWS, {"value": 9}]),
        make(GOOD + "\n# another thought\n"),
        make(GOOD, "Plain"),
    ]
    assert len({task.digest for task in tasks}) == len(tasks)
    assert make(GOOD).digest == tasks[0].digest


def test_a_scorer_from_a_package_by_its_name(make: Make) -> None:
    task = python_task(
        "mine", "tests.evaluation.scorers.test_python_scorer:doubled", make(GOOD).files[1].as_posix(), {}
    )
    assert values(task) == [0.0, 2.0, 4.0]
    assert task.python_files == (Path(__file__),)


def doubled(model: Any, items: Any) -> list[float]:
    """Scores by a number in the item."""
    return [2.0 * item["value"] for item in items]


def test_a_file_imports_what_lies_beside_it(make: Make, tmp_path: Path) -> None:
    (tmp_path / "beside_the_metric.py").write_text("FACTOR = 3\n")
    task = make("from beside_the_metric import FACTOR\ndef score(model, items): return [FACTOR] * len(items)\n")
    assert values(task) == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("code", "name", "data", "options", "message"),
    [
        ("def score(model, items) return 1", "score", ROWS, {}, r"cannot be imported: SyntaxError"),
        (
            "import no_such_package",
            "score",
            ROWS,
            {},
            r"ModuleNotFoundError: No module named 'no_such_package' \(metric",
        ),
        ("raise SystemExit(1)", "score", ROWS, {}, r"cannot be imported: SystemExit"),
        (GOOD, "scoer", ROWS, {}, r"there is no 'scoer' in it \(did you mean 'score'\?\)"),
        (GOOD, "dataclass.nothing", ROWS, {}, r"there is no 'nothing' in it"),
        ("score = 3", "score", ROWS, {}, r"it is the number 3, neither a function nor a class"),
        ("def score(items): return []", "score", ROWS, {}, r"takes \(items\), and is called as score\(model, items\)"),
        (GOOD, "score", ROWS, {"scal": 1}, r"is called as score\(model, items, scal\): got an unexpected .*'scal'"),
        (GOOD, "Loss", None, {"of": 1}, r"is called as Loss\(of\)"),
        (GOOD, "Loss", ROWS, {}, r"it has items\(\) of its own"),
        (GOOD, "score", None, {}, r"it has no items; say data: FILE.jsonl"),
        (GOOD, "score", [], {}, r"items.jsonl holds no items"),
        (GOOD, "score", [3], {}, r"items.jsonl: is no JSON object"),
        (
            "class C:\n  def items(self): return [1]\n  def score(self, model, items): 0",
            "C",
            None,
            {},
            r"a list of map",
        ),
        ("class C:\n  def items(self): return 1/0\n  def score(self, model, items): 0", "C", None, {}, r"ZeroDivision"),
        ("class C:\n  def __init__(self): 1/0\n", "C", None, {}, r"cannot be made: ZeroDivisionError"),
        ("class C:\n  def items(self): return [{}]\n", "C", None, {}, r"the class has no method score"),
        ("def score(m, i): 0\nscore.aggregate = 'median'", "score", ROWS, {}, r"aggregate is the text 'median'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_words(
    make: Make, code: str, name: str, data: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        make(code, name, data, **options)


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(TaskError, match=r"no_such_module:score: cannot be imported: ModuleNotFoundError"):
        python_task("mine", "no_such_module:score", None, {})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"its scorer gave 1 values for 3 items; one number an item"),
        ("return None", r"its scorer gave nothing"),
        ("return 'abc'", r"its scorer gave the text 'abc'"),
        ("return ['1'] * 3", r"item 0: its scorer gave the text '1'"),
        ("return [1, None, 2]", r"item 1: its scorer gave nothing"),
        ("return [1, 2, float('nan')]", r"item 2: its scorer gave nan, which is not finite"),
        ("return [1, float('inf'), 2]", r"item 1: its scorer gave inf"),
        ("return [(1, 2)] * 3", r"item 0: its scorer gave a list; one number an item"),
        ("return items[0]['nothing']", r"its scorer raised KeyError: 'nothing' \(metric.py, line 2\)"),
    ],
)
def test_values_that_are_no_numbers_fail_the_candidate(make: Make, body: str, message: str) -> None:
    task = make(f"def score(model, items):\n    {body}\n")
    with pytest.raises(CandidateError, match=message):
        values(task)


def test_a_ratio_takes_pairs_alone(make: Make) -> None:
    for given, message in (("1", "the number 1"), ("(1, -2)", "a negative denominator")):
        code = f"class C:\n  aggregate = 'ratio'\n  def score(self, model, items): return [{given}] * 3\n"
        with pytest.raises(CandidateError, match=message):
            values(make(code, "C"))


def test_numbers_of_other_libraries_are_numbers(make: Make) -> None:
    code = "import numpy, torch\ndef score(model, items): return [numpy.float32(1), torch.tensor(2.0), True]\n"
    assert values(make(code)) == [1.0, 2.0, 1.0]
    assert values(make("import numpy\ndef score(m, i): return numpy.arange(3)\n")) == [0.0, 1.0, 2.0]


def test_what_a_scorer_changes_in_its_items_is_forgotten(make: Make) -> None:
    task = make(
        "def score(m, items):\n    return [item.setdefault('seen', 1) and item.pop('value') for item in items]\n"
    )
    assert values(task) == values(task) == [0.0, 1.0, 2.0]


def test_the_traceback_is_in_the_log(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CandidateError):
        values(make("def score(model, items):\n    return helper()\ndef helper():\n    return 1 / 0\n"))
    assert "in helper" in caplog.text


SAME_AS_MC = """
def score(model, items):
    pairs = [("Q: " + item["question"] + "\\nA:", " " + choice) for item in items for choice in item["choices"]]
    values = iter(model.loglikelihood(pairs))
    right = []
    for item in items:
        own = [next(values) for _ in item["choices"]]
        right.append(own.index(max(own)) == item["label"])
    return right
"""
SAME_AS_GEN = """
def score(model, items):
    prompts = [item["question"] + "\\nA:" for item in items]
    texts = model.generate(prompts, max_new_tokens=12, stop=["e", "\\n\\n"])
    return [text == item["answer"] for text, item in zip(texts, items)]
"""


@pytest.mark.parametrize(("name", "code", "metric"), [("mc", SAME_AS_MC, "acc"), ("gen", SAME_AS_GEN, "exact_match")])
@pytest.mark.parametrize("backend", ["native", "hf"])
def test_a_scorer_that_asks_what_a_task_asks_gives_its_numbers(
    bench: Bench, tmp_path: Path, name: str, code: str, metric: str, backend: Any
) -> None:
    (tmp_path / "metric.py").write_text(code)
    own = python_task("own", f"{tmp_path / 'metric.py'}:score", str(bench.folder.parent / "data" / "docs.jsonl"), {})
    lm_eval = bench.evaluator(name, backend=backend)
    evaluator = Evaluator([own], bench.tokenizer, bench.model.config, backend=backend)
    selection = tuple(range(0, 24, 2))
    expected = lm_eval.score(bench.model, {name: selection})[name].values(metric)
    given = evaluator.score(bench.model, {"own": selection})["own"].values("score")
    assert np.array_equal(given, expected)


def test_both_kinds_in_one_selection_and_in_the_digests(bench: Bench, make: Make) -> None:
    own = make(SAME_AS_GEN, data=[{"question": "the river", "answer": "x"}] * 3)
    evaluator = Evaluator(
        {**bench.evaluator("ll").tasks, "mine": own}, bench.tokenizer, bench.model.config, batch_tokens=512
    )
    scores = evaluator.score(bench.model, {"mine": (0, 2), "ll": (1,)})
    assert list(scores) == ["mine", "ll"]
    assert evaluator.batch_digest({"mine": (0,)}) != evaluator.batch_digest({"mine": (1,)})
    assert evaluator.item_hash("mine", 0) == evaluator.item_hash("mine", 1)
    assert evaluator.check() == [f"tasks run Python of yours: {own.python_files[0]}"]
    assert evaluator.jacobian(bench.model, {"mine": (0,)}, {}, 0) == {}
