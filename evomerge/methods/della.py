"""DELLA: drop elements of each task vector at random, small ones more often than large ones, then merge as TIES does.

Deep, Bhardwaj and Poria 2024, "DELLA-Merging: reducing interference in model merging through magnitude-based
sampling", https://arxiv.org/abs/2406.11617

Within each row (an output unit; a vector is one row), the probability to keep an element rises evenly with the rank of
its magnitude, from density − epsilon to density + epsilon; what is kept is divided by its own probability (MAGPRUNE).
Equal magnitudes share the mean of their ranks, and a rank is one of 255 levels: an element's level depends on its row
alone, and a byte holds it. `della_linear` adds up instead of electing signs, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evomerge.methods.arithmetic import (
    add_edited_deltas,
    add_whole_deltas,
    as_float32,
    base_of,
    participants,
    scaled_weights,
)
from evomerge.methods.contract import Block, Method, Parameter, Settings
from evomerge.methods.random_field import STEPS
from evomerge.methods.shared_parameters import DENSITY, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, WEIGHT
from evomerge.methods.ties import AVERAGE, CONSENSUS, elect_and_merge

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "Deep, Bhardwaj and Poria 2024, DELLA-Merging, https://arxiv.org/abs/2406.11617"

TOP = 254
"""The level of the largest magnitude of a row; the smallest has level 0, and where all are equal it is 127."""

EPSILON = Parameter(
    "epsilon",
    default=0.15,
    per_source=True,
    low=0.0,
    high=0.5,
    gene=(0.0, 0.3),
    paper=0.07,
    idle_at=("density", 1.0),
    help="How far the probability to keep differs from density at most; less where density is nearer to 0 or 1.",
)


def rank_levels(magnitudes: Tensor) -> Tensor:
    """The rank of each element within its row, from 0 to `TOP`: uint8, shaped like `magnitudes`, [rows, columns].

    Equal elements share the mean of their ranks; the level is that rank over the largest, rounded half down.
    """
    import torch

    rows, columns = magnitudes.shape
    if columns <= 1:
        return torch.full((rows, columns), TOP // 2, dtype=torch.uint8, device=magnitudes.device)
    ascending = magnitudes.sort(dim=1).values
    below = torch.searchsorted(ascending, magnitudes)
    not_above = torch.searchsorted(ascending, magnitudes, right=True)
    twice_rank = below.add_(not_above).sub_(1)
    return twice_rank.mul_(TOP).add_(columns - 2).floor_divide_(2 * (columns - 1)).to(torch.uint8)


def line(source: Mapping[str, Any]) -> tuple[float, float]:
    """(a, b): an element of level l is kept where its number in the random field is below floor(a + b l), in float32.

    The paper wants density ± epsilon within (0, 1). Nearer to 0 or 1, epsilon is narrowed to what fits, which keeps the
    mean at density, and the masks nested in density. At density 1 everything is kept.
    """
    density = min(max(float(source["density"]), 0.0), 1.0)
    width = min(float(source["epsilon"]), density, 1.0 - density)
    return as_float32((density - width) * STEPS + 0.5), as_float32(2.0 * width * STEPS / TOP)


def keeps_all(source: Mapping[str, Any]) -> bool:
    """Returns whether nothing of a source is dropped."""
    return float(source["density"]) >= 1.0


def magprune(block: Block, source: int, settings: Settings, scale: float = 1.0) -> Tensor:
    """δ̃: the delta of one source after MAGPRUNE, times `scale`."""
    import torch

    delta = block.sources[source] - base_of(block)
    if keeps_all(settings.sources[source]):
        return delta.mul_(scale)
    first, step = line(settings.sources[source])
    limit = block.statistics.rank_levels(source).float().mul_(step).add_(first).floor_()
    kept = block.statistics.field(source).float() < limit
    if settings.shared["rescale"]:
        delta.mul_(limit.mul_(1.0 / STEPS).reciprocal_().mul_(scale))
    else:
        delta.mul_(scale)
    return torch.where(kept, delta, 0.0)


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ wi δ̃i [agrees] / Σ abs(wi) [agrees]: drop, elect, fuse (section 3 of the paper)."""
    indices, weights = participants(settings)
    if not indices:
        return base_of(block).clone()
    return elect_and_merge(block, indices, [magprune(block, i, settings) for i in indices], weights, settings)


def merge_linear(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ wi δ̃i, the weights divided by their sum under `normalize`."""
    parts = scaled_weights(settings)
    if all(keeps_all(settings.sources[i]) for i, _ in parts):
        return add_whole_deltas(block, settings, parts)
    return add_edited_deltas(block, ((magprune(block, i, settings, factor), 1.0) for i, factor in parts))


METHOD = Method(
    name="della",
    paper=PAPER,
    summary="Drop elements of the deltas at random, small ones more often; elect signs, average what agrees.",
    parameters=(
        WEIGHT,
        replace(DENSITY, paper=0.7, help="Probability to keep an element of a delta, on average."),
        EPSILON,
        replace(LAMBDA, paper=1.1),
        replace(NORMALIZE, help="Divide by the sum of the absolute weights."),
        replace(RESCALE, help="Divide what is kept by its probability to be kept."),
        CONSENSUS,
        AVERAGE,
        INT8_MASK,
    ),
    merge=merge,
    stochastic=True,
)

LINEAR = replace(
    METHOD,
    name="della_linear",
    summary="Drop elements of the deltas at random, small ones more often; add up the rest.",
    parameters=(*METHOD.parameters[:4], replace(NORMALIZE, default=False), METHOD.parameters[5], INT8_MASK),
    merge=merge_linear,
)
