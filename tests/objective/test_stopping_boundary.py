"""A boundary that allows for repeated analyses."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from evomerge.objective.stopping_boundary import stopping_boundary


def test_the_first_boundary_is_the_normal_quantile_of_what_is_spent_there() -> None:
    # error * t ** shape = 0.2 * 0.25 = 0.05, and 0.4 * 0.25 ** 0.5 = 0.2.
    assert stopping_boundary([0.25], 0.2, 1.0)[0] == pytest.approx(NormalDist().inv_cdf(0.95), abs=1e-9)
    assert stopping_boundary([0.25, 0.5], 0.4, 0.5)[0] == pytest.approx(NormalDist().inv_cdf(0.8), abs=1e-9)


def test_the_published_boundary_of_two_analyses() -> None:
    """Linear spending of 0.025 over analyses at information 1/2 and 1: z = 2.241 and 2.125 (Kim and DeMets, 1987).

    Our information at the fraction t is t / (1 - t), which is 1/2 and 1 at t = 1/3 and 1/2; half of the error is to be
    spent at the first: error * (1/3) ** s = 0.0125 and error * (1/2) ** s = 0.025, so s = ln 2 / ln 1.5.
    """
    shape = math.log(2) / math.log(1.5)
    boundary = stopping_boundary([1 / 3, 1 / 2], 0.025 * 2**shape, shape)
    assert boundary == pytest.approx((2.241, 2.125), abs=1e-3)


@pytest.mark.parametrize(("error", "shape"), [(0.1, 1.0), (0.5, 0.5)])
def test_a_candidate_equal_to_the_cut_off_is_stopped_as_often_as_stated(error: float, shape: float) -> None:
    """Differences that sum to 0 over all items, in random order: a Brownian bridge, analysed seven times."""
    rng = np.random.default_rng(0)
    total, fractions = 160, [k / 8 for k in range(1, 8)]
    values = rng.normal(size=(8000, total))
    values -= values.mean(axis=1, keepdims=True)
    sums = values.cumsum(axis=1)
    stopped = np.zeros(len(values), dtype=bool)
    for t, bound in zip(fractions, stopping_boundary(fractions, error, shape), strict=True):
        n = round(t * total)
        stopped |= sums[:, n - 1] / n < -bound * math.sqrt((1 - t) / n)
        # Three standard errors of the simulation: 3 * sqrt(0.5 * 0.5 / 8000) = 0.017.
        assert stopped.mean() == pytest.approx(error * t**shape, abs=0.017)
