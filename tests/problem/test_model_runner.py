"""Recipes to plans, and plans to scores and sizes, by one live model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import RecipeError
from evomerge.evaluation.splits import SEARCH
from evomerge.problem import model_runner
from evomerge.problem.model_runner import ModelRunner, join_items, take_items
from evomerge.problem.problem import Problem, open_problem
from evomerge.recipe.parse import single_model
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from tests.frame import search_spec


@pytest.fixture(scope="module")
def problem(tiny_family: dict[str, Path]) -> Problem:
    return open_problem(parse_spec(search_spec(tiny_family)))


@pytest.fixture(scope="module")
def runner(problem: Problem) -> ModelRunner:
    return ModelRunner(problem)


def stacked(family: Mapping[str, Path], pattern: str) -> dict[str, Any]:
    """A recipe whose layers come from these models, one letter for each layer."""
    slices = [{"sources": [{"model": str(family[name]), "layer_range": [k, k + 1]}]} for k, name in enumerate(pattern)]
    return {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}


def test_sizes_are_those_of_the_merged_model(runner: ModelRunner, tiny_family: dict[str, Path]) -> None:
    for recipe in (stacked(tiny_family, "ab"), stacked(tiny_family, "abba"), single_model(str(tiny_family["base"]))):
        plan = runner.plan(recipe)
        model = runner.materialise(plan)
        parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
        sizes = {"layers": len(model.model.layers), "parameters": sum(parameters.values())}
        assert runner.sizes(plan) == sizes


def test_a_recipe_that_is_not_possible(runner: ModelRunner) -> None:
    with pytest.raises(RecipeError):
        runner.plan({"merge_method": "linear"})


def test_sources_get_the_memory_of_the_device_that_the_run_gives_them(
    tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(model_runner, "Resident", lambda *_, **options: made.update(options))
    spec = search_spec(tiny_family) | {"run": {"device_memory": "2GB"}}
    assert ModelRunner(open_problem(parse_spec(spec)))._live is None
    assert made["device_memory"] == 2 * 10**9
    assert made["activations"] > 0


@pytest.mark.parametrize(
    ("backend", "given", "expected"), [("native", None, None), ("vllm", None, 0), ("vllm", 7, 7), ("hf", 0, 0)]
)
def test_beside_vllm_only_what_was_asked_for_is_kept(
    tiny_family: dict[str, Path], backend: str, given: int | None, expected: int | None
) -> None:
    spec = search_spec(tiny_family) | {"run": {"device_memory": given}}
    spec["evaluation"] = {**spec["evaluation"], "backend": backend, "device": "cuda"}
    assert model_runner.memory_for_sources(SearchSpec.model_validate(spec)) == expected


def test_scores_after_a_release_and_in_parts_are_the_same(
    problem: Problem, runner: ModelRunner, tiny_family: dict[str, Path]
) -> None:
    plan, selection = runner.plan(stacked(tiny_family, "aabb")), problem.splits[SEARCH]
    whole, seconds = runner.scores(plan, selection)
    assert set(seconds) == {"materialise", "score"}
    runner.release()
    again, _ = runner.scores(plan, selection)
    positions = {name: {item: k for k, item in enumerate(task.items)} for name, task in problem.tasks.items()}
    for task, scores in whole.items():
        assert again[task].items == scores.items
        for metric in scores.metrics:
            assert again[task].values(metric).tolist() == scores.values(metric).tolist()
    halves = [{t: s.items[start::2] for t, s in whole.items()} for start in (0, 1)]
    even, odd = (take_items(whole, half) for half in halves)
    assert even is not None
    assert odd is not None
    joined = join_items(even, odd, positions)
    assert {task: scores.items for task, scores in joined.items()} == {t: s.items for t, s in whole.items()}
    assert take_items(even, halves[1]) is None
