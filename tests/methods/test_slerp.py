"""SLERP by hand: arcs, chords, folds, and who takes part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.registry import METHODS
from evomerge.methods.slerp import arc, fold

SLERP = METHODS["slerp"]


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def merge(
    base: Tensor | None, sources: Sequence[Tensor], weights: Sequence[float] | None = None, **shared: Any
) -> Tensor:
    own = [{} for _ in sources] if weights is None else [{"weight": w} for w in weights]
    return merge_tensors(SLERP, base, sources, SLERP.settings(own, shared))


def test_a_right_angle() -> None:
    # Ω = π/2: sin((1−t)Ω), sin(tΩ): at 1/3, sin 60° = √3/2 and sin 30° = 1/2
    merged = merge(row(1, 0), [row(0, 1)], t=1 / 3)
    torch.testing.assert_close(merged, row(math.sqrt(3) / 2, 0.5))


def test_lengths_are_kept_as_they_are() -> None:
    # the angle is that of the directions, the coefficients are of the tensors themselves: at t = 1/2, both 1/√2
    torch.testing.assert_close(merge(row(2, 0), [row(0, 6)], t=0.5), row(2, 6) / math.sqrt(2))


def test_sixty_degrees() -> None:
    # Ω = 60°, t = 1/4: sin 45° / sin 60° = √(2/3), sin 15° / sin 60° = (√6 − √2)/4 · 2/√3
    a, b = row(1, 0), row(0.5, math.sqrt(3) / 2)
    of_a, of_b = math.sqrt(2 / 3), (math.sqrt(6) - math.sqrt(2)) / (2 * math.sqrt(3))
    torch.testing.assert_close(merge(a, [b], t=0.25), of_a * a + of_b * b)


def test_the_ends_are_the_models() -> None:
    a, b = row(0.3, -1.7, 2.2), row(1.1, 0.9, -0.4)
    assert torch.equal(merge(a, [b], t=0.0), a)
    assert torch.equal(merge(a, [b], t=1.0), b)


@pytest.mark.parametrize(
    "b",
    [
        pytest.param(row(-2, 0), id="antipodal"),
        pytest.param(row(-2, 0.01), id="nearly antipodal"),
        pytest.param(row(1, 0.03), id="near-parallel"),  # cos = 1/√1.0009 = 0.99955
    ],
)
def test_no_arc_is_a_chord(b: Tensor) -> None:
    torch.testing.assert_close(merge(row(1, 0), [b], t=0.25), 0.75 * row(1, 0) + 0.25 * b)
    torch.testing.assert_close(merge(b, [row(1, 0)], t=0.25), 0.75 * b + 0.25 * row(1, 0))


def test_a_tensor_of_zeros_is_orthogonal_to_any_other() -> None:
    # as in mergekit: Ω = π/2, at t = 1/3 sin 60° and sin 30°. Between deltas there is nothing to turn: the chord
    zero, one = row(0, 0), row(3, 4)
    torch.testing.assert_close(merge(zero, [one], t=1 / 3), 0.5 * one)
    torch.testing.assert_close(merge(one, [zero], t=1 / 3), math.sqrt(3) / 2 * one)
    torch.testing.assert_close(merge(zero, [zero], t=1 / 3), zero)
    torch.testing.assert_close(merge(one, [one, 2 * one], t=1 / 3, on="deltas"), 4 / 3 * one)


@pytest.mark.parametrize("t", [-0.5, 1.5])
def test_beyond_the_ends_it_goes_on_along_the_arc(t: float) -> None:
    # Ω = π/2: at 3/2 that is −√½ a + √½ b, at −1/2 the other way round
    merged = merge(row(1, 0), [row(0, 1)], t=t)
    torch.testing.assert_close(merged, row(-math.sqrt(0.5), math.sqrt(0.5)) * (1 if t > 1 else -1))


def test_just_inside_the_threshold_it_is_an_arc() -> None:
    assert arc(1.0, 0.9994, 1.0, 0.5)[2] is False
    assert arc(1.0, 0.9996, 1.0, 0.5)[2] is True
    assert arc(1.0, -0.9996, 1.0, 0.5) == (0.5, 0.5, True)


def test_weights_fold_in_listed_order() -> None:
    # x and y with weights 1, 1: t = 1/2: (1, 1)/√2 · ... = (√½, √½, 0). Then z with weight 2 of 4: t = 1/2 at a right
    # angle again, factor √½ on both: (½, ½, √½)
    x, y, z = row(1, 0, 0), row(0, 1, 0), row(0, 0, 1)
    half, root = 0.5, math.sqrt(0.5)
    torch.testing.assert_close(merge(None, [x, y, z], [1, 1, 2]), row(half, half, root))
    # listed as z, x, y: t = 1/3: (sin 60° z + sin 30° x), then t = 1/4: sin 67.5° and sin 22.5°
    big, small = math.sin(3 * math.pi / 8), math.sin(math.pi / 8)
    expected = row(big / 2, small, big * math.sqrt(3) / 2)
    torch.testing.assert_close(merge(None, [z, x, y], [2, 1, 1]), expected)


def test_two_models_by_weight_are_t() -> None:
    a, b = row(1, 2, 3), row(-3, 0.5, 1)
    torch.testing.assert_close(merge(None, [a, b], [3, 1]), merge(a, [b], t=0.25))


def test_on_deltas_the_base_is_the_origin() -> None:
    # deltas (1, 0) and (0, 1), t = 1/2: base + √½ (1, 1)
    base = row(10, 20)
    expected = base + math.sqrt(0.5)
    torch.testing.assert_close(merge(base, [row(11, 20), row(10, 21)], [1, 1], on="deltas"), expected)
    torch.testing.assert_close(merge(base, [row(11, 20), row(10, 21)], t=0.5, on="deltas"), expected)
    # one source: the base's own delta is zero, so it is a lerp
    torch.testing.assert_close(merge(base, [row(11, 20)], t=0.25, on="deltas"), row(10.25, 20))


def test_coefficients_fold_from_inner_products_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    gram = points @ points.T
    steps = [0.3, 0.6, 0.2]
    expected = points[0]
    for point, t in zip(points[1:], steps, strict=True):
        angle = math.acos(float(expected @ point / (expected.norm() * point.norm())))
        expected = (math.sin((1 - t) * angle) * expected + math.sin(t * angle) * point) / math.sin(angle)
    coefficients, chords = fold(4, steps, lambda i, j: float(gram[i, j]))
    assert not chords
    torch.testing.assert_close(torch.tensor(coefficients, dtype=torch.float64) @ points, expected)


def test_t_counts_where_weights_are_given_too() -> None:
    a, b = row(1, 0), row(0, 1)
    assert torch.equal(merge(a, [b], [0.9], t=0.3), merge(a, [b], t=0.3))


def test_who_needs_the_base() -> None:
    assert SLERP.base_needed({"t": 0.5, "on": "weights"})
    assert SLERP.base_needed({"t": None, "on": "deltas"})
    assert not SLERP.base_needed({"t": None, "on": "weights"})


def test_impossible_settings_are_refused() -> None:
    a, b, c = row(1, 0), row(0, 1), row(1, 1)
    with pytest.raises(RecipeError, match="slerp: t interpolates between base_model and one other model, got 2 others"):
        merge(a, [b, c], t=0.5)
    with pytest.raises(RecipeError, match="got 3 others"):
        merge(a, [a, b, c], t=0.5, on="deltas")
    with pytest.raises(RecipeError, match=r"slerp: give t .* or a weight for every model"):
        merge(a, [b, c])
    with pytest.raises(RecipeError, match="slerp: the weights sum to zero"):
        merge(a, [b, c], [0, 0])
