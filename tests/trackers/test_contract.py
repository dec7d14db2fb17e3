"""What every tracker takes, in the order of the port, and what the console shows of it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from evomerge.space.baselines import baselines
from evomerge.study.candidate import Candidate, Outcome, first_generation
from evomerge.study.interfaces import LogTracker, NullTracker, SearchInfo, Tracker
from evomerge.trackers.console import ConsoleTracker
from evomerge.trackers.metrics import MetricsTracker, Several
from tests.study.scripted_run import SPACE


class ListSink:
    """What an experiment tracker would keep; it has the candidates up to `last` already."""

    written: ClassVar[list[tuple[int, dict[str, float]]]] = []
    last = -1

    def __init__(self, name: str, folder: str, config: Mapping[str, Any]) -> None:
        self.written.clear()

    def write(self, number: int, values: Mapping[str, float]) -> None:
        self.written.append((number, dict(values)))

    def close(self) -> None:
        pass


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "null": NullTracker,
    "log": LogTracker,
    "console": ConsoleTracker,
    "metrics": lambda: MetricsTracker(ListSink),
    "several": lambda: Several([ConsoleTracker(), MetricsTracker(ListSink)]),
}
PROPOSALS = first_generation(baselines(SPACE), 4)
DONE = [Candidate.of(proposal, Outcome(0.1 * number)) for number, proposal in enumerate(PROPOSALS)]
FAILED = Candidate.of(PROPOSALS[3], Outcome(None, state="failed", failure="MemoryError: no memory"))
SEARCH = SearchInfo("runs/x", "ga", 10, 7, recorded=(DONE[1],))


def follow(tracker: Tracker) -> None:
    """A short run."""
    tracker.begin("x")
    tracker.report("opening models and tasks")
    tracker.report("the data differ", "warning")
    tracker.started(SEARCH)
    for candidate in (DONE[2], FAILED):
        tracker.candidate(candidate)
    tracker.report("the budget is spent")
    tracker.close()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_is_followed_and_standard_output_is_left_alone(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    follow(TRACKERS[name]())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_may_end_before_its_search_begins(name: str) -> None:
    tracker = TRACKERS[name]()
    tracker.begin("x")
    tracker.close()
    tracker.close()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_search_of_several_objectives_without_scores_is_followed(name: str) -> None:
    tracker = TRACKERS[name]()
    tracker.begin("x")
    tracker.started(replace(SEARCH, objectives=("a", "b"), recorded=()))
    tracker.candidate(FAILED)
    tracker.close()


def test_the_console_shows_a_line_for_everything(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "evomerge.run"):
        follow(ConsoleTracker())
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "x: opening models and tasks",
        "x: warning: the data differ",
        "x: 1 of 10 candidates are recorded; 7 genes, ga; the run is in runs/x",
    ]
    assert lines[3] == "x: candidate 2 of 10: 0.2000, best 0.2000, 0 s left"
    assert lines[4] == "x: candidate 3 of 10: failed (MemoryError: no memory), best 0.2000, 0 s left"
    assert lines[5] == "x: the budget is spent"
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO", "INFO", "INFO", "INFO"]


def test_a_terminal_shows_one_table_and_no_line_for_each_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _on_terminal(monkeypatch)
    text = _plain(shown)
    assert "candidate 2 of 10" not in text
    last = text[text.rindex("task and metric") :]
    assert "t acc" in last
    assert "0.250 ± 0.100" in last
    assert "0.2000" in last
    assert "1 failed" in last
    assert max(map(len, text.splitlines())) <= 100


def test_a_terminal_shows_a_line_for_each_candidate_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "x: candidate 2 of 10: 0.2000" in _plain(_on_terminal(monkeypatch, verbose=True))


def _on_terminal(monkeypatch: pytest.MonkeyPatch, **options: bool) -> str:
    """What a terminal gets to see of a short run."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    tracker = ConsoleTracker(**options)
    tracker.begin("x")
    tracker.started(replace(SEARCH, recorded=()))
    scores = {
        "search": {"t": {"acc": {"value": 0.25, "stderr": 0.1, "n": 8}, "prob": {"value": 0.2, "stderr": None, "n": 8}}}
    }
    for candidate in (replace(DONE[2], scores=scores), FAILED):
        tracker.candidate(candidate)
    tracker.close()
    return stream.getvalue()


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
