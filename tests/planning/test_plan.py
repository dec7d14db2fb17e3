"""Plans: which operation makes each tensor, and when two operations are the same."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.dtypes import widest
from evomerge.errors import CheckpointError, RecipeError
from evomerge.methods.contract import Method
from evomerge.planning.operation import COPY
from evomerge.planning.plan import align_and_plan
from evomerge.recipe import parse_recipe
from tests.engine.recipes import EVERY, layers, opened, plan_of, recipe_for, single
from tests.models import write_tiny_llama

Q = "model.layers.{}.self_attn.q_proj.weight"


def digests(recipe: dict[str, Any]) -> dict[str, str]:
    return {operation.output: operation.digest for operation in plan_of(recipe).operations}


@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)
def test_one_operation_for_every_tensor(tiny_family: dict[str, Path], method: Method) -> None:
    plan = plan_of(recipe_for(method, tiny_family))
    names = [operation.output for operation in plan.operations]
    depth = 5 if method.copies_layers else 4
    assert names == sorted(set(names))
    assert len(names) == 9 * depth + 2
    assert plan.config["num_hidden_layers"] == depth
    for operation in plan.operations:
        assert operation.digest
        assert operation.method == (COPY if method.copies_layers else method.name)
        assert (operation.base is not None) == (method.needs_base and not method.copies_layers)


def test_layers_come_from_where_the_slices_say(tiny_family: dict[str, Path]) -> None:
    a, b = str(tiny_family["a"]), str(tiny_family["b"])
    plan = plan_of(layers((a, 2, 4), (b, 0, 1), (a, 3, 4)))
    found = {op.output: (op.sources[0].model, op.sources[0].tensor) for op in plan.operations}
    expected = [(a, 2), (a, 3), (b, 0), (a, 3)]
    for output, (model, layer) in enumerate(expected):
        assert found[Q.format(output)] == (model, Q.format(layer))
    assert found["model.embed_tokens.weight"] == (a, "model.embed_tokens.weight")
    assert found["model.norm.weight"] == (a, "model.norm.weight")
    swapped = plan_of(layers((a, 0, 1), (b, 0, 1)))
    assert {op.output: op.sources[0].model for op in swapped.operations}["model.norm.weight"] == b


def test_filters_and_gradients(tiny_family: dict[str, Path]) -> None:
    """A gradient is read at each layer's place, a filter by the tensor's name; outer tensors take the first value."""
    models = [
        {"model": str(tiny_family["a"]), "parameters": {"weight": [0.0, 0.9]}},
        {
            "model": str(tiny_family["b"]),
            "parameters": {"weight": [{"filter": "mlp", "value": 0.25}, {"value": [1.0, 0.4]}]},
        },
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(tiny_family["base"]), "models": models}
    found = {op.output: [s["weight"] for s in op.settings.sources] for op in plan_of(recipe).operations}
    for layer in range(4):
        t = layer / 3
        assert found[Q.format(layer)] == pytest.approx([0.9 * t, 1.0 - 0.6 * t])
        assert found[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx([0.9 * t, 0.25])
    assert found["model.embed_tokens.weight"] == pytest.approx([0.0, 1.0])


def test_a_method_of_its_own_for_a_slice(tiny_family: dict[str, Path]) -> None:
    sources = [{"model": str(tiny_family[name]), "layer_range": [0, 2]} for name in "ab"]
    upper = [{"model": str(tiny_family[name]), "layer_range": [2, 4]} for name in "ab"]
    recipe = {
        "merge_method": "ties",
        "base_model": str(tiny_family["base"]),
        "parameters": {"weight": 1.0, "density": 0.5},
        "slices": [{"sources": sources}, {"sources": upper, "merge_method": "linear"}],
    }
    found = {op.output: op.method for op in plan_of(recipe).operations}
    assert [found[Q.format(layer)] for layer in range(4)] == ["ties", "ties", "linear", "linear"]


def test_equal_content_has_equal_digests(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """Neither the models' places nor the parameters' spelling matter; nor does the order of keys."""
    moved = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in tiny_family.items()}
    for method in EVERY:
        assert digests(recipe_for(method, tiny_family)) == digests(recipe_for(method, moved))
        assert plan_of(recipe_for(method, tiny_family)).digest == plan_of(recipe_for(method, moved)).digest
    spelled = single(tiny_family["a"])
    shared = {"merge_method": "linear", "models": [{"model": str(tiny_family["a"])}], "parameters": {"weight": [1.0]}}
    assert digests(spelled) == digests(shared)


def test_the_seed_matters_to_what_draws_only(tiny_family: dict[str, Path]) -> None:
    for method in EVERY:
        one, two = (digests(recipe_for(method, tiny_family, seed=seed)) for seed in (1, 2))
        assert (one != two) == method.stochastic, method.name
        if method.stochastic:
            assert all(one[name] != two[name] for name in one)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("ties", {"parameters": {"lambda": 0.8}}),
        ("ties", {"parameters": {"lambda": 0.9, "normalize": False}}),
        ("ties", {"parameters": {"lambda": 0.9, "scope": "model"}}),
        ("ties", {"merge_method": "dare_ties"}),
        ("linear", {"out_dtype": "bfloat16"}),
        ("dfs", {"parameters": {"lambda": 0.9, "gamma": 2.0}}),
    ],
)
def test_whatever_matters_changes_the_digests(
    tiny_family: dict[str, Path], method: str, change: dict[str, Any]
) -> None:
    chosen = next(m for m in EVERY if m.name == method)
    recipe = recipe_for(chosen, tiny_family)
    before, after = digests(recipe), digests({**recipe, **change})
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)
    assert plan_of(recipe).digest != plan_of({**recipe, **change}).digest


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.sampled_from([0.1, 0.2, 0.7]), min_size=8, max_size=8))
def test_digests_agree_just_where_the_settings_do(tiny_family: dict[str, Path], weights: list[float]) -> None:
    """Layer by layer: a gradient of four values per source gives each layer its own."""

    def recipe(values: list[float]) -> dict[str, Any]:
        models = [
            {"model": str(tiny_family[name]), "parameters": {"weight": values[4 * i : 4 * i + 4]}}
            for i, name in enumerate("ab")
        ]
        return {"merge_method": "linear", "models": models}

    other = [0.1, 0.2, 0.7, 0.1, 0.7, 0.7, 0.2, 0.2]
    ours, theirs = digests(recipe(weights)), digests(recipe(other))
    for layer in range(4):
        same = weights[layer] == other[layer] and weights[4 + layer] == other[4 + layer]
        assert (ours[Q.format(layer)] == theirs[Q.format(layer)]) == same


def test_scope_model_depends_on_every_tensor(tiny_family: dict[str, Path]) -> None:
    """With one threshold for the model, another model's content changes every operation; a layer's own does not."""
    base = {"merge_method": "ties", "base_model": str(tiny_family["base"])}

    def recipe(name: str, scope: str) -> dict[str, Any]:
        models = [{"model": str(tiny_family["a"])}, {"model": str(tiny_family[name]), "parameters": {"weight": 0}}]
        return {**base, "models": models, "parameters": {"density": 0.3, "weight": 1.0, "scope": scope}}

    assert plan_of(recipe("b", "model")).family
    one, two = digests(recipe("b", "model")), digests(recipe("c", "model"))
    assert all(one[name] != two[name] for name in one)
    assert set(one.values()).isdisjoint(digests(recipe("b", "tensor")).values())


def test_a_repeated_layer_has_one_digest(tiny_family: dict[str, Path]) -> None:
    found = digests(layers((tiny_family["a"], 0, 2), (tiny_family["a"], 0, 2)))
    for layer in (0, 1):
        assert found[Q.format(layer)] == found[Q.format(layer + 2)]


def test_integers_are_copied(tmp_path: Path) -> None:
    """A tensor that is no float is the first model's, whatever the method."""
    folders = []
    for seed, name in enumerate("ab"):
        folder = write_tiny_llama(tmp_path / name, seed)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.steps"] = torch.tensor([seed + 7, 3])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    found = {op.output: op for op in plan_of({"merge_method": "linear", "models": models}).operations}
    assert found["model.steps"].method == COPY
    assert (found["model.steps"].dtype, found["model.steps"].sources[0].model) == ("I64", str(folders[0]))
    assert found["model.norm.weight"].method == "linear"


