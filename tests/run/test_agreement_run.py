"""A search that nothing but agreement with the sources steers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.errors import SpecError
from evomerge.evaluation.score_store import RunScores
from evomerge.run.search import resume, start
from evomerge.spec.load import parse_spec
from tests.frame import search_spec
from tests.run.test_scorer_run import Stop


def test_agreement_steers_takes_steps_and_goes_on_the_same(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    texts = [{"source": "abc"[k % 3], "text": f"text number {k} of what {k * k} is about"} for k in range(36)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    changes = {
        "evaluation__tasks": [{"agreement": "texts.jsonl"}],
        "evaluation__guard": ["tiny_choice"],
        "search__candidates": 10,
        "search__finalists": 2,
        "run__keep": 0,
        "space": {"methods": ["linear"], "layer_groups": 1},
    }
    spec = parse_spec(search_spec(tiny_family, **changes), beside=tmp_path)
    whole = start(spec, folder=tmp_path / "whole")
    assert whole.winner.scores["test"]["agreement"]["divergence"].n == 9
    jacobians = list((tmp_path / "whole" / "scores").glob("*-jacobian.npz"))
    assert jacobians
    plan = jacobians[0].name.removesuffix("-jacobian.npz")
    assert list(RunScores(tmp_path / "whole").load_jacobian(plan) or {}) == ["agreement"]
    with pytest.raises(KeyboardInterrupt):
        start(spec, folder=tmp_path / "stopped", tracker=Stop(8))
    assert resume(tmp_path / "stopped") == whole


def test_agreement_is_native(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"source": "a", "text": "x"}\n')
    changes = {"evaluation__tasks": [{"agreement": "texts.jsonl"}], "evaluation__backend": "hf"}
    with pytest.raises(SpecError, match="task 'agreement' measures agreement, which backend native alone can"):
        parse_spec(search_spec(tiny_family, **changes), beside=tmp_path)
    with pytest.raises(SpecError, match=r"tasks.0.agreement: no file absent.jsonl"):
        parse_spec(search_spec(tiny_family, evaluation__tasks=[{"agreement": "absent.jsonl"}]), beside=tmp_path)
