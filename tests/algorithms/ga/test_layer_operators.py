"""Moves and crossover stay legal and do what their names say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.algorithms.ga import layer_operators
from evomerge.algorithms.ga.layer_operators import Layers
from evomerge.space.genes import Pattern
from evomerge.space.genome import LayerGene

seeds = st.integers(0, 2**32)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


pattern = Pattern(("base", "a", "b"), 12, 6, 18, (0.5, 1.5))
several_patterns = st.builds(
    lambda models, low, more, scale: Pattern(models, 12, low, low + more, scale),
    st.sampled_from([("a",), ("a", "b"), ("base", "a", "b")]),
    st.integers(1, 14),
    st.integers(0, 8),
    st.sampled_from([None, (0.5, 1.5), (1.1, 1.4)]),
)


@st.composite
def stacks_within(draw: st.DrawFn) -> tuple[Layers, Pattern]:
    """A pattern space and some layers that it allows."""
    space = draw(several_patterns)
    scale = st.just(1.0) if space.scale is None else st.one_of(st.just(1.0), st.floats(*space.scale))
    gene = st.builds(LayerGene, st.sampled_from(space.models), st.integers(0, 11), scale)
    return tuple(draw(st.lists(gene, min_size=space.min_layers, max_size=space.max_layers))), space


def stack(text: str) -> Layers:
    """``a0 b1`` as layers."""
    return tuple(LayerGene(word[0], int(word[1:])) for word in text.split())


def legal(layers: Layers, space: Pattern) -> bool:
    low, high = space.scale or (1.0, 1.0)
    return space.min_layers <= len(layers) <= space.max_layers and all(
        gene.source in space.models and 0 <= gene.layer < 12 and (gene.scale == 1.0 or low <= gene.scale <= high)
        for gene in layers
    )


@pytest.mark.parametrize("name", sorted(layer_operators.MOVES))
@settings(max_examples=40)
@given(stacks_within(), seeds)
def test_every_move_stays_legal_and_follows_its_generator(
    name: str, given_stack: tuple[Layers, Pattern], seed: int
) -> None:
    layers, space = given_stack
    moved = layer_operators.MOVES[name](layers, space, rng_of(seed))
    assert legal(moved, space)
    assert moved == layer_operators.MOVES[name](layers, space, rng_of(seed))


@pytest.mark.parametrize("name", ["model", "layer"])
@settings(max_examples=40)
@given(stacks_within(), seeds)
def test_changes_of_model_keep_the_depths_and_change_something(
    name: str, given_stack: tuple[Layers, Pattern], seed: int
) -> None:
    layers, space = given_stack
    moved = layer_operators.MOVES[name](layers, space, rng_of(seed))
    assert [(g.layer, g.scale) for g in moved] == [(g.layer, g.scale) for g in layers]
    assert (moved == layers) == (len(space.models) == 1)


@settings(max_examples=40)
@given(stacks_within(), seeds)
def test_scales_move_alone(given_stack: tuple[Layers, Pattern], seed: int) -> None:
    layers, space = given_stack
    moved = layer_operators.rescale(layers, space, rng_of(seed))
    if space.scale is not None:
        assert [(g.source, g.layer) for g in moved] == [(g.source, g.layer) for g in layers]


@settings(max_examples=40)
@given(stacks_within(), st.data(), seeds)
def test_pattern_crossover_stays_legal_and_invents_no_layer(
    given_stack: tuple[Layers, Pattern], data: st.DataObject, seed: int
) -> None:
    first, space = given_stack
    genes = st.builds(LayerGene, st.sampled_from(space.models), st.integers(0, 11))
    second = tuple(data.draw(st.lists(genes, min_size=space.min_layers, max_size=space.max_layers)))
    child = layer_operators.crossover(first, second, space, rng_of(seed))
    assert legal(child, space)
    assert set(child) <= set(first) | set(second)
    assert layer_operators.crossover(first, first, space, rng_of(seed)) == first


def test_crossover_aligns_depths_and_not_positions() -> None:
    # Cut anywhere, a stack with a repeat and one without give each depth of a model once or, of the first, repeated.
    first, second = stack("a0 a1 a2 a1 a2 a3 a4 a5"), stack("b0 b1 b2 b3 b4 b5")
    space = Pattern(("a", "b"), 6, 1, 12, None)
    for seed in range(50):
        child = layer_operators.crossover(first, second, space, rng_of(seed))
        assert {gene.layer for gene in child} == set(range(6))
        assert len(child) in (6, 8)


def outcomes(move: layer_operators.Move, layers: Layers, space: Pattern) -> set[Layers]:
    """All that a move makes of some layers, over many generators."""
    return {move(layers, space, rng_of(seed)) for seed in range(60)}


def test_straighten_by_hand() -> None:
    space = Pattern(("a", "b"), 12, 2, 12, None)
    # Depths 2 and 3 are missing between a1 and b4: from either side's model.
    assert outcomes(layer_operators.straighten, stack("a0 a1 b4 b5"), space) == {
        stack("a0 a1 a2 a3 b4 b5"),
        stack("a0 a1 b2 b3 b4 b5"),
    }
    # Depths 1 and 2 come twice: either copy goes.
    assert outcomes(layer_operators.straighten, stack("a0 a1 a2 b1 b2 b3"), space) == {
        stack("a0 a1 a2 b3"),
        stack("a0 b1 b2 b3"),
    }
    # Only so much is filled in and taken out as the bounds allow.
    narrow = Pattern(("a", "b"), 12, 5, 5, None)
    assert {len(layers) for layers in outcomes(layer_operators.straighten, stack("a0 a1 b4 b5 b6"), narrow)} == {5}


def test_repeats_and_seams_by_hand() -> None:
    space = Pattern(("a", "b"), 12, 3, 3, None)
    assert outcomes(layer_operators.repeat_neighbour, stack("a0 a1 a2"), space) == {
        stack("a0 a0 a2"),
        stack("a1 a1 a2"),
        stack("a0 a1 a1"),
        stack("a0 a2 a2"),
    }
    # Of three layers a run is one long, so the seam moves by one, up or down.
    assert outcomes(layer_operators.move_seam, stack("a0 b1 b2"), space) == {stack("b0 b1 b2"), stack("a0 a1 b2")}


def test_moves_do_what_their_names_say() -> None:
    layers = tuple(LayerGene("a", layer) for layer in range(10))
    sizes = {name: len(move(layers, pattern, rng_of(3))) for name, move in layer_operators.MOVES.items()}
    assert sizes["insert"] == 11
    assert sizes["delete"] < 10
    assert sizes["duplicate"] > 10
    swapped = layer_operators.swap(layers, pattern, rng_of(3))
    assert sorted(swapped, key=lambda gene: gene.layer) == list(layers)
    assert sum(a != b for a, b in zip(layers, swapped, strict=True)) == 2
    rng = rng_of(5)
    assert {gene.source for _ in range(9) for gene in layer_operators.change_model(layers, pattern, rng)} == {
        "a",
        "b",
        "base",
    }
    assert len({gene.scale for _ in range(9) for gene in layer_operators.rescale(layers, pattern, rng)}) > 3
    louder = tuple(LayerGene("a", layer, 1.4) for layer in range(10))
    back = {gene.scale for result in outcomes(layer_operators.rescale, louder, pattern) for gene in result}
    assert {1.0, 1.2} <= back  # all the way to 1, and half of it
