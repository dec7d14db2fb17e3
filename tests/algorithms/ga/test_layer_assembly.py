"""Assembly of layer patterns: the regression over depths, its best path, and what is drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.algorithms.ga import layer_assembly
from evomerge.algorithms.ga.layer_assembly import assemble
from evomerge.algorithms.ga.layer_operators import Layers
from evomerge.space.genes import Pattern
from evomerge.space.genome import LayerGene
from evomerge.space.space import sample_layers

DEPTH = 8
PATTERN = Pattern(("a", "b", "c"), DEPTH, DEPTH - 1, DEPTH + 2, None)


def one_by_one(models: str) -> Layers:
    return tuple(LayerGene(model, depth) for depth, model in enumerate(models))


def test_features_are_shares_seams_jumps_and_a_constant() -> None:
    two = Pattern(("a", "b"), 2, 1, 4, None)
    # Depth 0 once of a; depth 1 of b, of a and of a again: a third is b's. The model changes after the first layer and
    # after the second; the depth does not rise by one after the second and after the third.
    layers = (LayerGene("a", 0), LayerGene("b", 1), LayerGene("a", 1), LayerGene("a", 1))
    np.testing.assert_allclose(layer_assembly._features(layers, two), [1, 0, 2 / 3, 1 / 3, 2, 2, 1])


def test_the_prior_gives_the_sum_over_all_depths_a_deviation_of_one() -> None:
    _, covariance = layer_assembly._prior(PATTERN)
    whole = np.zeros(len(covariance))
    whole[[3 * depth for depth in range(DEPTH)]] = 1.0  # model a at every depth
    assert whole @ covariance @ whole == pytest.approx(1.0)


@given(st.integers(1, 5), st.integers(1, 3), st.floats(-2, 0.5), st.integers(0, 1000))
def test_the_path_is_the_best_of_all(depths: int, models: int, seam: float, seed: int) -> None:
    coefficients = np.random.default_rng(seed).normal(size=(depths, models))

    def value(path: tuple[int, ...]) -> float:
        changes = sum(a != b for a, b in itertools.pairwise(path))
        return float(sum(coefficients[k, m] for k, m in enumerate(path)) + min(seam, 0.0) * changes)

    found = layer_assembly._best_path(coefficients, min(seam, 0.0))
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
