"""Experiment trackers: every candidate once, in one run of theirs, however often ours is stopped; read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import SpecError
from evomerge.run.folder import RunFolder
from evomerge.run.search import resume, start
from evomerge.study.interfaces import NullTracker
from evomerge.trackers.clients import MlflowSink, TensorboardSink, TrackioSink, WandbSink
from evomerge.trackers.metrics import MetricsTracker
from evomerge.trackers.registry import SINKS, with_trackers
from tests.fakes import FAKE, fake_spec
from tests.trackers.test_contract import DONE, FAILED, SEARCH, ListSink


def run_and_extend(folder: Path, sink: type[Any]) -> dict[int, float | None]:
    """Searches, and goes on with more candidates in another session; gives the record's fitness by number."""
    spec = fake_spec(search__candidates=7, search__finalists=2)
    start(spec, folder=folder, parts=FAKE, tracker=MetricsTracker(sink))
    resume(folder, candidates=11, parts=FAKE, tracker=MetricsTracker(sink))
    return {c.number: c.fitness for c in RunFolder.existing(folder).candidates()}


def test_tensorboard_has_every_candidate_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record = run_and_extend(tmp_path / "run", TensorboardSink)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"fitness", "best_fitness", "items", "choice/acc"} <= set(events.Tags()["scalars"])
    logged = [(event.step, event.value) for event in events.Scalars("fitness")]
    assert logged == [(number, pytest.approx(value)) for number, value in record.items() if value is not None]


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    record = run_and_extend(tmp_path / "run", MlflowSink)
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("evomerge").experiment_id])
    assert len(runs) == 1
    history = client.get_metric_history(runs[0].info.run_id, "fitness")
    logged = sorted((metric.step, metric.value) for metric in history)
    assert logged == [(number, value) for number, value in record.items() if value is not None]


def test_trackio_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not part of the suite's installation: it brings libraries that change what Ray, Plotly and transformers do."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    record = run_and_extend(tmp_path / "run", TrackioSink)
    [run] = storage.get_runs("evomerge")
    rows = [(row["step"], row["fitness"]) for row in storage.get_logs("evomerge", run) if "fitness" in row]
    assert rows == [(number, value) for number, value in record.items() if value is not None]


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """What a session's file of W&B has logged: a log of LevelDB behind seven bytes, of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    content, position, part, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:  # no header fits into what is left of a block
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        part += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or a last part
            entry, part = wandb_internal_pb2.Record.FromString(part), b""
            if entry.WhichOneof("record_type") == "history":
                items = ((item.key or "/".join(item.nested_key), item.value_json) for item in entry.history.item)
                rows.append({key: json.loads(value) for key, value in items})
    return rows


def test_wandb_has_every_candidate_in_its_last_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not part of the suite's installation, which would take 70 MB more: `pip install "evomerge[wandb]"` first."""
    pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    record = run_and_extend(tmp_path / "run", WandbSink)
    sessions = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in sessions}) == 1  # one run of theirs
    assert [len(wandb_rows(path)) for path in sessions] == [7, 11]
    rows = [(row["candidate"], row["fitness"]) for row in wandb_rows(sessions[-1]) if "fitness" in row]
    assert rows == [(number, value) for number, value in record.items() if value is not None]


def test_what_a_tracker_has_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ListSink, "last", 1)
    tracker = MetricsTracker(ListSink)
    tracker.started(replace(SEARCH, recorded=(DONE[1], DONE[2])))
    tracker.candidate(FAILED)
    assert [number for number, _ in ListSink.written] == [2, 3]
    assert ListSink.written[0][1]["best_fitness"] == DONE[2].fitness
    assert ListSink.written[1][1] == {
        **{"generation": 0, "items": 0, "failed": 1.0, "pruned": 0.0, "best_fitness": DONE[2].fitness}
    }


def test_a_tracker_that_fails_is_given_up_and_the_search_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Away(ListSink):
        def write(self, number: int, values: Mapping[str, float]) -> None:
            raise ConnectionError("the server is away")

    tracker = MetricsTracker(Away)
    tracker.started(replace(SEARCH, recorded=()))
    for candidate in DONE:
        tracker.candidate(candidate)
    tracker.close()
    assert [record.message for record in caplog.records if "the server is away" in record.message] == [
        "an experiment tracker failed and gets no more of this session: the server is away"
    ]


def test_one_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = NullTracker()
    assert with_trackers(shown, []) is shown
    monkeypatch.setattr("evomerge.trackers.registry.find_spec", lambda name: None)
    with pytest.raises(SpecError) as caught:
        with_trackers(shown, list(SINKS))
    assert [text.split("`")[1] for text in caught.value.problems] == [f'pip install "evomerge[{n}]"' for n in SINKS]
