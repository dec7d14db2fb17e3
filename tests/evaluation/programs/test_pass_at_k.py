"""Code tasks: pass@k as code_eval has it, and lm-eval's own tasks on rows of their columns."""

from __future__ import annotations

import itertools
import json
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from evomerge.errors import TaskError
from evomerge.evaluation.lm_eval_command import lm_eval_commands
from evomerge.evaluation.programs.pass_at_k import CodeEval, pass_at_k
from evomerge.evaluation.scorers.lm_eval import item_scores
from evomerge.evaluation.tasks.lm_eval_tasks import find_tasks, load_tasks
from evomerge.evaluation.tasks.task import Task
from evomerge.run.evaluate import evaluate
from tests.shipped_data import ROWS, write_shipped_data


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory for data sets, and a cache for what `datasets` makes of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_pass_at_k_is_the_share_of_draws_with_a_right_one() -> None:
    """Every way to draw k of n samples, counted."""
    for samples in range(1, 7):
        for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            draws = [*itertools.combinations(range(samples), k)]
            share = sum(min(draw) < correct for draw in draws) / len(draws)
            assert pass_at_k(samples, correct, k) == pytest.approx(share, abs=1e-12), (samples, correct, k)
    # 200 samples, 3 right: 1 - C(197, 100) / C(200, 100).
    assert pass_at_k(200, 3, 100) == pytest.approx(1 - math.comb(197, 100) / math.comb(200, 100))


def test_candidates_and_tests_give_what_code_eval_gives() -> None:
    """The examples of code_eval's own page, and items with several samples."""
    tests = ["assert add(2, 3) == 5"]
    candidates = [["def add(a, b): return a * b", "def add(a, b): return a + b"]]
    given, results = CodeEval().compute(references=tests, predictions=candidates, k=[1, 2])
    assert given == {"pass@1": 0.5, "pass@2": 1.0}
    assert [(number, outcome["passed"]) for number, outcome in results[0]] == [(0, False), (1, True)]
    right, wrong = "def add(a, b): return a + b", "def add(a, b):"
    several = [[right, wrong, wrong, wrong], [right, right, wrong, wrong]]
    given, _ = CodeEval().compute(references=tests * 2, predictions=several, k=[1, 2, 5])
    # One of 4 right: 1/4 and 1 - C(3,2)/C(4,2) = 1/2. Two: 1/2 and 1 - C(2,2)/C(4,2) = 5/6. No item has 5.
    assert given == {"pass@1": pytest.approx(0.375), "pass@2": pytest.approx(2 / 3)}
    slow = [["import time; time.sleep(2)", "pass"]]
    assert CodeEval().compute(references=["pass"], predictions=slow, k=[1], timeout=0.5)[0] == {"pass@1": 0.5}


def score(task: Task, *answers: Sequence[str]) -> dict[str, float]:
    """A task's own metrics, had a model answered its first items like this, each as often as the task repeats it."""
    lm_task, instances = task.lm_eval_task, []
    for index, texts in enumerate(answers):
        doc, repeats = task.docs[index], lm_task.config.repeats
        instance = lm_task.construct_requests(doc=doc, ctx="", metadata=(task.name, index, repeats))
        instance.resps = [*texts]
        instances.append([instance])
    scores = item_scores(task, range(len(answers)), instances).scores()
    return {name: one.value for name, one in scores.items() if name != "tokens"}


BODY = "    return x + {}\n"
WHOLE = "def add(x):\n    return x + {}\n"
RIGHT = {
    "humaneval": BODY,
    "humaneval_plus": BODY,
    "humaneval_instruct": BODY + "```\nThat is it.",
    "humaneval_single_line_infilling": BODY,
    "mbpp": WHOLE,
    "mbpp_instruct": "\n" + WHOLE + "```",
    "mbpp_plus": WHOLE,
    "mbpp_plus_instruct": "\n" + WHOLE + "```",
}
"""Shipped task to the right answer for its document k."""


@pytest.mark.parametrize("name", RIGHT)
def test_shipped_tasks_value_programs(name: str, here: Path) -> None:
    """Of four items, two are right, one is wrong and one is no Python."""
    base = name if name in ROWS else name.removesuffix("_instruct")
    write_shipped_data(here, {base: ROWS[base]}, 4)
    task = load_tasks([name], unsafe_code=True)[name]
    assert task.runs_programs
    given = score(task, *([RIGHT[name].format(number)] for number in (0, 1, 5, ")")))
    assert given == {"pass_at_1" if "mbpp" in name else "pass@1": 0.5}


