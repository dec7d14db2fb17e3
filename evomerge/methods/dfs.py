"""DFS: average the task vectors, each weighted by the inverse of its variance.

The name is of "deep feature selection" (Li, Chen and Wasserman 2016, https://doi.org/10.1089/cmb.2015.0189). The
formula that merging code publishes under it divides every model by the same variance across models, which cancels: it
is the plain mean. Here each model has a variance of its own, as in classical inverse-variance weighting (Cochran
1937, https://doi.org/10.2307/2984123): a delta spread wide counts less than a quiet one.

Mode `position` weighs elements instead of models: the mean delta is shrunk where the models disagree, by the ratio of
signal to signal plus the mean's error variance (a Wiener filter, Wiener 1949).

Variances across models (mode `position`) are of the models that take part, unweighted: np.var(deltas, axis=0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from evomerge.methods.arithmetic import (
    add_deltas,
    affine,
    apply_update,
    base_of,
    normalized_weights,
    participants,
    refuse_zero_sum,
)
from evomerge.methods.contract import Block, Granularity, Method, Parameter, Settings, Statistics
from evomerge.methods.shared_parameters import DENSITY, LAMBDA, WEIGHT
from evomerge.methods.topk import density_mask

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 0.1
"""Smallest variance that counts, as a fraction of the mean over models: no model gains more than 10^γ."""

FAR = 1e18
"""Bound on the relative deviation in mode `position`; its square is still a float32."""


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ αk δk, or θ0 + λ s ⊙ δ̄ in mode `position`."""
    if settings.shared["mode"] == "position":
        return merge_positions(block, settings)
    indices, scale = participants(settings)[0], float(settings.shared["lambda"])
    alphas = scaled_alphas(block.statistics, settings)
    if settings.shared["scope"] == "tensor":
        return add_deltas(block, indices, [float(alpha[0]) for alpha in alphas], scale)
    base = base_of(block)
    columns = [base.new_tensor(alpha.astype(np.float32)).unsqueeze(-1) for alpha in alphas]
    return add_deltas(block, indices, columns, scale, row_anchor(scale))


def scaled_alphas(statistics: Statistics, settings: Settings) -> list[np.ndarray]:
    """λ αk of each source that takes part: one entry, or one for each row of the block; float64."""
    indices, weights = participants(settings)
    normalized_weights("dfs", weights)  # refuses weights that sum to zero
    scope, scale = settings.shared["scope"], float(settings.shared["lambda"])
    variances = [statistics.variance(i, scope).double().cpu().numpy().reshape(-1) for i in indices]
    alphas = inverse_variance(variances, weights, float(settings.shared["gamma"]))
    return [scale * alpha for alpha in alphas]


def row_anchor(scale: float) -> int:
    """Returns what a sum by rows is built around: 0 for the base, 1 for the first source; one for all rows."""
    return 0 if abs(1.0 - scale) >= 0.5 else 1


def inverse_variance(variances: Sequence[np.ndarray], weights: Sequence[float], gamma: float) -> list[np.ndarray]:
    """αk ∝ wk vk^−γ with Σ αk = 1, for each entry of the variances; where all are zero, αk ∝ wk.

    Args:
        variances: For each source, one entry or one per row, float64.
        weights: One for each source.
        gamma: 0 ignores the variances.
    """
    mean = sum(variances, np.zeros_like(variances[0])) / len(variances)
    level = np.where(mean > 0.0, mean, 1.0)
    floored = [np.where(mean > 0.0, np.maximum(v / level, FLOOR), 1.0) for v in variances]
    raw = [weight * v**-gamma for weight, v in zip(weights, floored, strict=True)]
    total = sum(raw, np.zeros_like(mean))
    return [part / total for part in raw]


def merge_positions(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ s ⊙ δ̄, of which the top `density` of s."""
    indices, weights = participants(settings)
    base = base_of(block)
    deltas = [block.sources[i] - base for i in indices]
    mean = affine(deltas, normalized_weights("dfs", weights))
    certainty = shrinkage(deltas, mean, float(settings.shared["tau"]))
    density = float(settings.shared["density"])
    update = mean.mul_(certainty)
    if density < 1.0:
        update.mul_(density_mask(certainty, density))
    scale = float(settings.shared["lambda"])
    return apply_update(block, indices, update) if scale == 1.0 else update.mul_(scale).add_(base)


def shrinkage(deltas: Sequence[Tensor], mean: Tensor, tau: float) -> Tensor:
    """s = δ̄² / (δ̄² + τ · Vark(δ) / K), where 0/0 = 0.

    Computed as 1 / (1 + τ/K · Vark(δ / δ̄)), in which the squares of small deltas do not underflow.
    """
    import torch

    count = len(deltas)
    centre = affine(deltas, [1.0 / count] * count)
    variance = torch.zeros_like(mean)
    for delta in deltas:
        ratio = (delta - centre).div_(mean).clamp_(-FAR, FAR)
        variance.add_(ratio.mul_(ratio).mul_(1.0 / count))
    certainty = variance.mul_(tau / count).add_(1.0).reciprocal_()
    return certainty.masked_fill_(mean == 0, 0.0)


def granularity(settings: Settings) -> Granularity:
    """Rows for variances by row; the whole tensor where the top of s is kept."""
    if settings.shared["mode"] == "position":
        return "tensor" if settings.shared["density"] < 1.0 else "element"
    return "row" if settings.shared["scope"] == "row" else "element"


METHOD = Method(
    name="dfs",
    paper="Li, Chen and Wasserman 2016, Deep feature selection, https://doi.org/10.1089/cmb.2015.0189 (the name); "
    "Cochran 1937, https://doi.org/10.2307/2984123 (the weights)",
    summary="Average the deltas, each weighted by the inverse of its variance.",
    parameters=(
        replace(WEIGHT, default=1.0, required=False, low=0.0, only_ratios=True),
        Parameter(
            "gamma", default=1.0, low=0.0, gene=(0.0, 2.0), when=("mode", "model"), help="Power of the variance."
        ),
        LAMBDA,
        Parameter(
            "scope",
            default="tensor",
            kind="choice",
            choices=("tensor", "row"),
            when=("mode", "model"),
            help="Variance of a delta over the tensor, or over each output row.",
        ),
        Parameter(
            "mode",
            default="model",
            kind="choice",
            choices=("model", "position"),
            help="Weigh the models, or shrink each element by how far the models agree.",
        ),
        Parameter(
            "tau",
            default=1.0,
            low=0.0,
            gene=(0.1, 10.0),
            when=("mode", "position"),
            help="Strength of the shrinkage.",
        ),
        replace(
            DENSITY, per_source=False, when=("mode", "position"), help="Fraction of the elements kept, by certainty."
        ),
    ),
    merge=merge,
    granularity=granularity,
    check=refuse_zero_sum("dfs"),
)
