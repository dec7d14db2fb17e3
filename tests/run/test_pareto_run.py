"""A search for a front from start to end: objectives, finalists, the knee, what is told of it, and going on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.evaluation.splits import SEARCH
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import open_problem
from evomerge.recipe.parse import single_model
from evomerge.report.result import Ending, RunResult
from evomerge.report.tables import result_table, status_text
from evomerge.run import export
from evomerge.run.folder import RunFolder
from evomerge.run.search import resume, start
from evomerge.run.status import read_status
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study import pareto
from evomerge.study.candidate import Candidate
from evomerge.study.interfaces import NullTracker
from evomerge.study.ranking import best, finalists, pareto_front
from evomerge.trackers.console import ConsoleTracker
from tests.fakes import FAKE, fake_spec
from tests.frame import invoke, search_spec
from tests.run.test_search import lasting

NAMES = ["tiny_choice", "tiny_text", "layers"]


def pareto_spec(family: dict[str, Path], **changes: Any) -> SearchSpec:
    wanted: dict[str, Any] = {
        "space__methods": ["task_arithmetic", "frankenmerge"],
        "search__objectives": "pareto",
        "search__also_minimize": ["layers"],
        "search__candidates": 14,
        "search__seed": 1,
        "search__options": {"jacobian_steps": False},  # so few children are to be of both methods
        "evaluation__guard": [],
        "run__keep": 0,
    }
    return parse_spec(search_spec(family, **{**wanted, **changes}))


@pytest.fixture(scope="module")
def front_run(tiny_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search for a front, beside a random search, with racing asked for."""
    folder = tmp_path_factory.mktemp("front") / "run"
    spec = pareto_spec(tiny_family, search__baseline="random", evaluation__racing=True)
    start(spec, folder=folder, tracker=ConsoleTracker())
    return folder


def found(folder: Path) -> tuple[Candidate, ...]:
    return RunFolder.existing(folder).candidates()


def result_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def test_objectives_are_the_tasks_values_and_the_size(front_run: Path) -> None:
    """Relative to the best source on each task, bits per byte inverted; 4 layers over the candidate's."""
    candidates = found(front_run)
    by_name = {c.operator: c.scores[SEARCH] for c in candidates}
    sources = [by_name[f"parent:{name}"] for name in "abc"]
    best_prob = max(s["tiny_choice"]["prob"]["value"] for s in sources)
    best_bits = min(s["tiny_text"]["bits_per_byte"]["value"] for s in sources)
    problem = open_problem(RunFolder.existing(front_run).spec)
    runner = ModelRunner(problem)
    depths = set()
    for candidate in candidates:
        prob = candidate.scores[SEARCH]["tiny_choice"]["prob"]["value"] / best_prob
        bits = best_bits / candidate.scores[SEARCH]["tiny_text"]["bits_per_byte"]["value"]
        depth = runner.plan(candidate.recipe).config["num_hidden_layers"]
        depths.add(depth)
        own = problem.reference_model.config["num_hidden_layers"]
        assert candidate.objectives == pytest.approx((prob, bits, own / depth))
        assert candidate.fitness == pytest.approx((prob + 2 * bits) / 3)
        assert candidate.state == "done"  # nobody is raced
    assert len(depths) > 1
    log = (front_run / "log.txt").read_text()
    assert "no racing: with several objectives" in log
    assert "ga for the front of tiny_choice, tiny_text, layers" in log


