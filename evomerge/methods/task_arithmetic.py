"""Task arithmetic: add the weighted sum of the task vectors to the base.

Ilharco et al. 2022, "Editing models with task arithmetic", https://arxiv.org/abs/2212.04089
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import add_whole_deltas, scaled_weights
from evomerge.methods.contract import Block, Method, Settings
from evomerge.methods.shared_parameters import INT8_MASK, LAMBDA, NORMALIZE, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ wi δi; the weights are divided by their sum under `normalize`."""
    return add_whole_deltas(block, settings, scaled_weights(settings))


METHOD = Method(
    name="task_arithmetic",
    paper="Ilharco et al. 2022, Editing models with task arithmetic, https://arxiv.org/abs/2212.04089",
    summary="Base plus the weighted sum of the deltas.",
    parameters=(WEIGHT, LAMBDA, replace(NORMALIZE, default=False), INT8_MASK),
    merge=merge,
)
