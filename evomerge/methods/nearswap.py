"""NearSwap: move every weight of the base towards the other model, by at most t.

alchemonaut 2024, "QuartetAnemoi-70B", https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001

The interpolation w θ1 + (1 − w) θ0 with w = min(1, t / |θ1 − θ0|) is θ0 plus the delta clipped to ±t: weights that are
nearly the same are swapped for the other model's, the others are moved by t. With several models the other one is
their weighted mean.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import affine, as_float32, base_of, normalized_weights, participants, refuse_zero_sum
from evomerge.methods.contract import Block, Method, Parameter, Settings
from evomerge.methods.shared_parameters import WEIGHT

if TYPE_CHECKING:
    from torch import Tensor


LARGEST = 3e38
"""Nothing in float32 is much further away."""


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + clip(θ̄ − θ0, −t, t); exactly θ̄ where it is not clipped."""
    import torch

    indices, weights = participants(settings)
    other = affine([block.sources[i] for i in indices], normalized_weights("nearswap", weights))
    base, reach = base_of(block), reach_of(settings)
    delta = other - base
    return torch.where(delta.abs() <= reach, other, delta.clamp_(-reach, reach).add_(base))


def reach_of(settings: Settings) -> float:
    """t as a float32 number, which deltas are compared with."""
    return as_float32(min(float(settings.shared["t"]), LARGEST))


METHOD = Method(
    name="nearswap",
    paper="alchemonaut 2024, QuartetAnemoi-70B, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    summary="Move every weight of the base towards the other model, by at most t.",
    parameters=(
        Parameter("t", default=1e-4, low=0.0, gene=(0.0, 0.01), help="The furthest that a weight moves."),
        replace(
            WEIGHT,
            default=1.0,
            required=False,
            low=0.0,
            only_ratios=True,
            help="Share of the source in the model moved towards.",
        ),
    ),
    merge=merge,
    check=refuse_zero_sum("nearswap"),
)