def test_the_winner_is_the_knee_of_the_finalists_front(front_run: Path) -> None:
    result = result_of(front_run)
    assert result["objectives"] == NAMES
    assert [f["candidate"] for f in result["finalists"]] == [c.number for c in finalists(found(front_run), 3)]
    front = result["front"]
    assert front[0]["candidate"] == result["winner"]["candidate"]
    assert front[0]["fitness"]["test"] == result["winner"]["fitness"]["test"]
    values = np.array([[row["objectives"]["pooled"][name] for name in NAMES] for row in front])
    assert (pareto.ranks(values) == 0).all()
    pooled = {f["candidate"]: f["pooled"] for f in result["finalists"]}
    assert pareto.knee(values, np.array([pooled[row["candidate"]] for row in front])) == 0
    by_number = {c.number: c for c in found(front_run)}
    for row in front:
        assert set(row["objectives"]) == {"pooled", "search", "select", "test"}
        assert all(list(objectives) == NAMES for objectives in row["objectives"].values())
        searched = tuple(row["objectives"]["search"].values())
        assert searched == pytest.approx(by_number[row["candidate"]].objectives)
        assert set(row["scores"]) >= {"search", "select", "test"}
        assert row["sizes"]["layers"] * row["objectives"]["test"]["layers"] == pytest.approx(4)
    assert any(name.startswith("random search: its candidate ") for name in result["baselines"])


def test_sizes_count_every_tensor(front_run: Path, tiny_family: dict[str, Path]) -> None:
    from safetensors.numpy import load_file

    problem = open_problem(RunFolder.existing(front_run).spec)
    runner = ModelRunner(problem)
    sizes = runner.sizes(runner.plan(single_model(problem.reference)))
    stored = load_file(tiny_family["base"] / "model.safetensors")
    assert sizes["parameters"] == sum(tensor.size for tensor in stored.values())
    assert sizes["layers"] == problem.reference_model.layout.layer_count


def test_the_study_names_its_objectives(front_run: Path) -> None:
    study = RunFolder.existing(front_run).record().study
    assert study.metric_names == NAMES
    assert {trial.number for trial in study.best_trials} >= {c.number for c in pareto_front(found(front_run))}


def test_hypervolume_over_time(front_run: Path) -> None:
    candidates = found(front_run)
    told = result_of(front_run)["hypervolume"]
    steps = told["generations"]
    assert [step["generation"] for step in steps] == list(range(max(c.generation for c in candidates) + 1))
    volumes = [step["hypervolume"] for step in steps]
    assert volumes == sorted(volumes)
    assert volumes[0] > 0
    front = pareto_front(candidates)
    assert (steps[-1]["candidates"], steps[-1]["front"]) == (14, len(front))
    reference = np.array([told["reference"][name] for name in NAMES])
    values = np.array([c.objectives for c in front])
    assert volumes[-1] == pytest.approx(pareto.hypervolume(values, reference))


