"""The pictures of a run and the numbers behind them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from evomerge.report.drawing import label
from evomerge.report.figures import pictures, recipe
from evomerge.report.html import csv_text
from evomerge.report.run_data import RunData
from evomerge.run.report import read_run
from evomerge.run.search import start
from tests.fakes import FAKE, fake_spec


@pytest.fixture(scope="module")
def front_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search for a front, with racing and a random search, on a formula: its models do not exist."""
    folder = tmp_path_factory.mktemp("front") / "run"
    spec = fake_spec(
        search__objectives="pareto",
        search__baseline="random",
        evaluation__racing=True,
    )
    start(spec, folder=folder, parts=FAKE)
    return folder


@pytest.fixture(scope="module")
def front_data(front_run: Path) -> RunData:
    return read_run(front_run)


def test_every_picture_of_a_finished_run(finished_run: Path) -> None:
    data = read_run(finished_run)
    drawn = {picture.name: picture for picture in pictures(data)}
    assert {"scores", "scores_by_task", "history", "recipe", "selection_bias", "time"} <= set(drawn)
    assert data.result is not None
    assert data.layers == 4
    winner = drawn["scores"].rows[-1]
    assert winner[:2] == (f"winner: candidate {data.result.winner.candidate}", data.result.winner.fitness["test"].value)
    assert len(drawn["scores"].rows) == 1 + len(data.result.baselines)
    assert [row[1] for row in drawn["history"].rows] == list(range(18))
    assert {sample.source for sample in data.samples} == {"a"}


def test_every_picture_of_a_front_without_its_models(front_data: RunData) -> None:
    drawn = {picture.name: picture for picture in pictures(front_data)}
    assert {"front", "hypervolume", "history"} <= set(drawn)
    assert front_data.layers is None
    assert {row[0] for row in drawn["history"].rows} == {"search", "random search"}
    on_front = {row[0] for row in drawn["front"].rows if row[1]}
    assert front_data.result is not None
    assert front_data.result.winner.candidate in on_front


def test_the_best_of_the_line_never_falls(front_data: RunData) -> None:
    rows = next(picture for picture in pictures(front_data) if picture.name == "history").rows
    for search in ("search", "random search"):
        best = [row[-1] for row in rows if row[0] == search and row[-1] is not None]
        assert best == sorted(best)


def test_any_candidate_can_be_drawn(finished_run: Path) -> None:
    data = read_run(finished_run)
    for candidate in data.history:
        picture = recipe(data, candidate.number)
        assert picture is not None, candidate.number
        assert picture.rows, candidate.number


def test_csv_has_all_rows_and_no_formulas(front_data: RunData) -> None:
    for picture in pictures(front_data):
        rows = list(csv.reader(io.StringIO(csv_text(picture))))
        assert rows[0] == list(picture.header)
        assert len(rows) == 1 + len(picture.rows)
        assert not any(cell.startswith(("=", "@")) for row in rows for cell in row)


def test_labels_show_markup_as_text() -> None:
    assert label("<b>x</b> & y") == "&lt;b&gt;x&lt;/b&gt; &amp; y"
    assert label("a\x1b[31m\nb") == "a[31m b"
    assert len(label("x" * 300).split("<br>")) == 2
    assert label("") == " "
