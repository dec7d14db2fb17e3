"""The genes that the methods' declarations give, and what a genome means as a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evomerge.errors import SpecError
from evomerge.methods.registry import METHODS
from evomerge.methods.shared_parameters import OUR_WEIGHT
from evomerge.recipe import parse_recipe
from evomerge.space.baselines import baselines
from evomerge.space.decode import active_genes, decode, genome_hash, why_invalid
from evomerge.space.genes import Pattern, layer_groups
from evomerge.space.genome import Genome, LayerGene
from evomerge.space.space import SearchSpace, sample_layers
from evomerge.study.optuna_trials import distributions_of, genome_of, params_of
from tests.algorithms.landscapes import make_space, pattern_space

OUTER = ("model.embed_tokens.weight", "model.norm.weight")


def set_genes(space: Any, values: dict[str, Any], layers: tuple[LayerGene, ...] = ()) -> Genome:
    start = space.default()
    unknown = set(values) - set(start.values)
    assert not unknown
    return Genome.of({**start.values, **values}, layers or start.layers)


def test_genes_are_shared_by_name_across_methods() -> None:
    space = make_space(methods=("ties", "dare", "task_arithmetic"), layer_groups=2)
    names = {gene.name for gene in space.reals}
    expected = {f"lambda.{group}" for group in ("g0", "g1", "outer")}
    for source in ("math", "code", "law"):
        expected |= {f"{p}.{source}.{g}" for p in ("weight", "density") for g in ("g0", "g1", "outer")}
    assert names == expected
    assert [choice.name for choice in space.choices] == ["method"]


def test_one_method_has_no_method_gene_and_only_its_own_parameters() -> None:
    space = make_space(methods=("linear",), layer_groups=1, outer=())
    assert [gene.name for gene in space.reals] == ["weight.code.g0", "weight.law.g0", "weight.math.g0"]
    assert space.choices == ()


def test_tensor_groups_split_the_layers_and_not_the_outer_tensors() -> None:
    space = make_space(methods=("linear",), layer_groups=1, tensor_groups=["attention", "mlp"])
    names = [gene.name for gene in space.reals if gene.source == "math"]
    assert names == ["weight.math.g0.attention", "weight.math.g0.mlp", "weight.math.g0.rest", "weight.math.outer"]


def test_parameters_of_a_mode_that_is_off_have_no_genes() -> None:
    space = make_space(methods=("dfs",), layer_groups=1)
    assert {gene.parameter for gene in space.reals} == {"weight", "gamma", "lambda"}


def test_slerp_is_searched_on_deltas_by_weight_and_without_a_base_on_weights() -> None:
    space = make_space(methods=("slerp",), layer_groups=1)
    assert {gene.parameter for gene in space.reals} == {"weight"}
    assert decode(space, space.default())["parameters"] == {"on": "deltas"}
    alone = make_space(methods=("slerp",), layer_groups=1, base=None)
    recipe = decode(alone, alone.default())
    assert "parameters" not in recipe
    assert "base_model" not in recipe


def test_overrides_narrow_from_the_general_to_the_specific() -> None:
    overrides = {
        "weight": {"low": 0.1, "high": 1.0},
        "weight.math": {"low": None, "high": 0.5},
        "weight.math.outer": {"low": 0.2},
    }
    space = make_space(methods=("linear",), layer_groups=1, gene_overrides=overrides)
    ranges = {gene.name: (gene.low, gene.high) for gene in space.reals}
    assert ranges["weight.code.g0"] == (0.1, 1.0)
    assert ranges["weight.math.g0"] == (0.0, 0.5)
    assert ranges["weight.math.outer"] == (0.2, 1.5)


def test_an_override_can_open_a_gene_that_no_declaration_opens() -> None:
    space = make_space(methods=("ties",), layer_groups=1, gene_overrides={"density": {"low": 0.3, "high": 0.3}})
    assert {(g.low, g.high) for g in space.reals if g.parameter == "density"} == {(0.3, 0.3)}
    assert np.all(space.unit(space.default())[[g.parameter == "density" for g in space.reals]] == 0.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"wieght": {"low": 0.0}}, r"space\.genes\.wieght: .*did you mean 'weight'"),
        ({"drop_rate": {"low": 0.1}}, r"give the range of 'density'"),
        ({"density": {"low": 0.5, "high": 1.5}}, r"space\.genes\.density: 'density' lies within \[0\.0, 1\.0\]"),
        ({"weight": {"low": 1.0, "high": 0.5}}, "low must not exceed high"),
        ({"weight": {"lo": 1.0}}, "give a range"),
        ({"weight": 0.5}, "give a range"),
        ({"weight": {"low": "a"}}, "give a finite number"),
        ({"weight.maths": {"low": 0.1}}, r"there is no such gene \(did you mean 'weight\.math'"),
    ],
)
def test_bad_overrides_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_space(methods=("ties", "dare"), gene_overrides=overrides)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        make_space(
            methods=("tis", "ties"),
            base=None,
            layer_groups=99,
            tensor_groups=["atention"],
            gene_overrides={"densty": {"low": 0.0}},
        )
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    for part in ("'tis' (did you mean", "needs models.base", "1 to 12", "'atention' (did you", "densty"):
        assert part in text


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (3, ((0, 4), (4, 8), (8, 12))),
        (5, ((0, 2), (2, 5), (5, 7), (7, 10), (10, 12))),
        ([4, 6], ((0, 4), (4, 6), (6, 12))),
        ([0, 6, 12], ((0, 6), (6, 12))),
        ("per_layer", tuple((i, i + 1) for i in range(12))),
    ],
)
def test_layer_groups(groups: Any, expected: tuple[tuple[int, int], ...]) -> None:
    assert layer_groups(groups, 12) == expected


@pytest.mark.parametrize("groups", [0, 13, [6, 4], [20], "all", True, 2.5])
def test_impossible_layer_groups_are_refused(groups: Any) -> None:
    with pytest.raises(SpecError, match=r"space\.layer_groups"):
        layer_groups(groups, 12)


def test_recipe_by_hand() -> None:
    space = make_space(
        sources={"math": "m"}, methods=("dare_ties",), layer_groups=2, tensor_groups=["mlp"], dtype="bfloat16", base="b"
    )
    genome = set_genes(
        space,
        {
            "weight.math.g0.mlp": 0.1,
            "weight.math.g0.rest": 0.2,
            "weight.math.g1.mlp": 0.3,
            "weight.math.g1.rest": 0.3,
            "weight.math.outer": 0.3,
            "density.math.outer": 0.5,
        },
    )
    outer_density = [{"filter": name, "value": 0.5} for name in OUTER]
    # First match wins: outer tensors by name, then the tensor group, then the rest. Both slices need the outer values,
    # since the embeddings follow the first slice and the final norm the last. In g1 all weights are equal: one scalar.
    assert decode(space, genome) == {
        "merge_method": "dare_ties",
        "base_model": "b",
        "dtype": "bfloat16",
        "seed": 0,
        "slices": [
            {
                "sources": [
                    {"model": "b", "layer_range": [0, 6]},
                    {
                        "model": "m",
                        "layer_range": [0, 6],
                        "parameters": {
                            "weight": [
                                {"filter": OUTER[0], "value": 0.3},
                                {"filter": OUTER[1], "value": 0.3},
                                {"filter": "mlp", "value": 0.1},
                                {"value": 0.2},
                            ],
                            "density": [*outer_density, {"value": 0.1}],
                        },
                    },
                ],
                "parameters": {"lambda": 1.0},
            },
            {
                "sources": [
                    {"model": "b", "layer_range": [6, 12]},
                    {
                        "model": "m",
                        "layer_range": [6, 12],
                        "parameters": {"weight": 0.3, "density": [*outer_density, {"value": 0.1}]},
                    },
                ],
                "parameters": {"lambda": 1.0},
            },
        ],
    }


def test_equal_neighbouring_groups_are_one_slice() -> None:
    space = make_space(methods=("linear",), layer_groups="per_layer")
    slices = decode(space, space.default())["slices"]
    assert [piece["sources"][0]["layer_range"] for piece in slices] == [[0, 12]]


def test_a_method_for_each_layer_group() -> None:
    space = make_space(methods=("linear", "ties", "dare"), method_scope="layer_group", layer_groups=3, recipe_seed=7)
    genome = set_genes(space, {"method.g0": "linear", "method.g1": "dare", "method.g2": "ties"})
    recipe = decode(space, genome)
    assert [piece["merge_method"] for piece in recipe["slices"]] == ["linear", "dare", "ties"]
    assert [len(piece["sources"]) for piece in recipe["slices"]] == [3, 4, 4]
    assert recipe["base_model"] == "models/base"
    assert recipe["seed"] == 7


def test_inactive_genes_do_not_change_the_recipe_hash_and_are_not_recorded() -> None:
    space = make_space(methods=("linear", "ties"))
    linear = set_genes(space, {"method": "linear", "density.math.g0": 0.1})
    other = set_genes(space, {"method": "linear", "density.math.g0": 0.9})
    assert linear != other
    assert genome_hash(space, linear) == genome_hash(space, other)
    assert genome_hash(space, set_genes(space, {"method": "ties", "density.math.g0": 0.1})) != genome_hash(
        space, set_genes(space, {"method": "ties", "density.math.g0": 0.9})
    )
    assert not any(name.startswith("density") for name in params_of(space, linear))


def test_frankenmerge_joins_what_follows_in_one_model_at_one_scale() -> None:
    space = pattern_space()
    layers = [LayerGene("base", 0), LayerGene("base", 1), LayerGene("math", 2, 0.8), LayerGene("math", 3, 0.8)]
    layers += [LayerGene("math", 4), LayerGene("math", 4), LayerGene("code", 5), LayerGene("code", 7)]
    recipe = decode(space, set_genes(space, {}, tuple(layers)))
    assert recipe == {
        "merge_method": "frankenmerge",
        "slices": [
            {"sources": [{"model": "models/base", "layer_range": [0, 2]}]},
            {"sources": [{"model": "models/math", "layer_range": [2, 4]}], "residual_scale": 0.8},
            {"sources": [{"model": "models/math", "layer_range": [4, 5]}]},
            {"sources": [{"model": "models/math", "layer_range": [4, 5]}]},
            {"sources": [{"model": "models/code", "layer_range": [5, 6]}]},
            {"sources": [{"model": "models/code", "layer_range": [7, 8]}]},
        ],
    }


def test_a_group_can_be_copied_while_the_others_are_merged() -> None:
    space = make_space(
        methods=("linear", "frankenmerge"),
        method_scope="layer_group",
        layer_groups=2,
        frankenmerge={"min_layers": 12, "max_layers": 12},
    )
    genome = set_genes(space, {"method.g0": "linear", "method.g1": "frankenmerge"})
    slices = decode(space, genome)["slices"]
    assert [piece["merge_method"] for piece in slices] == ["linear", "frankenmerge"]
    assert slices[1]["sources"] == [{"model": "models/base", "layer_range": [6, 12]}]


def test_weights_that_sum_to_zero_are_a_problem_only_where_they_count() -> None:
    space = make_space(methods=("linear",), layer_groups=2)
    zero = {f"weight.{source}.g1": 0.0 for source in space.sources}
    assert why_invalid(space, set_genes(space, zero)) == "the weights of g1 sum to 0"
    assert why_invalid(space, space.default()) is None


SUITED = tuple(name for name, method in METHODS.items() if method.max_sources is None)


everything = make_space(
    methods=SUITED,
    tensor_groups=["attention", "mlp", "rest"],
    frankenmerge={"min_layers": 8, "max_layers": 16, "scale": True},
)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_random_genomes_are_in_bounds_and_have_recipes(seed: int) -> None:
    genome = everything.sample(np.random.default_rng(seed))
    assert everything.contains(genome)
    recipe = decode(everything, genome)
    assert recipe["slices"]
    assert genome.values["method"] == recipe["merge_method"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_unit_and_back_is_the_same_genome(seed: int) -> None:
    genome = everything.sample(np.random.default_rng(seed))
    choices = {choice.name: str(genome.values[choice.name]) for choice in everything.choices}
    assert everything.genome(everything.unit(genome), choices, genome.layers) == genome


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_optuna_parameters_are_within_their_distributions_and_lead_back_to_the_recipe(seed: int) -> None:
    genome = everything.sample(np.random.default_rng(seed))
    params = params_of(everything, genome)
    known = distributions_of(everything)
    for name, value in params.items():
        assert known[name]._contains(known[name].to_internal_repr(value)), name
    assert genome_hash(everything, genome_of(everything, params)) == genome_hash(everything, genome)


BY_GROUP = make_space(
    methods=SUITED,
    method_scope="layer_group",
    layer_groups=3,
    frankenmerge={"min_layers": 8, "max_layers": 16, "scale": True},
)


def warnings_of(recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe warns of, but for weights that count here and not in mergekit: a search means them to."""
    return [warning for warning in parse_recipe(recipe).warnings if OUR_WEIGHT not in warning]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([everything, BY_GROUP, pattern_space()]))
