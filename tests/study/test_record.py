"""The record: an Optuna study that is the same when read back, and that a kill cannot spoil."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from evomerge.errors import RunError
from evomerge.space.baselines import baselines
from evomerge.space.genome import Genome
from evomerge.study.candidate import Candidate, Outcome, Proposal, first_generation
from evomerge.study.journal import repair
from evomerge.study.optuna_trials import params_of
from evomerge.study.record import Record
from evomerge.system.quiet import quiet_optuna
from tests.algorithms.landscapes import make_space
from tests.frame import environment
from tests.study.scripted_run import SPACE, run

PROPOSALS = first_generation(baselines(SPACE), 99)


def candidate(number: int, outcome: Outcome | None = None) -> Candidate:
    return Candidate.of(PROPOSALS[number], outcome or Outcome(0.25 * number, {"task": {"acc": {"value": 0.5, "n": 4}}}))


def fill(record: Record, count: int) -> None:
    for number in range(count):
        record.append(candidate(number))


@pytest.mark.parametrize("where", ["study.log", "sqlite:///{}/study.db"])
def test_what_is_read_back_is_what_was_written(tmp_path: Path, where: str) -> None:
    place = where.format(tmp_path) if "://" in where else str(tmp_path / where)
    record = Record.open(place, "run", space=SPACE)
    record.append(candidate(0, Outcome(0.5, {"a": {"acc": {"value": 0.5}}}, seconds={"score": 1.5, "total": 2.0})))
    record.append(candidate(1, Outcome(None, state="failed", failure="CandidateError: not finite")))
    record.append(candidate(2, Outcome(0.25, state="pruned", failure="raced out after 40 items")))
    again = Record.open(place, "run", create=False)
    assert again.candidates() == record.candidates()
    assert again.candidates()[0].seconds == {"score": 1.5, "total": 2.0}
    assert len(again) == 3


def test_the_study_is_an_ordinary_one(tmp_path: Path) -> None:
    record = Record.open(tmp_path / "study.log", "run", space=SPACE)
    fill(record, 4)
    record.append(candidate(4, Outcome(None, state="failed", failure="CandidateError: x")))
    record.append(candidate(5, Outcome(0.1, state="pruned")))
    trials = Record.open(tmp_path / "study.log", "run", create=False).study.trials
    states = [TrialState.COMPLETE] * 4 + [TrialState.FAIL, TrialState.PRUNED]
    assert [trial.state for trial in trials] == states
    assert [trial.value for trial in trials[:4]] == [0.0, 0.25, 0.5, 0.75]
    assert trials[1].params == params_of(SPACE, PROPOSALS[1].genome)
    assert trials[1].user_attrs["operator"] == "parent:math"


def test_several_objectives(tmp_path: Path) -> None:
    record = Record.open(tmp_path / "study.log", "run", space=SPACE, objectives=2)
    record.append(candidate(0, Outcome(0.5, objectives=(0.25, 0.75))))
    again = Record.open(tmp_path / "study.log", "run", create=False)
    assert again.study.trials[0].values == [0.25, 0.75]
    assert again.candidates()[0].objectives == (0.25, 0.75)


@pytest.mark.parametrize("where", ["study.log", "sqlite:///{}/study.db"])
def test_objectives_have_names(tmp_path: Path, where: str) -> None:
    place = where.format(tmp_path) if "://" in where else str(tmp_path / where)
    record = Record.open(place, "run", space=SPACE, objectives=2, names=("math", "code"))
    record.append(candidate(0, Outcome(0.5, objectives=(0.25, 0.75))))
    assert Record.open(place, "run", create=False).study.metric_names == ["math", "code"]


def test_estimates_are_intermediate_values(tmp_path: Path) -> None:
    """Step: items seen; of a pruned candidate too. With several objectives Optuna has none, so they are attributes."""
    pruned = Outcome(0.25, state="pruned", failure="raced out: x", estimates={24: 0.375, 48: 0.25})
    one = Record.open(tmp_path / "one.log", "run", space=SPACE)
    one.append(candidate(0, pruned))
    trial = Record.open(tmp_path / "one.log", "run", create=False).study.trials[0]
    assert trial.state is TrialState.PRUNED
    assert trial.intermediate_values == {24: 0.375, 48: 0.25}
    two = Record.open(tmp_path / "two.log", "run", space=SPACE, objectives=2)
    two.append(candidate(0, replace(pruned, objectives=(0.25, 0.5))))
    trial = Record.open(tmp_path / "two.log", "run", create=False).study.trials[0]
    assert trial.intermediate_values == {}
    for name in ("one.log", "two.log"):
        found = Record.open(tmp_path / name, "run", create=False).candidates()[0]
        assert (found.estimates, found.items) == (pruned.estimates, 48)


def test_a_number_is_recorded_once(tmp_path: Path) -> None:
    record = Record.open(tmp_path / "study.log", "run", space=SPACE)
    fill(record, 1)
    with pytest.raises(RunError, match="candidate 0 is recorded already"):
        fill(record, 1)


def test_what_is_missing_or_foreign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such record"):
        Record.open(tmp_path / "study.log", "run", create=False)
    assert not (tmp_path / "study.log").exists()
    fill(Record.open(tmp_path / "study.log", "run", space=SPACE), 1)
    with pytest.raises(RunError, match="holds no study 'other'"):
        Record.open(tmp_path / "study.log", "other", create=False)
    with pytest.raises(RunError, match=r"cannot open nodatabase://\*\*\*@nowhere/runs: .*nodatabase"):
        Record.open("nodatabase://me:secret@nowhere/runs", "run")
    with quiet_optuna():
        study = optuna.create_study(storage=f"sqlite:///{tmp_path}/foreign.db", study_name="run")
        study.add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(RunError, match="trial 0 of the study is not evomerge's"):
        Record.open(f"sqlite:///{tmp_path}/foreign.db", "run")


def test_a_line_torn_at_any_byte_is_cut_off(tmp_path: Path) -> None:
    journal = tmp_path / "study.log"
    record = Record.open(journal, "run")
    short = Candidate(0, 0, Genome(), {}, "0", (), "x", "done", 0.5)
    record.append(short)
    record.append(replace(short, number=1))
    whole = journal.read_bytes()
    kept = whole[: whole[:-1].rindex(b"\n") + 1]
    for cut in range(len(kept), len(whole)):
        journal.write_bytes(whole[:cut])
        assert repair(journal) == cut - len(kept)
        assert journal.read_bytes() == kept
    journal.write_bytes(whole)
    assert repair(journal) == 0
    assert journal.read_bytes() == whole


def test_a_torn_journal_is_read_and_continued(tmp_path: Path) -> None:
    journal = tmp_path / "study.log"
    fill(Record.open(journal, "run", space=SPACE), 3)
    whole = journal.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in [start, start + 1, *range(start + 2, len(whole), 211), len(whole) - 1]:
        journal.write_bytes(whole[:cut])
        record = Record.open(journal, "run", space=SPACE)
        assert len(record) == 2
        record.append(candidate(2))
        assert Record.open(journal, "run", space=SPACE).candidates() == tuple(candidate(n) for n in range(3))


@pytest.mark.parametrize("tail", [b'{"op_code":4,"worker\n', b"\0\0\0\n", b"\0" * 70000])
def test_a_last_line_that_is_no_json_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    journal = tmp_path / "study.log"
    fill(Record.open(journal, "run", space=SPACE), 2)
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    assert len(Record.open(journal, "run", space=SPACE)) == 2
    assert journal.read_bytes() == whole


def test_reading_waits_for_a_writer_instead_of_cutting_its_line(tmp_path: Path) -> None:
    journal = tmp_path / "study.log"
    fill(Record.open(journal, "run", space=SPACE), 2)
    code = (
        "import pathlib, sys, time\n"
        "from evomerge.study.journal import locked\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with locked(path), path.open('ab', buffering=0) as file:\n"
        '    file.write(b\'{"op_code": 2, "worker_id": "x", \')\n'
        "    print('half', flush=True)\n"
        "    time.sleep(0.5)\n"
        '    file.write(b\'"study_id": 0, "user_attr": {"note": 1}}\\n\')\n'
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(journal)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half\n"
    record = Record.open(journal, "run", space=SPACE)
    assert writer.wait(timeout=20) == 0
    writer.stdout.close()
    assert record.study.user_attrs == {"note": 1}
    assert len(record) == 2


def test_a_killed_holder_of_the_lock_leaves_no_lock(tmp_path: Path) -> None:
    journal = tmp_path / "study.log"
    code = (
        "import pathlib, sys, time\n"
        "from evomerge.study.journal import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(journal)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    begin = time.monotonic()
    fill(Record.open(journal, "run", space=SPACE), 1)
    assert time.monotonic() - begin < 10


# Forks, which a process that has threads, as this one may, should not.
KILLS = """
import collections, json, pathlib, sys
from tests.study.kills import recorded, scripted_campaign
root, rows = pathlib.Path(sys.argv[1]), {}
for seed, name in enumerate(sys.argv[2:]):
    done, different, _ = scripted_campaign(name, 4, 30, seed, root / name)
    states = collections.Counter(candidate["state"] for candidate in recorded(root / name / "whole")[0])
    rows[name] = [sum(len(killed.moments) for killed in done), [str(folder) for folder in different], states]
