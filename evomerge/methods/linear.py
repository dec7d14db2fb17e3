"""Linear: the (weighted) average of the models.

Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import affine, normalized_weights, participants, weighted_sum, zero_sum_problem
from evomerge.methods.contract import Block, Method, Settings
from evomerge.methods.shared_parameters import NORMALIZE, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor


def merge(block: Block, settings: Settings) -> Tensor:
    """Σ wi θi / Σ wi, or Σ wi θi without `normalize`."""
    indices, weights = participants(settings)
    tensors = [block.sources[i] for i in indices]
    if settings.shared["normalize"]:
        return affine(tensors, normalized_weights("linear", weights))
    if math.fsum(weights) == 1.0:
        return affine(tensors, weights)
    return weighted_sum(block.sources, settings.column("weight"))


def check(settings: Settings) -> list[str]:
    """Refuses weights that sum to zero under `normalize`."""
    return zero_sum_problem("linear", participants(settings)[1]) if settings.shared["normalize"] else []


METHOD = Method(
    name="linear",
    paper="Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482",
    summary="Weighted average of the models.",
    parameters=(WEIGHT, NORMALIZE),
    merge=merge,
    needs_base=False,
    check=check,
)
