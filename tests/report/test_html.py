"""The page: one file without a network, opened in a real browser, with names that would be markup if they could."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.report import tables
from evomerge.report.html import report_page
from evomerge.report.result import ConstraintResult
from evomerge.report.run_data import RunData, Sample
from evomerge.run.report import read_run, watch_report, write_report
from evomerge.study.candidate import ConstraintValue
from tests.fakes import FAKE, fake_spec
from tests.frame import invoke

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>\x1b[31m\nred ' + "x" * 300
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page_without_plotly(page: str) -> str:
    """What is ours of a page."""
    start = page.index("<script>")
    return page[:start] + page[page.index("</script>", start) :]


def opened(path: Path) -> tuple[str, list[str]]:
    """Opens a page in a real browser: the document after its scripts have run, and what was written to the console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    ended = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def data(finished_run: Path) -> RunData:
    return read_run(finished_run)


@pytest.fixture(scope="module")
def hostile(data: RunData) -> RunData:
    """The run with hostile names of models, tasks, operators and environment, and a model that writes markup."""
    assert data.result is not None
    rows = data.result.baselines
    result = replace(
        data.result,
        verdict=HOSTILE,
        baselines={f"{HOSTILE}{k}": row for k, row in enumerate(rows.values())},
        goals=tuple(replace(goal, steered_by=HOSTILE) for goal in data.result.goals),
    )
    return replace(
        data,
        names=dict.fromkeys(data.names, HOSTILE),
        status=replace(data.status, run=HOSTILE),
        history=tuple(replace(c, operator=HOSTILE) for c in data.history),
        result=result,
        environment={HOSTILE: {HOSTILE: HOSTILE}},
        search_yaml=HOSTILE,
        samples=(Sample(HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
    )


def test_one_file_of_bearable_size_that_asks_for_nothing(data: RunData) -> None:
    page = report_page(data)
    assert len(page.encode()) < 6e6
    assert re.findall(r"""(?:src|href)=(?!["']?data:)\S+""", page_without_plotly(page)) == []
    assert "default-src 'none'" in page


def test_tables_are_there_without_scripts(data: RunData) -> None:
    text = page_without_plotly(report_page(data))
    assert data.result is not None
    assert data.result.verdict in text.replace("&#39;", "'")
    assert f"{data.result.winner.fitness['test'].value:.4f}" in text
    assert "<table>" in text
    assert "source a" in text


def test_constraints_are_shown_with_limit_interval_and_verdict(data: RunData) -> None:
    assert data.result is not None
    assert 'id="constraints"' not in report_page(data)
    value = ConstraintValue(0.25, 0.5, 0.25)
    constraints = [
        ConstraintResult(f"{HOSTILE} acc >= base - 0.01", "broken", {"test": value}, (-0.4, -0.1)),
        ConstraintResult("words acc >= 0.2", "not to be told", {"test": value}, (-0.02, 0.12)),
        ConstraintResult("layers <= 30", "held", {"test": value}, None),
    ]
    text = page_without_plotly(report_page(replace(data, result=replace(data.result, constraints=tuple(constraints)))))
    section = text[text.index('id="constraints"') :]
    rows = re.findall("<tr>(.*?)</tr>", section[: section.index("</section>")])
    cells = [re.findall('<t[hd](?: class="([^"]*)")?>(.*?)</t[hd]>', row) for row in rows]
    assert [name for _, name in cells[0]] == [
        *("constraint", "winner, test items", "limit", "value less limit, 95% interval", "verdict")
    ]
    assert cells[2] == [
        *(("text", "words acc &gt;= 0.2"), ("number", "0.25"), ("number", "0.5"), ("number", "-0.020 to +0.120")),
        ("not", "not to be told at this number of items"),
    ]
    assert [row[-1] for row in cells[1:]][::2] == [("broken", "broken"), ("held", "held")]
    assert "<script>alert" not in section
    assert "\x1b" not in section
    assert "constraint" in tables.result_table(replace(data.result, constraints=tuple(constraints)))


def test_hostile_names_are_text(hostile: RunData) -> None:
    text = page_without_plotly(report_page(hostile))
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;alert(1)" in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("which", ["data", "hostile"])
def test_a_browser_draws_every_picture_and_complains_of_nothing(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "report.html"
    page = report_page(request.getfixturevalue(which))
    path.write_text(page, encoding="utf-8")
    document, console = opened(path)
    assert console == []
    names = re.findall(r'class="picture[^"]*" id="picture-(\w+)"', document)
    assert len(names) >= 6
    for name, drawn in zip(names, re.split(r'id="picture-\w+"', document)[1:], strict=True):
        assert "main-svg" in drawn, name
        assert re.search(r'class="(?:point|points|layer bg|heatmaplayer|trace|hm)', drawn), name
    assert "<img" not in document.replace('<img class="plotly', "")
    assert "<script>alert" not in document


def test_a_run_under_way_and_one_without_scores(tmp_path: Path, data: RunData) -> None:
    status = replace(data.status, state="running", verdict=None)
    page = report_page(replace(data, result=None, status=status, samples=()), refresh=10)
    assert 'http-equiv="refresh" content="10"' in page
    assert "is the best so far" in page
    begun = replace(data, result=None, status=replace(status, best=None), history=(), samples=())
    assert "Nothing is scored yet" in report_page(begun)


def test_the_command_writes_the_page_and_the_numbers(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = invoke(capsys, "report", finished_run, tmp_path / "r.html", "--csv", tmp_path / "csv", "--watch")
    assert (ended.code, ended.out.strip()) == (0, str(tmp_path / "r.html"))
    names = {path.name for path in (tmp_path / "csv").iterdir()}
    assert {"scores.csv", "history.csv", "recipe.csv"} <= names
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    ended = invoke(capsys, "report", tmp_path / "none")
    assert ended.code == 2
    assert "no run here" in ended.err


def test_watching_ends_with_the_run(finished_run: Path, tmp_path: Path) -> None:
    written: list[Path] = []
    watch_report(finished_run, tmp_path / "r.html", None, 0.0, written.append)
    assert written == [tmp_path / "r.html"]


def test_the_page_of_a_run_is_in_its_folder(tmp_path: Path) -> None:
    from evomerge.run.search import start

    folder = tmp_path / "run"
    start(fake_spec(search__candidates=7, search__finalists=2), folder=folder, parts=FAKE)
    assert write_report(folder) == folder / "report.html"
    assert (folder / "report.html").is_file()
