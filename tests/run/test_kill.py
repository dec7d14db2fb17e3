"""Processes that are stopped in the middle: by Ctrl-C, by SIGTERM, by SIGKILL at any moment."""

from __future__ import annotations

import json
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
from evomerge.problem.fake_evaluator import FakeRunner, fake_problem
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.prepare_objective import prepare_objective
from evomerge.run.folder import RunFolder
from evomerge.run.search import resume, start
from evomerge.run.status import read_status
from evomerge.spec.schema import SearchSpec
from evomerge.study.interfaces import NullTracker
from tests.fakes import FAKE, fake_spec
from tests.frame import command, environment, files, invoke, search_spec
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


def test_stopped_with_its_workers_and_then_killed_it_is_the_run_that_was_never_stopped(
    raced_run: Path,
    raced_spec: SearchSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C of the driver of two workers, then SIGKILL of one process in the middle of a race, each resumed in a fresh
    process: the candidates, scores, winner and checkpoint of a run of one process that was never stopped.

    With racing, a random baseline and a score cache that is new."""
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raced_spec.model_dump(mode="json", exclude_unset=True)))
    with _running(command(["run", "tiny.yaml", "--dir", folder, "--workers", "2"]), tmp_path) as running:
        _wait(running, lambda: (folder / "resolved.yaml").exists() and read_status(folder).state == "running")
        second = invoke(capsys, "resume", folder)
        assert (second.code, second.out) == (2, "")
        assert f"{folder} is in use by process {running.pid}" in second.err
        assert json.loads(invoke(capsys, "status", folder, "--json").out)["state"] == "running"
        _wait(running, lambda: _recorded(folder) >= 2)
        workers = _children(running.pid)
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE) == 130
    assert len(workers) == 2
    end = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end, "a worker has outlived its driver"
        time.sleep(0.01)
    assert (tmp_path / "stdout").read_text() == ""
    err = (tmp_path / "stderr").read_text()
    assert "2 workers, of 1 of the 1 threads each" in err
    assert err.rstrip().endswith("stopped; the same command goes on from here")
    assert "Traceback" not in err
    assert "Traceback" not in (folder / "log.txt").read_text()
    assert json.loads(invoke(capsys, "status", folder, "--json").out)["state"] == "stopped"
    found = RunFolder.existing(folder).candidates()
    assert 2 <= len(found) < 13
    assert f"stopped by the user after {len(found)} candidates" in err
    with _running(command(["resume", folder, "--workers", "1"]), tmp_path) as running:
        _wait(running, lambda: _recorded(folder) >= 13)  # generation 1 races
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    assert _recorded(folder) < 18
    resume(folder, workers=1)
    stopped, whole = RunFolder.existing(folder), RunFolder.existing(raced_run)
    by_number = {candidate.number: candidate for candidate in stopped.candidates()}
    assert all(by_number[candidate.number] == candidate for candidate in found)  # with its seconds: not scored again
    assert "pruned" in {candidate.state for candidate in stopped.candidates()}
    for baseline in (False, True):
        records = [run.record(baseline=baseline).candidates() for run in (stopped, whole)]
        assert lasting(records[0]) == lasting(records[1])
    assert stopped.result() == whole.result()
    scores = [dict(files(root / "scores")) for root in (folder, raced_run)]
    assert scores[0].keys() == scores[1].keys()
    assert scores[0] == scores[1]
    # And the checkpoint that was kept has the same bytes.
    kept = [dict(files(root / "best")) for root in (folder, raced_run)]
    weights = [
        {name: content for name, content in written.items() if name.endswith(".safetensors")} for written in kept
    ]
    assert weights[0] == weights[1] != {}


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


def _children(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_an_asynchronous_search_of_two_workers(tmp_path: Path) -> None:
    """With racing and a random baseline: an exact budget of distinct recipes, whose scores are those of one process."""
    changes = {"search__mode": "asynchronous", "evaluation__racing": True, "run__workers": 2}
    spec = fake_spec(search__baseline="random", **changes)
    result = start(spec, folder=tmp_path / "run", parts=FAKE)
    folder = RunFolder.existing(tmp_path / "run")
    found = folder.candidates()
    assert [c.number for c in found] == list(range(18))
    assert len({c.recipe_hash for c in found}) == 18
    assert result.candidates.recorded == 18
    assert any(name.startswith("random search") for name in result.baselines)
    assert not list((folder.root / "scores").glob(".*.partial"))
    (tmp_path / "again" / "scores").mkdir(parents=True)
    problem, store = fake_problem(spec), RunScores(tmp_path / "again")
    runner = FakeRunner(problem)
    objective = prepare_objective(problem, runner, store, NullTracker())
    evaluator = CandidateEvaluator(problem, runner, store, objective)
    for candidate in [c for c in found if c.state == "done"][-3:]:
        again, _ = evaluator.scores(candidate.recipe, SEARCH)
        assert objective.fitness(again) == candidate.fitness
