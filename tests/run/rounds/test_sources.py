"""A search in rounds: its record, what it goes on from after a kill at any moment, and whom winners descend from."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.errors import RunError, SpecError
from evomerge.evaluation.scores import score_table, table_to_json
from evomerge.evaluation.splits import TEST
from evomerge.objective.fitness import Fitness
from evomerge.objective.goals import Goal
from evomerge.problem.fake_evaluator import FakeRunner
from evomerge.problem.model_runner import ModelRunner
from evomerge.recipe import load_recipe
from evomerge.report.lineage import ancestors
from evomerge.report.result import RunResult
from evomerge.run.check import check_search
from evomerge.run.export import open_run
from evomerge.run.folder import RunFolder
from evomerge.run.merge import merge_to_folder
from evomerge.run.report import write_report
from evomerge.run.rounds.sources import complementary
from evomerge.run.search import resume, start
from evomerge.run.status import read_status
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.rounds import is_copy, winner_name, winners_in
from tests.fakes import FAKE, fake_spec
from tests.frame import invoke, search_spec
from tests.objective.test_fitness import ACC, bits, corpus, mean
from tests.run.test_search import candidates, lasting

BRED = {"search__options": {"jacobian_steps": False, "trust_region": False}, "search__finalists": 2}
"""A search that takes no time to think."""
SPEC = fake_spec(search__candidates=36, search__rounds=3, **BRED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search in three rounds that nobody stopped."""
    folder = tmp_path_factory.mktemp("rounds") / "whole"
    start(SPEC, folder=folder, parts=FAKE)
    return folder


def result(folder: Path) -> RunResult:
    """What a finished run found."""
    content = RunFolder.existing(folder).result()
    assert content is not None
    return content


def test_the_rounds_are_one_history(whole: Path) -> None:
    history = candidates(whole)
    assert [c.number for c in history] == list(range(36))
    assert list(RunFolder.existing(whole).rounds()) == [12, 24]
    assert all(parent < c.number for c in history for parent in c.parents)
    generations = [c.generation for c in history]
    assert generations == sorted(generations)
    for first, folder in RunFolder.existing(whole).rounds().items():
        round_ = RunFolder.existing(folder)
        winners = list(round_.spec.models.winners)
        assert len(winners) == 3
        assert list(round_.spec.models.sources) == ["a", "b", "c", *winners]
        copies = [c for c in history[first : first + 12] if is_copy(c)]
        assert sorted(winner_name(*c.parents) for c in copies) == sorted(winners)
        for copy in copies:  # is what it was, and costs nothing once more
            assert (copy.fitness, copy.items) == (history[copy.parents[0]].fitness, 0)
        best = max((c for c in history[:first] if not c.operator.startswith("parent:")), key=lambda c: c.fitness or 0)
        assert winners[0] == winner_name(best.number)
        later = [c for c in history[first : first + 12] if not c.parents]
        assert later == []  # every one descends from the rounds before


def test_the_winner_is_the_best_of_all_rounds(whole: Path) -> None:
    found, history = result(whole), candidates(whole)
    ranked = sorted((c for c in history if not is_copy(c)), key=lambda c: -(c.fitness or 0))
    assert [f.candidate for f in found.finalists] == [c.number for c in ranked[:2]]
    assert found.candidates.done == found.candidates.budget == 36
    assert found.items.evaluated == 40 * (36 - 6)
    assert found.ended.message == "round 3 of 3: the budget of 12 candidates is spent"
    status = read_status(whole)
    assert (status.state, status.candidates.recorded) == ("finished", 36)
    last = next(c for c in reversed(history) if c.generation > 0 and not is_copy(c))
    assert {c.number for c in ancestors(history, last.number)} & set(range(12))  # lineage goes through all rounds
    page = write_report(whole, whole / "page.html").read_text()
    assert "candidate-" in page


