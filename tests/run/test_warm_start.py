"""A search that starts from other runs and recipes: what it takes, what it keeps, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import RunError, SpecError
from evomerge.problem.fake_evaluator import FakeRunner, fake_problem
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import Problem, open_problem
from evomerge.run.check import check_search
from evomerge.run.folder import RunFolder
from evomerge.run.search import resume, start
from evomerge.run.warm_start import MAX_OF_A_RUN, read_seeds, warm_starts
from evomerge.space.baselines import Start, baselines, raced_last
from evomerge.space.decode import genome_hash, recipe_hash
from evomerge.spec.load import load_spec, parse_spec
from evomerge.spec.schema import SearchSpec
from evomerge.study.candidate import Candidate
from evomerge.study.ranking import ranked
from tests.fakes import FAKE, fake_spec
from tests.frame import changed, invoke, search_spec

SMALL: dict[str, Any] = {"search__finalists": 2, "run__keep": 0, "evaluation__guard": []}


def spec_of(family: dict[str, Path], warm: Any, **changes: Any) -> SearchSpec:
    return parse_spec(search_spec(family, **{**SMALL, "search__warm_start": warm, **changes}))


def starts_of(problem: Problem) -> tuple[Start, ...]:
    """Generation 0 of a problem's search."""
    return warm_starts(problem.spec, problem.space, problem.reference_model, ModelRunner(problem).plan)


@pytest.fixture
def recipe_file(tiny_family: dict[str, Path], tmp_path: Path) -> Path:
    """A recipe that no space here can say exactly: a normalised sum."""
    weights: dict[str, Any] = {"a": 0.6, "b": [0.1, 0.4]}
    models = [{"model": str(tiny_family[name]), "parameters": {"weight": w}} for name, w in weights.items()]
    data = {"merge_method": "task_arithmetic", "base_model": str(tiny_family["base"]), "models": models}
    path = tmp_path / "known-good.yaml"
    path.write_text(yaml.safe_dump({**data, "parameters": {"normalize": True, "lambda": 0.8}}))
    return path


def test_generation_0_is_the_baselines_then_the_best_of_the_run_then_the_recipe(
    finished_run: Path, tiny_family: dict[str, Path], recipe_file: Path
) -> None:
    problem = open_problem(spec_of(tiny_family, [str(finished_run), str(recipe_file)], search__population=6))
    starts = starts_of(problem)
    first = baselines(problem.space)
    seeds = [start for start in starts if start not in first]
    assert starts == raced_last([*first, *seeds])
    known = {candidate.number: candidate for candidate in RunFolder.existing(finished_run).candidates()}
    winner = RunFolder.existing(finished_run).winner(tuple(known.values()))
    order = [winner, *(c.number for c in ranked(known.values()) if c.number != winner)]
    old = {recipe_hash(s.recipe) for s in first}
    expected = [f"seed: tiny #{k}" for k in order if recipe_hash(known[k].recipe) not in old][:MAX_OF_A_RUN]
    assert [s.name for s in seeds] == [*expected, "seed: known-good.yaml"]
    for seed in seeds[:-1]:
        candidate = known[int(seed.name.split("#")[1])]
        assert (seed.recipe, genome_hash(problem.space, seed.genome)) == (candidate.recipe, candidate.recipe_hash)
    assert seeds[-1].recipe["parameters"] == {"normalize": True, "lambda": 0.8}
    assert seeds[-1].genome.values["method"] == "task_arithmetic"
    assert all(problem.space.contains(s.genome) for s in starts)
    assert len({recipe_hash(s.recipe) for s in starts}) == len(starts)


