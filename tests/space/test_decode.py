"""Which genes set which numbers: what `decode_literally` says is what moving a gene does to the resolved recipe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evomerge.recipe import Recipe, layer_places, parse_recipe, resolve
from evomerge.space.decode import LiteralRecipe, decode_literally
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from tests.algorithms.landscapes import make_space

METHODS = ("task_arithmetic", "ties", "dare", "slerp")
SPACES: dict[str, dict[str, Any]] = {
    "groups": {"layer_groups": 3},
    "tensor groups": {"layer_groups": 2, "tensor_groups": ["attention", "mlp"]},
    "methods by group": {"method_scope": "layer_group", "layer_groups": 3},
    "stages": {"after": ["svc"], "layer_groups": 2, "tensor_groups": ["mlp"]},
    "control points": {"layer_groups": {"control_points": 4}, "tensor_groups": ["mlp"]},
}
SUFFIXES = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


def tensors(recipe: Recipe, space: SearchSpace) -> list[tuple[int, str, float]]:
    """Slice, name and t of tensors in every layer, and of those outside the layers."""
    layers = enumerate(layer_places(recipe, space.layer_count))
    inside = [(at.slice_index, f"model.layers.{k}.{suffix}", at.t) for k, at in layers for suffix in SUFFIXES]
    return [*inside, (0, space.outer[0], 0.0), (len(recipe.slices) - 1, space.outer[-1], 0.0)]


def numbers(literal: LiteralRecipe, space: SearchSpace) -> dict[tuple[int, str, float, str, int | None], float]:
    """Every real number that the recipe gives for every tensor."""
    recipe = parse_recipe(literal.recipe)
    values = {}
    for slice_index, name, t in tensors(recipe, space):
        settings = resolve(recipe, slice_index, name, t).settings
        for source, row in [(None, settings.shared), *enumerate(settings.sources)]:
            for parameter, value in row.items():
                if isinstance(value, float):
                    values[slice_index, name, t, parameter, source] = value
    return values


@pytest.mark.parametrize("changes", SPACES.values(), ids=SPACES)
def test_genes_move_the_numbers_that_they_set(changes: dict[str, Any]) -> None:
    space = make_space(methods=METHODS, **changes)
    rng = np.random.default_rng(0)
    genome = space.sample(rng)
    literal = decode_literally(space, genome)
    before = numbers(literal, space)
    gradient = {key: literal.gene_gradient(key[0], key[3:], key[1], key[2]) for key in before}
    assert {gene for factors in gradient.values() for gene in factors} <= {gene.name for gene in space.reals}
    assert sum(bool(factors) for factors in gradient.values()) > 50
    for gene in space.reals:
        moved = Genome.of({**genome.values, gene.name: gene.low if rng.random() < 0.5 else gene.high})
        step = float(moved.values[gene.name]) - float(genome.values[gene.name])
        after = numbers(decode_literally(space, moved), space)
        changes_of_gene = {key: after[key] - before[key] for key in before}
        expected = {key: factors.get(gene.name, 0.0) * step for key, factors in gradient.items()}
        assert changes_of_gene == pytest.approx(expected, abs=1e-12)


def test_equal_values_have_their_own_genes() -> None:
    """Where all groups have one value, canonical recipes have one slice; the literal one keeps the groups apart."""
    space = make_space(methods=("task_arithmetic",), layer_groups=4)
    literal = decode_literally(space, space.default())
    assert len(literal.recipe["slices"]) == 4
    assert [piece["weight", 1] for piece in literal.genes[1:3]] == ["weight.code.g1", "weight.code.g2"]
    assert literal.gene_gradient(2, ("lambda", None), "any", 0.3) == {"lambda.g2": 1.0}


def test_interpolated_values_have_the_genes_of_both_neighbours() -> None:
    space = make_space(methods=("task_arithmetic",), layer_groups={"control_points": 3})
    literal = decode_literally(space, space.default())
    assert literal.gene_gradient(0, ("weight", 0), "any", 0.125) == {"weight.math.g0": 0.75, "weight.math.g1": 0.25}
    assert literal.gene_gradient(0, ("weight", 0), space.outer[0], 0.0) == {"weight.math.outer": 1.0}
    assert literal.gene_gradient(0, ("nothing", None), "any", 0.0) == {}
