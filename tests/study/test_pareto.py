"""Fronts, crowding, volumes and knees: rows computed by hand, brute force, and what must hold for any points."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.study import pareto
from evomerge.system.arrays import FloatArray


def points(most: int = 12, objectives: tuple[int, int] = (1, 4)) -> st.SearchStrategy[FloatArray]:
    """Up to `most` points, many of them equal in some objective or in all."""
    values = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0.0, 1.0, width=32)
    shapes = st.tuples(st.integers(1, most), st.integers(*objectives))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=values))


def dominates(a: FloatArray, b: FloatArray) -> bool:
    return bool((a >= b).all() and (a > b).any())


def reference_ranks(values: FloatArray) -> list[int]:
    """By the definition: take away what nothing that is left dominates, again and again."""
    found = [-1] * len(values)
    for front in range(len(values)):
        left = [k for k in range(len(values)) if found[k] < 0]
        for k in left:
            if not any(dominates(values[j], values[k]) for j in left):
                found[k] = front
    return found


def reference_volume(values: FloatArray, reference: FloatArray) -> float:
    """By inclusion and exclusion of the boxes."""
    boxes = np.maximum(values - reference, 0.0)
    groups = (c for n in range(1, len(boxes) + 1) for c in itertools.combinations(range(len(boxes)), n))
    return float(sum((-1) ** (len(c) + 1) * boxes[list(c)].min(axis=0).prod() for c in groups))


def test_ranks_row() -> None:
    """(1, 3) and (3, 1) are the front; (1, 1) lies behind both, (0, 3) behind the first; (0, 0) behind those two.
    A point that is there twice is in the same front twice."""
    values = np.array([[1, 1], [1, 3], [0, 0], [3, 1], [0, 3], [1, 3]], dtype=float)
    assert pareto.ranks(values).tolist() == [1, 0, 2, 0, 1, 0]
    assert pareto.ranks(values, 1).tolist() == [1, 0, 1, 0, 1, 0]
    assert pareto.ranks(values, 4).tolist() == pareto.ranks(values).tolist()


@given(points())
def test_ranks_are_those_of_the_definition(values: FloatArray) -> None:
    assert pareto.ranks(values).tolist() == reference_ranks(values)


@given(points(), st.integers(1, 14))
def test_enough_ranks(values: FloatArray, enough: int) -> None:
    whole, some = pareto.ranks(values), pareto.ranks(values, enough)
    last = some.max()
    assert (some[some < last] == whole[some < last]).all()
    assert (whole[some == last] >= last).all()
    assert (some < last).sum() >= enough or some.tolist() == whole.tolist()


def test_crowding_row() -> None:
    """Ranges 4 and 8. The middle points: (3 - 0) / 4 + (8 - 2) / 8 and (4 - 1) / 4 + (6 - 0) / 8."""
    values = np.array([[1, 6], [0, 8], [4, 0], [3, 2], [1, 6]], dtype=float)
    expected = [0.75 + 0.75, np.inf, np.inf, 0.75 + 0.75, 0.0]
    assert pareto.crowding(values).tolist() == expected
    assert pareto.crowding(values[:1]).tolist() == [np.inf]


@given(points(), st.randoms(use_true_random=False))
def test_the_order_of_the_points_does_not_matter(values: FloatArray, random: Any) -> None:
    order = list(range(len(values)))
    random.shuffle(order)
    assert pareto.ranks(values)[order].tolist() == pareto.ranks(values[order]).tolist()
    both = [sorted(zip(v.tolist(), pareto.crowding(v).tolist(), strict=True)) for v in (values, values[order])]
    assert both[0] == both[1]
    reference = np.full(values.shape[1], -0.25)
    assert pareto.hypervolume(values, reference) == pytest.approx(pareto.hypervolume(values[order], reference))
    assert pareto.reference_point(values).tolist() == pareto.reference_point(values[order]).tolist()
    fitness = values @ np.arange(1.0, values.shape[1] + 1)
    front = np.flatnonzero(pareto.ranks(values) == 0)
    shuffled = np.flatnonzero(pareto.ranks(values[order]) == 0)
    knees = [
        v[f][pareto.knee(v[f], w[f])]
        for v, f, w in zip((values, values[order]), (front, shuffled), (fitness, fitness[order]), strict=True)
    ]
    # Equal in all that decides: the first of them is as good as any.
    assert fitness[(values == knees[0]).all(axis=1)][0] == pytest.approx(fitness[(values == knees[1]).all(axis=1)][0])


def test_volume_row() -> None:
    """Above (0, 0): 1 x 3 and 3 x 1 share 1 x 1; (1, 1) adds nothing, (5, 0) and (-1, 9) are not above it."""
    values = np.array([[1, 3], [3, 1], [1, 1], [5, 0], [-1, 9]], dtype=float)
    assert pareto.hypervolume(values, np.zeros(2)) == 5.0
    assert pareto.growing_hypervolume(values, np.zeros(2)).tolist() == [3.0, 5.0, 5.0, 5.0, 5.0]
    assert pareto.hypervolume(values[3:], np.zeros(2)) == 0.0
    assert pareto.hypervolume(values[:0], np.zeros(2)) == 0.0


def test_volume_of_a_staircase_in_three_dimensions() -> None:
    """Unit cubes (i, j, k) with i + j + k < n, as boxes to their corners: n (n + 1) (n + 2) / 6 of them."""
    n = 7
    corners = [(i, j, n + 2 - i - j) for i in range(1, n + 1) for j in range(1, n + 2 - i)]
    values = np.array(corners, dtype=float)
    assert pareto.hypervolume(values, np.zeros(3)) == n * (n + 1) * (n + 2) / 6


@given(points(6, (1, 5)))
def test_volume_is_that_of_the_boxes(values: FloatArray) -> None:
    reference = np.full(values.shape[1], 0.125)
    expected = reference_volume(values, reference)
    assert pareto.hypervolume(values, reference) == pytest.approx(expected, abs=1e-9)
    grown = pareto.growing_hypervolume(values, reference)
    each = [pareto.hypervolume(values[: k + 1], reference) for k in range(len(values))]
    assert grown == pytest.approx(each, abs=1e-9)
    assert (np.diff(grown) >= 0).all()


@given(points(12, (2, 4)), st.integers(1, 12))
def test_what_is_left_of_a_front_is_spread_over_it(values: FloatArray, count: int) -> None:
    front = np.unique(values[pareto.ranks(values) == 0], axis=0)
    ends = [int(k) for k in np.argmax(front, axis=0)]
    left = pareto.thin_front(front, count, ends)
    assert len(left) == min(count, len(front))
    assert left == sorted(set(left))
    assert set(list(dict.fromkeys(ends))[:count]) <= set(left)
    assert pareto.thin_front(front, len(front)) == list(range(len(front)))


def test_thinning_takes_the_crowded_one() -> None:
    values = np.array([[0, 8], [1, 7], [1.5, 6.5], [4, 4], [8, 0]], dtype=float)
    assert pareto.thin_front(values, 4) == [0, 2, 3, 4] or pareto.thin_front(values, 4) == [0, 1, 3, 4]
    assert pareto.thin_front(values, 4, keep=[2]) == [0, 2, 3, 4]
    assert pareto.thin_front(values, 1, keep=[3, 0]) == [3]


KNEES: list[tuple[str, list[list[float]], list[float], int]] = [
    ("one point", [[1, 2]], [0], 0),
    ("two points: the fitter", [[1, 2], [2, 1]], [0.25, 0.5], 1),
    ("equal ones: the first", [[1, 1], [1, 1]], [0.5, 0.5], 0),
    ("equal but for one objective", [[1, 1, 2], [1, 2, 1]], [0.5, 0.25], 0),
    # Scaled to the unit square these are (0, 1), (0.5, 0.75), (1, 0): the middle is outside the line of the ends.
    ("a bend", [[0, 8], [5, 6], [10, 0]], [1, 0, 1], 1),
    # (0, 1), (0.75, 0.5), (0.5, 0.75), (1, 0): two as far out, so the fitter.
    ("two bends", [[0, 4], [3, 2], [2, 3], [4, 0]], [9, 1, 2, 9], 2),
    # (0, 1), (0.25, 0.5), (1, 0): nothing lies outside, so the fitter of the ends.
    ("a dent", [[0, 4], [1, 2], [4, 0]], [1, 9, 2], 2),
    # The three ends and (0.5, 0.5, 0.5), which the plane x + y + z = 1 has on its far side.
    ("three objectives", [[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0.5], [0, 0, 1]], [1, 1, 0, 1], 2),
    # The first is best in two objectives, so that there is no plane through the best points: the sum decides.
    ("too few ends", [[1, 1, 0], [0, 0, 1], [0.75, 0.75, 0.75]], [1, 1, 0], 2),
]


@pytest.mark.parametrize(("values", "otherwise", "expected"), [row[1:] for row in KNEES], ids=[row[0] for row in KNEES])
def test_knee_rows(values: list[list[float]], otherwise: list[float], expected: int) -> None:
    assert pareto.knee(np.array(values, dtype=float), np.array(otherwise, dtype=float)) == expected


@given(points(12, (2, 3)), st.floats(0.5, 4.0), st.floats(-2.0, 2.0))
def test_the_knee_does_not_depend_on_the_units(values: FloatArray, scale: float, shift: float) -> None:
    front = np.round(np.unique(values[pareto.ranks(values) == 0], axis=0), 3)
    otherwise = np.arange(float(len(front)))
    factors = np.array([scale, *[1.0] * (front.shape[1] - 1)])
    assert pareto.knee(front * factors + shift, otherwise) == pareto.knee(front, otherwise)


@given(points(10, (1, 3)))
def test_by_knee_a_dominated_point_comes_behind_what_dominates_it(values: FloatArray) -> None:
    order = pareto.by_knee(values, values.sum(axis=1))
    assert sorted(order) == list(range(len(values)))
    place = {k: at for at, k in enumerate(order)}
    for a, b in itertools.permutations(range(len(values)), 2):
        assert not dominates(values[a], values[b]) or place[a] < place[b]


def test_reference_point_row() -> None:
    """A tenth of the range 4 below 1; where all are equal half the value below, or a half below 0."""
    values = np.array([[1, -2, 0], [5, -2, 0], [3, -2, 0]], dtype=float)
    assert pareto.reference_point(values) == pytest.approx([0.6, -3.0, -0.5])
