"""TSV-Merge: the leading singular vectors of every task, decorrelated, side by side.

Gargiulo et al. 2024, "Task Singular Vectors: Reducing Task Interference in Model Merging",
https://arxiv.org/abs/2412.00081

Of each of K deltas Ui Σi Viᵀ the top 1/K of the singular vectors is kept. All Ui side by side, and all Vi, are replaced
by the orthonormal vectors nearest to them (orthogonal Procrustes), which takes the tasks' interference away; the merge
is λ U⊥ Σ V⊥ᵀ. What is no matrix is averaged. The paper's tasks have no weights: here they are relative (wi over their
mean) and scale Σi, so that equal weights are the paper's, and the vectors depend on the tensors alone.

Deltas that are equal are one task, at the mean of their weights: side by side with itself, a task has no nearest
orthonormal vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import add_deltas, base_of, normalized_weights, participants, refuse_zero_sum
from evomerge.methods.contract import Block, Method, Settings
from evomerge.methods.shared_parameters import LAMBDA, SHARE, SPECTRAL
from evomerge.methods.spectral import orthogonal, right_vectors, tall, times

if TYPE_CHECKING:
    from torch import Tensor


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ ri U⊥i Σi V⊥iᵀ; of what is no matrix θ0 + λ Σ wi δi / Σ wi."""
    import torch

    indices, weights = participants(settings)
    parts, scale = normalized_weights("tsv_merge", weights), float(settings.shared["lambda"])
    base = base_of(block)
    if not settings.shared["spectral"] or base.dim() != 2 or base.numel() == 0:
        return add_deltas(block, indices, [scale * part for part in parts], scale)
    tasks = distinct(block, indices)
    relative = [len(parts) * sum(parts[k] for k in task) / len(task) for task in tasks]
    leaders = tuple(indices[task[0]] for task in tasks)
    if len(tasks) == 1:
        return add_deltas(block, leaders, [scale * relative[0]], scale * relative[0])
    left, right, values, owner = block.statistics.remember(
        ("tsv_merge", leaders), lambda: task_vectors((tall(block.sources[i] - base) for i in leaders), len(leaders))
    )
    factor = torch.tensor(relative, dtype=torch.float64, device=base.device).mul_(scale)[owner]
    update = (left * (values * factor).to(left.dtype)) @ right.T
    return (update if base.shape[0] >= base.shape[1] else update.T).add(base)


def distinct(block: Block, indices: Sequence[int]) -> list[list[int]]:
    """Positions in `indices`, those of equal deltas together."""

    def dot(i: int, j: int) -> float:
        return block.statistics.dot(min(i, j), max(i, j), "deltas")

    groups: list[list[int]] = []
    for position, i in enumerate(indices):
        for group in groups:
            j = indices[group[0]]
            if dot(i, i) == dot(i, j) == dot(j, j):  # then abs(δi − δj)² is zero
                group.append(position)
                break
        else:
            groups.append([position])
    return groups


def task_vectors(deltas: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the decorrelated singular vectors of K deltas (section 4.2 of the paper, algorithm 1).

    Args:
        deltas: float32 [m, n], m at least n; each is used once, so that they need not be held together.
        count: K.

    Returns:
        (U⊥ float32 [m, r], V⊥ float32 [n, r], singular values float64 [r], number of the delta int64 [r]).
    """
    import torch

    lefts, rights, values, owner = [], [], [], []
    for number, delta in enumerate(deltas):
        keep = max(1, delta.shape[1] // count)
        sigma, vectors = right_vectors(delta)
        sigma, vectors = sigma[:keep], vectors[:, :keep]
        lefts.append(times(delta, vectors / sigma))
        rights.append(vectors.to(delta.dtype))
        values.append(sigma)
        owner.append(torch.full((len(sigma),), number, device=delta.device))
    return orthogonal(torch.cat(lefts, 1)), orthogonal(torch.cat(rights, 1)), torch.cat(values), torch.cat(owner)


METHOD = Method(
    name="tsv_merge",
    paper="Gargiulo et al. 2024, Task Singular Vectors, https://arxiv.org/abs/2412.00081",
    summary="Base plus the leading singular vectors of every delta, decorrelated, side by side.",
    parameters=(
        SHARE,
        LAMBDA,
        SPECTRAL,
    ),
    merge=merge,
    granularity=lambda settings: "tensor" if settings.shared["spectral"] else "element",
    check=refuse_zero_sum("tsv_merge"),
)
