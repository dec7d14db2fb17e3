"""NuSLERP: SLERP by weights, over whole tensors or over each of their rows or columns.

Shoemake 1985, "Animating rotation with quaternion curves", https://doi.org/10.1145/325165.325242, in the form that
mergekit calls nuslerp: t is the second model's share of the weights, and where there is a base the deltas are
interpolated and added to it. More than two models fold in listed order with t = wk / Σj≤k wj, as in `slerp`.

Unlike `slerp`, near-parallel vectors are interpolated along their arc too: in float64 its coefficients are exact down
to angles of a millionth. What has no arc (zeros, parallel) or no one arc (nearly antipodal) is interpolated along the
chord.

What vectors there are:

- ``nuslerp_flatten: true``: one, the flattened tensor.
- ``nuslerp_flatten: false``: those along the last dimension; with ``nuslerp_row_wise`` those along the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from evomerge.errors import RecipeError
from evomerge.methods.arithmetic import ROUNDING, from_origin, origin_dot, participants, zero_sum_problem
from evomerge.methods.contract import Block, Granularity, Method, Parameter, Settings, Statistics
from evomerge.methods.shared_parameters import WEIGHT
from evomerge.methods.slerp import PARALLEL
from evomerge.system.arrays import FloatArray

if TYPE_CHECKING:
    from torch import Tensor


SAME = 1.0 - 1e-12
"""Above this cosine the arc is the chord: the angle is lost in the rounding of the cosine."""

BASE = -1


def merge(block: Block, settings: Settings) -> Tensor:
    """sin((1−t)Ω)/sinΩ · a + sin(tΩ)/sinΩ · b for every vector, folded over the sources."""
    if problems := check(settings):
        raise RecipeError(problems)
    if not settings.shared["nuslerp_flatten"]:
        return merge_vectors(block, vector_terms(block.statistics, block.base is not None, settings))
    indices, weights = participants(settings)
    gram = [[np.array(origin_dot(block, i, j)) for j in indices] for i in indices]
    return from_origin(block, indices, [float(c) for c in folded(gram, steps_of(weights))])


def steps_of(weights: Sequence[float]) -> list[float]:
    """t of each fold."""
    sums = np.cumsum(weights)
    return [float(weight / total) for weight, total in zip(weights[1:], sums[1:], strict=True)]


def folded(gram: Sequence[Sequence[FloatArray]], steps: Sequence[float]) -> list[FloatArray]:
    """Coefficients of the operands, folded in order, for any number of vectors at once.

    Args:
        gram: Inner products of two operands, one for each vector: K x K arrays of one shape.
        steps: t of each fold, K − 1 of them.
    """
    coefficients = [np.ones_like(gram[0][0])]
    for k, t in enumerate(steps, start=1):
        aa, ab = np.zeros_like(gram[0][0]), np.zeros_like(gram[0][0])
        for i, x in enumerate(coefficients):
            ab += x * gram[i][k]
            for j, y in enumerate(coefficients):
                aa += x * y * gram[i][j]
        of_a, of_b = arcs(aa, ab, gram[k][k], t)
        coefficients = [x * of_a for x in coefficients] + [of_b]
    return coefficients


def arcs(aa: FloatArray, ab: FloatArray, bb: FloatArray, t: float) -> tuple[FloatArray, FloatArray]:
    """Coefficients of a and b at t, from their inner products."""
    size = np.sqrt(np.maximum(aa, 0.0)) * np.sqrt(bb)
    cosine = np.divide(ab, size, out=np.ones_like(size), where=size > 0)
    curved = (cosine >= -PARALLEL) & (cosine <= SAME)
    angle = np.arccos(np.where(curved, cosine, 0.0))
    of_a, of_b = np.sin((1.0 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    return np.where(curved, of_a, 1.0 - t), np.where(curved, of_b, t)


@dataclass(frozen=True)
class VectorTerms:
    """A sum around a pivot, with coefficients of its own for every vector.

    Attributes:
        pivot: Index of the source xa.
        of_pivot: Its coefficient, where the sum is of xa and of differences to it.
        others: (index of a source or −1 for the base, coefficient of xi − xa).
        along: What the vectors are, as in `Statistics.products`; the coefficients have the shape that it gives.
    """

    pivot: int
    of_pivot: FloatArray
    others: tuple[tuple[int, FloatArray], ...]
    along: Literal["rows", "columns"]


def vector_terms(statistics: Statistics, based: bool, settings: Settings) -> VectorTerms:
    """Returns what `merge_vectors` adds up, for the vectors of a block.

    Args:
        statistics: Those of the block.
        based: Whether there is a base, whose deltas are interpolated.
        settings: Weights of which no sum is zero.
    """
    indices, weights = participants(settings)
    along: Literal["rows", "columns"] = "columns" if settings.shared["nuslerp_row_wise"] else "rows"
    of: Literal["weights", "deltas"] = "deltas" if based else "weights"

    def products(i: int, j: int) -> FloatArray:
        return statistics.products(min(i, j), max(i, j), of, along).cpu().numpy()

    gram = [[products(i, j) for j in indices] for i in indices]
    coefficients = folded(gram, steps_of(weights))
    total = sum(coefficients, np.zeros_like(coefficients[0]))
    total = np.where(np.abs(total - 1.0) <= ROUNDING, 1.0, total)
    pivot = int(np.argmax(np.abs(weights)))
    others = [(i, c) for k, (i, c) in enumerate(zip(indices, coefficients, strict=True)) if k != pivot]
    if not based:
        return VectorTerms(indices[pivot], total, tuple(others), along)
    return VectorTerms(indices[pivot], np.ones_like(total), ((BASE, 1.0 - total), *others), along)


def merge_vectors(block: Block, terms: VectorTerms) -> Tensor:
    """ca xa + Σ ci (xi − xa): exactly xa where all are equal and ca is one."""
    pivot = block.sources[terms.pivot]
    count = terms.of_pivot.shape[1]
    shape = (pivot.shape[0], count, pivot.shape[1] // max(1, count))

    def vectors(index: int) -> Tensor:
        tensor = block.base if index == BASE else block.sources[index]
        assert tensor is not None
        return tensor.view(shape)

    def single(coefficients: FloatArray) -> Tensor:
        return pivot.new_tensor(coefficients.astype(np.float32))

    result = vectors(terms.pivot) * single(terms.of_pivot)
    for index, coefficients in terms.others:
        result.add_((vectors(index) - vectors(terms.pivot)).mul_(single(coefficients)))
    return result.view(pivot.shape)


def granularity(settings: Settings) -> Granularity:
    """Rows, where a row or a column has an angle of its own."""
    return "element" if settings.shared["nuslerp_flatten"] else "row"


def check(settings: Settings) -> list[str]:
    """Refuses weights of which those up to some model sum to zero: that model has no share of them."""
    weights = participants(settings)[1]
    for count in range(min(2, len(weights)), len(weights) + 1):
        if problems := zero_sum_problem("nuslerp", weights[:count]):
            return problems
    return []


METHOD = Method(
    name="nuslerp",
    paper="Shoemake 1985, Animating rotation with quaternion curves, https://doi.org/10.1145/325165.325242",
    summary="Interpolate along the arc by weights, over whole tensors or their rows or columns.",
    parameters=(
        replace(WEIGHT, only_ratios=True),
        Parameter("nuslerp_flatten", default=True, kind="bool", help="One angle for the whole tensor."),
        Parameter(
            "nuslerp_row_wise",
            default=False,
            kind="bool",
            help="Without nuslerp_flatten: an angle for each vector along the first dimension, not along the last.",
        ),
    ),
    merge=merge,
    needs_base=False,
    takes_base=True,
    granularity=granularity,
    order_matters=True,
    check=check,
)
