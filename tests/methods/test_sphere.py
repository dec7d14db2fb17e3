"""NuSLERP, Multi-SLERP and the Karcher mean by hand: arcs, means on the sphere, and where there is neither."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.methods.karcher import mean_direction
from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.registry import METHODS
from evomerge.testing.methods import family

SPHERE = ["nuslerp", "multislerp", "karcher"]
ROOT = math.sqrt(0.5)


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def merge(name: str, base: Tensor | None, sources: Sequence[Tensor], weights: Sequence[float], **shared: Any) -> Tensor:
    method = METHODS[name]
    return merge_tensors(method, base, sources, method.settings([{"weight": w} for w in weights], shared))


@pytest.mark.parametrize("name", SPHERE)
def test_between_perpendicular_vectors_of_one_length(name: str) -> None:
    # halfway along the arc from (3, 0) to (0, 3) lies 3 (√½, √½), by any of them
    torch.testing.assert_close(merge(name, None, [row(3, 0), row(0, 3)], [1, 1]), row(3 * ROOT, 3 * ROOT))


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
def test_a_base_is_where_the_deltas_start(name: str) -> None:
    # the deltas are (3, 0) and (0, 3)
    base = row(10, 20)
    merged = merge(name, base, [row(13, 20), row(10, 23)], [2, 2])
    torch.testing.assert_close(merged, base + 3 * ROOT)


def test_karcher_has_no_use_for_a_base() -> None:
    sources = [row(3, 0), row(0, 3)]
    assert torch.equal(merge("karcher", row(1, 1), sources, [1, 1]), merge("karcher", None, sources, [1, 1]))


def test_lengths() -> None:
    # at a right angle and t = 1/2, nuslerp has √½ of both; the others have their mean length 4 in direction 45°
    sources = [row(2, 0), row(0, 6)]
    torch.testing.assert_close(merge("nuslerp", None, sources, [1, 1]), row(2 * ROOT, 6 * ROOT))
    for name in ("multislerp", "karcher"):
        torch.testing.assert_close(merge(name, None, sources, [1, 1]), row(4 * ROOT, 4 * ROOT))


def test_shares_of_an_arc() -> None:
    # weights 2 : 1 on a right angle: nuslerp and the Karcher mean go a third of it, 30°; multislerp to the direction of
    # the chord's point (2, 1)
    x, y = row(1, 0), row(0, 1)
    third = row(math.sqrt(3) / 2, 0.5)
    torch.testing.assert_close(merge("nuslerp", None, [x, y], [2, 1]), third)
    torch.testing.assert_close(merge("karcher", None, [x, y], [2, 1]), third)
    torch.testing.assert_close(merge("multislerp", None, [x, y], [2, 1]), row(2, 1) / math.sqrt(5))


def test_multislerp_without_normalised_weights() -> None:
    # direction (2, 1)/√5 as before, length 2 · 1 + 1 · 1
    merged = merge("multislerp", None, [row(1, 0), row(0, 1)], [2, 1], normalize_weights=False)
    torch.testing.assert_close(merged, 3 * row(2, 1) / math.sqrt(5))


def test_three_axes() -> None:
    # by symmetry the mean direction of the three axes is (1, 1, 1)/√3
    axes = [row(1, 0, 0), row(0, 1, 0), row(0, 0, 1)]
    for name in ("multislerp", "karcher"):
        torch.testing.assert_close(merge(name, None, axes, [1, 1, 1]), row(1, 1, 1) / math.sqrt(3))
    # nuslerp folds: x and y at t = ½ give (√½, √½, 0); z with weight 2 of 4 at a right angle again: (½, ½, √½)
    torch.testing.assert_close(merge("nuslerp", None, axes, [1, 1, 2]), row(0.5, 0.5, ROOT))


@pytest.mark.parametrize("name", SPHERE)
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(row(-2, 0), id="antipodal"),
        pytest.param(row(0, 0), id="zero"),
        pytest.param(row(4, 0), id="parallel"),
    ],
)
def test_no_arc_is_a_chord(name: str, other: Tensor) -> None:
    # antipodal at equal weights: no direction is the mean's. A zero has none, so that the mean is of the other alone,
    # at the mean length, which on the line is the chord's point as well
    torch.testing.assert_close(merge(name, None, [row(2, 0), other], [1, 1]), 0.5 * (row(2, 0) + other))


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_three_directions_that_cancel(name: str) -> None:
    # at 0°, 120° and 240° (where mergekit's multislerp fails): the chord's point is (3 a + 2 b + 2 c) / 3 = (1/3, 0)
    a, b, c = row(3, 0), row(-1, math.sqrt(3)), row(-1, -math.sqrt(3))
    merged = merge(name, None, [a, b, c], [1, 1, 1], **({"eps": 1e-6} if name == "multislerp" else {}))
    torch.testing.assert_close(merged, row(1 / 3, 0.0), atol=1e-6, rtol=1e-6)


def test_a_karcher_mean_with_its_antipode_is_the_average() -> None:
    # 2 x and −x: the mean of the directions is x, which has no shortest arc to −x
    torch.testing.assert_close(merge("karcher", None, [row(1, 0), row(1, 0), row(-1, 0)], [1, 1, 1]), row(1 / 3, 0))


def test_nearly_parallel_is_still_an_arc_for_nuslerp() -> None:
    # an angle of 0.02 (cos = 0.9998, a chord for slerp): halfway, both have sin 0.01 / sin 0.02 = 1 / (2 cos 0.01)
    a, b = row(1, 0), row(math.cos(0.02), math.sin(0.02))
    factor = 1 / (2 * math.cos(0.01))
    torch.testing.assert_close(merge("nuslerp", None, [a, b], [1, 1]), factor * (a + b), rtol=1e-7, atol=1e-8)
    chord = 0.5 * (a + b)
    assert not torch.equal(merge("nuslerp", None, [a, b], [1, 1]), chord)
    torch.testing.assert_close(merge("slerp", None, [a, b], [1, 1]), chord, rtol=1e-7, atol=1e-8)


def test_rows_and_columns_have_angles_of_their_own() -> None:
    # rows: (1, 0) and (0, 1) at a right angle: √½ each; (2, 0) and (6, 0) parallel: their mean
    left, right = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [6.0, 0.0]])
    by_row = torch.tensor([[ROOT, ROOT], [4.0, 0.0]])
    torch.testing.assert_close(merge("nuslerp", None, [left, right], [1, 1], nuslerp_flatten=False), by_row)
    merged = merge("nuslerp", None, [left.T, right.T], [1, 1], nuslerp_flatten=False, nuslerp_row_wise=True)
    torch.testing.assert_close(merged, by_row.T)
    base = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    on_deltas = merge("nuslerp", base, [base + left, base + right], [1, 1], nuslerp_flatten=False)
    torch.testing.assert_close(on_deltas, base + by_row)


@pytest.mark.parametrize("along_first", [False, True])
def test_vectors_of_a_tensor_of_three_dimensions(along_first: bool) -> None:
    base, (a, b) = family(6, 2, (3, 4, 5))
    merged = merge("nuslerp", base, [a, b], [1, 2], nuslerp_flatten=False, nuslerp_row_wise=along_first)
    assert merged.shape == base.shape
    for index in ((1, 2), (0, 3)):
        one = (slice(None), *index) if along_first else index
        torch.testing.assert_close(merged[one], merge("nuslerp", base[one], [a[one], b[one]], [1, 2]))


def test_nuslerp_extrapolates_by_negative_weights() -> None:
    # t = −1/2 / (1/2) = −1 on a right angle: sin 180° = 0 of a and sin −90° = −1 of b
    torch.testing.assert_close(merge("nuslerp", None, [row(1, 0), row(0, 1)], [1, -0.5]), row(0, -1))


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [1, -1, 3]])
def test_nuslerp_refuses_weights_without_a_share(weights: list[float]) -> None:
    with pytest.raises(RecipeError, match="nuslerp: the weights sum to zero"):
        merge("nuslerp", None, [row(1, 0)] * len(weights), weights)


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
def test_means_refuse_weights_of_zero(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}: the weights sum to zero"):
        merge(name, None, [row(1, 0), row(0, 1)], [0, 0])


def test_no_source_of_raw_multislerp_is_no_change() -> None:
    sources = [row(1, 0), row(0, 1)]
    assert torch.equal(merge("multislerp", row(5, 6), sources, [0, 0], normalize_weights=False), row(5, 6))
    assert torch.equal(merge("multislerp", None, sources, [0, 0], normalize_weights=False), row(0, 0))


@given(seed=st.integers(0, 10**6), weights=st.lists(st.floats(0.1, 3.0), min_size=2, max_size=5))
def test_the_karcher_mean_has_no_slope(seed: int, weights: list[float]) -> None:
    # what defines it: Σ αi log_m(ui) = 0
    points = np.random.default_rng(seed).normal(size=(len(weights), 40)) + 0.5
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    alphas = np.array(weights) / sum(weights)
    coefficients = mean_direction(units @ units.T, alphas, 200, 1e-12)
    assert coefficients is not None
    mean = coefficients @ units
    assert np.linalg.norm(mean) == pytest.approx(1.0, rel=1e-12)
    angles = np.arccos(units @ mean)
    slope = (alphas * angles / np.sin(angles)) @ (units - np.outer(units @ mean, mean))
    assert np.linalg.norm(slope) < 1e-9


def test_more_steps_come_closer_to_the_mean() -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(3, 30))
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    alphas = np.array([0.7, 0.2, 0.1])
    gram = units @ units.T
    exact = mean_direction(gram, alphas, 500, 0.0)
    assert exact is not None
    apart = [np.linalg.norm((mean_direction(gram, alphas, n, 0.0) - exact) @ units) for n in (1, 3, 10)]  # type: ignore[operator]
    assert apart[0] > 10 * apart[1] > 100 * apart[2]
