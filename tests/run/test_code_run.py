"""A search with a code task beside others: models that are far from writing Python, whose programs run all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from evomerge.errors import BadInput
from evomerge.evaluation.tasks.shipped import shipped_folder
from evomerge.run.check import check_search
from evomerge.run.search import resume, start
from evomerge.spec.load import parse_spec
from tests.frame import TASKS, search_spec
from tests.shipped_data import ROWS


def write_mbpp(folder: Path) -> None:
    """lm-eval's mbpp, on rows of its columns, with short answers."""
    rows = [{**ROWS["mbpp"](0), "task_id": k, "text": str(k)} for k in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        **{"include": str(shipped_folder() / "mbpp" / "mbpp.yaml"), "task": "short_mbpp", "num_fewshot": 0},
        **{"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}},
        "generation_kwargs": {"until": ["[DONE]"], "max_gen_toks": 4, "do_sample": False},
    }
    (folder / "short_mbpp.yaml").write_text(yaml.safe_dump(config))


def test_a_code_task_steers(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    write_mbpp(tmp_path)
    spec = search_spec(
        tiny_family,
        evaluation__include_path=[str(TASKS), str(tmp_path)],
        evaluation__tasks=[{"task": "short_mbpp", "metric": "pass_at_1"}, {"task": "tiny_choice"}],
        evaluation__scale="raw",
        evaluation__splits={"search": 0.5, "select": 0.25, "test": 0.25},
        evaluation__guard=[],
        evaluation__racing=True,
        search__candidates=3,
        search__population=2,
        search__finalists=1,
        run__keep=0,
    )
    with pytest.raises(BadInput, match=r"task 'short_mbpp' runs code .* evaluation\.unsafe_code: true"):
        start(parse_spec(spec), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    spec["evaluation"]["unsafe_code"] = True
    said = check_search(parse_spec(spec))
    assert "warning: 'short_mbpp': programs that the model writes are run, each in a process of its own: 3 s" in said
    result = start(parse_spec(spec), folder=tmp_path / "run")
    assert result.state == "finished"
    assert result.winner.scores["test"]["short_mbpp"]["pass_at_1"].value == 0
    assert result.winner.scores["test"]["short_mbpp"]["pass_at_1"].n == 2
    assert resume(tmp_path / "run") == result
    assert json.loads((tmp_path / "run" / "result.json").read_text())["state"] == "finished"
