"""Arcee Fusion: take from a fine-tune only the elements that stand out, and leave the base elsewhere.

Arcee AI 2025, mergekit's merge method of that name, https://github.com/arcee-ai/mergekit (there is no paper)

An element's importance is the magnitude of its delta times the Kullback-Leibler divergence of its row, both rows seen
as logits of a softmax. What reaches the median plus one and a half times the distance between the quartiles is taken.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from evomerge.methods.arithmetic import base_of
from evomerge.methods.contract import Block, Granularity, Method, Settings

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-8
"""Added to every probability, as mergekit does."""

QUARTERS = (1, 2, 3)


def divergence(rows: Tensor, base: Tensor) -> Tensor:
    """Returns the divergence of each row from the base's, [rows, columns] -> float64 [rows]; at least 0.

    In float32 the terms of fine-tunes, which cancel to their squares, drown in rounding.
    """
    p, q = (tensor.double().softmax(dim=1).add_(SMALLEST) for tensor in (rows, base))
    return p.mul(p.div(q).log_()).sum(dim=1).clamp_(min=0.0)


def relative(divergences: Tensor) -> Tensor:
    """Divergences over the largest, float32 [rows, 1]: only their ratios count, and these do not underflow."""
    largest = float(divergences.max()) if divergences.numel() else 0.0
    return (divergences / largest if largest > 0.0 else divergences).float().unsqueeze(1)


def quartile_ranks(size: int) -> list[int]:
    """Returns the places of the three quartiles, counted from the largest (1) down."""
    return [size - quarter * (size - 1) // 4 for quarter in QUARTERS]


def threshold(quartiles: list[float]) -> float:
    """median + 1.5 (third − first quartile): the smallest float32 that is not below it."""
    first, median, third = quartiles
    exact = median + 1.5 * (third - first)
    single = np.float32(exact)
    return float(single) if single >= exact or math.isinf(single) else float(np.nextafter(single, np.float32(np.inf)))


def merge(block: Block, settings: Settings) -> Tensor:
    """θ1 where it is important, else θ0."""
    import torch

    base, (source,) = base_of(block), block.sources
    factors, least = block.statistics.importance(0)
    return torch.where((source - base).abs_().mul_(factors) >= least, source, base)


def granularity(settings: Settings) -> Granularity:
    """Sees whole rows: each has its own divergence."""
    return "row"


METHOD = Method(
    name="arcee_fusion",
    paper="Arcee AI 2025, Arcee Fusion in mergekit, https://github.com/arcee-ai/mergekit",
    summary="Take the elements of one fine-tune that stand out by importance, leave the base elsewhere.",
    parameters=(),
    merge=merge,
    max_sources=1,
    granularity=granularity,
)
