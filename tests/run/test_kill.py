"""Processes that are stopped in the middle: by Ctrl-C, by SIGTERM, by SIGKILL at any moment."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.evaluation.score_store import RunScores
from evomerge.evaluation.splits import SEARCH
from evomerge.problem.candidate_evaluator import CandidateEvaluator
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.prepare_objective import prepare_objective
from evomerge.problem.problem import open_problem
from evomerge.run.folder import RunFolder
from evomerge.run.search import resume, start
from evomerge.spec.load import parse_spec
from evomerge.study.interfaces import NullTracker
from tests.frame import command, environment, files, invoke, process, search_spec
from tests.run.test_search import lasting

pytestmark = pytest.mark.slow  # processes of their own, each of which loads torch


PATIENCE = 300  # seconds, for a machine that is busy with other things


@contextmanager
def _running(arguments: list[str], cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is there for the length of a block, its stderr in `stderr` of `cwd`."""
    with (cwd / "stdout").open("wb") as out, (cwd / "stderr").open("wb") as err:
        running = subprocess.Popen(arguments, cwd=cwd, env=environment(), stdout=out, stderr=err)
        try:
            yield running
        finally:
            running.kill()
            running.wait()


def _recorded(folder: Path) -> int:
    journal = folder / "study.log"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def _wait(running: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    """Waits until something has happened."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert running.poll() is None, "the process ended before anything happened"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def test_killed_three_times_is_never_stopped(finished_run: Path, tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL at three random moments, each resumed in a fresh process: the candidates, scores and winner of a run that
    was never stopped."""
    moments = random.Random(20)
    folder = tmp_path / "run"
    (tmp_path / "tiny.yaml").write_text((finished_run / "search.yaml").read_text())
    for kill in range(3):
        arguments: list[str | Path] = ["run", "tiny.yaml", "--dir", folder] if kill % 2 == 0 else ["resume", folder]
        least = _recorded(folder) + moments.randrange(1, 4)
        with _running(command(arguments), tmp_path) as running:
            _wait(running, lambda least=least: _recorded(folder) >= least)  # type: ignore[misc]
            time.sleep(moments.random() * 0.1)
            running.send_signal(signal.SIGKILL)
            assert running.wait() == -signal.SIGKILL
    assert _recorded(folder) < 18
    ended = process("resume", folder)
    assert ended.code == 0, ended.err
    ours, theirs = RunFolder.existing(folder), RunFolder.existing(finished_run)
    assert lasting(ours.candidates()) == lasting(theirs.candidates())
    assert ours.result() == theirs.result()
    scores = [dict(files(root / "scores")) for root in (folder, finished_run)]
    assert scores[0].keys() == scores[1].keys()
    assert scores[0] == scores[1]
    # And the checkpoint that was kept has the same bytes.
    kept = [dict(files(root / "best")) for root in (folder, finished_run)]
    weights = [{name: content for name, content in found.items() if name.endswith(".safetensors")} for found in kept]
    assert weights[0] == weights[1] != {}


def test_killed_in_the_middle_of_a_race(
    tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With racing, a random baseline and a score cache that is new: as never stopped, and never cached."""
    changes = {"evaluation__racing": True, "search__baseline": "random", "run__keep": 0}
    whole = parse_spec(search_spec(tiny_family, **changes))
    start(whole, folder=tmp_path / "whole")
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(search_spec(tiny_family, evaluation__cache=True, **changes)))
    folder = tmp_path / "run"
    with _running(command(["run", "tiny.yaml", "--dir", folder]), tmp_path) as running:
        _wait(running, lambda: _recorded(folder) >= 13)  # generation 1 races
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    resume(folder)
    ours, theirs = RunFolder.existing(folder), RunFolder.existing(tmp_path / "whole")
    assert "pruned" in {candidate.state for candidate in ours.candidates()}
    for baseline in (False, True):
        records = [run.record(baseline=baseline).candidates() for run in (ours, theirs)]
        assert lasting(records[0]) == lasting(records[1])
    assert ours.result() == theirs.result()
    assert dict(files(folder / "scores")) == dict(files(tmp_path / "whole" / "scores"))


def test_stopped_by_the_user(
    finished_run: Path, tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C: exit code 130, what was scored is kept; a second process is told who holds the run meanwhile."""
    spec = search_spec(tiny_family, search__candidates=4000, run__keep=0)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(spec))
    folder = tmp_path / "run"
    with _running(command(["run", "tiny.yaml", "--dir", folder]), tmp_path) as running:
        _wait(running, lambda: _recorded(folder) >= 2)
        second = invoke(capsys, "resume", folder)
        assert (second.code, second.out) == (2, "")
        assert f"{folder} is in use by process {running.pid}" in second.err
        assert json.loads(invoke(capsys, "status", folder, "--json").out)["state"] == "running"
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE) == 130
    assert (tmp_path / "stdout").read_text() == ""
    err = (tmp_path / "stderr").read_text()
    assert err.rstrip().endswith("stopped; the same command goes on from here")
    assert "Traceback" not in err
    assert json.loads(invoke(capsys, "status", folder, "--json").out)["state"] == "stopped"
    found = RunFolder.existing(folder).candidates()
    assert len(found) >= 2
    assert f"stopped by the user after {len(found)} candidates" in err
    expected = lasting(RunFolder.existing(finished_run).candidates())
    assert lasting(found)[:10] == expected[: min(10, len(found))]


