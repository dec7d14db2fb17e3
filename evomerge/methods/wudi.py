"""WUDI: the merged delta that interferes least with every task's own, in closed form.

Cheng et al. 2025, "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
https://arxiv.org/abs/2503.08099

A task's delta spans about what its inputs span, so that Σ ‖(δ − δi) δiᵀ‖² / ‖δi‖² measures how far the merge changes
the answers to them. The paper takes 300 steps of Adam from the sum of the deltas; the loss is quadratic, and where
descent from there ends is δ = Σ δi Pi with Pi = (Gi / ‖δi‖²) H⁺, Gi = δiᵀ δi and H = Σ Gi / ‖δi‖²: computed once, for
all λ. Matrices are those of a Linear, [out, in]. What is no matrix is averaged. There are no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import add_deltas, base_of
from evomerge.methods.contract import Block, Method, Settings
from evomerge.methods.shared_parameters import LAMBDA, SPECTRAL
from evomerge.methods.spectral import NOTHING, gram, times
from evomerge.methods.tsv_merge import distinct

if TYPE_CHECKING:
    from torch import Tensor


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ δi Pi; of what is no matrix θ0 + λ Σ δi / K."""
    base, scale = base_of(block), float(settings.shared["lambda"])
    indices = range(len(block.sources))
    matrix = settings.shared["spectral"] and base.dim() == 2 and base.numel() > 0
    leaders = [indices[task[0]] for task in distinct(block, indices)] if matrix else []
    if len(leaders) == 1:
        return add_deltas(block, leaders, [scale], scale)
    if not matrix:
        return add_deltas(block, indices, [scale / len(indices)] * len(indices), scale)
    (update,) = block.statistics.remember(
        ("wudi",), lambda: (least_interference([source - base for source in block.sources]),)
    )
    return (update * scale).add_(base)


def least_interference(deltas: Sequence[Tensor]) -> Tensor:
    """Σ δi Pi, like the deltas [m, n]; the shortest where H is singular."""
    import torch

    parts = []
    for delta in deltas:
        part = gram(delta)
        size = float(part.trace())  # ‖δi‖²
        parts.append(part.div_(size) if size > 0.0 else part)
    values, vectors = torch.linalg.eigh(sum(parts[1:], parts[0]))
    used = values > NOTHING**2 * values[-1:]
    inverse = (vectors * (torch.where(used, values, 1.0).reciprocal() * used)) @ vectors.T
    result = torch.zeros_like(deltas[0])
    for delta, part in zip(deltas, parts, strict=True):
        result.add_(times(delta, part @ inverse))
    return result


METHOD = Method(
    name="wudi",
    paper="Cheng et al. 2025, Whoever Started the Interference Should End It, https://arxiv.org/abs/2503.08099",
    summary="Base plus the delta that interferes least with every task's own, matrix by matrix.",
    parameters=(LAMBDA, SPECTRAL),
    merge=merge,
    granularity=lambda settings: "tensor" if settings.shared["spectral"] else "element",
)
