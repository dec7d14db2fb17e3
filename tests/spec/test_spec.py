"""A search.yaml: every key of the contract is read, every kind of mistake is told with its key and the nearest one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.errors import SpecError
from evomerge.run.preflight import load_search as load_spec
from evomerge.run.preflight import parse_search as parse_spec
from evomerge.spec.schema import SearchSpec
from tests.frame import changed, search_spec

EXAMPLE = """
name: grammar-math-science
models:
  base: models/base
  sources: {islands: models/islands, agreement: models/agreement, math: models/math}
space:
  methods: [linear, slerp, task_arithmetic, ties, dare, dare_ties, frankenmerge, dfs]
  method_scope: run
  layer_groups: 6
  tensor_groups: [attention, mlp, rest]
  genes:
    weight: {low: 0.0, high: 1.5}
    density: {low: 0.1, high: 1.0}
  frankenmerge: {min_layers: 24, max_layers: 36, scale: true}
evaluation:
  include_path: tasks
  tasks:
    - {task: real_blimp_islands, metric: acc, weight: 1.0}
    - {task: real_blimp_agreement, metric: acc, weight: 1.0, splits: {search: 100, select: 0.25, test: 30}}
    - {task: real_gsm8k_bpb, metric: bits_per_byte, weight: 1.0}
  scale: relative
  splits: {search: 0.25, select: 0.25, test: 0.5}
  guard: [real_arc_easy]
  fitness: metric
  racing: true
  device: cpu
  dtype: bfloat16
  batch_tokens: 4096
search:
  algorithm: ga
  population: 16
  candidates: 200
  objectives: mean
  seed: 0
  stop: {hours: 8, stale_generations: 5}
run:
  dir: runs/grammar-math-science
  executor: local
  storage: null
  keep: 3
