"""SCE: select the elements on which the models differ most, weigh the models by what is left, erase minority signs.

Wan et al. 2024, "FuseChat: knowledge fusion of chat models", https://arxiv.org/abs/2408.07990

Select: of the elements whose deltas vary across the models, the top `select_topk` by that variance. Calculate: each
model's weight is the sum of squares of its selected delta over that of all models. Erase: what has not the sign of the
sum of the deltas; the rest is averaged by weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import apply_update, base_of, sum_dtype
from evomerge.methods.contract import Block, Method, Parameter, Settings
from evomerge.methods.shared_parameters import INT8_MASK
from evomerge.methods.ties import disjoint_merge, elect_sign
from evomerge.methods.topk import cutoff_mask

if TYPE_CHECKING:
    from torch import Tensor


def element_variance(deltas: Sequence[Tensor]) -> Tensor:
    """Returns the population variance of each element across the models, computed in float64 and rounded to float32.

    In float64 the sum of a few float32 numbers hardly rounds: equal deltas have variance 0, and the order of the models
    does not matter.
    """
    import torch

    count, mean = float(len(deltas)), torch.zeros_like(deltas[0], dtype=sum_dtype(deltas[0]))
    for delta in deltas:
        mean.add_(delta)
    mean.div_(count)
    total = torch.zeros_like(mean)
    for delta in deltas:
        apart = delta.to(mean.dtype).sub_(mean)
        total.add_(apart.mul_(apart))
    return total.div_(count).float()


def coefficients(energies: Sequence[float]) -> tuple[list[int], list[float]]:
    """(the models with anything selected, their shares of the sum of squares)."""
    total = math.fsum(energies)
    indices = [i for i, energy in enumerate(energies) if energy / total > 0.0] if total > 0.0 else []
    return indices, [energies[i] / total for i in indices]


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + Σ ηi δ̂i [agrees] / Σ ηi [agrees]."""
    fraction = float(settings.shared["select_topk"])
    cut, energies = block.statistics.selection(fraction)
    indices, weights = coefficients(energies)
    if not indices:
        return base_of(block).clone()
    deltas = block.deltas
    if fraction < 1.0:
        mask = cutoff_mask(element_variance(deltas), *cut, block.start)
        deltas = [delta.mul_(mask) for delta in deltas]
    sign = elect_sign(deltas, [1.0] * len(deltas), "mass")
    update = disjoint_merge(sign, [deltas[i] for i in indices], weights, normalize=True, average="agreeing").mul_(sign)
    return apply_update(block, indices, update)


METHOD = Method(
    name="sce",
    paper="Wan et al. 2024, FuseChat, https://arxiv.org/abs/2408.07990",
    summary="Select the elements on which the models differ most, weigh the models by their squares, erase minorities.",
    parameters=(
        Parameter(
            "select_topk",
            default=1.0,
            low=0.0,
            high=1.0,
            gene=(0.05, 1.0),
            paper=0.1,
            help="Fraction kept of the elements on which the models differ, by variance; 1 keeps every element.",
        ),
        INT8_MASK,
    ),
    merge=merge,
)
