"""Model stock: between the base and the average of the models, as near to the average as their angles warrant.

Jang, Yun and Han 2024, "Model stock: all we need is just a few fine-tuned models", https://arxiv.org/abs/2403.19522

Fine-tunes lie on a shell around a better centre; where K deltas stand at the angle θ to each other, the point nearest
to it is t of the way from the base to their average, t = K cos θ / (1 + (K − 1) cos θ) (equation 4 of the paper's
general case). The cosine is the mean over all pairs. Below 0 the deltas have nothing in common and the base stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evomerge.methods.arithmetic import add_deltas, affine, base_of
from evomerge.methods.contract import Block, Granularity, Method, Parameter, Settings
from evomerge.system.arrays import FloatArray

if TYPE_CHECKING:
    from torch import Tensor


def interpolation(count: int, dot: Callable[[int, int], FloatArray]) -> NDArray[np.float32]:
    """t for each entry of the inner products, rounded to float32, in which 1 − t is then exact.

    Args:
        count: How many models, 2 or more.
        dot: Inner products of the deltas of two of them.
    """
    squares = [dot(i, i) for i in range(count)]
    cosines = []
    for i, j in itertools.combinations(range(count), 2):
        norms = np.sqrt(squares[i] * squares[j])  # the exact square where both are one
        cosines.append(np.divide(dot(i, j), norms, out=np.zeros_like(norms), where=norms > 0.0))
    cosine = np.clip(sum(cosines, np.zeros_like(squares[0])) / len(cosines), 0.0, 1.0)
    return (count * cosine / (1.0 + (count - 1) * cosine)).astype(np.float32)


def merge(block: Block, settings: Settings) -> Tensor:
    """t θ̄ + (1 − t) θ0."""
    import torch

    indices = range(len(block.sources))
    count, statistics = len(indices), block.statistics
    if not settings.shared["filter_wise"]:
        t = float(interpolation(count, lambda i, j: np.array(statistics.dot(i, j, "deltas"))))
        return add_deltas(block, indices, [t / count] * count, t)
    t_of_rows = interpolation(count, lambda i, j: statistics.products(i, j, "deltas", "rows").cpu().numpy())
    base = base_of(block)
    t_rows = torch.from_numpy(t_of_rows).to(base.device)  # [rows, vectors, 1]
    vectors = [tensor.reshape(*t_of_rows.shape[:2], -1) for tensor in (base, *block.sources)]
    mean = affine(vectors[1:], [1.0 / count] * count)
    return mean.mul_(t_rows).add_(vectors[0] * (1.0 - t_rows)).reshape(base.shape)


def granularity(settings: Settings) -> Granularity:
    """Sees whole rows under `filter_wise`, where each has its own t."""
    return "row" if settings.shared["filter_wise"] else "element"


METHOD = Method(
    name="model_stock",
    paper="Jang, Yun and Han 2024, Model stock, https://arxiv.org/abs/2403.19522",
    summary="Move from the base towards the average of the models, as far as the angles between their deltas warrant.",
    parameters=(
        Parameter(
            "filter_wise",
            default=False,
            kind="bool",
            help="Angles along the last dimension (of each output row) instead of the whole tensor.",
        ),
    ),
    merge=merge,
    min_sources=2,
    granularity=granularity,
)