def test_test_items_are_read_once_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the winner and the baselines alone, after every candidate of every round has been scored."""
    read: list[Any] = []
    scores = FakeRunner.scores

    def noted(self: FakeRunner, plan: Any, selection: Any) -> Any:
        read.append(selection)
        return scores(self, plan, selection)

    monkeypatch.setattr(FakeRunner, "scores", noted)
    start(SPEC, folder=tmp_path / "run", parts=FAKE)
    problem = FAKE.open_problem(SPEC, None)
    at = [k for k, selection in enumerate(read) if selection == problem.splits[TEST]]
    searched = [k for k, selection in enumerate(read) if selection == problem.splits["search"]]
    assert len(at) == 1 + len(result(tmp_path / "run").baselines)
    assert min(at) > max(searched)


class _Killed(BaseException):
    """As if the process had gone."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Ends the process when it is about to give a file its name for the n-th time."""
    replace: Callable[..., None] = os.replace
    calls: list[int] = []

    def counted(*paths: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise _Killed
        replace(*paths)

    monkeypatch.setattr(os, "replace", counted)


def test_a_kill_at_any_moment_changes_nothing(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kills = 0
    for call in (3, 17, 14, 4, 2, 3, 4, 6, 20, 2, 3, 4, 5, 30):  # rounds begin in the middle of them
        with pytest.MonkeyPatch.context() as patch:
            _kill_at(patch, call)
            try:
                start(SPEC, folder=folder, parts=FAKE)
            except _Killed:
                kills += 1
    assert kills > 5
    assert start(SPEC, folder=folder, parts=FAKE) == result(whole)
    assert lasting(candidates(folder)) == lasting(candidates(whole))
    assert {p.name for p in (folder / "scores").iterdir()} == {p.name for p in (whole / "scores").iterdir()}


def test_a_round_whose_end_is_missing_is_told_and_scored_again(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "torn"))
    log = folder / "rounds" / "12" / "study.log"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-4]))
    with pytest.raises(RunError, match="of the 12 candidates of its round: its end is missing"):
        RunFolder.existing(folder).candidates()
    assert resume(folder, parts=FAKE) == result(whole)
    assert lasting(candidates(folder)) == lasting(candidates(whole))


def test_more_candidates_go_to_the_last_round(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.move(shutil.copytree(whole, tmp_path / "first"), tmp_path / "moved"))
    longer = resume(folder, candidates=40, parts=FAKE)
    assert list(RunFolder.existing(folder).rounds()) == [12, 24]
    assert longer.candidates.recorded == 40
    assert lasting(candidates(folder))[:36] == lasting(candidates(whole))