"""
MINIMAL: dict[str, Any] = {
    "name": "small",
    "models": {"base": "base", "sources": {"a": "a", "b": "b"}},
    "evaluation": {"tasks": ["arc_easy"]},
}


def _problems(**changes: Any) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        parse_spec(changed(MINIMAL, changes))
    return caught.value.problems


@pytest.fixture
def example(tmp_path: Path) -> Path:
    for folder in ("tasks", "models/base", "models/islands", "models/agreement", "models/math"):
        (tmp_path / folder).mkdir(parents=True)
    path = tmp_path / "search.yaml"
    path.write_text(EXAMPLE)
    return path


def test_every_key_of_the_contract(example: Path) -> None:
    spec = load_spec(example)
    assert list(spec.models.sources) == ["islands", "agreement", "math"]
    assert spec.space.genes["weight"].high == 1.5
    assert spec.space.frankenmerge.model_dump() == {"min_layers": 24, "max_layers": 36, "scale": True}
    assert spec.evaluation.tasks[1].splits is not None
    assert spec.evaluation.tasks[1].splits.search == 100
    assert spec.evaluation.racing
    assert (spec.search.stop.hours, spec.search.stop.stale_generations) == (8, 5)
    assert (spec.run.keep, spec.folder) == (3, Path("runs/grammar-math-science"))
    # Nothing is lost on the way: what was written is what is kept, paths aside.
    written = yaml.safe_load(EXAMPLE)
    kept = spec.model_dump(mode="json")
    written["evaluation"]["include_path"] = [str(example.parent / "tasks")]
    written["models"] = kept["models"]
    assert _differences(written, kept) == []


def _differences(written: Any, kept: Any, where: str = "") -> list[str]:
    if isinstance(written, dict):
        return [d for key, value in written.items() for d in _differences(value, kept[key], f"{where}.{key}")]
    if isinstance(written, list) and written and isinstance(written[0], dict):
        return [d for i, value in enumerate(written) for d in _differences(value, kept[i], f"{where}.{i}")]
    return [] if written == kept else [f"{where}: {written!r} became {kept!r}"]


def test_resolved_spec_reads_back(example: Path) -> None:
    spec = load_spec(example)
    assert SearchSpec.model_validate(yaml.safe_load(yaml.safe_dump(spec.model_dump()))) == spec


def test_minimal_takes_defaults() -> None:
    spec = parse_spec(MINIMAL)
    assert spec.evaluation.tasks[0].task == "arc_easy"
    assert spec.folder == Path("runs/small")
    assert (spec.search.algorithm, spec.evaluation.dtype, spec.run.keep) == ("ga", "auto", 1)


@pytest.mark.parametrize(
    ("methods", "fitness"),
    [
        (["linear", "ties"], "smooth"),
        (["linear", "frankenmerge"], "smooth"),
        (["frankenmerge"], "metric"),
        (["passthrough"], "metric"),
    ],
)
def test_what_steers_suits_the_space(methods: list[str], fitness: str) -> None:
    """Stacks of copied layers differ in how sure they are; where the file says what steers, that does."""
    assert parse_spec({**MINIMAL, "space": {"methods": methods}}).evaluation.fitness == fitness
    for said in ("smooth", "metric"):
        evaluation = {**MINIMAL["evaluation"], "fitness": said}
        assert (
            parse_spec({**MINIMAL, "space": {"methods": methods}, "evaluation": evaluation}).evaluation.fitness == said
        )


def test_paths_beside_the_file_above_it_and_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "project" / "searches"
    for folder in (inner / "beside", tmp_path / "above", tmp_path / "here" / "cwd", inner / "tasks"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    models = {"base": "beside", "sources": {"above": "above", "cwd": "cwd", "hub": "org/name@main", "tiny": "zoo:x"}}
    content = changed(MINIMAL, {"models": models, "evaluation__include_path": "tasks"})
    (inner / "search.yaml").write_text(yaml.safe_dump(content))
    spec = load_spec(inner / "search.yaml")
    assert spec.models.base == str(inner / "beside")
    assert spec.models.sources == {
        "above": str(tmp_path / "above"),
        "cwd": str(tmp_path / "here" / "cwd"),
        "hub": "org/name@main",
        "tiny": "zoo:x",
    }
    assert spec.evaluation.include_paths == [str(inner / "tasks")]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"evaluaton": {}}, "evaluaton: unknown key (did you mean 'evaluation'?)"),
        ({"search__candidate": 3}, "search.candidate: unknown key (did you mean 'candidates'?)"),
        ({"space__genes": {"weight": {"lw": 0}}}, "space.genes.weight.lw: unknown key (did you mean 'low'?)"),
        (
            {"evaluation__tasks": [{"task": "x", "metrc": "acc"}]},
            "evaluation.tasks.0.metrc: unknown key (did you mean 'metric'?)",
        ),
        (
            {"evaluation__tasks": [{"task": "x", "splits": {"serch": 3}}]},
            "evaluation.tasks.0.splits.serch: unknown key (did you mean 'search'?)",
        ),
        (
            {"space__frankenmerge": {"min_layer": 3}},
            "space.frankenmerge.min_layer: unknown key (did you mean 'min_layers'?)",
        ),
        ({"name": ...}, "name: missing"),
        ({"models__sources": {}}, "models.sources"),
        ({"models__sources": {"base": "x"}}, "source name 'base'"),
        ({"name": "../escape"}, "name: "),
        ({"search__population": 1}, "search.population: input should be greater than or equal to 2 (got 1)"),
        ({"search__candidates": "many"}, "(got 'many')"),
        ({"search__objectives": "front"}, "search.objectives: input should be 'mean' or 'pareto' (got 'front')"),
        ({"search__objectives": "pareto"}, "search.objectives: a front is of 2 to 6 objectives, a task each and what"),
        ({"search__also_minimize": ["layers"], "space__methods": ["frankenmerge"]}, "only with `objectives: pareto`"),
        ({"search__stop__fitness": "high"}, "search.stop.fitness: input should be a valid number"),
        ({"run__executor": "slurm"}, "run.executor: input should be 'local' or 'ray' (got 'slurm')"),
        ({"run__workers": 0}, "run.workers: input should be greater than or equal to 1 (got 0)"),
        ({"search__mode": "steady"}, "search.mode: input should be 'generational' or 'asynchronous' (got 'steady')"),
        ({"evaluation__dtype": "int8"}, "evaluation.dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"search__algorithm": "tpee"}, "search.algorithm: 'tpee' is not one of "),
        ({"search__algorithm": "rando"}, "(did you mean 'random'?)"),
        ({"space__methods": ["tie"]}, "space.methods: no method 'tie' (did you mean 'ties'?)"),
        ({"space__genes": {"weight": {"low": 2, "high": 1}}}, "low (2.0) is above high (1.0)"),
        ({"space__genes": {"weight": {"low": 0, "high": float("inf")}}}, "space.genes.weight.high: "),
        ({"space__layer_groups": "some"}, "space.layer_groups: "),
        ({"space__layer_groups": {"control_point": 4}}, "space.layer_groups: a mapping says {control_points: a number"),
        (
            {"space__layer_groups": {"control_points": 1}},
            "space.layer_groups: a mapping says {control_points: a number",
        ),
        ({"search__warm_start": 3}, "search.warm_start: input should be a valid string"),
        ({"evaluation__tasks": []}, "evaluation.tasks: "),
        ({"evaluation__tasks": ["x", "x"]}, "'x' is listed twice"),
        ({"evaluation__guard": ["arc_easy"]}, "evaluation.guard: 'arc_easy' is one of evaluation.tasks"),
        ({"evaluation__splits": {"search": 0.5, "select": 0.4, "test": 0.2}}, "add up to 1.1"),
        ({"evaluation__splits": {"search": 1.0, "select": 0.4, "test": 20}}, "add up to 1.4"),
        ({"evaluation__splits": {"search": 2.5}}, "2.5 is neither a fraction nor a whole number"),
        ({"evaluation__splits": {"search": float("inf")}}, "evaluation.splits.search: "),
        ({"evaluation__include_path": "nowhere"}, "evaluation.include_path: no folder nowhere"),
        ({"models__base": ..., "space": {"methods": ["ties", "linear"]}}, "models.base: missing, and ties need"),
    ],
)
def test_one_mistake_one_message(changes: dict[str, Any], expected: str) -> None:
    problems = _problems(**changes)
    assert len(problems) == 1, problems
    assert expected in problems[0]
    assert problems[0].startswith("search.yaml: ")


def test_several_mistakes_at_once() -> None:
    problems = _problems(search={"candidates": 0, "algoritm": "ga"}, evaluation__batch_token=8, nam="x")
    assert [problem.removeprefix("search.yaml: ").split(":")[0] for problem in problems] == [
        "evaluation.batch_token",
        "search.candidates",
        "search.algoritm",
        "nam",
    ]
    names = _problems(space__methods=["lineer"], search__algorithm="gaa", evaluation__include_path="nowhere")
    assert len(names) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("name: a\nname: b\n", "given twice"),
    ],
)
def test_files_that_are_no_search(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=expected):
        load_spec(path)
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        load_spec(tmp_path / "missing.yaml")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.sampled_from(
        [
            "name",
            "models",
            "models__base",
            "models__sources",
            "space",
            "space__layer_groups",
            "space__genes",
            "run",
            "run__dir",
            "search",
            "search__stop",
            "evaluation__tasks",
            "evaluation__splits",
            "evaluation__include_path",
        ]
    ),
    json_values,
)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    problems: tuple[str, ...] = ()
    try:
        parse_spec(changed(MINIMAL, {key: value}))
    except SpecError as error:
        problems = error.problems or ("no problem is told",)
    assert all(problem.startswith("search.yaml: ") for problem in problems)


def test_the_tiny_search_of_these_tests(tiny_family: dict[str, Path]) -> None:
    assert parse_spec(search_spec(tiny_family)).search.candidates == 18


def test_objectives() -> None:
    """The tasks as they are listed, then sizes."""
    two = {"evaluation__tasks": ["arc_easy", "hellaswag"]}
    assert parse_spec(changed(MINIMAL, two)).objectives == ()
    assert parse_spec(changed(MINIMAL, {**two, "search__objectives": "pareto"})).objectives == ("arc_easy", "hellaswag")
    sizes = {"search__objectives": "pareto", "search__also_minimize": ["layers"], "space__methods": ["frankenmerge"]}
    assert parse_spec(changed(MINIMAL, sizes)).objectives == ("arc_easy", "layers")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"search__also_minimize": ["layers", "layers"], "space__methods": ["frankenmerge"]},
            "'layers' is listed twice",
        ),
        ({"search__also_minimize": ["layers"]}, "without frankenmerge in space.methods every merge has the same size"),
        ({"search__also_minimize": ["depth"]}, "input should be 'tokens', 'layers' or 'parameters'"),
        ({"evaluation__tasks": [f"task{k}" for k in range(7)]}, "a front is of 2 to 6 objectives"),
    ],
)
def test_objectives_that_make_no_front(changes: dict[str, Any], expected: str) -> None:
    two = {"evaluation__tasks": ["arc_easy", "hellaswag"], "search__objectives": "pareto"}
    problems = _problems(**{**two, **changes})
    assert len(problems) == 1, problems
    assert expected in problems[0]


def test_an_algorithm_must_be_able_to_search_for_the_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    one, several = (
        replace(ALGORITHMS["ga"], multi_objective=False),
        replace(ALGORITHMS["ga"], single_objective=False, multi_objective=True),
    )
    monkeypatch.setitem(ALGORITHMS, "of-one", one)
    monkeypatch.setitem(ALGORITHMS, "of-several", several)
    two = {"evaluation__tasks": ["arc_easy", "hellaswag"]}
    (problem,) = _problems(**two, search__objectives="pareto", search__algorithm="of-one")
    assert "search.objectives: of-one cannot search for pareto; these can: " in problem
    able = problem.rpartition(": ")[2].split(", ")
    assert able == sorted(name for name, algorithm in ALGORITHMS.items() if algorithm.multi_objective)
    (problem,) = _problems(**two, search__algorithm="of-several")
    assert "of-several cannot search for mean; these can: " in problem
    assert "of-several" not in problem.rpartition(": ")[2]


def test_an_algorithm_of_whole_generations_is_not_asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    from evomerge.algorithms.registry import ALGORITHMS

    generational = replace(ALGORITHMS["random"], asynchronous=False)
    monkeypatch.setitem(ALGORITHMS, "whole", generational)
    parse_spec(changed(MINIMAL, {"search__algorithm": "whole"}))
    (problem,) = _problems(search__algorithm="whole", search__mode="asynchronous")
    assert "search.mode: whole learns from whole generations and cannot be asynchronous; these can: ga, " in problem
    assert parse_spec(changed(MINIMAL, {"search__mode": "asynchronous"})).search.mode == "asynchronous"


NUMBERS = [
    *("search.candidates", "search.population", "search.seed", "search.finalists", "search.stop.hours"),
    *("search.stop.stale_generations", "run.workers", "run.keep", "evaluation.batch_tokens", "evaluation.max_length"),
    *("space.layer_groups", "space.frankenmerge.max_layers", "evaluation.splits.search"),
]


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_is_without_a_bound(key: str) -> None:
    problems = _problems(**{key.replace(".", "__"): 10**30})
    assert any(key in problem for problem in problems), problems


@pytest.mark.parametrize("weight", [1e308, 1e-320, float("inf"), 10**400])
def test_task_weights_have_finite_sums(weight: float) -> None:
    problems = _problems(evaluation__tasks=[{"task": "t", "weight": weight}, {"task": "u", "weight": weight}])
    assert any("evaluation.tasks.0.weight" in problem for problem in problems)


@pytest.mark.parametrize(("text", "size"), [("20GB", 20 * 10**9), ("1.5 GiB", 3 << 29), (0, 0), (7, 7), (None, None)])
def test_memory_in_words(tiny_family: dict[str, Path], text: str | int | None, size: int | None) -> None:
    spec = parse_spec(search_spec(tiny_family) | {"run": {"device_memory": text}})
    assert spec.run.device_memory == size
    assert parse_spec(spec.model_dump(mode="json")).run.device_memory == size


@pytest.mark.parametrize("text", ["much", "-1GB", -1, "2000000GB", 1.5])
def test_memory_that_is_none(tiny_family: dict[str, Path], text: str | float) -> None:
    with pytest.raises(SpecError, match=r"run\.device_memory"):
        parse_spec(search_spec(tiny_family) | {"run": {"device_memory": text}})
