"""TIES: trim each task vector, elect a sign for each element, and average what agrees with it.

Yadav et al. 2023, "TIES-Merging: resolving interference when merging models", https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import apply_update, as_float32, base_of, participants
from evomerge.methods.contract import Block, Method, Parameter, Settings
from evomerge.methods.shared_parameters import (
    DENSITY,
    INT8_MASK,
    LAMBDA,
    NORMALIZE,
    RESCALE_TO_MASS,
    SCOPE,
    WEIGHT,
)
from evomerge.methods.topk import NONE, mass_factor, trim

if TYPE_CHECKING:
    from torch import Tensor

CONSENSUS = Parameter(
    "consensus",
    default="mass",
    kind="choice",
    choices=("mass", "count"),
    help="Elect by the sign of the weighted sum, or by the majority of signs (a tie goes to the first model).",
)
AVERAGE = Parameter(
    "average",
    default="agreeing",
    kind="choice",
    choices=("agreeing", "all"),
    help="Under normalize, divide by the absolute weights of the models that agree, or of every model.",
)

NEVER = 1e-30
"""Where no model agrees, the sum of agreeing weights: small enough to vanish beside any weight."""


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ wi δ̂i [agrees] / Σ abs(wi) [agrees] (section 3 of the paper: trim, elect sign, disjoint merge)."""
    indices, weights = participants(settings)
    if not indices:
        return base_of(block).clone()
    deltas = [trimmed(block, i, settings.sources[i]["density"], settings) for i in indices]
    return elect_and_merge(block, indices, deltas, weights, settings)


def trimmed(block: Block, source: int, density: float, settings: Settings) -> Tensor:
    """δ̂: the delta of one source with all but its top `density` set to 0."""
    delta = block.sources[source] - base_of(block)
    if density >= 1.0:
        return delta
    kept = block.statistics.trim(source, density, settings.shared["scope"])
    delta = trim(delta, *kept, block.start)
    if settings.shared["rescale"]:
        delta.mul_(mass_factor(block.statistics.masses(source, kept, NONE)))
    return delta


def elect_and_merge(
    block: Block, indices: Sequence[int], deltas: Sequence[Tensor], weights: Sequence[float], settings: Settings
) -> Tensor:
    """θ0 plus λ times the disjoint merge of the deltas.

    Args:
        block: Where the base and the sources are.
        indices: The sources that take part, at least one.
        deltas: Their deltas, trimmed or dropped already.
        weights: Their weights, none of them 0.
        settings: For consensus, normalize, average and lambda.
    """
    sign = elect_sign(deltas, weights, settings.shared["consensus"])
    update = disjoint_merge(sign, deltas, weights, settings.shared["normalize"], settings.shared["average"]).mul_(sign)
    scale = float(settings.shared["lambda"])
    if scale == 1.0:
        return apply_update(block, indices, update)
    return update.mul_(scale).add_(base_of(block))


def elect_sign(deltas: Sequence[Tensor], weights: Sequence[float], consensus: str) -> Tensor:
    """Returns the sign of each element, +1 or -1: of Σ wi δ̂i (mass) or of the majority (count); 0 elects +.

    The mass is added up in float64, where float32 products are exact: sums that cancel (common among fine-tunes
    stored in bfloat16, whose deltas are small multiples of one step) then give 0 whatever the order of the sources.
    """
    import torch

    if consensus == "mass":
        wide = torch.float32 if deltas[0].device.type == "mps" else torch.float64  # mps has no float64
        mass = torch.zeros_like(deltas[0], dtype=wide)
        for delta, weight in zip(deltas, weights, strict=True):
            mass.add_(delta, alpha=as_float32(weight))
    else:
        mass = torch.zeros_like(deltas[0])
        for delta, weight in zip(deltas, weights, strict=True):
            mass.add_(delta.sign().mul_(1.0 if weight > 0 else -1.0))
        first = deltas[0] if weights[0] > 0 else -deltas[0]
        mass = torch.where(mass == 0, first, mass).add_(0.0)  # turns -0 into +0
    one = torch.ones((), device=mass.device, dtype=deltas[0].dtype)
    return torch.copysign(one, mass.to(one.dtype))


def disjoint_merge(
    sign: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool, average: str
) -> Tensor:
    """Returns the magnitude of what agrees: Σ abs(wi) mi, where mi is abs(δ̂i) if wi δ̂i has the elected sign, else 0.

    Under `normalize` it is a weighted mean, updated one source at a time (mean += share · (value − mean)), so that
    equal values give exactly that value.
    """
    import torch

    result = torch.zeros_like(sign)
    total = torch.full_like(sign, NEVER)
    everyone = 0.0
    for delta, weight in zip(deltas, weights, strict=True):
        size = abs(weight)
        magnitude = (delta * sign if weight > 0 else (delta * sign).neg_()).clamp_(min=0.0)
        if not normalize:
            result.add_(magnitude.mul_(size))
        elif average == "all":
            everyone += size
            result.add_(magnitude.sub_(result).mul_(size / everyone))
        else:
            part = magnitude.sign().mul_(size)
            total.add_(part)
            result.add_(magnitude.sub_(result).mul_(part.div_(total)))
    return result


METHOD = Method(
    name="ties",
    paper="Yadav et al. 2023, TIES-Merging, https://arxiv.org/abs/2306.01708",
    summary="Trim the deltas, elect a sign for each element, average the deltas that agree.",
    parameters=(
        WEIGHT,
        replace(DENSITY, paper=0.2, help="Fraction of each delta that is kept, the largest magnitudes."),
        LAMBDA,
        replace(NORMALIZE, help="Divide by the sum of the absolute weights."),
        CONSENSUS,
        AVERAGE,
        SCOPE,
        RESCALE_TO_MASS,
        INT8_MASK,
    ),
    merge=merge,
)
