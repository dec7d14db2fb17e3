"""A merge of merges as one over the first models: the same tensors, or the recipe as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from evomerge.recipe import Recipe, parse_recipe
from evomerge.recipe.flatten import flattened, with_steps
from evomerge.run.export import tensor_layers
from evomerge.run.merge import merge_to_folder

TOLERANCE = 1e-6
"""Of weights of about 0.02 to 1 in float32: sums in another order, and no rounding in between."""


def models(weights: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"model": model, "parameters": {"weight": weight}} for model, weight in weights.items()]


def layered(*slices: dict[str, Any]) -> list[dict[str, Any]]:
    """Slices over two layers each."""
    return [
        {"sources": [{**entry, "layer_range": [2 * k, 2 * k + 2]} for entry in models(weights)]}
        for k, weights in enumerate(slices)
    ]


@pytest.fixture
def family(tiny_family: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in tiny_family.items()}


def over(family: dict[str, str], recipe: dict[str, Any], steps: dict[str, Any]) -> tuple[Recipe, Recipe]:
    """A recipe with its steps, and as one."""
    whole = with_steps(recipe, steps)
    opened = open_checkpoint(family["base"])
    return whole, flattened(whole, tensor_layers(opened.layout), opened.layout.layer_count)


def same_tensors(whole: Recipe, one: Recipe, folder: Path) -> None:
    results: list[Checkpoint] = []
    for name, recipe in (("whole", whole), ("one", one)):
        results.append(open_checkpoint(str(merge_to_folder(recipe, folder / name))))
    first, second = results
    assert list(first.tensors) == list(second.tensors)
    for name in first.tensors:
        assert torch.allclose(first.tensor(name), second.tensor(name), rtol=0, atol=TOLERANCE), name


def test_task_arithmetic_of_sums(family: dict[str, str], tmp_path: Path) -> None:
    """Per slice, along gradients and by filters; a step that rests on another, and a model on both levels."""
    base, a, b, c = (family[name] for name in ("base", "a", "b", "c"))
    attention = [{"filter": ".self_attn.", "value": 0.9}, {"value": [0.2, 0.7]}]
    embedding = [{"filter": "embed_tokens", "value": 0.1}, {"filter": ".self_attn.", "value": 0.4}, {"value": 0.3}]
    steps = {
        "candidate-2": {"merge_method": "linear", "models": models({a: 0.3, b: [1.0, 0.2]})},
        "candidate-5": {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": models({"candidate-2": 0.5, c: attention}),
            "parameters": {"lambda": 0.8},
        },
    }
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "slices": layered({a: 0.2, "candidate-5": embedding}, {"candidate-2": 0.6, "candidate-5": -0.1}),
    }
    whole, one = over(family, recipe, steps)
    assert not one.steps
    assert set(one.models()) == {base, a, b, c}
    assert (one.merge_method, one.base_model) == ("task_arithmetic", base)
    same_tensors(whole, one, tmp_path)
    assert parse_recipe(one.to_yaml()).digest == one.digest


def test_linear_without_a_base(family: dict[str, str], tmp_path: Path) -> None:
    """a: 0.5 · 0.25 + 0.5 = 0.625, b: 0.5 · 0.75 = 0.375."""
    steps = {"candidate-1": {"merge_method": "linear", "models": models({family["a"]: 1.0, family["b"]: 3.0})}}
    recipe = {"merge_method": "linear", "models": models({"candidate-1": 2.0, family["a"]: 2.0})}
    whole, one = over(family, recipe, steps)
    (part,) = one.slices
    assert {s.model: s.parameters["weight"] for s in part.sources} == {family["a"]: 0.625, family["b"]: 0.375}
    same_tensors(whole, one, tmp_path)


@pytest.mark.parametrize("what", ["ties", "not one", "filters"])
def test_what_is_no_such_sum_keeps_its_steps(family: dict[str, str], what: str) -> None:
    base, a, b = family["base"], family["a"], family["b"]
    step: dict[str, Any] = {"merge_method": "linear", "models": models({a: 0.5, b: 0.5})}
    recipe: dict[str, Any] = {"merge_method": "linear", "models": models({"candidate-1": 0.5, a: 0.5})}
    if what == "ties":
        step = {"merge_method": "ties", "base_model": base, "models": models({a: 0.5, b: 0.5})}
    if what == "not one":
        recipe["parameters"] = {"normalize": False}
        recipe["models"] = models({"candidate-1": 0.7, a: 0.5})
    if what == "filters":  # in the one order "proj" hides what "q_proj" tells apart in the other document
        step["models"] = models({a: [{"filter": "proj", "value": 0.2}, {"value": 0.5}], b: 0.5})
        recipe["models"] = models({"candidate-1": [{"filter": "q_proj", "value": 0.9}, {"value": 0.5}], a: 0.5})
    whole, one = over(family, recipe, {"candidate-1": step})
    assert one is whole
