"""Taking a candidate home: the checkpoint scores what the search measured, by lm-eval's own count too."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge.evaluation.splits import TEST
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import open_problem
from evomerge.recipe import load_recipe, parse_recipe
from evomerge.run.folder import RunFolder
from evomerge.run.merge import merge_to_folder
from evomerge.study.record import Record
from evomerge.system.quiet import quiet
from evomerge.system.sealed import seal_json
from tests.frame import TASKS, files, invoke


@pytest.fixture(scope="module")
def exported(finished_run: Path) -> Path:
    """The checkpoint that the run kept."""
    return next((finished_run / "best").iterdir())


def winner(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())["winner"]
    return found


def test_scores_are_the_search_s(finished_run: Path, exported: Path) -> None:
    kept = json.loads((exported / "scores.json").read_text())
    assert kept["split"] == "test"
    assert kept["measured"] == kept["now"]
    for task, metrics in winner(finished_run)["scores"]["test"].items():
        assert kept["measured"][task] == {metric: score["value"] for metric, score in metrics.items()}


def test_lm_eval_counts_the_same(
    finished_run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command on the card gives the card's numbers, on the items in the file beside it."""
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.tasks import TaskManager

    problem = open_problem(RunFolder.existing(finished_run).spec)
    items = json.loads((exported / "items.json").read_text())
    assert items == {task: list(numbers) for task, numbers in problem.splits[TEST].items()}
    card = (exported / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("lm_eval --model hf"))
    assert f" --tasks {','.join(items)} --include_path " in line
    words = [word.replace("OUT", str(exported)) for word in shlex.split(line)]
    words[words.index("--include_path") + 1] = str(TASKS)
    monkeypatch.chdir(TASKS)  # lm-eval looks for a task's data from the working directory
    # The tasks are the include path's: lm-eval's own 14,000 files need not be parsed, nor this machine be described.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu", "--output_path", str(tmp_path)])
    cli = HarnessCLI()
    with quiet():
        cli.execute(cli.parse_args())
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    stated = json.loads((exported / "scores.json").read_text())["now"]
    for task, metric in (("tiny_choice", "acc"), ("tiny_text", "bits_per_byte")):
        assert results[task][f"{metric},none"] == pytest.approx(stated[task][metric], abs=1e-6)
        row = next(line for line in card.splitlines() if line.startswith(f"| {task} ") and f"| {metric} " in line)
        assert row.split("|")[3].strip() == f"{stated[task][metric]:.4f}"


