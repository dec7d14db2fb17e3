"""What scripts read of a run: `status --json`, `lineage --json`, `lineage --dot`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from evomerge.report.result import CandidateCounts
from evomerge.report.tables import status_text
from evomerge.run.folder import RunFolder
from evomerge.run.status import read_status
from evomerge.study.candidate import Candidate
from tests.frame import invoke


def test_status_contract(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = invoke(capsys, "status", finished_run, "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    result = json.loads((finished_run / "result.json").read_text())
    assert (found["run"], found["state"]) == ("tiny", "finished")
    assert found["candidates"] == result["candidates"]
    assert set(found["candidates"]) == {"done", "failed", "pruned", "budget"}
    assert found["best"]["candidate"] == result["winner"]["candidate"]
    assert found["best"]["fitness"] == result["winner"]["fitness"]["search"]["value"]
    assert set(found["best"]["scores"]) == {"search", "select", "test", "guard"}
    for scores in (found["best"]["scores"], *found["baselines"].values()):
        for tasks in scores.values():
            for metrics in tasks.values():
                for score in metrics.values():
                    assert set(score) >= {"value", "stderr", "n"}
    assert {"parent:a", "parent:b", "parent:c", "uniform average"} <= set(found["baselines"])


def test_rate_counts_each_second_once(finished_run: Path) -> None:
    status = read_status(finished_run)
    totals = [c.seconds["total"] for c in RunFolder.existing(finished_run).candidates()]
    assert status.candidates_per_hour == pytest.approx(3600 * len(totals) / sum(totals))
    assert status.seconds_left == 0


def test_status_of_a_run_under_way(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "result.json").unlink()
    folder = RunFolder.existing(run)
    with folder.hold():
        status = read_status(run)
        shown = invoke(capsys, "status", run)
    assert status.state == "running"
    assert status.best is not None
    assert status.best.fitness == max(c.fitness for c in folder.candidates() if c.fitness is not None)
    assert set(status.best.scores) == {"search"}
    assert shown.out.startswith("tiny: running; 18 scored, 0 failed, 0 pruned of 18\n")
    assert "candidates an hour" in shown.out
    assert "| search | tiny_choice" in shown.out
    assert read_status(run).state == "stopped"


def test_status_before_the_first_candidate(finished_run: Path, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", RunFolder.existing(finished_run).spec, "")
    status = read_status(folder.root)
    assert status.best is None
    assert status.candidates_per_hour is None
    assert status.candidates == CandidateCounts(done=0, failed=0, pruned=0, budget=18)
    assert status_text(status) == "tiny: stopped; 0 scored, 0 failed, 0 pruned of 18"


def test_lineage_contract(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = invoke(capsys, "lineage", finished_run, "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    keys = {"candidate", "generation", "parents", "operator", "recipe_hash", "state", "fitness", "genome"}
    known = RunFolder.existing(finished_run).candidates()
    assert [entry["candidate"] for entry in found] == list(range(18))
    for entry, candidate in zip(found, known, strict=True):
        assert set(entry) >= keys
        assert entry["parents"] == list(candidate.parents)
        assert entry["recipe_hash"] == candidate.recipe_hash
        assert entry["fitness"] == candidate.fitness


def _last(folder: Path) -> Candidate:
    return RunFolder.existing(folder).candidates()[-1]


def test_lineage_leads_back_to_generation_0(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = _last(finished_run)
    shown = invoke(capsys, "lineage", finished_run, "--candidate", "17")
    lines = shown.out.splitlines()
    assert lines[0].startswith(f"17  [generation {last.generation}]")
    assert all(f"{parent}  [generation" in shown.out for parent in last.parents)
    # Whatever is not drawn as a branch of something is of generation 0.
    assert "[generation 0]" in lines[-1]
    winner = json.loads((finished_run / "result.json").read_text())["winner"]["candidate"]
    assert invoke(capsys, "lineage", finished_run).out.startswith(f"{winner}  [generation")


def test_lineage_as_a_graph(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = invoke(capsys, "lineage", finished_run, "--dot").out
    assert whole.startswith("digraph lineage {")
    assert all(f"  c{number} [label=" in whole for number in range(18))
    one = invoke(capsys, "lineage", finished_run, "--dot", "--candidate", "17").out
    assert all(f"c{parent} -> c17;" in one for parent in _last(finished_run).parents)
    assert len(one.splitlines()) < len(whole.splitlines())


def test_no_such_run_or_candidate(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["status"], ["lineage"], ["export"], ["resume"]):
        rest = ["out"] if arguments == ["export"] else []
        ended = invoke(capsys, *arguments, finished_run.parent / "tinny", *rest)
        assert (ended.code, ended.out) == (2, "")
        assert "no run here (no resolved.yaml); runs beside it: tiny" in ended.err
    ended = invoke(capsys, "lineage", finished_run, "--candidate", "99")
    assert ended.code == 2
    assert "there is no candidate 99; the run has 0 to 17" in ended.err
