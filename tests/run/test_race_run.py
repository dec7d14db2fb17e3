"""A search with racing, the score cache and a random baseline: the same however it is stopped, and cheaper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.errors import SpecError
from evomerge.evaluation.splits import SEARCH
from evomerge.problem.genome_jacobian import COST
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import open_problem
from evomerge.report.tables import status_text
from evomerge.run.folder import RunFolder
from evomerge.run.preflight import parse_search
from evomerge.run.search import resume, start
from evomerge.run.status import read_status
from evomerge.space.baselines import PARENT
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.budget import spent_items
from evomerge.study.candidate import Candidate, step_parent
from tests.frame import files, search_spec
from tests.run.test_search import lasting


@pytest.fixture
def spec(raced_spec: SearchSpec) -> SearchSpec:
    """The search of `raced_run`, without a checkpoint at its end."""
    return raced_spec.model_copy(update={"run": raced_spec.run.model_copy(update={"keep": 0})})


@pytest.fixture(autouse=True)
def cache(raced_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_CACHE", str(raced_cache))


def found(folder: Path, *, baseline: bool = False) -> tuple[Candidate, ...]:
    return RunFolder.existing(folder).record(baseline=baseline).candidates()


def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the item sets that are really scored from now on."""
    sizes: list[int] = []
    measure = ModelRunner.measure

    def counting(self: ModelRunner, plan: Any, part: Any) -> Any:
        sizes.append(sum(map(len, part.values())))
        return measure(self, plan, part)

    monkeypatch.setattr(ModelRunner, "measure", counting)
    return sizes


def test_losers_are_pruned_with_a_reason_and_an_estimate(raced_run: Path) -> None:
    candidates = found(raced_run)
    assert len(candidates) == 18
    pruned = [c for c in candidates if c.state == "pruned"]
    assert pruned
    assert all(c.failure_kind == "raced out" and c.items < 20 for c in pruned)
    # Of generation 0 only guesses race: sources and their average are what a result is compared with.
    assert not any(c.operator.startswith(PARENT) or c.operator == "uniform average" for c in pruned)
    done = [c for c in candidates if c.state == "done"]
    assert all(c.items == 20 for c in done)  # 12 of tiny_choice, 8 of tiny_text
    for candidate in candidates:
        assert list(candidate.estimates.values())[-1] == candidate.fitness
        earlier = [c.fitness or 0.0 for c in done if c.generation < max(1, candidate.generation)]
        if candidate.state == "pruned":
            assert (candidate.fitness or 0.0) < max(earlier)
    result = json.loads((raced_run / "result.json").read_text())
    states = {c.number: c.state for c in candidates}
    assert {states[f["candidate"]] for f in result["finalists"]} == {"done"}


def test_what_racing_saved_is_reported(raced_run: Path) -> None:
    candidates = found(raced_run)
    seen = sum(c.items for c in candidates)
    expected = {"evaluated": seen, "without_racing": 20 * 18, "saved": 1 - seen / 360}
    expected["jacobians"] = len({step_parent(c) for c in candidates} - {None})
    assert json.loads((raced_run / "result.json").read_text())["items"] == expected
    status = read_status(raced_run)
    assert status.to_json()["items"] == expected
    assert f"racing saved {1 - seen / 360:.0%} of the item evaluations" in status_text(status)


def test_the_whole_score_does_not_depend_on_the_blocks(raced_run: Path, finished_run: Path) -> None:
    """A candidate that went the whole way has the per-item scores that it has without racing, within rounding."""
    whole = RunFolder.existing(finished_run)
    runner = ModelRunner(open_problem(whole.spec))
    for candidate in (c for c in found(raced_run) if c.generation == 0 and c.state == "done"):
        digest = runner.plan(candidate.recipe).digest
        ours, theirs = RunFolder.existing(raced_run).scores.load(digest, SEARCH), whole.scores.load(digest, SEARCH)
        assert ours is not None
        assert theirs is not None
        for task, part in ours.items():
            assert part.items == theirs[task].items
            for metric, columns in part.metrics.items():
                assert np.allclose(columns, theirs[task].metrics[metric], atol=1e-4)


def test_the_baseline_spends_the_same_items_and_is_one_more_to_beat(raced_run: Path) -> None:
    ours, random = found(raced_run), found(raced_run, baseline=True)
    spent = max(spent_items(ours, jacobian_items=round(COST * 20)))
    items = [c.items for c in random]
    assert sum(items) >= spent > sum(items[:-1])
    first = [c.recipe_hash for c in ours if c.generation == 0]
    assert [c.recipe_hash for c in random][: len(first)] == first
    assert {c.operator for c in random[len(first) :]} == {"random"}
    rows = json.loads((raced_run / "result.json").read_text())["baselines"]
    name = next(name for name in rows if name.startswith("random search: its candidate "))
    assert random[int(name.rsplit(" ", 1)[1])].recipe == rows[name]["recipe"]
    assert set(rows[name]["fitness"]) == {"search", "select", "test"}
    assert RunFolder.existing(raced_run).candidates() == ours  # the run's own record is the search's


