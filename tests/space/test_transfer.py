"""What another search found, or a recipe says, in the genes of this space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.recipe import parse_recipe
from evomerge.space.genome import Genome, LayerGene
from evomerge.space.space import SearchSpace
from evomerge.space.transfer import SpaceLayout, depth_shares, layer_shares, nearest_genome, transfer_genome
from tests.algorithms.landscapes import make_space, pattern_space

SOURCES = {"math": "models/math", "code": "models/code", "law": "models/law"}
SAME = {name: name for name in SOURCES}
PARTS = ("self_attn.q_proj", "mlp.up_proj", "norm")
TENSORS = [
    ("model.embed_tokens.weight", None),
    *((f"model.layers.{k}.{part}.weight", k) for k in range(12) for part in PARTS),
    ("model.norm.weight", None),
]


def shape_of(space: SearchSpace) -> SpaceLayout:
    return SpaceLayout(space.groups, space.smooth, space.tensor_groups, space.methods[0].name)


SPACES: list[SearchSpace] = [
    make_space(),
    make_space(layer_groups={"control_points": 5}, tensor_groups=["attention"]),
    make_space(layer_groups="per_layer", method_scope="layer_group", methods=("linear", "ties")),
    pattern_space(),
]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), space=st.sampled_from(SPACES))
def test_a_genome_of_the_same_space_is_itself(seed: int, space: SearchSpace) -> None:
    genome = space.sample(np.random.default_rng(seed))
    assert transfer_genome(space, genome, shape_of(space), SAME) == genome


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), there=st.sampled_from(SPACES), here=st.sampled_from(SPACES))
def test_a_genome_of_any_other_space_is_one_of_this(seed: int, there: SearchSpace, here: SearchSpace) -> None:
    found = transfer_genome(here, there.sample(np.random.default_rng(seed)), shape_of(there), SAME)
    if found is None:
        assert there.pattern is not None
        assert here.pattern is None
    else:
        assert here.contains(found)


def test_genes_go_by_layer_and_values_into_their_range() -> None:
    there = make_space(methods=("ties",), layer_groups=2)
    values = {"weight.math.g0": 0.2, "weight.math.g1": 0.6, "weight.math.outer": 1.4, "density.code.g1": 0.9}
    genome = Genome.of({**there.default().values, **values})
    here = make_space(methods=("dare", "ties"), layer_groups=[4, 9], gene_overrides={"weight": {"high": 1.0}})
    found = transfer_genome(here, genome, shape_of(there), SAME)
    assert found is not None
    assert found.values["method"] == "ties"
    # Layers 4 to 8 lie in groups 0 (4, 5) and 1 (6, 7, 8): (2 * 0.2 + 3 * 0.6) / 5.
    assert [found.values[f"weight.math.{g}"] for g in ("g0", "g1", "g2", "outer")] == [0.2, 0.44, 0.6, 1.0]
    assert found.values["density.code.g2"] == 0.9


def test_models_go_by_name_and_one_that_the_other_search_lacks_takes_no_part() -> None:
    there = make_space(methods=("ties",), sources={"maths": "models/math", "poems": "models/poems"}, layer_groups=1)
    genome = Genome.of({**there.default().values, "weight.maths.g0": 0.3, "density.maths.g0": 0.7, "lambda.g0": 1.7})
    here = make_space(methods=("ties",), layer_groups=1)
    found = transfer_genome(here, genome, shape_of(there), {"maths": "math"})
    assert found is not None
    values = found.values
    assert (values["weight.math.g0"], values["density.math.g0"], values["lambda.g0"]) == (0.3, 0.7, 1.7)
    assert (values["weight.law.g0"], values["density.law.g0"]) == (0.0, here.default().values["density.law.g0"])


def test_tensor_groups_are_split_and_averaged() -> None:
    fine = make_space(methods=("linear",), layer_groups=1, tensor_groups=["attention", "mlp", "rest"])
    parts = {"weight.math.g0.attention": 0.1, "weight.math.g0.mlp": 0.3, "weight.math.g0.rest": 0.5}
    genome = Genome.of({**fine.default().values, **parts})
    plain = make_space(methods=("linear",), layer_groups=1)
    mean = transfer_genome(plain, genome, shape_of(fine), SAME)
    assert mean is not None
    assert mean.values["weight.math.g0"] == 0.3
    back = transfer_genome(fine, mean, shape_of(plain), SAME)
    assert back is not None
    assert {back.values[name] for name in parts} == {0.3}
    two = make_space(methods=("linear",), layer_groups=1, tensor_groups=["mlp"])
    coarse = transfer_genome(two, genome, shape_of(fine), SAME)
    assert coarse is not None
    assert (coarse.values["weight.math.g0.mlp"], coarse.values["weight.math.g0.rest"]) == (0.3, 0.5)


def test_a_finer_group_takes_the_value_of_the_wider_one() -> None:
    wide = make_space(methods=("linear",), layer_groups=1, tensor_groups=["attention", "mlp"])
    filters = {"experts": (".experts.",), "ssm": (".mamba.",), "norm": ("norm",)}
    fine = make_space(
        methods=("linear",), layer_groups=1, tensor_groups=["experts", "ssm", "norm"], tensor_group_filters=filters
    )
    parts = {"weight.math.g0.attention": 0.1, "weight.math.g0.mlp": 0.3, "weight.math.g0.rest": 0.5}
    moved = transfer_genome(fine, Genome.of({**wide.default().values, **parts}), shape_of(wide), SAME)
    assert moved is not None
    assert [moved.values[f"weight.math.g0.{group}"] for group in ("experts", "ssm", "norm")] == [0.3, 0.1, 0.5]


@pytest.mark.parametrize(("count", "smooth"), [(4, False), (12, False), (2, True), (5, True), (12, True)])
def test_shares_of_depth_sum_to_one(count: int, smooth: bool) -> None:
    space = make_space(layer_groups={"control_points": count} if smooth else count)
    for layer in range(12):
        assert sum(depth_shares(space.groups, smooth, layer).values()) == pytest.approx(1.0)
    for group in range(count):
        assert sum(layer_shares(space, group).values()) == pytest.approx(1.0)


def test_a_pattern_is_cut_to_length_and_dropped_where_a_model_is_missing() -> None:
    there = pattern_space()
    layers = [LayerGene("base", 0), *(LayerGene("code", k, 0.6) for k in range(1, 12)), LayerGene("law", 11)]
    genome = Genome.of({}, layers)
    here = pattern_space(frankenmerge={"min_layers": 4, "max_layers": 8})
    found = transfer_genome(here, genome, shape_of(there), SAME)
    assert found is not None
    assert found.layers == (LayerGene("base", 0), *(LayerGene("code", k) for k in range(1, 8)))
    assert transfer_genome(here, genome, shape_of(there), {"code": "code"}) is None
    assert transfer_genome(make_space(), genome, shape_of(there), SAME) is None


def whole(method: str, weights: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    models = [{"model": SOURCES[name], "parameters": {"weight": w}} for name, w in weights.items()]
    return {"merge_method": method, "base_model": "models/base", "models": models, "parameters": parameters}


def test_a_recipe_as_a_genome_by_hand() -> None:
    space = make_space(methods=("linear", "dare_ties"), layer_groups=2, tensor_groups=["mlp"])
    weights = {"math": [{"filter": "mlp", "value": 0.2}, {"value": [0.0, 1.1]}], "code": 0.5}
    recipe = parse_recipe(whole("dare_ties", weights, **{"density": 0.4, "lambda": 1.3}))
    values = nearest_genome(space, recipe, TENSORS).values
    assert values["method"] == "dare_ties"
    assert values["weight.math.g0.mlp"] == 0.2
    # The gradient over twelve layers is 0.1 k: layers 0 to 5 have 0.25 on average, 6 to 11 0.85; outside it is 0.
    assert [values[f"weight.math.{g}"] for g in ("g0.rest", "g1.rest", "outer")] == [0.25, 0.85, 0.0]
    assert {values[f"weight.code.{g}"] for g in ("g0.mlp", "g1.rest", "outer")} == {0.5}
    assert {values[f"weight.law.{g}"] for g in ("g0.mlp", "g1.rest", "outer")} == {0.0}
    assert {values[f"density.math.{g}"] for g in ("g0.mlp", "g1.rest", "outer")} == {0.4}
    assert values["lambda.g1.mlp"] == 1.3


def test_weights_of_which_only_ratios_count_come_as_shares() -> None:
    space = make_space(methods=("linear",), layer_groups=1)
    values = nearest_genome(space, parse_recipe(whole("linear", {"math": 6.0, "law": 2.0})), TENSORS).values
    assert (values["weight.math.g0"], values["weight.law.g0"], values["weight.code.g0"]) == (0.75, 0.25, 0.0)


def test_control_points_read_a_gradient_where_they_lie() -> None:
    space = make_space(methods=("task_arithmetic",), layer_groups={"control_points": 3})
    recipe = parse_recipe(whole("task_arithmetic", {"math": [0.0, 1.1], "code": 0.4}))
    values = nearest_genome(space, recipe, TENSORS).values
    assert [values[f"weight.math.g{k}"] for k in range(3)] == [0.0, 0.55, 1.1]


def test_copied_layers_become_a_pattern() -> None:
    slices = [
        {"sources": [{"model": "models/base", "layer_range": [0, 6]}]},
        {"sources": [{"model": "models/law", "layer_range": [4, 12]}], "residual_scale": 0.8},
    ]
    recipe = parse_recipe({"merge_method": "passthrough", "slices": slices})
    limits = {"min_layers": 12, "max_layers": 16, "scale": True}
    space = make_space(methods=("frankenmerge", "linear"), frankenmerge=limits)
    found = nearest_genome(space, recipe, TENSORS)
    expected = [LayerGene("base", k) for k in range(6)] + [LayerGene("law", k, 0.8) for k in range(4, 12)]
    assert found.layers == tuple(expected)
    assert found.values["method"] == "frankenmerge"
    merging = nearest_genome(make_space(methods=("linear",), layer_groups=2), recipe, TENSORS)
    assert (merging.values["weight.law.g0"], merging.values["weight.law.g1"]) == (0.0, 1.0)


def test_a_method_for_each_layer_group_is_kept() -> None:
    def part(method: str, start: int, stop: int) -> dict[str, Any]:
        models = ("models/base", *SOURCES.values()) if method == "ties" else tuple(SOURCES.values())
        sources = [{"model": m, "layer_range": [start, stop], "parameters": {"weight": 0.5}} for m in models]
        return {"merge_method": method, "sources": sources}

    data = {
        "merge_method": "linear",
        "base_model": "models/base",
        "slices": [part("linear", 0, 5), part("ties", 5, 12)],
    }
    space = make_space(methods=("ties", "linear"), layer_groups=2, method_scope="layer_group")
    values = nearest_genome(space, parse_recipe(data), TENSORS).values
    assert (values["method.g0"], values["method.g1"]) == ("linear", "ties")