print(json.dumps(rows))
"""


def test_a_run_killed_again_and_again_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    """A few kills of an algorithm that learns and of one that does not; `python bench/kills.py` does 200 of all.

    What a kill can spoil is the record, whoever proposes; that each algorithm goes on from any record as if it had
    never been stopped, `test_loop` shows without processes.
    """
    command = [sys.executable, "-c", KILLS, str(tmp_path), "ga", "random"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert list(rows) == ["ga", "random"]
    for kills, different, states in rows.values():
        assert (kills, different) == (4, [])
        assert states.keys() == {"done", "failed", "pruned"}


def ask_dashboard(app: Any, path: str) -> Any:
    answer: dict[str, str] = {}

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        answer["status"] = status

    environ: dict[str, Any] = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "test"}
    environ |= {"SERVER_PORT": "80", "wsgi.url_scheme": "http", "SCRIPT_NAME": ""}
    body: Iterable[bytes] = app(environ, start_response)
    data = json.loads(b"".join(body))
    assert answer["status"].startswith("200")
    return data


def test_optuna_dashboard_shows_the_study(tmp_path: Path) -> None:
    """Hundreds of candidates of every state and several methods: parameters, importances, intermediate values and user
    attributes that a person can read."""
    from optuna_dashboard import wsgi

    finished = run(tmp_path, "random", 120)
    record = Record.open(tmp_path / "study.log", "run", space=SPACE)
    app = wsgi(record.study._storage)
    studies = ask_dashboard(app, "/api/studies")["study_summaries"]
    assert [study["study_name"] for study in studies] == ["run"]
    place = f"/api/studies/{studies[0]['study_id']}"
    detail = ask_dashboard(app, place)
    states = {"done": "Complete", "failed": "Fail", "pruned": "Pruned"}
    assert [trial["state"] for trial in detail["trials"]] == [states[c.state] for c in finished.candidates]
    assert set(states.values()) == {trial["state"] for trial in detail["trials"]}
    assert detail["has_intermediate_values"]
    assert finished.best is not None
    assert [trial["number"] for trial in detail["best_trials"]] == [finished.best.number]
    for trial, candidate in zip(detail["trials"], finished.candidates, strict=True):
        assert {p["name"] for p in trial["params"]} == set(params_of(SPACE, candidate.genome))
        assert [(v["step"], v["value"]) for v in trial["intermediate_values"]] == list(candidate.estimates.items())
        shown = {item["key"]: item["value"] for item in trial["user_attrs"]}
        assert (shown["operator"], shown.get("failure")) == (candidate.operator, candidate.failure)
        assert shown.get("parents", "") == ", ".join(map(str, candidate.parents))
        assert ("search task acc" in shown) == (candidate.state != "failed")
        assert all(len(value) < 100 for value in shown.values())
    sortable = {item["key"] for item in detail["union_user_attrs"] if item["sortable"]}
    assert {"generation", "fitness", "items", "search task acc", "seconds"} <= sortable
    importances = ask_dashboard(app, f"{place}/param_importances")["param_importances"][0]
    # Genes that only some methods have are no part of an importance: they have no value in the other trials.
    assert "method" in {item["name"] for item in importances}
    assert sum(item["importance"] for item in importances) == pytest.approx(1.0)


def test_a_record_opens_without_the_space_for_reading(tmp_path: Path) -> None:
    space = make_space(methods=("linear", "ties", "frankenmerge"), frankenmerge={"max_layers": 14})
    record = Record.open(tmp_path / "study.log", "run", space=space)
    proposals: list[Proposal] = first_generation(baselines(space), 99)
    for proposal in proposals:
        record.append(Candidate.of(proposal, Outcome(0.5)))
    assert [c.genome for c in Record.open(tmp_path / "study.log", "run").candidates()] == [p.genome for p in proposals]


def test_an_interruption_while_a_candidate_is_written_comes_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record.open(tmp_path / "study.log", "run", space=SPACE)
    add = record._store.append

    def interrupted(candidate: Candidate) -> None:
        signal.raise_signal(signal.SIGINT)
        add(candidate)

    monkeypatch.setattr(record._store, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.append(candidate(0))
    assert len(record) == 1
    assert len(Record.open(tmp_path / "study.log", "run")) == 1
