"""RAM: every element of a delta that moved is averaged over the models in which it moved, and over no others.

"Reinforced Agent Merging", 2026, https://arxiv.org/abs/2601.13572

Reinforcement learning moves few elements, and a mean over all models would shrink those that one of them has moved
alone. An element counts for a model where its delta is above `epsilon`. RAM+ makes up for what a model gives up where
it shares: what it has moved alone is scaled by 1 + r min(ρ, alpha), ρ being how many of its elements it shares over
how many it has alone, by tensor ("tensor-local", as in mergekit: `ramplus_tl`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import apply_update, base_of, sum_dtype
from evomerge.methods.contract import Block, Method, Parameter, Settings, Statistics
from evomerge.methods.shared_parameters import LAMBDA

if TYPE_CHECKING:
    from torch import Tensor


def reinforcements(statistics: Statistics, settings: Settings) -> list[float]:
    """Returns what each source's elements are scaled by where no other has moved them: 1 + r min(ρ, alpha)."""
    if "r" not in settings.shared:
        return [1.0] * len(settings.sources)
    strength, most = float(settings.shared["r"]), float(settings.shared["alpha"])
    overlaps = statistics.overlaps(float(settings.shared["epsilon"]))
    return [1.0 + strength * min(shared / max(alone, 1), most) for shared, alone in overlaps]


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ mean of the δi that count; where one counts alone θ0 + λ (1 + r min(ρi, alpha)) δi."""
    import torch

    base, epsilon, scale = base_of(block), float(settings.shared["epsilon"]), float(settings.shared["lambda"])
    total = torch.zeros_like(base, dtype=sum_dtype(base))
    count, factor = torch.zeros_like(total), torch.zeros_like(total)
    for delta, alone in zip(block.deltas, reinforcements(block.statistics, settings), strict=True):
        moved = delta.abs() > epsilon
        total.add_(delta.masked_fill_(~moved, 0.0))
        count.add_(moved)
        factor.add_(moved, alpha=alone)
    update = torch.where(count == 1, total * factor, total / count.clamp_(min=1.0)).to(base.dtype)
    if scale != 1.0:
        return update.mul_(scale).add_(base)
    return apply_update(block, range(len(block.sources)), update)


EPSILON = Parameter("epsilon", default=1e-5, low=0.0, help="An element has moved where its delta is larger than this.")

METHOD = Method(
    name="ram",
    paper="Reinforced Agent Merging, 2026, https://arxiv.org/abs/2601.13572",
    summary="Average each element over the models in which it has moved.",
    parameters=(EPSILON, LAMBDA),
    merge=merge,
)

PLUS = replace(
    METHOD,
    name="ramplus_tl",
    summary="As ram; what a model has moved alone is scaled up by how much else it shares, tensor by tensor.",
    parameters=(
        Parameter("r", default=0.1, low=0.0, gene=(0.0, 1.0), help="Strength of the scaling."),
        Parameter("alpha", default=0.2, low=0.0, gene=(0.0, 1.0), help="Largest ratio of shared to own that counts."),
        EPSILON,
        LAMBDA,
    ),
)