def test_impossible_ranges_are_told_together(tiny_family: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match="which has 4 layers") as caught:
        plan_of(layers((tiny_family["a"], 0, 5), (tiny_family["b"], 3, 9)))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["slices[0]", "slices[1]"]


def test_misfits_are_refused(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    narrow = write_tiny_llama(tmp_path / "narrow", 1, hidden=16)
    recipe = {"merge_method": "linear", "models": [{"model": str(m)} for m in (tiny_family["a"], narrow)]}
    with pytest.raises(CheckpointError, match="other shapes"):
        plan_of({**recipe, "parameters": {"weight": 1.0}})


def test_scale_is_for_numbers(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """Indices and masks are copied as they are, however a layer is scaled."""
    state = {"weight": torch.rand(4), "ids": torch.arange(300), "mask": torch.tensor([True, False])}
    save_file(state, tmp_path / "m.safetensors")
    source = {"model": str(tmp_path / "m.safetensors"), "parameters": {"scale": 0.5}}
    plan = plan_of({"merge_method": "passthrough", "models": [source]})
    assert {op.output: op.scale for op in plan.operations} == {"weight": 0.5, "ids": 1.0, "mask": 1.0}


@pytest.mark.parametrize("order", [("half", "full"), ("full", "half")])
def test_models_in_different_dtypes(tiny_family: dict[str, Path], tmp_path: Path, order: tuple[str, str]) -> None:
    """The widest of what goes in, whoever comes first, and a word of it; a recipe's own dtype settles it."""
    folders = {"full": tiny_family["a"], "half": write_tiny_llama(tmp_path / "half", dtype=torch.bfloat16)}
    models = [{"model": str(folders[name]), "parameters": {"weight": 0.5}} for name in order]
    recipe = parse_recipe({"merge_method": "linear", "models": models})
    checkpoints = opened(recipe.models())
    plan, _, warnings = align_and_plan(recipe, checkpoints, identify=False)
    assert {op.dtype for op in plan.operations} == {"F32"}
    assert [text for text in warnings if "half in bfloat16" in text and "written in float32" in text]
    settled = parse_recipe({"merge_method": "linear", "models": models, "dtype": "bfloat16"})
    plan, _, warnings = align_and_plan(settled, checkpoints, identify=False)
    assert ({op.dtype for op in plan.operations}, warnings) == ({"BF16"}, ())


@pytest.mark.parametrize(
    ("stored", "expected"), [("F16 BF16", "F32"), ("BF16 BF16", "BF16"), ("BF16 F32 F64", "F64"), ("F16 F32", "F32")]
)
def test_the_narrowest_dtype_that_holds_all(stored: str, expected: str) -> None:
    assert widest(stored.split()) == expected


def test_a_filter_that_leaves_tensors_without_a_weight_is_one_problem(tiny_family: dict[str, Path]) -> None:
    only = [{"filter": "mlp", "value": 0.5}]
    models = [{"model": str(tiny_family[name]), "parameters": {"weight": only}} for name in "ab"]
    with pytest.raises(RecipeError, match="needs 'weight' of") as caught:
        plan_of({"merge_method": "linear", "models": models})
    assert len(caught.value.problems) == 2
    for problem, name in zip(caught.value.problems, "ab", strict=True):
        assert re.match(r"\S+, \S+, \S+ and \d+ more: linear needs 'weight' of \S+/" + name, problem)