def test_every_recipe_is_one_without_a_warning(seed: int, space: SearchSpace) -> None:
    genome = space.sample(np.random.default_rng(seed))
    assume(why_invalid(space, genome) is None)
    assert warnings_of(decode(space, genome)) == []


@pytest.mark.parametrize("space", [everything, make_space(base=None, methods=("linear", "slerp")), pattern_space()])
def test_every_baseline_is_a_recipe_without_a_warning(space: SearchSpace) -> None:
    for start in baselines(space):
        assert warnings_of(start.recipe) == [], start.name


def test_contains_refuses_what_is_outside() -> None:
    genome = everything.default()
    assert everything.contains(genome)
    name = everything.reals[0].name
    assert not everything.contains(Genome.of({**genome.values, name: 99.0}, genome.layers))
    assert not everything.contains(Genome.of({**genome.values, "method": "magic"}, genome.layers))
    assert not everything.contains(Genome.of(genome.values, genome.layers[:3]))
    assert not everything.contains(Genome.of(genome.values, (*genome.layers[:-1], LayerGene("law", 99))))


def test_sampled_patterns_are_often_one_whole_stack_and_scales_mostly_near_one() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_layers(Pattern(("a", "b"), 12, 8, 16, (0.5, 1.5)), rng) for _ in range(400)]
    whole = [layers for layers in drawn if [gene.layer for gene in layers] == list(range(12))]
    assert len(whole) >= 180
    assert {len(layers) for layers in drawn} == set(range(8, 17))
    off = [abs(gene.scale - 1.0) for layers in drawn for gene in layers]
    assert max(off) <= 0.5
    assert np.median(off) < 0.1
    assert max(off) > 0.4