def test_what_an_export_holds(finished_run: Path, exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "recipe.yaml",
        "scores.json",
    }
    card = (exported / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["tags"][:2] == ["evomerge", "merge"]
    sections = ["Scores on the test items", "Beside its sources", "How to reproduce it", "Lineage", "Samples"]
    assert re.findall("(?m)^## (.*)$", card) == [*sections, "Sources", "Recipe"]
    assert "the same numbers as in the search" in card
    scores = card.split("## Scores on the test items\n")[1].split("\n## ")[0]
    assert [row.split("|")[1].strip() for row in scores.splitlines() if row.startswith("| tiny_")] == [
        *("tiny_choice", "tiny_text")  # one metric a task
    ]
    samples = card.split("## Samples\n")[1].split("\n## ")[0].strip().splitlines()
    assert [cell.strip() for cell in samples[2].split("|")[1:-1]] == ["prompt", "this model", "a"]
    assert len(samples) == 2 + 2 + 3  # a sentence, the head, three prompts
    number = winner(finished_run)["candidate"]
    assert f"\n{number}  [generation" in card


def test_recipe_beside_the_weights_makes_them(exported: Path, tmp_path: Path) -> None:
    out = merge_to_folder(load_recipe(exported / "recipe.yaml"), tmp_path / "again")
    assert (out / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_any_candidate(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that was scored on the search items only; and the run is left as it was."""
    before = dict(files(finished_run))
    loser = winner(finished_run)["candidate"]
    rows = [c for c in RunFolder.existing(finished_run).candidates() if c.generation > 0]
    tested = {path.name for path in (finished_run / "scores").glob("*-test.npz")}
    problem = open_problem(RunFolder.existing(finished_run).spec)
    runner = ModelRunner(problem)
    chosen = next(c for c in rows if f"{runner.plan(c.recipe).digest}-test.npz" not in tested and c.number != loser)
    ended = invoke(capsys, "export", finished_run, tmp_path / "out", "--candidate", str(chosen.number))
    assert ended.code == 0, ended.err
    assert f"candidate {chosen.number} ({chosen.operator}) is in {tmp_path / 'out'}" in ended.out
    assert "scored again on the search items: the same numbers as in the search" in ended.out
    assert "warning: the models' licences do not agree" in ended.out
    kept = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert kept["now"]["tiny_text"]["bits_per_byte"] == pytest.approx(
        chosen.scores["search"]["tiny_text"]["bits_per_byte"]["value"]
    )
    assert dict(files(finished_run)) == before
    taken = invoke(capsys, "export", finished_run, tmp_path / "out", "--candidate", str(chosen.number))
    assert taken.code == 1
    assert "is not empty" in taken.err


def test_every_recipe(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `--recipe` writes means the candidate: mergekit's keys where mergekit can say it, the same weights."""
    problem = open_problem(RunFolder.existing(finished_run).spec)
    runner = ModelRunner(problem)
    known = RunFolder.existing(finished_run).candidates()
    for candidate in known:
        path = tmp_path / f"{candidate.number}.yaml"
        ended = invoke(capsys, "export", finished_run, path, "--recipe", "--candidate", str(candidate.number))
        assert ended.code == 0, ended.err
        written = parse_recipe(yaml.safe_load(path.read_text()))
        ours, theirs = runner.plan(candidate.recipe), runner.plan(written.to_mapping())
        assert [(op.output, op.digest) for op in ours.operations] == [
            (op.output, op.digest) for op in theirs.operations
        ]
    taken = invoke(capsys, "export", finished_run, tmp_path / "0.yaml", "--recipe")
    assert taken.code == 2
    assert "--overwrite replaces it" in taken.err
    assert invoke(capsys, "export", finished_run, tmp_path / "0.yaml", "--recipe", "--overwrite").code == 0


def test_refusals(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = invoke(capsys, "export", finished_run, tmp_path / "out", "--candidate", "99")
    assert unknown.code == 2
    assert "no candidate 99; there are 18, counted from 0" in unknown.err
    size = invoke(capsys, "export", finished_run, tmp_path / "out", "--max-shard-size", "huge")
    assert size.code == 2
    assert "'huge' is no size" in size.err
    assert not (tmp_path / "out").exists()


def test_a_failed_candidate_has_nothing_to_export(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    folder = RunFolder.existing(run)
    last = folder.candidates()[-1]
    failed = replace(last, number=18, state="failed", fitness=None, failure="not scored: its logits are not finite")
    Record.open(run / "study.log", "tiny").append(failed)
    ended = invoke(capsys, "export", run, tmp_path / "out", "--candidate", "18")
    assert ended.code == 2
    assert "candidate 18 has no scores (failed: not scored: its logits are not finite)" in ended.err
    assert not (tmp_path / "out").exists()


def test_changed_models_are_noticed(
    finished_run: Path, tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export from other weights than the search's would be another model."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    environment = json.loads((run / "environment.json").read_text())
    del environment["checksum"]
    environment["content"]["models"][str(tiny_family["a"])] = "0" * 32
    (run / "environment.json").write_text(seal_json(environment))
    ended = invoke(capsys, "export", run, tmp_path / "out")
    assert ended.code == 2
    assert "the models or the data have changed" in ended.err


def test_exported_weights_are_the_resident_ones(finished_run: Path, exported: Path) -> None:
    problem = open_problem(RunFolder.existing(finished_run).spec)
    runner = ModelRunner(problem)
    model = runner.materialise(runner.plan(winner(finished_run)["recipe"]))
    held = model.state_dict()
    for name, value in load_file(exported / "model.safetensors").items():
        assert torch.equal(held[name], value)
