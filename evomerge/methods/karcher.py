"""Karcher mean: the point of the hypersphere with the least sum of squared arcs to the models' directions.

Karcher 1977, "Riemannian center of mass and mollifier smoothing", https://doi.org/10.1002/cpa.3160300502

The mean is found by gradient steps on the sphere, m <- exp_m(Σ αi log_m(ui)), ui the direction of source i. Every
point on the way is a linear combination of the sources, so that all steps are taken with its K coefficients and the K
x K inner products of the directions, in float64; the tensors themselves are read once, for the result. The length of
the result is the weighted mean of the sources' lengths.

Where there is no such mean (the directions cancel, or one of them is opposite to it) the merge is the weighted average.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from evomerge.methods.arithmetic import (
    linear_combination,
    normalized_weights,
    participants,
    refuse_zero_sum,
    unit_factors,
)
from evomerge.methods.contract import Block, Method, Parameter, Settings
from evomerge.methods.shared_parameters import OUR_WEIGHT, WEIGHT
from evomerge.system.arrays import FloatArray

if TYPE_CHECKING:
    from torch import Tensor


OPPOSITE = -1.0 + 1e-12
"""A cosine below this to the mean is an opposite direction: there is no one shortest arc to it."""


def merge(block: Block, settings: Settings) -> Tensor:
    """Returns the weighted mean length times the Karcher mean of the directions."""
    indices, weights = participants(settings)
    alphas = np.array(normalized_weights("karcher", weights))
    gram = np.array([[block.statistics.dot(min(i, j), max(i, j), "weights") for j in indices] for i in indices])
    coefficients = karcher_coefficients(gram, alphas, int(settings.shared["max_iter"]), float(settings.shared["tol"]))
    return linear_combination([block.sources[i] for i in indices], coefficients.tolist())


def karcher_coefficients(gram: FloatArray, alphas: FloatArray, max_iter: int, tol: float) -> FloatArray:
    """Coefficients of the sources in their Karcher mean.

    Args:
        gram: Inner products of the sources, float64 [K, K].
        alphas: Their weights, which sum to one.
        max_iter: Most gradient steps.
        tol: A step shorter than this (in radians) is the last.
    """
    lengths = np.sqrt(np.diagonal(gram))
    inverse = np.array(unit_factors(lengths.tolist()))
    cosines = np.clip(gram * inverse[:, None] * inverse, -1.0, 1.0)
    directed = np.where(inverse > 0.0, alphas, 0.0)  # a tensor of zeros has no direction
    mean = mean_direction(cosines, directed / directed.sum(), max_iter, tol) if directed.any() else None
    return alphas if mean is None else mean * inverse * (alphas @ lengths)


def mean_direction(cosines: FloatArray, alphas: FloatArray, max_iter: int, tol: float) -> FloatArray | None:
    """Coefficients of unit vectors in their Karcher mean, a unit vector; None where there is none.

    Args:
        cosines: Inner products of the vectors, [K, K].
        alphas: Their weights, which sum to one.
        max_iter: Most gradient steps.
        tol: A step shorter than this (in radians) is the last.
    """
    mean = _unit(cosines, alphas, tol)
    for _ in range(max_iter):
        if mean is None:
            break
        toward = np.clip(cosines @ mean, -1.0, 1.0)
        if (toward[alphas != 0] < OPPOSITE).any():
            return None
        angle = np.arccos(toward)
        sine = np.sin(angle)
        stretch = alphas * np.divide(angle, sine, out=np.ones_like(angle), where=sine > 0)  # log_m(ui), per ui - cos m
        step = stretch - (stretch @ toward) * mean
        length = _length(cosines, step)
        if length <= tol:
            break
        mean = _unit(cosines, math.cos(length) * mean + math.sin(length) / length * step, tol)
    return mean


def _unit(cosines: FloatArray, coefficients: FloatArray, tol: float) -> FloatArray | None:
    length = _length(cosines, coefficients)
    return None if length <= tol else coefficients / length


def _length(cosines: FloatArray, coefficients: FloatArray) -> float:
    return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))


METHOD = Method(
    name="karcher",
    paper="Karcher 1977, Riemannian center of mass and mollifier smoothing, https://doi.org/10.1002/cpa.3160300502",
    summary="Mean of the models' directions on the hypersphere, at their mean length.",
    parameters=(
        replace(WEIGHT, default=1.0, required=False, low=0.0, only_ratios=True, remark=OUR_WEIGHT),
        Parameter("max_iter", default=10, kind="int", low=1, help="Most steps to the mean."),
        Parameter("tol", default=1e-5, low=0.0, help="The shortest step (in radians) that is followed by another."),
    ),
    merge=merge,
    needs_base=False,
    check=refuse_zero_sum("karcher"),
)
