"""Operators stay in bounds, touch what they say, and come back the same for the same generator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.algorithms import operators
from evomerge.algorithms.ga import layer_operators as patterns
from evomerge.space.genes import Pattern
from evomerge.space.genome import LayerGene

seeds = st.integers(0, 2**32)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(seeds, st.floats(0.001, 5.0))
def test_gaussian_and_shift_stay_within_and_touch_the_mask_only(seed: int, sigma: float) -> None:
    rng = rng_of(seed)
    unit = rng.random(12)
    mask = rng.random(12) < 0.5
    for operator in (operators.gaussian, operators.shift):
        child = operator(unit, mask, sigma, rng)
        assert ((child >= 0.0) & (child <= 1.0)).all()
        assert (child[~mask] == unit[~mask]).all()


def test_reflection_by_hand() -> None:
    # 1.2 is 0.2 beyond 1 and comes back to 0.8; -0.3 to 0.3; 2.1 goes round to 0.1.
    assert operators.reflect(np.array([0.4, 1.2, -0.3, 2.1])) == pytest.approx([0.4, 0.8, 0.3, 0.1])


def test_shift_keeps_differences() -> None:
    unit = np.array([0.4, 0.5, 0.6, 0.9])
    child = operators.shift(unit, np.array([True, True, True, False]), 0.05, rng_of(1))
    assert np.diff(child[:3]) == pytest.approx([0.1, 0.1])
    assert child[0] != unit[0]


def test_pull_by_hand() -> None:
    # The mean of 0.2 and 0.6 is 0.4; half the way there.
    child = operators.pull(np.array([0.2, 0.6, 0.9]), np.array([True, True, False]), 0.5)
    assert child == pytest.approx([0.3, 0.5, 0.9])


def test_centroid_weights_by_hand() -> None:
    # Two parents: log(2.5) - log(1) = 0.9163 and log(2.5) - log(2) = 0.2231, that is 0.8042 and 0.1958 of the sum.
    child = operators.centroid([np.array([0.0, 1.0]), np.array([1.0, 1.0])])
    assert child == pytest.approx([0.1958, 1.0], abs=1e-4)


@given(seeds)
def test_crossovers_of_equal_parents_give_the_parent(seed: int) -> None:
    rng = rng_of(seed)
    unit = rng.random(8)
    labels = rng.integers(0, 3, size=8)
    assert operators.line(unit, unit, rng) == pytest.approx(unit)
    assert operators.blend(unit, unit, rng) == pytest.approx(unit)
    assert (operators.uniform(unit, unit, rng) == unit).all()
    assert (operators.by_label(unit, unit, labels, [1]) == unit).all()


@given(seeds)
def test_crossovers_stay_within(seed: int) -> None:
    rng = rng_of(seed)
    first, second = rng.random(8), rng.random(8)
    for child in (operators.line(first, second, rng), operators.blend(first, second, rng)):
        assert ((child >= 0.0) & (child <= 1.0)).all()
    mixed = operators.uniform(first, second, rng)
    assert ((mixed == first) | (mixed == second)).all()


def test_by_label_takes_whole_labels() -> None:
    child = operators.by_label(np.zeros(4), np.ones(4), np.array([0, 1, 1, 2]), [1])
    assert child.tolist() == [0.0, 1.0, 1.0, 0.0]


@given(seeds, st.integers(2, 20))
def test_a_contiguous_block_is_neither_nothing_nor_everything(seed: int, count: int) -> None:
    block = operators.contiguous_block(count, rng_of(seed))
    assert block == list(range(block[0], block[-1] + 1))
    assert 1 <= len(block) < count
    assert block[0] >= 0
    assert block[-1] < count


@given(seeds)
def test_tournaments_prefer_the_better(seed: int) -> None:
    rng = rng_of(seed)
    picks = [operators.tournament(10, 3, rng) for _ in range(200)]
    assert set(picks) <= set(range(10))
    assert np.mean(picks) < 3.5  # the mean of the least of three uniform picks is 1.9


pattern = Pattern(("base", "a", "b"), 12, 6, 18, (0.5, 1.5))
several_patterns = st.builds(
    lambda models, low, more, scale: Pattern(models, 12, low, low + more, scale),
    st.sampled_from([("a",), ("a", "b"), ("base", "a", "b")]),
    st.integers(1, 14),
    st.integers(0, 8),
    st.sampled_from([None, (0.5, 1.5), (1.1, 1.4)]),
)


@st.composite
def stacks_within(draw: st.DrawFn) -> tuple[patterns.Layers, Pattern]:
    """A pattern space and some layers that it allows."""
    space = draw(several_patterns)
    scale = st.just(1.0) if space.scale is None else st.one_of(st.just(1.0), st.floats(*space.scale))
    gene = st.builds(LayerGene, st.sampled_from(space.models), st.integers(0, 11), scale)
    return tuple(draw(st.lists(gene, min_size=space.min_layers, max_size=space.max_layers))), space


def stack(text: str) -> patterns.Layers:
    """``a0 b1`` as layers."""
    return tuple(LayerGene(word[0], int(word[1:])) for word in text.split())


def legal(layers: patterns.Layers, space: Pattern) -> bool:
    low, high = space.scale or (1.0, 1.0)
    return space.min_layers <= len(layers) <= space.max_layers and all(
        gene.source in space.models and 0 <= gene.layer < 12 and (gene.scale == 1.0 or low <= gene.scale <= high)
        for gene in layers
    )


@pytest.mark.parametrize("name", sorted(patterns.MOVES))
@settings(max_examples=40)
@given(stacks_within(), seeds)
def test_every_move_stays_legal_and_follows_its_generator(
    name: str, given_stack: tuple[patterns.Layers, Pattern], seed: int
) -> None:
    layers, space = given_stack
    moved = patterns.MOVES[name](layers, space, rng_of(seed))
    assert legal(moved, space)
    assert moved == patterns.MOVES[name](layers, space, rng_of(seed))


@pytest.mark.parametrize("name", ["model", "layer"])
@settings(max_examples=40)
@given(stacks_within(), seeds)
def test_changes_of_model_keep_the_depths_and_change_something(
    name: str, given_stack: tuple[patterns.Layers, Pattern], seed: int
) -> None:
    layers, space = given_stack
    moved = patterns.MOVES[name](layers, space, rng_of(seed))
    assert [(g.layer, g.scale) for g in moved] == [(g.layer, g.scale) for g in layers]
    assert (moved == layers) == (len(space.models) == 1)


@settings(max_examples=40)
@given(stacks_within(), seeds)
def test_scales_move_alone(given_stack: tuple[patterns.Layers, Pattern], seed: int) -> None:
    layers, space = given_stack
    moved = patterns.rescale(layers, space, rng_of(seed))
    if space.scale is not None:
        assert [(g.source, g.layer) for g in moved] == [(g.source, g.layer) for g in layers]


@settings(max_examples=40)
@given(stacks_within(), st.data(), seeds)
def test_pattern_crossover_stays_legal_and_invents_no_layer(
    given_stack: tuple[patterns.Layers, Pattern], data: st.DataObject, seed: int
) -> None:
    first, space = given_stack
    genes = st.builds(LayerGene, st.sampled_from(space.models), st.integers(0, 11))
    second = tuple(data.draw(st.lists(genes, min_size=space.min_layers, max_size=space.max_layers)))
    child = patterns.crossover(first, second, space, rng_of(seed))
    assert legal(child, space)
    assert set(child) <= set(first) | set(second)
    assert patterns.crossover(first, first, space, rng_of(seed)) == first


def test_crossover_aligns_depths_and_not_positions() -> None:
    # Cut anywhere, a stack with a repeat and one without give each depth of a model once or, of the first, repeated.
    first, second = stack("a0 a1 a2 a1 a2 a3 a4 a5"), stack("b0 b1 b2 b3 b4 b5")
    space = Pattern(("a", "b"), 6, 1, 12, None)
    for seed in range(50):
        child = patterns.crossover(first, second, space, rng_of(seed))
        assert {gene.layer for gene in child} == set(range(6))
        assert len(child) in (6, 8)


def outcomes(move: patterns.Move, layers: patterns.Layers, space: Pattern) -> set[patterns.Layers]:
    """All that a move makes of some layers, over many generators."""
    return {move(layers, space, rng_of(seed)) for seed in range(60)}


def test_straighten_by_hand() -> None:
    space = Pattern(("a", "b"), 12, 2, 12, None)
    # Depths 2 and 3 are missing between a1 and b4: from either side's model.
    assert outcomes(patterns.straighten, stack("a0 a1 b4 b5"), space) == {
        stack("a0 a1 a2 a3 b4 b5"),
        stack("a0 a1 b2 b3 b4 b5"),
    }
    # Depths 1 and 2 come twice: either copy goes.
    assert outcomes(patterns.straighten, stack("a0 a1 a2 b1 b2 b3"), space) == {
        stack("a0 a1 a2 b3"),
        stack("a0 b1 b2 b3"),
    }
    # Only so much is filled in and taken out as the bounds allow.
    narrow = Pattern(("a", "b"), 12, 5, 5, None)
    assert {len(layers) for layers in outcomes(patterns.straighten, stack("a0 a1 b4 b5 b6"), narrow)} == {5}


def test_repeats_and_seams_by_hand() -> None:
    space = Pattern(("a", "b"), 12, 3, 3, None)
    assert outcomes(patterns.repeat_neighbour, stack("a0 a1 a2"), space) == {
        stack("a0 a0 a2"),
        stack("a1 a1 a2"),
        stack("a0 a1 a1"),
        stack("a0 a2 a2"),
    }
    # Of three layers a run is one long, so the seam moves by one, up or down.
    assert outcomes(patterns.move_seam, stack("a0 b1 b2"), space) == {stack("b0 b1 b2"), stack("a0 a1 b2")}


def test_moves_do_what_their_names_say() -> None:
    layers = tuple(LayerGene("a", layer) for layer in range(10))
    sizes = {name: len(move(layers, pattern, rng_of(3))) for name, move in patterns.MOVES.items()}
    assert sizes["insert"] == 11
    assert sizes["delete"] < 10
    assert sizes["duplicate"] > 10
    swapped = patterns.swap(layers, pattern, rng_of(3))
    assert sorted(swapped, key=lambda gene: gene.layer) == list(layers)
    assert sum(a != b for a, b in zip(layers, swapped, strict=True)) == 2
    rng = rng_of(5)
    assert {gene.source for _ in range(9) for gene in patterns.change_model(layers, pattern, rng)} == {"a", "b", "base"}
    assert len({gene.scale for _ in range(9) for gene in patterns.rescale(layers, pattern, rng)}) > 3
    louder = tuple(LayerGene("a", layer, 1.4) for layer in range(10))
    back = {gene.scale for result in outcomes(patterns.rescale, louder, pattern) for gene in result}
    assert {1.0, 1.2} <= back  # all the way to 1, and half of it
