"""Multi-SLERP: the direction between several models on the hypersphere, at their mean length.

Goddard 2025, "Multi-SLERP", https://goddard.blog/posts/multislerp-wow-what-a-cool-idea

The directions' weighted mean m is put back on the sphere; the sources are projected on the tangent space there,
averaged, and the average is carried back by the exponential map. With the weights of m itself that average is zero: Σ
wi ui is a multiple of m, and has no part that is perpendicular to it. So the result is exactly

    (Σ wi |xi|) · Σ wi ui / |Σ wi ui|,   ui = xi / |xi|

with the deltas as xi where there is a base, the weights themselves otherwise. It is a linear combination of the
sources, whose coefficients need their inner products only. Where the directions cancel, it is Σ wi xi.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import (
    from_origin,
    normalized_weights,
    origin_dot,
    participants,
    refuse_zero_sum,
    unit_factors,
)
from evomerge.methods.contract import Block, Method, Parameter, Settings
from evomerge.methods.shared_parameters import WEIGHT

if TYPE_CHECKING:
    from torch import Tensor


def merge(block: Block, settings: Settings) -> Tensor:
    """(Σ wi |xi|) · Σ wi ui / |Σ wi ui|."""
    indices, weights = participants(settings)
    if settings.shared["normalize_weights"]:
        weights = normalized_weights("multislerp", weights)
    gram = [[origin_dot(block, i, j) for j in indices] for i in indices]
    return from_origin(block, indices, directions_mean(gram, weights, float(settings.shared["eps"])))


def directions_mean(gram: Sequence[Sequence[float]], weights: Sequence[float], eps: float) -> list[float]:
    """Coefficients of the sources.

    Args:
        gram: Inner products of the sources, K x K.
        weights: One for each source.
        eps: A mean direction shorter than this is none: the coefficients are the weights.
    """
    lengths = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    parts = [w * unit for w, unit in zip(weights, unit_factors(lengths), strict=True)]
    squared = math.fsum(a * b * gram[i][j] for i, a in enumerate(parts) for j, b in enumerate(parts))
    mean = math.sqrt(max(squared, 0.0))
    if mean <= eps:
        return list(weights)
    scale = math.fsum(w * n for w, n in zip(weights, lengths, strict=True)) / mean
    return [part * scale for part in parts]


METHOD = Method(
    name="multislerp",
    paper="Goddard 2025, Multi-SLERP, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    summary="Weighted mean of the models' (or deltas') directions on the hypersphere, at their mean length.",
    parameters=(
        replace(WEIGHT, only_ratios="normalize_weights"),
        Parameter("normalize_weights", default=True, kind="bool", help="Divide by the sum of the weights."),
        Parameter("eps", default=1e-8, low=0.0, help="Shorter than this, a mean of directions is none."),
    ),
    merge=merge,
    needs_base=False,
    takes_base=True,
    check=refuse_zero_sum("multislerp", "normalize_weights"),
)