def test_what_is_told_of_the_front(front_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    candidates, result = found(front_run), result_of(front_run)
    status = read_status(front_run)
    front = pareto_front(candidates)
    assert status.front is not None
    assert status.front.size == len(front)
    assert status.front.hypervolume == result["hypervolume"]["generations"][-1]["hypervolume"]
    members = {row.candidate: row.objectives for row in status.front.candidates}
    assert members == {c.number: dict(zip(NAMES, c.objectives or (), strict=True)) for c in front}
    assert f"\nfront: {len(front)} candidates, hypervolume " in status_text(status)
    text = result_table(RunResult.from_json({key: value for key, value in result.items() if key != "checksum"}))
    assert "| front, on the test items" in text
    assert f"| candidate {result['winner']['candidate']}: the winner " in text
    assert "Hypervolume on the search items: " in text
    entries = json.loads(invoke(capsys, "lineage", front_run, "--json").out)
    assert [tuple(entry["objectives"]) for entry in entries] == [c.objectives for c in candidates]


def test_any_member_is_exported_and_the_knee_by_default(
    front_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    front = result_of(front_run)["front"]
    for arguments, row in (([], front[0]), (["--candidate", str(front[-1]["candidate"])], front[-1])):
        out = tmp_path / f"{len(arguments)}.yaml"
        ended = invoke(capsys, "export", front_run, out, "--recipe", *arguments)
        assert ended.code == 0, ended.err
        assert out.is_file()
        recipe = next(c.recipe for c in found(front_run) if c.number == row["candidate"])
        assert str(recipe["merge_method"]) in out.read_text() or recipe["merge_method"] == "frankenmerge"
    before = RunFolder.existing(front_run)
    assert before.winner(before.candidates()) == front[0]["candidate"]


def test_a_front_in_parts_is_the_front_in_one(
    front_run: Path, tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the search and in the middle of its end; a status in between has the knee so far."""
    spec = pareto_spec(tiny_family, search__baseline="random", evaluation__racing=True)
    measure = ModelRunner.measure
    left = [0]

    def stopping(self: ModelRunner, plan: Any, part: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return measure(self, plan, part)

    monkeypatch.setattr(ModelRunner, "measure", stopping)
    for left[0] in (12, 14):
        with pytest.raises(KeyboardInterrupt):
            start(spec, folder=tmp_path / "run")
        known = found(tmp_path / "run")
        knee = best(known)
        assert knee is not None
        leader = read_status(tmp_path / "run").best
        assert leader is not None
        assert leader.candidate == knee.number
    left[0] = 0
    start(spec, folder=tmp_path / "run")
    assert lasting(found(tmp_path / "run")) == lasting(found(front_run))
    assert result_of(tmp_path / "run") == result_of(front_run)


def test_good_enough_ends_a_run_that_can_be_extended(tmp_path: Path) -> None:
    """Generation 0 has a fitness above 0.5 at once. The end stays the end until the budget is a larger one."""
    spec = fake_spec(search__stop={"fitness": 0.5}, search__candidates=12)
    first = start(spec, folder=tmp_path / "run", parts=FAKE)
    count = len(found(tmp_path / "run"))
    assert count == 9
    assert (first.ended.reason, first.ended.extended_from) == ("target", 0)
    assert {c.generation for c in found(tmp_path / "run")} == {0}
    assert start(spec, folder=tmp_path / "run", parts=FAKE) == first
    assert read_status(tmp_path / "run").state == "finished"
    more = resume(tmp_path / "run", candidates=13, parts=FAKE)
    assert (more.ended.reason, more.ended.extended_from) == ("budget", count)
    assert len(found(tmp_path / "run")) == 13
    assert resume(tmp_path / "run", parts=FAKE) == more
    ended = resume(tmp_path / "run", candidates=14, parts=FAKE).ended
    assert ended == Ending("budget", "the budget of 14 candidates is spent", extended_from=count)
    # Without the target it would have been the same candidates.
    whole = fake_spec(search__candidates=14)
    start(whole, folder=tmp_path / "whole", parts=FAKE)
    assert lasting(found(tmp_path / "run")) == lasting(found(tmp_path / "whole"))


def test_the_front_is_kept_before_what_is_behind_it(
    front_run: Path, tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Winner 4, then the front's 7 and 2, then 9, which has a better mean than they and is dominated."""
    whole = RunFolder.existing(front_run).result()
    assert whole is not None
    pooled = ((9, 0.9), (4, 0.5), (7, 0.4), (2, 0.3), (1, 0.2))
    result = replace(
        whole,
        winner=replace(whole.winner, candidate=4),
        front=tuple(replace(whole.front[0], candidate=n) for n in (4, 7, 2)),
        finalists=tuple(replace(whole.finalists[0], candidate=n, pooled=p) for n, p in pooled),
    )
    kept: list[int] = []
    monkeypatch.setattr(export, "write_export", lambda *arguments: kept.append(arguments[3].number))
    folder = RunFolder(tmp_path, pareto_spec(tiny_family, run__keep=4))
    monkeypatch.setattr(folder, "candidates", lambda: found(front_run))
    problem = open_problem(folder.spec)
    export.keep_best(problem, ModelRunner(problem), folder, result, NullTracker())
    assert kept == [4, 7, 2, 9]
