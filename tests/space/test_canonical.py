"""One merge, one identity: what is neutral leaves no trace in a recipe, which is the merge that the genes spell out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoints
from evomerge.engine.resident import Resident
from evomerge.errors import SpecError
from evomerge.methods.shared_parameters import OUR_WEIGHT
from evomerge.planning.plan import make_plan
from evomerge.recipe import parse_recipe
from evomerge.space.build import build_space
from evomerge.space.canonical import shares
from evomerge.space.decode import active_genes, decode, genome_hash, why_invalid
from evomerge.space.genes import layer_groups
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.study.optuna_trials import genome_of, params_of
from tests.algorithms.landscapes import make_space

LAYERS = 4
FILTERS = {"attention": (".self_attn.",), "mlp": (".mlp.",)}
OUTER = ("model.embed_tokens.weight", "model.norm.weight")
SUMMING = ("linear", "task_arithmetic", "ties", "dare", "dare_ties", "della", "breadcrumbs", "dfs", "slerp", "nuslerp")
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def checkpoints(tiny_family: dict[str, Path]) -> Mapping[str, Checkpoint]:
    return open_checkpoints(str(folder) for folder in tiny_family.values())


@pytest.fixture(scope="module")
def resident(checkpoints: Mapping[str, Checkpoint]) -> Resident:
    return Resident(checkpoints, torch.float32)


def tiny_space(family: Mapping[str, Path], **changes: Any) -> SearchSpace:
    arguments: dict[str, Any] = {
        "base": str(family["base"]),
        "sources": {name: str(family[name]) for name in "abc"},
        "layer_count": LAYERS,
        "outer": OUTER,
        "tensor_group_filters": FILTERS,
        "methods": SUMMING,
    }
    return build_space(**{**arguments, **changes})


def weights_of(
    recipe: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint], resident: Resident
) -> dict[str, Tensor]:
    model, _ = resident.write(make_plan(parse_recipe(recipe), checkpoints))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def literal(space: SearchSpace, genome: Genome) -> dict[str, Any]:
    """The recipe that the genes spell out: a slice for every layer, every source and every value as it stands."""
    slices = []
    for layer in range(LAYERS):
        group = next(k for k, (start, stop) in enumerate(space.groups) if start <= layer < stop)
        method = space.method(genome, group)

        def value(stem: str, tensors: str | None, layer: int = layer, group: int = group) -> float:
            end = "" if tensors is None else f".{tensors}"
            if not space.smooth:
                return float(genome.values[f"{stem}.g{group}{end}"])
            points = [float(genome.values[f"{stem}.g{k}{end}"]) for k in range(len(space.groups))]
            return float(np.interp(layer / (LAYERS - 1), np.linspace(0, 1, len(points)), points))

        def setting(stem: str) -> list[dict[str, Any]]:
            entries = [{"filter": name, "value": float(genome.values[f"{stem}.outer"])} for name in OUTER]
            for tensors in space.tensor_groups[:-1]:
                entries += [{"filter": text, "value": value(stem, tensors)} for text in FILTERS[tensors]]
            return [*entries, {"value": value(stem, "rest" if space.tensor_groups else None)}]

        wanted = space.searched[method.name]
        span = {"layer_range": [layer, layer + 1]}
        sources: list[dict[str, Any]] = [{"model": space.base, **span}] if space.needs_base(method) else []
        for name, reference in space.sources.items():
            own = {p.name: setting(f"{p.name}.{name}") for p in wanted if p.per_source}
            sources.append({"model": reference, **span, "parameters": own})
        shared = {p.name: setting(p.name) for p in wanted if not p.per_source} | dict(space.constants[method.name])
        slices.append({"merge_method": method.name, "sources": sources, "parameters": shared})
    data: dict[str, Any] = {"merge_method": slices[0]["merge_method"], "base_model": space.base, "slices": slices}
    return {**data, "seed": space.seed}


SHAPES: list[dict[str, Any]] = [
    {"layer_groups": 2},
    {"layer_groups": "per_layer", "tensor_groups": ["attention", "mlp", "rest"]},
    {"layer_groups": 2, "method_scope": "layer_group"},
    {"layer_groups": {"control_points": 3}},
    {"layer_groups": {"control_points": 4}, "tensor_groups": ["mlp"]},
]


def sparse(space: SearchSpace, rng: np.random.Generator) -> Genome:
    """A random genome in which many genes are at a bound or at 0, where others become neutral."""
    genome = space.sample(rng)
    values = dict(genome.values)
    for gene in space.reals:
        if rng.random() < 0.4:
            values[gene.name] = gene.low if gene.parameter == "weight" or rng.random() < 0.5 else gene.high
    return Genome.of(values)


def neutral_twin(space: SearchSpace, genome: Genome, rng: np.random.Generator) -> Genome:
    """Other values for all that changes nothing."""
    used = active_genes(space, genome)
    other = space.sample(rng).values
    return Genome.of({name: value if name in used else other[name] for name, value in genome.scalars})


@FEW
@given(seed=st.integers(0, 2**32), shape=st.sampled_from(SHAPES))
def test_neutral_genes_have_no_identity_and_the_recipe_is_the_merge_that_the_genes_spell_out(
    tiny_family: dict[str, Path],
    checkpoints: Mapping[str, Checkpoint],
    resident: Resident,
    seed: int,
    shape: dict[str, Any],
) -> None:
    rng = np.random.default_rng(seed)
    space = tiny_space(tiny_family, **shape)
    genome = sparse(space, rng)
    assume(why_invalid(space, genome) is None)
    twin = neutral_twin(space, genome, rng)
    assert genome_hash(space, twin) == genome_hash(space, genome)
    assert genome_hash(space, genome_of(space, params_of(space, genome))) == genome_hash(space, genome)
    recipe = decode(space, genome)
    assert parse_recipe(recipe).warnings == ()
    merged = weights_of(recipe, checkpoints, resident)
    expected = weights_of(literal(space, twin), checkpoints, resident)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


@settings(FEW, max_examples=60)
@given(seed=st.integers(0, 2**32), shape=st.sampled_from(SHAPES))
def test_one_identity_is_one_merge_and_an_active_gene_changes_it(
    tiny_family: dict[str, Path], seed: int, shape: dict[str, Any]
) -> None:
    """A step of a tenth of its range in an active gene is a new recipe."""
    rng = np.random.default_rng(seed)
    space = tiny_space(tiny_family, **shape)
    genome = sparse(space, rng)
    assume(why_invalid(space, genome) is None)
    used = sorted(active_genes(space, genome) & {gene.name for gene in space.reals})
    picked = used[int(rng.integers(len(used)))]
    gene = next(gene for gene in space.reals if gene.name == picked)
    step = 0.1 * (gene.high - gene.low)
    value = float(genome.values[gene.name])
    moved = Genome.of({**genome.values, gene.name: value + step if value + step <= gene.high else value - step})
    assume(why_invalid(space, moved) is None)
    beside = [g.name for g in space.reals if (g.parameter, g.group, g.tensors) == ("weight", gene.group, gene.tensors)]
    # Where one source has all the weight of a place, its size may be no matter.
    assume(
        gene.parameter != "weight"
        or all(sum(float(v[n]) != 0 for n in beside) > 1 for v in (genome.values, moved.values))
    )
    assert genome_hash(space, moved) != genome_hash(space, genome)


def test_a_source_without_weight_is_not_in_the_recipe() -> None:
    space = make_space(methods=("ties",), layer_groups=1)
    values = {f"weight.law.{group}": 0.0 for group in ("g0", "outer")}
    recipe = decode(space, Genome.of({**space.default().values, **values}))
    models = [source["model"] for source in recipe["slices"][0]["sources"]]
    assert models == ["models/base", "models/math", "models/code"]


def test_all_sources_without_weight_leave_the_base_where_nothing_is_divided_by_it() -> None:
    space = make_space(methods=("task_arithmetic", "ties"), layer_groups=1)
    none = {gene.name: 0.0 for gene in space.reals if gene.parameter == "weight"}
    arithmetic = Genome.of({**space.default().values, **none, "method": "task_arithmetic"})
    assert why_invalid(space, arithmetic) is None
    (piece,) = decode(space, arithmetic)["slices"]
    assert [source["model"] for source in piece["sources"]] == ["models/base", "models/math"]
    assert piece["sources"][1]["parameters"] == {"weight": 0.0}
    ties = Genome.of({**space.default().values, **none, "method": "ties"})
    assert why_invalid(space, ties) == "the weights of g0 sum to 0"


def test_weights_of_which_only_the_ratio_counts_are_written_as_shares() -> None:
    space = make_space(sources={"a": "a", "b": "b"}, methods=("linear", "task_arithmetic"), layer_groups=1, outer=())
    for pair in ((0.3, 0.6), (0.1, 0.2), (0.5, 1.0), (0.7, 1.4)):
        values = dict(zip(("weight.a.g0", "weight.b.g0"), pair, strict=True))
        linear = Genome.of({**space.default().values, **values})
        sources = decode(space, linear)["slices"][0]["sources"]
        assert [source["parameters"]["weight"] for source in sources] == [1 / 3, 2 / 3]
        arithmetic = Genome.of({**space.default().values, **values, "method": "task_arithmetic"})
        sources = decode(space, arithmetic)["slices"][0]["sources"]
        assert [source["parameters"]["weight"] for source in sources[1:]] == list(pair)


WEIGHTS = st.lists(st.tuples(*[st.integers(-3, 12)] * 3), min_size=1, max_size=5)


@given(points=WEIGHTS, factor=st.integers(1, 900))
def test_shares_know_ratios_exactly(points: list[tuple[int, int, int]], factor: int) -> None:
    columns = [tuple(value / 10**4 for value in column) for column in zip(*points, strict=True)]
    scaled = [tuple(value * factor / 10**4 for value in column) for column in zip(*points, strict=True)]
    assert shares(columns) == shares(scaled)


@given(points=WEIGHTS)
def test_shares_give_every_layer_the_ratios_that_the_weights_give_it(points: list[tuple[int, int, int]]) -> None:
    assume(all(sum(point) > 0 for point in points))
    columns = [tuple(value / 10**4 for value in column) for column in zip(*points, strict=True)]
    depth, at = np.linspace(0, len(points) - 1, 31), np.arange(len(points))
    before, after = (np.array([np.interp(depth, at, c) for c in made]) for made in (columns, shares(columns)))
    np.testing.assert_allclose(before / before.sum(0), after / after.sum(0), atol=1e-12)


def test_shares_along_the_depth_by_hand() -> None:
    # Points 0 and 1 are (1 : 1) both, so the scale of what lies beyond 1 is free of that of 0; 1 and 2 share theirs:
    # their magnitudes 2 + 2 + 1 + 3 = 8 become 2, one for each point.
    assert shares([(1.0, 0.2, 0.1), (1.0, 0.2, 0.3)]) == [(0.5, 0.5, 0.25), (0.5, 0.5, 0.75)]
    # The same ratios at every point are one ratio.
    assert shares([(0.1, 0.3), (0.3, 0.9)]) == [(0.25, 0.25), (0.75, 0.75)]


def test_a_gradient_by_hand() -> None:
    space = make_space(
        sources={"math": "m", "code": "c"},
        methods=("dare_linear",),
        layer_groups={"control_points": 3},
        tensor_groups=["mlp"],
        base="b",
        outer=("embed",),
    )
    assert [gene.name for gene in space.reals if gene.name.startswith("lambda")] == [
        *("lambda.g0.mlp", "lambda.g0.rest", "lambda.g1.mlp", "lambda.g1.rest", "lambda.g2.mlp", "lambda.g2.rest"),
        "lambda.outer",
    ]
    values = {
        **{f"weight.math.g{k}.mlp": v for k, v in enumerate((0.1, 0.5, 0.3))},
        **{f"weight.math.g{k}.rest": 0.7 for k in range(3)},
        **{
            f"weight.code.{end}": 0.0
            for end in ("g0.mlp", "g1.mlp", "g2.mlp", "g0.rest", "g1.rest", "g2.rest", "outer")
        },
        "weight.math.outer": 0.7,
        "density.math.g1.rest": 0.4,
    }
    assert decode(space, Genome.of({**space.default().values, **values})) == {
        "merge_method": "dare_linear",
        "base_model": "b",
        "slices": [
            {
                "sources": [
                    {"model": "b", "layer_range": [0, 12]},
                    {
                        "model": "m",
                        "layer_range": [0, 12],
                        "parameters": {
                            "weight": [
                                {"filter": "embed", "value": 0.7},
                                {"filter": "mlp", "value": [0.1, 0.5, 0.3]},
                                {"value": 0.7},
                            ],
                            "density": [
                                {"filter": "embed", "value": 0.1},
                                {"filter": "mlp", "value": 0.1},
                                {"value": [0.1, 0.4, 0.1]},
                            ],
                        },
                    },
                ],
                "parameters": {"lambda": 1.0},
            }
        ],
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (2, ((0, 6), (6, 12))),  # points at layers 0 and 11
        (3, ((0, 3), (3, 9), (9, 12))),  # 0, 5.5, 11: layers 3 to 8 are within 2.75 of the middle
        (12, tuple((k, k + 1) for k in range(12))),
    ],
)
def test_control_points_own_the_layers_nearest_to_them(count: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert layer_groups({"control_points": count}, 12) == expected


@pytest.mark.parametrize("count", range(2, 33))
def test_every_control_point_has_a_layer(count: int) -> None:
    for layers in (count, count + 1, 2 * count - 1, 64):
        found = layer_groups({"control_points": count}, layers)
        assert len(found) == count
        assert all(start < stop for start, stop in found)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_groups": {"control_points": 1}}, r"space\.layer_groups\.control_points: a number from 2 to 12"),
        ({"layer_groups": {"control_points": 13}}, r"space\.layer_groups\.control_points: a number from 2 to 12"),
        ({"layer_groups": {"points": 3}}, r"space\.layer_groups: \{control_points: number\}"),
        (
            {"layer_groups": {"control_points": 3}, "method_scope": "layer_group"},
            r"space\.method_scope: values between",
        ),
        (
            {
                "methods": ("karcher",),
                "layer_groups": {"control_points": 3},
                "gene_overrides": {"max_iter": {"high": 9}},
            },
            r"space\.genes\.max_iter: 'max_iter' is a whole number",
        ),
    ],
)
def test_impossible_control_points_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_space(**changes)


def test_a_whole_number_is_written_as_one() -> None:
    space = make_space(methods=("karcher",), layer_groups=1, gene_overrides={"max_iter": {"low": 1, "high": 9}})
    genome = Genome.of({**space.default().values, "max_iter.g0": 3.4, "max_iter.outer": 2.6})
    assert decode(space, genome)["slices"][0]["parameters"] == {"max_iter": 3}
    assert all(OUR_WEIGHT in warning for warning in parse_recipe(decode(space, genome)).warnings)


def test_slerp_of_one_source_goes_by_t() -> None:
    space = make_space(methods=("slerp",), sources={"math": "m"}, layer_groups=1)
    assert {gene.parameter for gene in space.reals} == {"t"}
    recipe = decode(space, Genome.of({**space.default().values, "t.g0": 0.3, "t.outer": 0.3}))
    assert recipe["slices"][0]["parameters"] == {"t": 0.3}
    assert recipe["parameters"] == {"on": "deltas"}
    with pytest.raises(SpecError, match=r"'slerp' needs models\.base"):
        make_space(methods=("slerp",), sources={"math": "m"}, base=None)