def test_a_second_run_measures_nothing(
    raced_run: Path, spec: SearchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = measured(monkeypatch)
    result = start(spec, folder=tmp_path / "again")
    assert sizes == []
    assert lasting(found(tmp_path / "again")) == lasting(found(raced_run))
    assert result == RunFolder.existing(raced_run).result()
    assert dict(files(tmp_path / "again" / "scores")) == dict(files(raced_run / "scores"))


@pytest.mark.parametrize("change", [{"evaluation__dtype": "bfloat16"}, {"evaluation__batch_tokens": 4096}])
def test_other_settings_are_not_taken_from_the_cache(
    raced_run: Path,
    tiny_family: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    sizes = measured(monkeypatch)
    more = {"evaluation__racing": True, "evaluation__cache": True, "search__candidates": 1, "search__finalists": 1}
    other = parse_spec(search_spec(tiny_family, run__keep=0, **more, **change))
    start(other, folder=tmp_path / "run")
    assert sum(sizes) >= 5 * 20  # four models on the search items; the winner on the others


@pytest.mark.slow
def test_without_the_cache_everything_is_measured_and_comes_out_the_same(
    raced_run: Path, spec: SearchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in three sessions, stopped in the middle of a candidate's blocks."""
    sizes = measured(monkeypatch)
    off = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"cache": False})})
    scored = ModelRunner.measure
    for limit in (12, 40):
        sizes.clear()

        def stopping(self: ModelRunner, plan: Any, part: Any, limit: int = limit) -> Any:
            if len(sizes) == limit:
                raise KeyboardInterrupt
            return scored(self, plan, part)

        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "measure", stopping)
            with pytest.raises(KeyboardInterrupt):
                start(off, folder=tmp_path / "run")
    result = resume(tmp_path / "run")
    for baseline in (False, True):
        assert lasting(found(tmp_path / "run", baseline=baseline)) == lasting(found(raced_run, baseline=baseline))
    assert result == RunFolder.existing(raced_run).result()
    assert dict(files(tmp_path / "run" / "scores")) == dict(files(raced_run / "scores"))


@pytest.mark.slow
def test_a_race_on_the_items_that_tell_candidates_apart(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """The blocks are of the drawn items, whose weights count; finalists are scored on all search items; resumed it is
    the same."""
    changes: dict[str, Any] = {
        "evaluation__racing": True,
        "evaluation__informative": 0.7,
        "evaluation__guard": [],
        "evaluation__splits": {"search": 0.7, "select": 0.2, "test": 0.1},
        "search__finalists": 2,
        "search__options": {"jacobian_steps": False},  # so few children are to be good and bad
        "run__keep": 0,
    }
    start(parse_spec(search_spec(tiny_family, search__candidates=12, **changes)), folder=tmp_path / "parts")
    result = resume(tmp_path / "parts", candidates=16)
    start(parse_spec(search_spec(tiny_family, search__candidates=16, **changes)), folder=tmp_path / "whole")
    assert lasting(found(tmp_path / "parts")) == lasting(found(tmp_path / "whole"))
    assert result == RunFolder.existing(tmp_path / "whole").result()
    assert result.informative is not None
    drawn = {task: row.items for task, row in result.informative.tasks.items()}
    assert drawn == {"tiny_choice": 12, "tiny_text": 8}  # of 17 and 11
    candidates = found(tmp_path / "whole")
    assert {c.items for c in candidates if c.state == "done"} == {20}
    assert all(c.items < 20 for c in candidates if c.state == "pruned")
    assert {c.state for c in candidates} == {"done", "pruned"}
    fitness = {c.number: c.fitness for c in candidates}
    assert all(row.estimate == fitness[row.candidate] for row in result.informative.finalists)
    assert result.winner.fitness["search"].n == 28


def test_the_cache_and_the_baseline_may_change_under_a_run_and_racing_may_not(
    spec: SearchSpec, raced_run: Path
) -> None:
    folder = RunFolder.existing(raced_run)
    search, evaluation = spec.search, spec.evaluation
    folder._refuse_other(spec.model_copy(update={"search": search.model_copy(update={"baseline": None})}))
    folder._refuse_other(spec.model_copy(update={"evaluation": evaluation.model_copy(update={"cache": False})}))
    with pytest.raises(Exception, match="racing: false"):
        folder._refuse_other(spec.model_copy(update={"evaluation": evaluation.model_copy(update={"racing": False})}))


def test_a_baseline_that_is_the_algorithm_is_refused(tiny_family: dict[str, Path]) -> None:
    with pytest.raises(SpecError, match=r"search\.baseline: random is the algorithm itself"):
        parse_search(search_spec(tiny_family, search__algorithm="random", search__baseline="random"))


@pytest.mark.slow
def test_actors_of_ray_make_the_same_run(
    ray_cluster: Any, raced_run: Path, raced_spec: SearchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache that is new: the candidates, scores, winner and checkpoint of one process, and every score's file
    in the run's folder, which the actors do not know."""
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    start(raced_spec, folder=tmp_path / "run", executor="ray", workers=2)
    other, whole = RunFolder.existing(tmp_path / "run"), RunFolder.existing(raced_run)
    assert lasting(other.candidates()) == lasting(whole.candidates())
    assert other.result() == whole.result()
    for folder in ("scores", "best"):
        written = [dict(files(run.root / folder)) for run in (other, whole)]
        kept = [{k: v for k, v in each.items() if not k.endswith((".md", ".json"))} for each in written]
        # The baseline may have begun one more when its items were spent.
        assert {name: kept[0].get(name) for name in kept[1]} == kept[1] != {}