def test_items_are_divided_too(tmp_path: Path) -> None:
    spec = fake_spec(search__candidates=400, search__rounds=3, search__stop={"items": 1440}, **BRED)
    found = start(spec, folder=tmp_path / "run", parts=FAKE)
    history = candidates(tmp_path / "run")
    edges = [0, *RunFolder.existing(tmp_path / "run").rounds(), len(history)]
    spent = [sum(c.items for c in history[a:b]) for a, b in itertools.pairwise(edges)]
    assert spent == [480, 480, 480]
    assert (found.ended.reason, found.items.evaluated) == ("items", 1440)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"search__candidates": 2}, "3 of 2 candidates"),
        ({"models__tokenizer": "union"}, "not with models.tokenizer"),
        ({"models__sources": {"candidate-1": "/models/a"}}, "is what search.rounds calls a winner"),
    ],
)
def test_what_rounds_cannot_do_is_told(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        fake_spec(search__rounds=3, **changes)


def test_nothing_to_go_on_with(tmp_path: Path) -> None:
    spec: SearchSpec = fake_spec(search__rounds=3, search__candidates=9, **BRED)  # the models themselves
    with pytest.raises(RunError, match="no merge of this round has a score"):
        start(spec, folder=tmp_path / "run", parts=FAKE)


@pytest.mark.slow
def test_rounds_of_models(tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Winners are written once and score what they did; an export's recipe is over the first models alone."""
    changes: dict[str, Any] = {"space__methods": ["linear", "task_arithmetic"], "space__frankenmerge": ..., **BRED}
    changes |= {"search__rounds": 3, "search__candidates": 33, "evaluation__guard": []}
    spec = parse_spec(search_spec(tiny_family, **changes))
    assert "GB for the 6 sources of later rounds" in check_search(spec)
    root = tmp_path / "first" / "run"
    start(spec, folder=root)
    folder = RunFolder.existing(Path(shutil.move(root, tmp_path / "moved")))
    history = folder.candidates()
    checkpoints = sorted(path.name for path in (folder.root / "rounds").glob("candidate-*"))
    named = [RunFolder.existing(path).spec.models.winners for path in folder.rounds().values()]
    assert checkpoints == sorted({name for winners in named for name in winners})
    problem = open_run(folder)
    runner = ModelRunner(problem)
    for copy in filter(is_copy, history):
        again, _ = runner.measure(runner.plan(copy.recipe), problem.splits["search"])
        assert table_to_json(score_table(again)) == copy.scores["search"]
    last = next(c for c in reversed(history) if set(winners_in(c.recipe)) and c.generation > 0 and not is_copy(c))
    options = ("--candidate", str(last.number))
    exported = invoke(capsys, "export", folder.root, tmp_path / "whole", *options)
    assert exported.code == 0, exported.err
    assert "the same numbers as in the search" in exported.out
    assert invoke(capsys, "export", folder.root, tmp_path / "one.yaml", "--recipe", *options).code == 0
    one, whole = load_recipe(tmp_path / "one.yaml"), load_recipe(tmp_path / "whole" / "recipe.yaml")
    assert not one.steps
    assert whole.steps
    assert set(one.models()) <= set(map(str, tiny_family.values()))
    assert set(whole.external_models()) <= set(map(str, tiny_family.values()))
    for name, recipe, tolerance in (("with-steps", whole, 0.0), ("flat", one, 1e-6)):
        merged = open_checkpoint(str(merge_to_folder(recipe, tmp_path / name)))
        own = open_checkpoint(str(tmp_path / "whole"))
        for tensor in own.tensors:
            assert torch.allclose(merged.tensor(tensor), own.tensor(tensor), rtol=0, atol=tolerance), tensor


BEST, NEAR, OTHER, ALL = [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 1, 1, 0]


def test_what_the_best_lacks_counts() -> None:
    """Beside 11100: 11000 adds nothing, 00011 two items, 10110 one; then nobody adds anything: the first is taken."""
    models = [{"mc": mean(row)} for row in (BEST, NEAR, OTHER, ALL)]
    assert complementary(Fitness((ACC,)), models, 3) == [0, 2, 1]
    assert complementary(Fitness((ACC,)), models, 9) == [0, 2, 1, 3]
    assert complementary(Fitness((ACC,)), models[:1], 3) == [0]
    assert complementary(Fitness((ACC,)), [], 3) == []


@pytest.mark.parametrize(("weight", "second"), [(4.0, 2), (0.2, 1)])
def test_goals_count_as_they_weigh(weight: float, second: int) -> None:
    """One more beside 3 right items is a share of 1/3, 1.5 bits less than 6 of 1/4; the second weighs 4, or 0.2."""
    first = {"mc": mean(BEST), "text": bits([-4 * math.log(2), -2 * math.log(2)], [1, 1])}
    more = {"mc": mean([0, 0, 0, 1, 0]), "text": bits([-4 * math.log(2), -2 * math.log(2)], [1, 1])}
    fewer = {"mc": mean([0] * 5), "text": bits([-2.5 * math.log(2), -2 * math.log(2)], [1, 1])}
    goals = (ACC, Goal("text", "bits_per_byte", weight, False))
    assert complementary(Fitness(goals), [first, more, fewer], 2) == [0, second]


def test_a_goal_of_the_whole_corpus_says_nothing_of_items() -> None:
    models = [{"mc": mean(row), "f": corpus(0.5, 5)} for row in (BEST, NEAR, OTHER)]
    assert complementary(Fitness((ACC, Goal("f", "f1", 9.0, True))), models, 2) == [0, 2]
