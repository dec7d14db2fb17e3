"""Iso-C: the sum of the task vectors, every matrix of it with one singular value, the mean of its own.

Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
https://arxiv.org/abs/2502.04959

The sum of U Σ Vᵀ is dominated by what the tasks have in common; the merge is λ σ̄ U Vᵀ, in which every direction that
any task uses counts the same. What is no matrix is averaged, as in the authors' code. The paper's sum has no weights:
here they are relative (wi over their mean), so that equal weights are the paper's.

A flat spectrum is never that of a fine-tune, so that not even a model merged with itself stays as it is. `spectral:
false` (for the embeddings by a filter, say) averages a matrix like a vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import add_deltas, base_of, normalized_weights, participants, refuse_zero_sum
from evomerge.methods.contract import Block, Method, Settings
from evomerge.methods.shared_parameters import LAMBDA, SHARE, SPECTRAL
from evomerge.methods.spectral import right_vectors, tall, times

if TYPE_CHECKING:
    from torch import Tensor


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ σ̄ U Vᵀ with U Σ Vᵀ = Σ ri δi; of what is no matrix θ0 + λ Σ wi δi / Σ wi."""
    indices, weights = participants(settings)
    parts, scale = normalized_weights("iso_c", weights), float(settings.shared["lambda"])
    base = base_of(block)
    if not settings.shared["spectral"] or base.dim() != 2:
        return add_deltas(block, indices, [scale * part for part in parts], scale)
    total = base.new_zeros(base.shape)  # one delta at a time: a vocabulary's are large
    for i, part in zip(indices, parts, strict=True):
        total.add_((block.sources[i] - base).mul_(len(parts) * part))
    return isotropic(total).mul_(scale).add_(base)


def isotropic(matrix: Tensor) -> Tensor:
    """σ̄ U Vᵀ of U Σ Vᵀ, σ̄ the mean over all min(m, n) singular values (equations 4 and 5 of the paper).

    Directions in which the matrix is zero stay so: an SVD has arbitrary vectors there.
    """
    standing = tall(matrix)
    if standing.numel() == 0:
        return matrix.clone()
    values, vectors = right_vectors(standing)
    mean = values.sum() / standing.shape[1]
    result = times(standing, (vectors * (mean / values)) @ vectors.T)
    return result if standing is matrix else result.T.contiguous()


METHOD = Method(
    name="iso_c",
    paper="Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging, https://arxiv.org/abs/2502.04959",
    summary="Base plus the summed deltas, each matrix with all its singular values replaced by their mean.",
    parameters=(
        SHARE,
        LAMBDA,
        SPECTRAL,
    ),
    merge=merge,
    granularity=lambda settings: "tensor" if settings.shared["spectral"] else "element",
    check=refuse_zero_sum("iso_c"),
)