def test_a_run_goes_on_without_what_it_started_from(
    finished_run: Path, tiny_family: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(finished_run, tmp_path / "first"))
    changes = {**SMALL, "search__warm_start": "first", "search__candidates": 11}
    changes["space__layer_groups"] = {"control_points": 3}  # over two groups there
    path = tmp_path / "second.yaml"
    path.write_text(yaml.safe_dump(search_spec(tiny_family, **changes), sort_keys=False))
    root = tmp_path / "run"
    start(load_spec(path), source=path, folder=root)
    folder = RunFolder.existing(root)
    kept = folder.starts()
    assert kept is not None
    names = [start.name for start in kept]
    assert [c.operator for c in folder.candidates()] == names[:11]
    assert any(name.startswith("seed: first #") for name in names)
    shutil.rmtree(source)
    resume(root, candidates=len(names) + 2)
    found = RunFolder.existing(root).candidates()
    assert [c.operator for c in found if c.generation == 0] == names
    assert [c.recipe for c in found if c.generation == 0] == [start.recipe for start in kept]
    assert start(load_spec(path), source=path, folder=root).candidates.budget == len(found)
    path.write_text(path.read_text().replace("warm_start: first", "warm_start: another"))
    with pytest.raises(RunError, match="warm_start"):
        start(load_spec(path), source=path, folder=root)


def test_check_says_what_it_starts_from(tiny_family: dict[str, Path], recipe_file: Path) -> None:
    told = check_search(spec_of(tiny_family, str(recipe_file)))
    assert f"warm start: 1 of generation 0 from {recipe_file}" in told


def refused(spec: SearchSpec, match: str) -> None:
    with pytest.raises(SpecError, match=match) as caught:
        read_seeds(spec)
    assert all(problem.startswith("search.warm_start: ") for problem in caught.value.problems)


def test_what_cannot_be_started_from_is_told_at_once(
    tiny_family: dict[str, Path], tmp_path: Path, recipe_file: Path
) -> None:
    (tmp_path / "empty").mkdir()
    torn = tmp_path / "torn.yaml"
    torn.write_text("merge_method: tys\n")
    spec = spec_of(tiny_family, ["runs/gone", str(tmp_path / "empty"), str(torn)])
    with pytest.raises(SpecError) as caught:
        read_seeds(spec)
    text = "\n".join(caught.value.problems)
    for part in ("no run folder and no recipe runs/gone", "empty: no run here", "'tys'"):
        assert part in text
    other = {**tiny_family, "b": tiny_family["c"]}
    spec = spec_of(other, str(recipe_file), models__sources={"a": str(tiny_family["a"])})
    refused(spec, rf"names {tiny_family['b']}, which this search does not have")


def test_a_run_of_other_models_is_refused(finished_run: Path, tiny_family: dict[str, Path]) -> None:
    spec = spec_of(tiny_family, str(finished_run), models__sources={"x": str(tiny_family["base"])})
    refused(spec, "no source in common with this search: a, b, c there, x here")


def test_a_run_without_scores_is_refused(tiny_family: dict[str, Path], finished_run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(finished_run, tmp_path / "begun"))
    for name in ("study.log", "result.json"):
        (copied / name).unlink()
    refused(spec_of(tiny_family, str(copied)), "no candidate of that run has been scored")


def test_a_recipe_with_steps_or_a_tokenizer_is_refused(recipe_file: Path, tiny_family: dict[str, Path]) -> None:
    recipe_file.write_text(recipe_file.read_text() + "tokenizer_source: union\n")
    refused(spec_of(tiny_family, str(recipe_file)), "one merge with the models' tokenizer")


