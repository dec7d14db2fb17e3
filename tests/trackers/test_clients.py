"""Experiment trackers: every candidate once, in one run of theirs, however often ours is stopped; read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import SpecError
from evomerge.run.folder import RunFolder
from evomerge.run.search import resume, start
from evomerge.study.interfaces import NullTracker
from evomerge.trackers.clients import MlflowSink, TensorboardSink
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