@pytest.mark.parametrize(("layers", "groups"), [(1, 1), (3, 3), (6, 6), (24, 6)])
def test_groups_that_nobody_asked_for_are_never_more_than_the_layers(layers: int, groups: int) -> None:
    assert len(layer_groups(None, layers)) == groups


def test_stages_follow_the_methods_of_deltas() -> None:
    space = make_space(methods=("linear", "ties", "slerp"), after=("svc",))
    assert [[stage.name for stage in method.after] for method in space.methods] == [[], ["svc"], ["svc"]]
    assert {gene.parameter for gene in space.reals} >= {"svc_alpha", "svc_strength"}
    for start in baselines(space):
        recipe = parse_recipe(start.recipe)
        assert (recipe.after == ("svc",)) == (start.name in ("ties (defaults)", "slerp (defaults)"))
    genome = space.default()
    off = Genome.of({**genome.values, "method": "ties"} | {g.name: 0.0 for g in space.reals if "strength" in g.name})
    assert not any("svc_alpha" in name for name in active_genes(space, off))
    assert "after" not in decode(space, Genome.of({**genome.values, "method": "linear"}))
    space = make_space(methods=("ties",), after=("aim", "svc"), activations="means.safetensors")
    recipe = parse_recipe(decode(space, space.default()))
    assert (recipe.after, recipe.activations) == (("aim", "svc"), "means.safetensors")
    with pytest.raises(SpecError, match=r"models.activations: is missing: 'aim' of space.after asks for it"):
        make_space(methods=("ties",), after=("aim",))
    with pytest.raises(SpecError, match=r"space.after: works on what a method adds to models.base, and none"):
        make_space(methods=("linear",), after=("svc",))
    with pytest.raises(SpecError, match=r"space.after: no stage is called 'svd' \(did you mean 'svc'\?\)"):
        make_space(methods=("ties",), after=("svd",))
