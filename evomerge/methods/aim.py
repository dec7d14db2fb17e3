"""AIM, a stage: what was merged moves least where the base's inputs are largest.

Nobari et al. 2025, "Activation-Informed Merging of Large Language Models", https://arxiv.org/abs/2502.02421

Column k of a Linear reads input k, of mean magnitude ak over a few texts run through the base. Its part of the merged
delta is multiplied by 1 − (1 − omega) ak / max a: omega 1 leaves the merge as it is, the paper's experiments have 0.4.
The means are those that the recipe's `activations:` names; a tensor without any (embeddings, vectors) stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import base_of
from evomerge.methods.contract import Block, Parameter, Settings, Stage

if TYPE_CHECKING:
    from torch import Tensor


def apply(block: Block, merged: Tensor, settings: Settings) -> Tensor:
    """θ0 + (1 − (1 − omega) a / max a) δ, column by column."""
    base, inputs = base_of(block), block.statistics.activations().to(merged)
    largest = float(inputs.max())
    importance = inputs / largest if largest > 0.0 else inputs
    change = (merged - base).mul_(importance.mul_(float(settings.shared["aim_omega"]) - 1.0))
    return change.add_(merged)


STAGE = Stage(
    name="aim",
    paper="Nobari et al. 2025, Activation-Informed Merging, https://arxiv.org/abs/2502.02421",
    summary="Shrink what was merged where the base's inputs are large (activations: FILE).",
    parameters=(
        Parameter(
            "aim_omega",
            default=0.4,
            low=0.0,
            high=1.0,
            gene=(0.0, 1.0),
            help="What is left of a delta where the base's inputs are largest; 1 leaves the merge as it is.",
        ),
    ),
    apply=apply,
    shapes=lambda shape: len(shape) == 2,
    idle=lambda settings: settings.shared["aim_omega"] == 1.0,
    activations=True,
)