def test_groups_that_do_not_fit_these_models_are_told(
    finished_run: Path, tiny_family: dict[str, Path], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(finished_run, tmp_path / "deep"))
    folder = RunFolder.existing(copied)
    space = folder.spec.space.model_copy(update={"layer_groups": 9})
    folder.write_spec(folder.spec.model_copy(update={"space": space}))
    with pytest.raises(SpecError, match=r"search\.warm_start: .*deep: space\.layer_groups: a number from 1 to 4"):
        starts_of(open_problem(spec_of(tiny_family, str(copied))))


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_missing_one_is_bad_input_and_leaves_nothing(
    command: str, tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "search.yaml"
    changes = {**SMALL, "search__warm_start": "runs/gone", "run__dir": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(search_spec(tiny_family, **changes)))
    ended = invoke(capsys, command, path)
    assert ended.code == 2
    assert "search.warm_start: no run folder and no recipe runs/gone" in ended.err
    assert not (tmp_path / "run").exists()


POOL = fake_spec(search__candidates=30, search__options={"jacobian_steps": False, "trust_region": False})


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search of two tasks, of which the second weighs twice as much."""
    folder = tmp_path_factory.mktemp("pool") / "first"
    start(POOL, folder=folder, parts=FAKE)
    return folder


def other_goal(pool: Path, **changes: Any) -> SearchSpec:
    """A search of the same models and items, by the first task's weight."""
    tasks = [{"task": "choice", "metric": "acc", "weight": 9.0}, {"task": "text", "metric": "bits_per_byte"}]
    spec = POOL.model_dump(by_alias=True) | {"name": "second"}
    return parse_spec(changed(spec, {"evaluation__tasks": tasks, "search__warm_start": str(pool), **changes}))


def generation_0(folder: Path) -> list[Candidate]:
    return [c for c in RunFolder.existing(folder).candidates() if c.generation == 0]


def test_a_pool_is_searched_for_another_goal_from_its_known_scores(pool: Path, tmp_path: Path) -> None:
    """Generation 0 costs nothing, the sources that the scale rests on included, and has the best by the new goal."""
    scored: list[str] = []
    scores, problem = FakeRunner.scores, fake_problem(POOL)

    def noted(self: FakeRunner, plan: Any, selection: Any) -> Any:
        if selection == problem.splits["search"]:
            scored.append(plan.digest)
        return scores(self, plan, selection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeRunner, "scores", noted)
        start(other_goal(pool, search__candidates=28), folder=tmp_path / "second", parts=FAKE)
    first = generation_0(tmp_path / "second")
    seeds = [c for c in first if c.operator.startswith("seed: ")]
    assert len(seeds) == MAX_OF_A_RUN
    runner = FakeRunner(problem)
    assert {c.items for c in first} == {0}
    assert not {runner.plan(c.recipe).digest for c in first} & set(scored)
    old = RunFolder.existing(pool).candidates()

    def value(candidate: Candidate) -> float:
        own, best = candidate.scores["search"], [c.scores["search"] for c in old[1:4]]
        prob = own["choice"]["prob"]["value"] / max(row["choice"]["prob"]["value"] for row in best)
        bits = min(row["text"]["bits_per_byte"]["value"] for row in best) / own["text"]["bits_per_byte"]["value"]
        return float(9 * prob + bits) / 10

    baseline_hashes = {c.recipe_hash for c in first if c not in seeds}
    order = sorted((c for c in old if c.recipe_hash not in baseline_hashes), key=lambda c: -value(c))
    assert [s.recipe_hash for s in seeds] == [c.recipe_hash for c in order[:MAX_OF_A_RUN]]
    assert [s.fitness for s in seeds] == pytest.approx([value(c) for c in order[:MAX_OF_A_RUN]])
    assert [s.fitness for s in seeds] != pytest.approx([c.fitness for c in order[:MAX_OF_A_RUN]])
    resumed = resume(tmp_path / "second", candidates=30, parts=FAKE)
    new = {c.recipe_hash for c in RunFolder.existing(tmp_path / "second").candidates()} - {c.recipe_hash for c in old}
    assert resumed.items.evaluated == 40 * len(new)


@pytest.mark.parametrize("change", ["dtype", "task"])
def test_what_was_scored_in_another_way_is_scored_again(pool: Path, tmp_path: Path, change: str) -> None:
    """Of a task that is another one, its own items alone."""
    changes: dict[str, Any] = {"evaluation__dtype": "bfloat16"}
    if change == "task":
        changes = {"evaluation__tasks": [{"task": "choice", "metric": "acc"}, {"task": "text", "metric": "loss"}]}
    start(other_goal(pool, search__candidates=6, **changes), folder=tmp_path / "run", parts=FAKE)
    assert {c.items for c in generation_0(tmp_path / "run")} == {40 if change == "dtype" else 20}
