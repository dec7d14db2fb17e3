"""Linear: the (weighted) average of the models.

Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import affine, normalized_weights, participants, refuse_zero_sum, weighted_sum
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


METHOD = Method(
    name="linear",
    paper="Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482",
    summary="Weighted average of the models.",
    parameters=(WEIGHT, NORMALIZE),
    merge=merge,
    needs_base=False,
    check=refuse_zero_sum("linear", "normalize"),
)