def test_several_samples_of_an_item(here: Path) -> None:
    write_shipped_data(here, {"humaneval": ROWS["humaneval"], "cruxeval_input": ROWS["cruxeval_input"]}, 1)
    tasks = load_tasks(["humaneval_64", "cruxeval_input"], unsafe_code=True)
    given = score(tasks["humaneval_64"], [BODY.format(0)] * 3 + ["    return"] * 61)
    assert given == {f"pass@{k}": pytest.approx(pass_at_k(64, 3, k)) for k in (2, 8, 16, 32, 64)}
    # Its own functions start processes of their own; they are run here all the same.
    module = sys.modules["lm_eval.tasks.cruxeval.utils"]
    assert module.check_correctness.__module__ == "evomerge.evaluation.programs.pass_at_k"
    assert score(tasks["cruxeval_input"], ["[ANSWER] assert f(1) == 1"] * 4 + ["f(2)"] * 6) == {"pass@1": 0.4}


def test_unasked_no_program_is_run(here: Path) -> None:
    write_shipped_data(here, {"humaneval": ROWS["humaneval"]}, 2)
    (problem,) = find_tasks(["humaneval"]).problems
    assert problem == (
        "task 'humaneval' runs code that the model writes, which has to be asked for: evaluation.unsafe_code: true in "
        "a search.yaml, --confirm-run-unsafe-code of `evomerge eval`"
    )


def own_task(folder: Path, code: str, **settings: object) -> None:
    """A task with a metric of its own."""
    (folder / "rows.jsonl").write_text(json.dumps({"q": "1 + 1", "a": "assert 1"}) + "\n")
    (folder / "own_metric.py").write_text(code)
    config = {
        **{"task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}},
        **{"test_split": "test", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"},
        **{"metric_list": [{"metric": "METRIC", "aggregation": "mean", "higher_is_better": True}], **settings},
    }
    text = yaml.safe_dump(config).replace("METRIC", "!function own_metric.passes")
    (folder / "own.yaml").write_text(text)


LOADED = """
import evaluate
metric = evaluate.load("code_eval")
def passes(references, predictions, **options):
    return metric.compute(references=references, predictions=[predictions], k=[1])[0]["pass@1"]
"""


def test_a_task_of_ones_own_that_loads_code_eval(here: Path) -> None:
    own_task(here, LOADED)  # it does not say unsafe_code
    assert (
        "runs code that the model writes, which has to be asked for"
        in find_tasks(["own"], include_path=here).problems[0]
    )
    task = load_tasks(["own"], include_path=here, unsafe_code=True)["own"]
    assert score(task, ["x = 1"]) == {"passes": 1.0}
    assert score(task, ["x = 1 / 0"]) == {"passes": 0.0}


def test_a_function_that_runs_programs_by_itself_is_refused(here: Path) -> None:
    own_task(here, "def passes(references, predictions):\n    exec(predictions[0])\n    return 1.0\n", unsafe_code=True)
    with pytest.raises(TaskError, match="by a function of its own, passes, and not by code_eval"):
        load_tasks(["own"], include_path=here, unsafe_code=True)


def test_what_evaluate_loads_is_as_before(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate as library

    before = library.load
    write_shipped_data(here, {"mbpp": ROWS["mbpp"]}, 1)
    load_tasks(["mbpp"], unsafe_code=True)
    assert library.load is before
    assert isinstance(before, types.FunctionType)


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_a_model_is_scored(tiny_family: dict[str, Path], here: Path, backend: str) -> None:
    write_shipped_data(here, {"humaneval": ROWS["humaneval"], "mbpp": ROWS["mbpp"]}, 2)
    model, notes = str(tiny_family["a"]), []
    options = {"gen_kwargs": "max_gen_toks=4", "num_fewshot": 0, "output_path": here / "out", "log_samples": True}
    with pytest.raises(TaskError, match=r"--confirm-run-unsafe-code"):
        evaluate(model, ["humaneval"], backend=backend, **options)
    result = evaluate(
        *(model, ["humaneval", "mbpp"]), backend=backend, confirm_run_unsafe_code=True, warn=notes.append, **options
    )
    assert result.tasks["humaneval"]["pass@1"].value == result.tasks["mbpp"]["pass_at_1"].value == 0
    assert result.tasks["humaneval"]["pass@1"].n == 2
    assert any("programs that the model writes are run" in note and "3 s" in note for note in notes)
    (file,) = (here / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["humaneval"]["pass@1,create_test"] == 0


def test_the_command_line_that_gives_it_again_confirms(here: Path) -> None:
    write_shipped_data(here, {"humaneval": ROWS["humaneval"], "hellaswag": ROWS["hellaswag"]}, 2)
    for name, programs in (("humaneval", True), ("hellaswag", False)):
        tasks = load_tasks([name], unsafe_code=True)
        (command,) = lm_eval_commands(tasks, {name: (0,)}, model="m", samples="s.json")
        assert ("--confirm_run_unsafe_code" in command) == programs
        assert command.startswith("HF_ALLOW_CODE_EVAL=1 lm_eval" if programs else "lm_eval")
