"""The files of a run: written whole or not at all, held by one process, read by any."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from evomerge.errors import RunError
from evomerge.run.folder import RunFolder
from evomerge.run.search import resume, score_unless_crashing
from evomerge.space.genome import Genome
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.candidate import Outcome, Proposal
from tests.algorithms.landscapes import make_space

SPEC = {
    "name": "x",
    "models": {"sources": {"a": "a"}},
    "space": {"methods": ["linear"]},
    "evaluation": {"tasks": ["t"]},
}


@pytest.fixture
def spec() -> SearchSpec:
    return parse_spec(SPEC)


def test_create_and_open(spec: SearchSpec, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "name: x  # as written\n")
    assert (folder.root / "search.yaml").read_text() == "name: x  # as written\n"
    assert RunFolder.existing(folder.root).spec == spec
    assert RunFolder.create(folder.root, spec, "").spec == spec


def test_no_run_names_the_runs_beside_it(spec: SearchSpec, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "first", spec, "")
    with pytest.raises(RunError, match=r"no run here .*; runs beside it: first"):
        RunFolder.existing(tmp_path / "frist")


def test_reading_makes_nothing(spec: SearchSpec, tmp_path: Path) -> None:
    """A status asked for before the first candidate must not make the study that the run is about to make."""
    folder = RunFolder.create(tmp_path / "run", spec, "")
    before = sorted(folder.root.rglob("*"))
    assert folder.candidates() == ()
    assert folder.result() is None
    assert folder.scores.load("plan", "search") is None
    assert sorted(folder.root.rglob("*")) == before
    with pytest.raises(RunError, match="no candidate has been scored yet"):
        folder.winner(())


def test_environment(spec: SearchSpec, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "")
    first = {"content": {"models": {"a": "123"}}, "versions": {"torch": "2.1", "threads": 2}}
    assert folder.check_environment(first) == []
    assert folder.check_environment(first) == []
    warnings = folder.check_environment({**first, "versions": {"torch": "2.2", "threads": 2}})
    assert len(warnings) == 1
    assert "-torch: '2.1'" in warnings[0]
    assert "+torch: '2.2'" in warnings[0]
    with pytest.raises(RunError, match=r"have changed since this run began(.|\n)*\+  a: '456'"):
        folder.check_environment({**first, "content": {"models": {"a": "456"}}})


def test_a_shared_storage_has_one_folder_a_study(tmp_path: Path) -> None:
    """A second folder of the same name is refused; the first one may be moved, and anybody may read."""
    shared = parse_spec({**SPEC, "run": {"storage": f"sqlite:///{tmp_path}/runs.db"}})
    first = RunFolder.create(tmp_path / "first", shared, "")
    space = make_space()
    first.record(space)
    second = RunFolder.create(tmp_path / "second", shared, "")
    with pytest.raises(RunError, match=f"study 'x' is the record of the run in {tmp_path}/first on ") as caught:
        second.record(space)
    assert caught.value.exit_code == 2
    assert second.candidates() == ()
    moved = first.root.rename(tmp_path / "moved")
    assert len(RunFolder.existing(moved).record(space)) == 0


def die_scoring(folder: RunFolder, recipe_hash: str) -> None:
    """A process that dies while it scores a candidate."""
    child = os.fork()
    if child == 0:
        with folder.attempting(recipe_hash):
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def deaths_of(folder: RunFolder, recipe_hash: str) -> int:
    with folder.attempting(recipe_hash) as deaths:
        return deaths


def test_deaths_over_one_candidate_are_counted(tmp_path: Path, spec: SearchSpec) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "")
    assert deaths_of(folder, "one") == 0
    die_scoring(folder, "one")
    die_scoring(folder, "one")
    assert deaths_of(folder, "one") == 2
    assert deaths_of(folder, "one") == 0  # it was lived through


def test_deaths_over_another_candidate_do_not_count(tmp_path: Path, spec: SearchSpec) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "")
    die_scoring(folder, "one")
    die_scoring(folder, "other")
    assert deaths_of(folder, "one") == 0


def test_an_interruption_is_no_death(tmp_path: Path, spec: SearchSpec) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "")
    with pytest.raises(KeyboardInterrupt), folder.attempting("one"):
        raise KeyboardInterrupt
    assert deaths_of(folder, "one") == 0


def test_a_candidate_that_kills_every_process_fails_in_the_end(tmp_path: Path, spec: SearchSpec) -> None:
    folder = RunFolder.create(tmp_path / "run", spec, "")
    proposal = Proposal(3, 1, Genome.of({}), {}, "one", (), "random")

    def scored() -> Outcome:
        return score_unless_crashing(folder, lambda _: Outcome(0.5), proposal)

    for _ in range(3):  # as many as may be kills that are none of its doing
        die_scoring(folder, "one")
    assert scored() == Outcome(0.5)
    for _ in range(4):
        die_scoring(folder, "one")
    found = scored()
    assert found.state == "failed"
    assert "killed: 4 processes in a row died" in (found.failure or "")


def test_a_record_without_its_end_is_told_and_made_whole(finished_run: Path, tmp_path: Path) -> None:
    """What a kill leaves of a line is cut off by a run that goes on; of a finished run nobody reads the rest as all."""
    root = Path(shutil.copytree(finished_run, tmp_path / "run"))
    whole, result = RunFolder.existing(root).candidates(), RunFolder.existing(root).result()
    path = root / "study.log"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(RunError, match=rf"study\.log: has \d+ of the {len(whole)} candidates that result\.json counts"):
        RunFolder.existing(root).candidates()
    torn = RunFolder.existing(root).candidates(torn=True)
    assert 0 < len(torn) < len(whole)
    assert resume(root).to_json() == result.to_json() if result is not None else False
    assert [c.recipe_hash for c in RunFolder.existing(root).candidates()] == [c.recipe_hash for c in whole]