def test_sigterm_stops_as_ctrl_c_does(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(search_spec(tiny_family, run__keep=0)))
    measure, before = ModelRunner.measure, signal.getsignal(signal.SIGTERM)
    measured: list[Any] = []

    def terminated(self: ModelRunner, plan: Any, part: Any) -> Any:
        measured.append(part)
        if len(measured) == 6:
            signal.raise_signal(signal.SIGTERM)
        return measure(self, plan, part)

    monkeypatch.setattr(ModelRunner, "measure", terminated)
    try:
        stopped = invoke(capsys, "run", tmp_path / "tiny.yaml", "--dir", tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (stopped.code, stopped.out) == (130, "")
    assert 0 < len(RunFolder.existing(tmp_path / "run").candidates()) < 18


def _merge_recipe(folder: Path, family: dict[str, Path]) -> Path:
    path = folder / "recipe.yaml"
    models = [{"model": str(family[name]), "parameters": {"weight": 0.5, "density": 0.5}} for name in "ab"]
    path.write_text(yaml.safe_dump({"merge_method": "ties", "base_model": str(family["base"]), "models": models}))
    return path


SLOW = """
import sys, time
from evomerge.engine import to_disk
whole = to_disk.parts
def slowly(*args, **kwargs):
    time.sleep(0.05)
    return whole(*args, **kwargs)
to_disk.parts = slowly
from evomerge.cli.main import main
main()
"""


def test_killed_in_the_middle_of_a_merge(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old checkpoint is there, byte for byte; the same command then replaces it."""
    recipe, out = _merge_recipe(tmp_path, tiny_family), tmp_path / "out"
    shutil.copytree(tiny_family["c"], out)
    before = dict(files(out))
    arguments = [sys.executable, "-c", SLOW, "merge", str(recipe), str(out), "--overwrite"]
    with _running(arguments, tmp_path) as running:
        _wait(running, lambda: bool(list(tmp_path.glob(".out.partial-*/model.safetensors"))))
        time.sleep(0.2)  # some tensors are written, not all
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    assert dict(files(out)) == before
    again = invoke(capsys, "merge", recipe, out, "--overwrite")
    assert (again.code, again.out.strip()) == (0, str(out))
    assert dict(files(out)) != before
    assert not list(tmp_path.glob(".out.partial-*"))


def test_killed_in_the_middle_of_an_export(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a merge: what is written is scored before it gets its name."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    out = tmp_path / "home"
    with _running(command(["export", run, out]), tmp_path) as running:
        _wait(running, lambda: bool(list(tmp_path.glob(".home.partial-*"))))
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    assert not out.exists()
    again = invoke(capsys, "export", run, out)
    assert again.code == 0, again.err
    assert "the same numbers as in the search" in again.out
    assert (out / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".home.partial-*"))


def test_two_workers_killed_with_their_driver(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of the driver, then no workers: as one process that was never stopped."""
    folder = tmp_path / "run"
    (tmp_path / "tiny.yaml").write_text((finished_run / "search.yaml").read_text())
    with _running(command(["run", "tiny.yaml", "--dir", folder, "--workers", "2"]), tmp_path) as running:
        _wait(running, lambda: _recorded(folder) >= 8)
        workers = _children(running.pid)
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert len(workers) == 2
    end = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end, "a worker has outlived its driver"
        time.sleep(0.01)
    assert _recorded(folder) < 18
    ended = invoke(capsys, "resume", folder, "--workers", "1")
    assert ended.code == 0, ended.err
    ours, theirs = RunFolder.existing(folder), RunFolder.existing(finished_run)
    assert lasting(ours.candidates()) == lasting(theirs.candidates())
    assert ours.result() == theirs.result()
    assert dict(files(folder / "scores")) == dict(files(finished_run / "scores"))
    assert "2 workers, of 1 of the 1 threads each" in (tmp_path / "stderr").read_text()
    assert "Traceback" not in (folder / "log.txt").read_text()


def _children(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_an_asynchronous_search_of_two_workers(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """With racing and a random baseline: an exact budget of distinct recipes, whose scores are those of one process."""
    changes = {"search__mode": "asynchronous", "evaluation__racing": True, "run__workers": 2, "run__keep": 0}
    spec = parse_spec(search_spec(tiny_family, search__baseline="random", **changes))
    result = start(spec, folder=tmp_path / "run")
    folder = RunFolder.existing(tmp_path / "run")
    found = folder.candidates()
    assert [c.number for c in found] == list(range(18))
    assert len({c.recipe_hash for c in found}) == 18
    assert result.candidates.recorded == 18
    assert any(name.startswith("random search") for name in result.baselines)
    assert not list((folder.root / "scores").glob(".*.partial"))
    (tmp_path / "again" / "scores").mkdir(parents=True)
    problem, store = open_problem(spec), RunScores(tmp_path / "again")
    runner = ModelRunner(problem)
    objective = prepare_objective(problem, runner, store, NullTracker())
    evaluator = CandidateEvaluator(problem, runner, store, objective)
    for candidate in [c for c in found if c.state == "done"][-3:]:
        again, _ = evaluator.scores(candidate.recipe, SEARCH)
        assert objective.fitness(again) == candidate.fitness
