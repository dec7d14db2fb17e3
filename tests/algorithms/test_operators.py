"""Operators stay in bounds, touch what they say, and come back the same for the same generator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.algorithms import operators

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


def test_toward_mean_by_hand() -> None:
    # The mean of 0.2 and 0.6 is 0.4; half the way there.
    child = operators.toward_mean(np.array([0.2, 0.6, 0.9]), np.array([True, True, False]), 0.5)
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


def test_steps_are_small_and_large_within_bounds() -> None:
    rng = rng_of(1)
    steps = [operators.step_size(rng) for _ in range(500)]
    assert all(operators.MIN_STEP <= step <= operators.MAX_STEP for step in steps)
    assert np.median(steps) == pytest.approx(np.sqrt(operators.MIN_STEP * operators.MAX_STEP), rel=0.2)
