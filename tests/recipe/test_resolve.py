"""What a recipe says about one tensor: gradients, filters, precedence, inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipe import Conditional, layer_places, lookup, parse_recipe, resolve, slice_inputs
from evomerge.recipe.settings import chain, evaluate, layer_t, restrict

Q = "model.layers.3.self_attn.q_proj.weight"
DOWN = "model.layers.3.mlp.down_proj.weight"


def ties(**extra: Any) -> dict[str, Any]:
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 2}}]
    return {"merge_method": "ties", "base_model": "base", "models": models} | extra


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0, 1))
def test_gradient_is_linear_interpolation(points: list[float], t: float) -> None:
    expected = np.interp(t, np.linspace(0, 1, len(points)), points) if len(points) > 1 else points[0]
    got = evaluate(tuple(points), "x", t)
    assert isinstance(got, float)
    assert got == pytest.approx(expected, abs=1e-7)


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=64))
def test_one_value_for_each_layer_is_exact(points: list[float]) -> None:
    assert [evaluate(tuple(points), "x", layer_t(k, len(points))) for k in range(len(points))] == points


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(1, 20), st.data())
def test_restricting_keeps_each_layers_value(points: list[float], total: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    for setting in (tuple(points), (Conditional(tuple(points), "q"), Conditional(7.0))):
        part = restrict(setting, start, stop, total)
        for offset in range(stop - start):
            whole = evaluate(setting, "q", layer_t(start + offset, total))
            assert evaluate(part, "q", layer_t(offset, stop - start)) == whole


def test_gradient_of_words_steps() -> None:
    # int(t · (n − 1)), as in mergekit: the last point not after t.
    assert [evaluate((True, False, True), "x", t) for t in (0.0, 0.49, 0.5, 0.99, 1.0)] == [
        True,
        True,
        False,
        False,
        True,
    ]


def test_filters_take_the_first_match() -> None:
    setting = (Conditional(0.1, "self_attn"), Conditional((0.0, 1.0), "mlp"), Conditional(0.5))
    assert evaluate(setting, Q, 0.25) == 0.1
    assert evaluate(setting, DOWN, 0.25) == 0.25
    assert evaluate(setting, "model.norm.weight", 1.0) == 0.5
    assert evaluate((Conditional(3.0, "*"),), "anything", 0.0) == 3.0
    assert evaluate((Conditional(3.0, "mlp"),), Q, 0.0) is None


def test_chain_says_what_two_levels_say() -> None:
    mlp = (Conditional(1.0, "mlp"),)
    assert chain(None, 2.0) == 2.0
    assert chain(0.5, mlp) == 0.5
    joined = chain(mlp, 2.0)
    assert joined == (Conditional(1.0, "mlp"), Conditional(2.0))
    assert chain(mlp, (Conditional(2.0, "q_proj"),)) == (Conditional(1.0, "mlp"), Conditional(2.0, "q_proj"))


def test_precedence_source_slice_model_module_recipe() -> None:
    levels: dict[str, Any] = {"source": 1.0, "slice": 2.0, "model": 3.0, "module": 4.0, "recipe": 5.0}
    order = list(levels)
    for first in range(len(order)):
        given_levels = {name: {"density": levels[name] / 10} for name in order[first:]}
        source = {"model": "a", "layer_range": [0, 4], "parameters": given_levels.get("source")}
        data = {
            "merge_method": "ties",
            "base_model": "base",
            "modules": {
                "decoder": {
                    "slices": [{"sources": [source], "parameters": given_levels.get("slice")}],
                    "parameters": given_levels.get("module"),
                }
            },
            "input_model_parameters": {"a": given_levels.get("model") or {}},
            "parameters": given_levels.get("recipe", {}) | {"weight": 1},
        }
        tensor = resolve(parse_recipe(data), 0, Q, 0.0)
        assert tensor.settings.column("density") == [levels[order[first]] / 10]


def test_level_without_a_match_falls_through() -> None:
    models = [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 0.25}]}}]
    recipe = parse_recipe(ties(models=models, parameters={"weight": 0.75}))
    assert resolve(recipe, 0, DOWN, 0.0).settings.column("weight") == [0.25]
    assert resolve(recipe, 0, Q, 0.0).settings.column("weight") == [0.75]


def test_filters_see_the_source_name_for_its_own_parameters() -> None:
    models = [
        {"model": "a", "parameters": {"weight": [{"filter": "layers.7", "value": 2}, {"value": 1}]}},
        {"model": "b", "parameters": {"weight": [{"filter": "layers.7", "value": 2}, {"value": 1}]}},
    ]
    shared = {"lambda": [{"filter": "layers.7", "value": 2}, {"value": 1}]}
    recipe = parse_recipe(ties(models=models, parameters=shared))
    tensor = resolve(recipe, 0, "model.layers.3.x", 0.0, ["model.layers.7.x", "model.layers.3.x"])
    assert tensor.settings.column("weight") == [2.0, 1.0]
    assert tensor.settings.shared["lambda"] == 1.0


def test_defaults_come_from_the_declaration() -> None:
    settings = resolve(parse_recipe(ties()), 0, Q, 0.0).settings
    assert settings.column("weight") == [1.0, 2.0]
    assert settings.column("density") == [1.0, 1.0]
    assert settings.shared["lambda"] == 1.0
    assert settings.shared["normalize"] is True
    assert settings.shared["consensus"] == "mass"


def test_base_is_no_source_of_a_delta_method() -> None:
    listed = ties()["models"] + [{"model": "base"}]
    for recipe in (parse_recipe(ties()), parse_recipe(ties(models=listed))):
        tensor = resolve(recipe, 0, Q, 0.0)
        assert (tensor.base, tensor.sources) == ("base", ("a", "b"))


def test_listed_base_is_a_source_of_linear() -> None:
    models = [{"model": "base", "parameters": {"weight": 3}}, {"model": "a", "parameters": {"weight": 1}}]
    tensor = resolve(parse_recipe({"merge_method": "linear", "base_model": "base", "models": models}), 0, Q, 0.0)
    assert (tensor.base, tensor.sources) == (None, ("base", "a"))
    assert tensor.settings.column("weight") == [3.0, 1.0]


def test_unlisted_base_joins_linear_only_when_it_has_a_weight() -> None:
    models: list[dict[str, Any]] = [{"model": "a"}, {"model": "b"}]
    shared = parse_recipe(
        {"merge_method": "linear", "base_model": "base", "models": models, "parameters": {"weight": 0.5}}
    )
    assert resolve(shared, 0, Q, 0.0).sources == ("a", "b", "base")
    own = [model | {"parameters": {"weight": 0.5}} for model in models]
    alone = parse_recipe({"merge_method": "linear", "base_model": "base", "models": own})
    assert resolve(alone, 0, Q, 0.0).sources == ("a", "b")


@pytest.mark.parametrize("listed", [["a", "b"], ["base", "a", "b"]])
@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_a_base_that_is_taken_is_no_source(method: str, listed: list[str]) -> None:
    models = [{"model": m, "parameters": {"weight": 0.5}} for m in listed]
    tensor = resolve(parse_recipe({"merge_method": method, "base_model": "base", "models": models}), 0, Q, 0.0)
    assert (tensor.base, tensor.sources) == ("base", ("a", "b"))
    alone = resolve(parse_recipe({"merge_method": method, "models": models}), 0, Q, 0.0)
    assert (alone.base, alone.sources) == (None, tuple(listed))


def test_unlisted_base_joins_karcher_which_asks_nothing_of_a_source() -> None:
    data = {"merge_method": "karcher", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}
    assert resolve(parse_recipe(data), 0, Q, 0.0).sources == ("a", "b", "base")


@pytest.mark.parametrize("listed", [["a", "b"], ["b", "a"], ["b"]])
def test_slerp_by_t_goes_from_the_base_to_the_other(listed: list[str]) -> None:
    data = {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": m} for m in listed],
        "parameters": {"t": 0.3},
    }
    tensor = resolve(parse_recipe(data), 0, Q, 0.0)
    assert (tensor.base, tensor.sources, tensor.settings.shared["t"]) == ("a", ("b",), 0.3)


def test_slerp_by_weight_has_a_listed_base_as_source() -> None:
    data = {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in (("b", 1), ("a", 2), ("c", 3))],
    }
    tensor = resolve(parse_recipe(data), 0, Q, 0.0)
    assert (tensor.base, tensor.sources) == (None, ("b", "a", "c"))


def test_t_within_slices() -> None:
    slices = [{"sources": [{"model": "a", "layer_range": span}]} for span in ([0, 3], [5, 6], [0, 2])]
    recipe = parse_recipe({"merge_method": "passthrough", "slices": slices})
    places = layer_places(recipe, 99)
    assert [(p.slice_index, p.offset, p.t) for p in places] == [
        *((0, 0, 0.0), (0, 1, 0.5), (0, 2, 1.0)),
        (1, 0, 1.0),
        *((2, 0, 0.0), (2, 1, 1.0)),
    ]


def test_slice_inputs_say_which_layers() -> None:
    sources = [
        {"model": "a", "layer_range": [4, 8]},
        {"model": "base", "layer_range": [1, 5]},
        {"model": "b", "layer_range": [0, 4]},
    ]
    data = {"merge_method": "ties", "base_model": "base", "slices": [{"sources": sources}], "parameters": {"weight": 1}}
    inputs = slice_inputs(parse_recipe(data), 0)
    assert inputs.base is not None
    assert (inputs.base.model, inputs.base.start) == ("base", 1)
    assert [(source.model, source.start) for source in inputs.sources] == [("a", 4), ("b", 0)]


def test_unlisted_base_follows_the_sources_layers() -> None:
    sources = [{"model": "a", "layer_range": [4, 8]}, {"model": "b", "layer_range": [4, 8]}]
    data = {"merge_method": "ties", "base_model": "base", "slices": [{"sources": sources}], "parameters": {"weight": 1}}
    inputs = slice_inputs(parse_recipe(data), 0)
    assert inputs.base is not None
    assert inputs.base.start == 4


def test_same_model_twice_keeps_its_own_parameters() -> None:
    sources = [
        {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 0.25}},
        {"model": "a", "layer_range": [2, 4], "parameters": {"weight": 0.75}},
    ]
    recipe = parse_recipe({"merge_method": "linear", "slices": [{"sources": sources}]})
    assert resolve(recipe, 0, Q, 0.0).settings.column("weight") == [0.25, 0.75]


def test_base_and_method_of_a_slice() -> None:
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 2]}], "base_model": "other"},
        {"sources": [{"model": "a", "layer_range": [2, 4]}], "merge_method": "linear"},
    ]
    recipe = parse_recipe({"merge_method": "ties", "base_model": "base", "slices": slices, "parameters": {"weight": 1}})
    first, second = (resolve(recipe, index, Q, 0.0) for index in (0, 1))
    assert (first.method.name, first.base) == ("ties", "other")
    assert (second.method.name, second.base) == ("linear", None)


def test_missing_weight_of_one_tensor_is_named() -> None:
    models = [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]
    recipe = parse_recipe(ties(models=models))
    assert resolve(recipe, 0, DOWN, 0.0).sources == ("a",)
    with pytest.raises(RecipeError, match=r"q_proj\.weight: ties needs 'weight' of a"):
        resolve(recipe, 0, Q, 0.0)


def test_weights_that_cancel_for_one_tensor_are_named() -> None:
    models = [
        {"model": "a", "parameters": {"weight": 1}},
        {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": -1}, {"value": 1}]}},
    ]
    recipe = parse_recipe({"merge_method": "linear", "models": models})
    assert resolve(recipe, 0, Q, 0.0).settings.column("weight") == [1.0, 1.0]
    with pytest.raises(RecipeError, match=r"down_proj\.weight: linear: .*sum to zero"):
        resolve(recipe, 0, DOWN, 0.0)


def test_weights_that_cancel_at_the_end_of_a_gradient_are_found_when_parsing() -> None:
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": [0, -1]}}]
    with pytest.raises(RecipeError, match="sum to zero"):
        parse_recipe({"merge_method": "linear", "models": models})


def test_residual_scale_by_layer_wins_over_the_parameter() -> None:
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 3]}], "residual_scale": [0.5, 0.6, 0.7]},
        {"sources": [{"model": "a", "layer_range": [3, 4]}], "residual_scale": 2},
        {"sources": [{"model": "a", "layer_range": [4, 6]}]},
    ]
    recipe = parse_recipe({"merge_method": "passthrough", "slices": slices, "parameters": {"residual_scale": [0, 1]}})
    got = [resolve(recipe, p.slice_index, Q, p.t).residual_scale for p in layer_places(recipe, 0)]
    assert got == [0.5, 0.6, 0.7, 2.0, 0.0, 1.0]


def test_scale_of_copies_is_per_source() -> None:
    sources = [{"model": "a", "layer_range": [0, 2], "parameters": {"scale": [{"filter": "o_proj", "value": 0}]}}]
    recipe = parse_recipe({"merge_method": "passthrough", "slices": [{"sources": sources}]})
    assert resolve(recipe, 0, "l.o_proj.weight", 0.0).settings.column("scale") == [0.0]
    assert resolve(recipe, 0, Q, 0.0).settings.column("scale") == [1.0]


def test_lookup_of_what_is_no_method_parameter() -> None:
    recipe = parse_recipe(ties(parameters={"embed_slerp": True}))
    assert lookup(recipe, 0, "embed_slerp", "model.embed_tokens.weight", 0.0) is True
    assert lookup(recipe, 0, "int8_mask", Q, 0.0) is None
