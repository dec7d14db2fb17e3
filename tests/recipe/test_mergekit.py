"""Writing a recipe as a mergekit configuration."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from evomerge.recipe import expand_frankenmerge, parse_recipe
from evomerge.recipe.mergekit import to_mergekit_yaml

WEIGHTED = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.5}}]


def exported(data: dict[str, Any]) -> dict[str, Any] | None:
    text = to_mergekit_yaml(parse_recipe(data))
    return None if text is None else yaml.safe_load(text)


def test_ties_comes_out_as_it_went_in() -> None:
    data = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}}],
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float16",
    }
    assert exported(data) == data


def test_our_names_become_theirs() -> None:
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 4]}]},
        {"sources": [{"model": "b", "layer_range": [4, 8]}]},
    ]
    assert exported({"merge_method": "frankenmerge", "base_model": "a", "slices": slices}) == {
        "merge_method": "passthrough",
        "slices": slices,
    }
    dare = exported({"merge_method": "dare", "base_model": "base", "models": WEIGHTED, "seed": 3})
    assert dare == {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": WEIGHTED,
        "parameters": {"normalize": True},
    }


def test_pattern_is_said_in_slices() -> None:
    data = {"merge_method": "frankenmerge", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"pattern": "AB"}}
    recipe = parse_recipe(data)
    assert to_mergekit_yaml(recipe) is None
    text = to_mergekit_yaml(expand_frankenmerge(recipe, 2))
    assert text is not None
    assert yaml.safe_load(text)["slices"] == [
        {"sources": [{"model": "a", "layer_range": [0, 1]}]},
        {"sources": [{"model": "b", "layer_range": [1, 2]}]},
    ]


def test_drop_rate_becomes_density() -> None:
    rate = [{"filter": "mlp", "value": [0.9, 0.8]}, {"value": 0.5}]
    models = [{"model": "a", "parameters": {"weight": 1, "drop_rate": rate}}]
    got = exported({"merge_method": "dare_ties", "base_model": "base", "models": models})
    assert got is not None
    density = [{"filter": "mlp", "value": [0.1, 0.2]}, {"value": 0.5}]
    assert got["models"] == [{"model": "a", "parameters": {"weight": 1, "density": density}}]
    both = [{"model": "a", "parameters": {"weight": 1, "drop_rate": 0.9, "density": 0.5}}]
    assert exported({"merge_method": "dare_ties", "base_model": "base", "models": both}) is None


def test_base_is_listed_where_mergekit_wants_it() -> None:
    sources = [{"model": "a", "layer_range": [2, 4], "parameters": {"weight": 1}}]
    got = exported({"merge_method": "ties", "base_model": "base", "slices": [{"sources": sources}]})
    assert got is not None
    assert got["slices"] == [{"sources": [*sources, {"model": "base", "layer_range": [2, 4]}]}]


def test_base_that_linear_leaves_alone_gets_no_weight() -> None:
    got = exported({"merge_method": "linear", "base_model": "base", "models": WEIGHTED, "tokenizer_source": "base"})
    assert got is not None
    assert got["models"] == [*WEIGHTED, {"model": "base", "parameters": {"weight": 0}}]


def test_model_parameters_move_to_the_sources() -> None:
    sources = [
        {"model": "a", "layer_range": [0, 2]},
        {"model": "b", "layer_range": [0, 2], "parameters": {"weight": 9}},
    ]
    data = {
        "merge_method": "linear",
        "slices": [{"sources": sources, "parameters": {"weight": [{"filter": "mlp", "value": 2}]}}],
        "input_model_parameters": {"a": {"weight": 3}, "b": {"weight": 4}},
    }
    got = exported(data)
    assert got is not None
    assert "input_model_parameters" not in got
    assert got["slices"][0]["sources"][0]["parameters"]["weight"] == [{"filter": "mlp", "value": 2}, {"value": 3}]
    assert got["slices"][0]["sources"][1]["parameters"]["weight"] == 9


def test_what_mergekit_does_anyway_is_left_out() -> None:
    data = {"merge_method": "ties", "base_model": "base", "models": WEIGHTED, "parameters": {"consensus": "mass"}}
    got = exported(data)
    assert got is not None
    assert "parameters" not in got


@pytest.mark.parametrize(
    "data",
    [
        {
            "merge_method": "nuslerp",
            "base_model": "base",
            "models": WEIGHTED,
            "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        },
        {"merge_method": "nuslerp", "models": WEIGHTED},
        {
            "merge_method": "multislerp",
            "base_model": "base",
            "models": [*WEIGHTED, {"model": "c", "parameters": {"weight": [0, 1]}}],
            "parameters": {"normalize_weights": False, "eps": 1e-6},
        },
        {"merge_method": "karcher", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"max_iter": 50}},
        {"merge_method": "nearswap", "base_model": "base", "models": [{"model": "a"}], "parameters": {"t": 0.001}},
    ],
    ids=lambda data: data["merge_method"],
)
def test_methods_that_are_mergekits_come_out_as_they_went_in(data: dict[str, Any]) -> None:
    assert exported(data) == data


def test_weights_that_change_nothing_are_left_out() -> None:
    models = [{"model": m, "parameters": {"weight": 1.0}} for m in "ab"]
    assert exported({"merge_method": "karcher", "models": models}) == {
        "merge_method": "karcher",
        "models": [{"model": "a"}, {"model": "b"}],
    }


@pytest.mark.parametrize(
    ("method", "own", "shared"),
    [
        ("della", {"weight": 1, "density": 0.6, "epsilon": 0.1}, {"lambda": 1.1, "rescale": False}),
        ("della_linear", {"weight": 0.5, "density": [0.4, 0.6]}, {"normalize": True}),
        ("breadcrumbs", {"weight": 1, "density": 0.9, "gamma": 0.01}, {}),
        ("breadcrumbs_ties", {"weight": 1, "density": 0.9}, {"normalize": True, "int8_mask": True}),
        ("model_stock", {}, {"filter_wise": True}),
        ("sce", {}, {"select_topk": 0.5}),
        ("arcee_fusion", {}, {}),
        ("ram", {}, {"epsilon": 1e-6}),
        ("ramplus_tl", {}, {"r": 0.2, "alpha": 0.5}),
    ],
)
def test_what_both_know_comes_out_as_it_went_in(method: str, own: dict[str, Any], shared: dict[str, Any]) -> None:
    names = ["a"] if method == "arcee_fusion" else ["a", "b"]
    models = [{"model": name} | ({"parameters": own} if own else {}) for name in names]
    data = {"merge_method": method, "base_model": "base", "models": models}
    data |= {"parameters": shared} if shared else {}
    assert exported(data) == data
    sources = [entry | {"layer_range": [0, 2]} for entry in models]
    slices = exported({key: data[key] for key in data if key != "models"} | {"slices": [{"sources": sources}]})
    assert slices is not None
    assert slices["slices"] == [{"sources": [*sources, {"model": "base", "layer_range": [0, 2]}]}]


@pytest.mark.parametrize(
    ("own", "shared"),
    [
        ({"density": 0.9}, {}),  # with mergekit's epsilon of 0.15, above 1
        ({"density": [0.5, 0.1]}, {"epsilon": 0.2}),
        ({"density": 0.5}, {"consensus": "count"}),
    ],
)
def test_della_beyond_what_mergekit_accepts_is_not_written(own: dict[str, Any], shared: dict[str, Any]) -> None:
    models = [{"model": "a", "parameters": {"weight": 1, **own}}]
    assert exported({"merge_method": "della", "base_model": "base", "models": models, "parameters": shared}) is None


SLICE = {"sources": [{"model": "a", "layer_range": [0, 2]}]}


@pytest.mark.parametrize(
    "data",
    [
        {"merge_method": "dfs", "base_model": "base", "models": WEIGHTED},
        {"merge_method": "ties", "base_model": "base", "models": WEIGHTED, "parameters": {"consensus": "count"}},
        {"merge_method": "ties", "base_model": "base", "models": WEIGHTED, "parameters": {"scope": "model"}},
        {"merge_method": "slerp", "base_model": "base", "models": WEIGHTED},
        {"merge_method": "nuslerp", "models": WEIGHTED[:1]},
        {"merge_method": "nuslerp", "models": [*WEIGHTED, {"model": "c", "parameters": {"weight": 1}}]},
        {"merge_method": "karcher", "models": WEIGHTED},
        {"merge_method": "nearswap", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]},
        {"merge_method": "tsv_merge", "base_model": "base", "models": [{"model": "a"}]},
        {"merge_method": "iso_c", "base_model": "base", "models": [{"model": "a"}]},
        {
            "merge_method": "slerp",
            "base_model": "c",
            "models": [{"model": "a"}],
            "parameters": {"t": 0.5, "on": "deltas"},
        },
        {"merge_method": "passthrough", "slices": [SLICE | {"residual_scale": 0.5}]},
        {"merge_method": "passthrough", "slices": [SLICE], "parameters": {"residual_scale": 0.5}},
        {
            "merge_method": "passthrough",
            "slices": [SLICE, SLICE | {"merge_method": "linear"}],
            "parameters": {"weight": 1},
        },
        {"merge_method": "passthrough", "models": [{"model": "zoo:base"}]},
        {"merge_method": "passthrough", "models": [{"model": "a.safetensors"}]},
    ],
)
def test_what_mergekit_cannot_say(data: dict[str, Any]) -> None:
    assert exported(data) is None


def test_tokenizer_settings_in_todays_words() -> None:
    """Today's mergekit takes a tokenizer's model without the `model:` of older versions."""
    block = {"source": "model:org/b", "tokens": {"<x>": {"source": "a", "force": True}}, "pad_to_multiple_of": 64}
    common = {"merge_method": "linear", "models": WEIGHTED, "chat_template": "chatml"}
    assert exported(common | {"tokenizer": block}) == common | {"tokenizer": block | {"source": "org/b"}}
    for source, said in (("model:org/b", "org/b"), ("org/b", "org/b"), ("union", "union"), ("base", "base")):
        assert exported(common | {"tokenizer_source": source}) == common | {"tokenizer_source": said}


def test_embed_slerp_is_said_where_it_changes_nothing() -> None:
    """mergekit passes over it: under a tokenizer source it would merge the embeddings by another method than we do."""
    wanted = {"parameters": {"embed_slerp": True, "t": 0.5}, "base_model": "a", "tokenizer_source": "union"}
    models = [{"model": "a"}, {"model": "b"}]
    slerp = {"merge_method": "slerp", "models": models, **wanted}
    assert exported(slerp) == slerp
    assert exported({"merge_method": "linear", "models": WEIGHTED, **wanted}) is None
    assert exported({"merge_method": "linear", "models": WEIGHTED, "parameters": {"embed_slerp": True}}) is not None
