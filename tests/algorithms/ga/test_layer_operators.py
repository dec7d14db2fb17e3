"""Moves and crossover stay legal and do what their names say; assembly finds what all candidates say of every depth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.algorithms.ga import layer_operators
from evomerge.algorithms.ga.layer_operators import Layers, assemble
from evomerge.space.genes import Pattern
from evomerge.space.genome import LayerGene
from evomerge.space.space import sample_layers

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


DEPTH = 8
PATTERN = Pattern(("a", "b", "c"), DEPTH, DEPTH - 1, DEPTH + 2, None)


def one_by_one(models: str) -> Layers:
    return tuple(LayerGene(model, depth) for depth, model in enumerate(models))


def test_features_are_shares_seams_jumps_and_a_constant() -> None:
    two = Pattern(("a", "b"), 2, 1, 4, None)
    # Depth 0 once of a; depth 1 of b, of a and of a again: a third is b's. The model changes after the first layer and
    # after the second; the depth does not rise by one after the second and after the third.
    layers = (LayerGene("a", 0), LayerGene("b", 1), LayerGene("a", 1), LayerGene("a", 1))
    np.testing.assert_allclose(layer_operators._features(layers, two), [1, 0, 2 / 3, 1 / 3, 2, 2, 1])


def test_the_prior_gives_the_sum_over_all_depths_a_deviation_of_one() -> None:
    _, covariance = layer_operators._prior(PATTERN)
    whole = np.zeros(len(covariance))
    whole[[3 * depth for depth in range(DEPTH)]] = 1.0  # model a at every depth
    assert whole @ covariance @ whole == pytest.approx(1.0)


@given(st.integers(1, 5), st.integers(1, 3), st.floats(-2, 0.5), st.integers(0, 1000))
def test_the_path_is_the_best_of_all(depths: int, models: int, seam: float, seed: int) -> None:
    coefficients = np.random.default_rng(seed).normal(size=(depths, models))

    def value(path: tuple[int, ...]) -> float:
        changes = sum(a != b for a, b in itertools.pairwise(path))
        return float(sum(coefficients[k, m] for k, m in enumerate(path)) + min(seam, 0.0) * changes)

    found = layer_operators._best_path(coefficients, min(seam, 0.0))
    assert value(tuple(found)) == pytest.approx(max(map(value, itertools.product(range(models), repeat=depths))))


def test_a_ruined_depth_is_taken_from_another_model() -> None:
    """Model a is the best but at depth 5."""
    rng = np.random.default_rng(1)

    def fitness(layers: Layers) -> float:
        return sum({"a": 0.1, "b": 0.0, "c": -0.05}[g.source] for g in layers) - 0.8 * (LayerGene("a", 5) in layers)

    seen = [sample_layers(PATTERN, rng) for _ in range(60)]
    evaluated = [(layers, fitness(layers)) for layers in (*map(one_by_one, ("a" * 8, "b" * 8, "c" * 8)), *seen)]
    drawn = [assemble(evaluated, PATTERN, {}, rng) for _ in range(20)]
    assert sum(layers[5].source != "a" for layers in drawn) >= 18
    assert max(map(fitness, drawn)) > max(value for _, value in evaluated)


def test_draws_differ_where_little_is_known() -> None:
    rng = np.random.default_rng(0)
    evaluated = [(one_by_one("a" * 8), 0.5), (one_by_one("b" * 8), 0.4)]
    assert len({assemble(evaluated, PATTERN, {}, rng) for _ in range(20)}) >= 8


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_any_history_gives_a_pattern_within_bounds(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    pattern = Pattern(("a", "b"), 6, 7, 9, (0.5, 2.0))
    evaluated = [(sample_layers(pattern, rng), float(rng.random())) for _ in range(count)]
    layers = assemble(evaluated, pattern, {2: 0.7}, rng)
    assert 7 <= len(layers) <= 9
    assert {gene.layer for gene in layers} == set(range(6))
    assert all(gene.scale == (0.7 if gene.layer == 2 else 1.0) for gene in layers)


def test_equal_fitness_says_nothing_and_breaks_nothing() -> None:
    layers = assemble([(one_by_one("a" * 8), 0.5)] * 3, PATTERN, {}, np.random.default_rng(0))
    assert [gene.layer for gene in layers] == list(range(DEPTH))


@pytest.mark.parametrize("seed", range(5))
def test_of_a_tall_stack_assembly_keeps_what_is_good(seed: int) -> None:
    """Thirty depths, five models of which a is the best but for two ruined layers; what is assembled joins the rest."""
    rng = np.random.default_rng(seed)
    tall = Pattern(("a", "b", "c", "d", "e"), 30, 28, 32, None)
    ruined = {LayerGene("a", 7), LayerGene("a", 20)}

    def fitness(layers: Layers) -> float:
        return float(np.mean([g.source == "a" for g in layers])) - 0.5 * sum(gene in ruined for gene in layers)

    whole = [tuple(LayerGene(model, depth) for depth in range(30)) for model in tall.models]
    evaluated = [(layers, fitness(layers)) for layers in (*whole, *(sample_layers(tall, rng) for _ in range(20)))]
    before = max(value for _, value in evaluated)
    for _ in range(30):
        layers = assemble(evaluated, tall, {}, rng)
        evaluated.append((layers, fitness(layers)))
    assert max(value for _, value in evaluated) > before + 0.05
