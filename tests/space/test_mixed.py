"""Recipes of which every layer group has a method of its own, copied ones among them, on models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoints
from evomerge.checkpoints.layout import residual_writers
from evomerge.engine.resident import Resident
from evomerge.methods.registry import METHODS
from evomerge.planning.plan import make_plan
from evomerge.recipe import parse_recipe
from evomerge.space.decode import decode, why_invalid
from evomerge.space.genome import Genome, LayerGene
from evomerge.space.space import SearchSpace
from tests.space.test_canonical import LAYERS, OUTER, tiny_space

COPYING = "frankenmerge"
SEVERAL = tuple(name for name, m in METHODS.items() if m.max_sources is None)


@pytest.fixture(scope="module")
def checkpoints(tiny_family: dict[str, Path]) -> Mapping[str, Checkpoint]:
    return open_checkpoints(str(folder) for folder in tiny_family.values())


@pytest.fixture(scope="module")
def resident(checkpoints: Mapping[str, Checkpoint]) -> Resident:
    return Resident(checkpoints, torch.float32)


def mixed_space(family: Mapping[str, Path], **changes: Any) -> SearchSpace:
    limits = {"min_layers": 2, "max_layers": 9, "scale": True}
    arguments: dict[str, Any] = {"methods": SEVERAL, "method_scope": "layer_group", "layer_groups": "per_layer"}
    return tiny_space(family, **{**arguments, "frankenmerge": limits, **changes})


def merged(recipe: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint], resident: Resident) -> dict[str, Tensor]:
    model, _ = resident.write(make_plan(parse_recipe(recipe), checkpoints))
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(3, 43).view(2, 20)).logits).all()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def layer_of(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    stem = f"model.layers.{layer}."
    return {name.removeprefix(stem): value for name, value in tensors.items() if name.startswith(stem)}


def together(names: Sequence[str], width: int) -> Iterator[tuple[str, ...]]:
    """Stacks of `width` methods in which every two methods are together somewhere."""
    missing = set(itertools.combinations(names, 2))
    while missing:
        stack = list(min(missing))
        while len(stack) < width:
            stack.append(max(names, key=lambda n: sum((a, n) in missing or (n, a) in missing for a in stack)))
        missing -= {pair for a, b in itertools.combinations(stack, 2) for pair in ((a, b), (b, a))}
        yield tuple(stack if len(missing) % 2 else stack[::-1])


def check_layers(
    space: SearchSpace,
    genome: Genome,
    alone: Mapping[str, Mapping[str, Tensor]],
    checkpoints: Mapping[str, Checkpoint],
    resident: Resident,
) -> None:
    """Every layer of a mixed merge is the layer of the merge by its method alone, or the copy that the pattern says."""
    made = merged(decode(space, genome), checkpoints, resident)
    output = 0
    for group, (start, stop) in enumerate(space.groups):
        name = space.method(genome, group).name
        if name != COPYING:
            for layer in range(start, stop):
                for suffix, tensor in layer_of(made, output).items():
                    assert torch.equal(tensor, layer_of(alone[name], layer)[suffix]), (name, layer, suffix)
                output += 1
            continue
        genes = [g for g in genome.layers if start <= g.layer < stop]
        for gene in genes or [LayerGene(genome.layers[0].source, layer) for layer in range(start, stop)]:
            held = checkpoints[space.reference(gene.source)]
            loud = residual_writers(held.layout, held.tensors, gene.layer)
            for suffix, tensor in layer_of(made, output).items():
                full = f"model.layers.{gene.layer}.{suffix}"
                factor = gene.scale if full in loud else 1.0
                torch.testing.assert_close(tensor, held.tensor(full).float() * factor, rtol=1e-6, atol=0)
            output += 1
    assert f"model.layers.{output}.input_layernorm.weight" not in made
    for tensors, first in ((OUTER[0], True), (OUTER[1], False)):
        name = space.method(genome, 0 if first else len(space.groups) - 1).name
        if name != COPYING:
            assert torch.equal(made[tensors], alone[name][tensors])


def by_one(
    space: SearchSpace, genome: Genome, checkpoints: Mapping[str, Checkpoint], resident: Resident
) -> dict[str, dict[str, Tensor]]:
    """The merge of all layers by each method, with the same genes."""
    found = {}
    for method in space.methods:
        if not method.copies_layers:
            choices = {choice.name: method.name for choice in space.choices}
            found[method.name] = merged(
                decode(space, Genome.of({**genome.values, **choices}, genome.layers)), checkpoints, resident
            )
    return found


@pytest.mark.slow
def test_every_pair_of_methods_in_one_recipe(
    tiny_family: dict[str, Path], checkpoints: Mapping[str, Checkpoint], resident: Resident
) -> None:
    space = mixed_space(tiny_family)
    # One copy in the place of each layer: the masks of stochastic methods go by the output's names.
    layers = [LayerGene("a", 0), LayerGene("b", 1, 0.7), LayerGene("base", 2), LayerGene("c", 3)]
    genome = Genome.of(space.sample(np.random.default_rng(3)).values, layers)
    alone = by_one(space, genome, checkpoints, resident)
    for stack in together(SEVERAL, LAYERS):
        choices = {f"method.g{k}": name for k, name in enumerate(stack)}
        check_layers(space, Genome.of({**genome.values, **choices}, genome.layers), alone, checkpoints, resident)


def test_methods_of_one_source_stand_beside_others(
    tiny_family: dict[str, Path], checkpoints: Mapping[str, Checkpoint], resident: Resident
) -> None:
    one = {"a": str(tiny_family["a"])}
    methods = ("arcee_fusion", "slerp", "nearswap", "ties", COPYING)
    space = mixed_space(tiny_family, sources=one, methods=methods)
    # One copy in the place of each layer: the masks of stochastic methods go by the output's names.
    layers = [LayerGene("a", 0), LayerGene("base", 1, 0.7), LayerGene("base", 2), LayerGene("a", 3)]
    genome = Genome.of(space.sample(np.random.default_rng(4)).values, layers)
    alone = by_one(space, genome, checkpoints, resident)
    for stack in together(methods, LAYERS):
        choices = {f"method.g{k}": name for k, name in enumerate(stack)}
        check_layers(space, Genome.of({**genome.values, **choices}, genome.layers), alone, checkpoints, resident)


FAST = ("linear", "slerp", "ties", COPYING)  # where a layer lies in the output does not matter to them


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    layers=st.lists(
        st.builds(
            LayerGene, st.sampled_from(["base", "a", "b", "c"]), st.integers(0, LAYERS - 1), st.sampled_from([1.0, 0.7])
        ),
        min_size=2,
        max_size=9,
    ),
    stack=st.tuples(*[st.sampled_from(FAST)] * 3),
)
def test_patterns_of_any_length_with_repeats_and_gaps_between_merged_groups(
    tiny_family: dict[str, Path],
    checkpoints: Mapping[str, Checkpoint],
    resident: Resident,
    seed: int,
    layers: list[LayerGene],
    stack: tuple[str, ...],
) -> None:
    space = mixed_space(tiny_family, methods=FAST, layer_groups=[1, 3])
    values = {f"method.g{k}": name for k, name in enumerate(stack)}
    if set(stack) == {COPYING}:  # then the pattern is the whole stack, in any order
        values["method.g0"] = "linear"
    genome = Genome.of({**space.sample(np.random.default_rng(seed)).values, **values}, layers)
    assert space.contains(genome)
    assume(why_invalid(space, genome) is None)
    check_layers(space, genome, by_one(space, genome, checkpoints, resident), checkpoints, resident)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_pattern_alone_is_the_copies_in_its_order(
    tiny_family: dict[str, Path], checkpoints: Mapping[str, Checkpoint], resident: Resident, seed: int
) -> None:
    space = mixed_space(tiny_family, methods=(COPYING,), method_scope="run")
    genome = space.sample(np.random.default_rng(seed))
    made = merged(decode(space, genome), checkpoints, resident)
    for output, gene in enumerate(genome.layers):
        held = checkpoints[space.reference(gene.source)]
        loud = residual_writers(held.layout, held.tensors, gene.layer)
        for suffix, tensor in layer_of(made, output).items():
            full = f"model.layers.{gene.layer}.{suffix}"
            factor = gene.scale if full in loud else 1.0
            torch.testing.assert_close(tensor, held.tensor(full).float() * factor, rtol=1e-6, atol=0)
    assert f"model.layers.{len(genome.layers)}.input_layernorm.weight" not in made


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_declared_range_is_a_gene_for_each_layer_group_and_tensor_group(name: str) -> None:
    from tests.algorithms.landscapes import make_space

    method = METHODS[name]
    sources = {"math": "m"} if method.max_sources == 1 else {"math": "m", "code": "c"}
    space = make_space(methods=(name,), sources=sources, layer_groups=2, tensor_groups=["attention", "mlp"])
    if method.copies_layers:
        assert not space.reals
        return
    wanted = {
        p.name: p.per_source
        for p in method.parameters
        if p.gene is not None
        and (p.gene_sources is None or len(sources) <= p.gene_sources)
        and (p.when is None or p.when == ("mode", "model"))
    }
    places = [f"g{k}.{tensors}" for k in range(2) for tensors in ("attention", "mlp", "rest")] + ["outer"]
    expected = {
        f"{parameter}.{owner}{place}"
        for parameter, own in wanted.items()
        for owner in ([f"{source}." for source in sources] if own else [""])
        for place in places
    }
    assert {gene.name for gene in space.reals} == expected
