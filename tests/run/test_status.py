"""What scripts read of a run: `status --json`, `lineage --json`, `lineage --dot`."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
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


def test_status_of_a_finished_run_begins_with_the_verdict_and_fits_a_screen(finished_run: Path) -> None:
    status = read_status(finished_run)
    lines = status_text(status).splitlines()
    assert lines[:2] == ["tiny: finished", status.verdict]
    assert len(lines) <= 24
    assert max(map(len, lines[2:])) <= 100
    assert status.best is not None
    test = status.best.overall["test"]
    assert f"winner: candidate {status.best.candidate}, overall score {test.value:.3f}" in "\n".join(lines)
    many = {"search": {f"task_{k}": {"acc": test} for k in range(60)}}
    crowded = status_text(replace(status, best=replace(status.best, scores=many)))
    assert len(crowded.splitlines()) <= 24
    assert "44 more tasks" in crowded


def test_candidates_are_listed(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = {c.number: c for c in RunFolder.existing(finished_run).candidates()}
    ended = invoke(capsys, "candidates", finished_run, "-n", "3")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ended.out.splitlines() if line[:1] == "|"]
    assert rows[0] == ["candidate", "generation", "state", "fitness", "items", "made by"]
    best = sorted(history, key=lambda n: (-(history[n].fitness or 0), n))[:3]
    assert [int(row[0]) for row in rows[2:]] == best
    assert "3 of 18; --limit N shows more" in ended.out
    listed = list(
        csv.DictReader(invoke(capsys, "candidates", finished_run, "--csv", "--sort", "number").out.splitlines())
    )
    assert [int(row["candidate"]) for row in listed] == list(range(18))
    assert [float(row["fitness"]) for row in listed] == [history[k].fitness for k in range(18)]
    assert float(listed[0]["tiny_choice/acc"]) == history[0].scores["search"]["tiny_choice"]["acc"]["value"]
    parents = invoke(capsys, "candidates", finished_run, "--made-by", "PARENT:", "--csv").out.splitlines()
    assert len(parents) == 1 + 4
    slowest = list(
        csv.DictReader(invoke(capsys, "candidates", finished_run, "--csv", "--sort", "time").out.splitlines())
    )
    assert float(slowest[0]["seconds"]) == max(c.seconds["total"] for c in history.values())
    assert "failed" not in invoke(capsys, "candidates", finished_run, "--state", "failed").out


def test_lineage_says_what_changed(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = RunFolder.existing(finished_run).candidates()
    child = next(c for c in reversed(history) if c.parents)
    ended = invoke(capsys, "lineage", finished_run, "--candidate", str(child.number))
    assert f"fitness {child.fitness:.4f}" in ended.out
    assert f"from {child.parents[0]}: " in ended.out


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
    assert shown.out.startswith("tiny: running\n18 of 18 candidates: 18 scored in full, 0 stopped early, 0 failed\n")
    assert "candidates an hour" in shown.out
    assert "by this the search compares" in shown.out
    assert "| tiny_choice acc" in shown.out
    assert read_status(run).state == "stopped"


def test_status_before_the_first_candidate(finished_run: Path, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", RunFolder.existing(finished_run).spec, "")
    status = read_status(folder.root)
    assert status.best is None
    assert status.candidates_per_hour is None
    assert status.candidates == CandidateCounts(done=0, failed=0, pruned=0, budget=18)
    assert status_text(status) == ("tiny: stopped\n0 of 18 candidates: 0 scored in full, 0 stopped early, 0 failed")


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
