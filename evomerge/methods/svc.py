"""SVC, a stage: the singular values of what was merged, calibrated where it counts again what the sources share.

Li et al. 2026, "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging" (singular value calibration),
https://arxiv.org/abs/2602.05536

Along each left singular vector u of the merged delta, si says how many times source i's own response uᵀδi is in the
merged one: si = ⟨uᵀδ, uᵀδi⟩ / ‖uᵀδi‖². The singular value becomes γσ with γ = K / Σ max(alpha, si). With alpha 1
nothing grows; the paper's experiments have 1/K. (The authors' code clips the mean of the si, and only where all of them
are above 0: the same where none is clipped.) `svc_strength` mixes: 0 leaves the merge as it is, 1 is the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import base_of, sum_dtype
from evomerge.methods.contract import Block, Parameter, Settings, Stage
from evomerge.methods.spectral import left_vectors

if TYPE_CHECKING:
    from torch import Tensor


def apply(block: Block, merged: Tensor, settings: Settings) -> Tensor:
    """θ + strength U (Γ − 1) Uᵀ δ, with θ − θ0 = δ = U Σ Vᵀ."""
    base, strength = base_of(block), float(settings.shared["svc_strength"])
    delta = merged - base
    basis = left_vectors(delta)
    response = basis.T @ delta
    own = (basis.T @ (source - base) for source in block.sources)
    factors = calibration(response, own, float(settings.shared["svc_alpha"]))
    change = response.mul_(factors.sub_(1.0).unsqueeze(1))
    return (basis @ change).mul_(strength).add_(merged)


def calibration(response: Tensor, own: Iterable[Tensor], alpha: float) -> Tensor:
    """γ of each direction, float64 [r]; one along which a source does not move counts for it as alpha.

    Args:
        response: Of the merged delta, [r, n].
        own: Of each source's delta.
        alpha: Least that an si counts as.
    """
    wide = sum_dtype(response)
    total, count = response.new_zeros(response.shape[0], dtype=wide), 0
    for part in own:
        square = (part * part).sum(1, dtype=wide)
        share = (part * response).sum(1, dtype=wide).div_(square.masked_fill(square == 0.0, 1.0))
        total, count = share.clamp_(min=alpha).add_(total), count + 1
    return count / total


STAGE = Stage(
    name="svc",
    paper="Li et al. 2026, When Shared Knowledge Hurts, https://arxiv.org/abs/2602.05536",
    summary="Calibrate the singular values of the merged delta where it counts again what the sources share.",
    parameters=(
        Parameter(
            "svc_strength",
            default=1.0,
            low=0.0,
            high=1.0,
            gene=(0.0, 1.0),
            help="Share of the calibrated delta; the rest is the delta as it was merged.",
        ),
        Parameter(
            "svc_alpha",
            default=1.0,
            low=0.01,
            high=1.0,
            gene=(0.1, 1.0),
            idle_at=("svc_strength", 0.0),
            help="Least that a source counts in a direction: 1 only shrinks, less lets what no source shares grow.",
        ),
    ),
    apply=apply,
    shapes=lambda shape: len(shape) == 2,
    idle=lambda settings: settings.shared["svc_strength"] == 0.0,
)
