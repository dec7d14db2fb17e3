"""Median: add the element-wise median of the task vectors to the base."""

from __future__ import annotations

import torch
from torch import Tensor

from evomerge.methods.arithmetic import base_of
from evomerge.methods.contract import Block, Parameter, Settings, merge_method


@merge_method(Parameter("scale", default=1.0, low=0.0, gene=(0.3, 2.0), help="Factor on the median."), min_sources=2)
def median(block: Block, settings: Settings) -> Tensor:
    """Base plus the element-wise median of the deltas."""
    deltas = torch.stack(block.deltas).sort(dim=0).values
    count = len(deltas)
    middle = (deltas[(count - 1) // 2] + deltas[count // 2]) / 2  # the mean of two, for an even number
    return base_of(block) + settings.shared["scale"] * middle
