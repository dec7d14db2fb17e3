"""A search steered by a group of lm-eval's, with another one as its guard, on synthetic rows of the real columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import TaskError
from evomerge.report.tables import result_table
from evomerge.run.search import start
from evomerge.spec.load import parse_spec
from tests.shipped_data import ROWS, bbh_row, config_of, members, write_shipped_data

GUARD = "leaderboard_bbh"


def test_mmlu_steers_and_bbh_guards_on_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    subjects = [task for tag in members("mmlu_stem") for task in _tagged(tag)]
    rows = dict.fromkeys(subjects, ROWS["mmlu_abstract_algebra"]) | {task: bbh_row(task) for task in members(GUARD)}
    write_shipped_data(tmp_path, rows, 4)
    spec = {
        "name": "stem",
        "models": {"base": "zoo:base", "sources": {name: f"zoo:{name}" for name in ("facts", "agreement")}},
        "space": {"methods": ["linear"], "layer_groups": 1},
        "evaluation": {
            "tasks": [{"task": "mmlu_stem", "metric": "acc,none"}],
            "guard": [GUARD],
            "splits": {"search": 25, "select": 25, "test": 25},
            "dtype": "float32",
            "racing": True,
        },
        "search": {"candidates": 5, "population": 4, "finalists": 2},
        "run": {"keep": 0},
    }
    result = start(parse_spec(spec, beside=tmp_path), folder=tmp_path / "run")
    assert result.winner.scores["test"]["mmlu_stem"]["acc"].n == 25
    assert result.winner.scores["guard"][GUARD]["acc_norm"].n == 25
    assert [goal.steered_by for goal in result.goals] == ["prob"]
    assert "mmlu_stem" in result_table(result)


def test_a_refused_run_leaves_no_folder_and_the_corrected_one_starts(
    tiny_family: dict[str, Path], tmp_path: Path
) -> None:
    from tests.frame import search_spec

    folder = tmp_path / "run"
    changes = {"search__candidates": 5, "run__keep": 0, "search__finalists": 1}
    wrong = search_spec(tiny_family, evaluation__tasks=[{"task": "tiny_choice", "metric": "accc"}], **changes)
    with pytest.raises(TaskError, match="'accc'"):
        start(parse_spec(wrong), folder=folder)
    assert not folder.exists()
    none = search_spec(
        tiny_family, evaluation__tasks=["tiny_answer"], evaluation__guard=[], evaluation__scale="relative", **changes
    )
    with pytest.raises(TaskError, match="no ratio to it"):  # only once the sources have been scored
        start(parse_spec(none), folder=folder)
    assert not folder.exists()
    right = search_spec(tiny_family, evaluation__tasks=[{"task": "tiny_choice", "metric": "acc"}], **changes)
    assert start(parse_spec(right), folder=folder).state == "finished"


def _tagged(name: str) -> list[str]:
    from evomerge.evaluation.tasks.shipped import shipped_index

    kind, _, tasks = shipped_index()[name]
    return list(tasks) if kind == "TAG" else config_of(name)["task"] if kind == "GROUP" else [name]
