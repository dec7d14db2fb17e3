"""`export --lora` and `extract-lora`: an adapter that opens as base+adapter and scores what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.run.folder import RunFolder
from tests.frame import TASKS, invoke


@pytest.mark.slow
def test_a_winner_as_an_adapter(
    finished_run: Path, tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.existing(finished_run)
    chosen = next(c for c in folder.candidates() if c.recipe["merge_method"] == "task_arithmetic")
    out = tmp_path / "adapter"
    arguments = ("export", finished_run, out, "--lora", "32", "--candidate", str(chosen.number))
    ended = invoke(capsys, *arguments)
    assert ended.code == 0, ended.err
    assert f"candidate {chosen.number} is in {out}. Of rank 32 in " in ended.out
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores) == ["split", "merge", "base + adapter"]
    for task, row in scores["merge"].items():
        for metric, value in row.items():
            assert scores["base + adapter"][task][metric] == pytest.approx(value, abs=1e-3)
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "peft"
    assert "| base + adapter |" in card
    evaluated = ("eval", f"{tiny_family['base']}+{out}", "--tasks", "tiny_text", "--include-path", TASKS, "--json")
    assert "bits_per_byte" in invoke(capsys, *evaluated).out
    taken = invoke(capsys, *arguments)
    assert taken.code == 1
    assert "is not empty" in taken.err
    both = invoke(capsys, "export", finished_run, tmp_path / "x", "--lora", "2", "--recipe")
    assert both.code == 2
    assert "choose one" in both.err


def test_a_fine_tune_as_an_adapter(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    ended = invoke(capsys, "extract-lora", tiny_family["a"], tiny_family["base"], out, "--rank", "64")
    assert ended.code == 0, ended.err
    assert f"{out}: Of rank 64 in " in ended.out
    applied, tuned = open_checkpoint(f"{tiny_family['base']}+{out}"), open_checkpoint(str(tiny_family["a"]))
    assert list(applied.tensors) == list(tuned.tensors)
    for name in tuned.tensors:
        assert torch.allclose(applied.tensor(name), tuned.tensor(name), atol=1e-4), name
    same = invoke(capsys, "extract-lora", tiny_family["a"], tiny_family["a"], tmp_path / "none")
    assert same.code == 2
    assert "is its own base" in same.err
