"""Linear combinations of tensors that are exact where the maths is: merging a model with itself changes no bit.

Coefficients are Python floats (float64) that torch rounds once to float32. Every operation here is a single IEEE
operation per element (no fused multiply-add, no library function), so that a tensor cut in blocks anywhere gives the
same bits as the tensor in one piece.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from evomerge.errors import RecipeError
from evomerge.methods.contract import Block, Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SMALLEST_SUM = 1e-6
"""A sum of weights below this fraction of the sum of their magnitudes counts as zero."""

ROUNDING = 1e-12
"""How far from one the sum of coefficients that sum to one may be, for rounding in float64."""

SMALLEST_LENGTH = 1e-30
"""A vector shorter than this part of the longest has no direction: drawn out to their length it leaves float32."""


def participants(settings: Settings) -> tuple[list[int], list[float]]:
    """Returns the sources that take part, those whose weight is not 0: (indices, weights)."""
    weights = settings.column("weight")
    indices = [i for i, weight in enumerate(weights) if weight]
    return indices, [float(weights[i]) for i in indices]


def zero_sum_problem(method: str, weights: Sequence[float]) -> list[str]:
    """Returns a message when a normaliser would divide by zero, else nothing."""
    if abs(math.fsum(weights)) > SMALLEST_SUM * math.fsum(map(abs, weights)):
        return []
    got = ", ".join(f"{weight:g}" for weight in weights) or "none but 0"
    return [f"{method}: the weights sum to zero ({got}) and the merge divides by their sum; change a weight"]


def refuse_zero_sum(method: str, normalize: str | None = None) -> Callable[[Settings], list[str]]:
    """Makes a method's check: weights may not sum to zero, where a parameter says so only under that."""

    def check(settings: Settings) -> list[str]:
        divides = normalize is None or settings.shared[normalize]
        return zero_sum_problem(method, participants(settings)[1]) if divides else []

    return check


def normalized_weights(method: str, weights: Sequence[float]) -> list[float]:
    """Divides weights by their sum.

    Raises:
        RecipeError: They sum to zero.
    """
    if problems := zero_sum_problem(method, weights):
        raise RecipeError(problems)
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def shares(weights: Sequence[float]) -> list[float]:
    """Divides weights by their sum, as `normalize` of a method on deltas does; as they are where they cancel.

    mergekit, too, then divides by one: the weighted sum of deltas still means something.
    """
    return list(weights) if zero_sum_problem("", weights) else normalized_weights("", weights)


def affine(tensors: Sequence[Tensor], coefficients: Sequence[float | Tensor], anchor: int | None = None) -> Tensor:
    """Σ ci xi for coefficients that sum to one, computed as xa + Σ ci (xi − xa) around one of the tensors.

    Where all tensors with a coefficient agree in an element, the result is that element exactly; with one coefficient
    of 1 and the others 0 it is that tensor exactly. The anchor's own coefficient is implied.

    Args:
        tensors: One or more of the same shape.
        coefficients: Python numbers, or tensors that broadcast (then `anchor` is needed).
        anchor: Index of xa; the largest coefficient when None, which also rounds least.
    """
    if anchor is None:
        anchor = max(range(len(tensors)), key=lambda i: abs(float(coefficients[i])))
    pivot = tensors[anchor]
    result = pivot.clone()
    for i, (tensor, coefficient) in enumerate(zip(tensors, coefficients, strict=True)):
        if i == anchor or (isinstance(coefficient, (int, float)) and coefficient == 0):
            continue
        result.add_((tensor - pivot).mul_(coefficient))
    return result


def weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Σ ci xi for any coefficients, added in order; those of 0 are left out."""
    result: Tensor | None = None
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        if coefficient == 0:
            continue
        term = tensor * coefficient
        result = term if result is None else result.add_(term)
    return tensors[0].new_zeros(tensors[0].shape) if result is None else result


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Returns what float32 numbers are added up in: float64; on mps, which has none, float32."""
    import torch

    return torch.float32 if tensor.device.type == "mps" else torch.float64


def base_of(block: Block) -> Tensor:
    """Returns the block's base, for the methods that need one."""
    if block.base is None:
        raise ValueError("this method works on deltas and the block has no base")
    return block.base


def add_deltas(
    block: Block,
    indices: Sequence[int],
    coefficients: Sequence[float | Tensor],
    total: float,
    anchor: int | None = None,
) -> Tensor:
    """θ0 + Σ ci δi, written as (1 − Σ ci) θ0 + Σ ci θi so that Σ ci = 1 never rounds through the base.

    Args:
        block: Where the base and the sources are.
        indices: The sources that take part.
        coefficients: One for each of them.
        total: Σ ci as the maths has it (λ for normalised weights), free of rounding.
        anchor: As for `affine`, where 0 is the base and 1 the first of `indices`.
    """
    tensors = [base_of(block), *(block.sources[i] for i in indices)]
    return affine(tensors, [1.0 - total, *coefficients], anchor)


def add_edited_deltas(block: Block, terms: Iterable[tuple[Tensor, float]]) -> Tensor:
    """θ0 + Σ ci δi, added in order; the deltas are used up."""
    result = base_of(block).clone()
    for delta, factor in terms:
        result.add_(delta.mul_(factor))
    return result


def scaled_weights(settings: Settings) -> list[tuple[int, float]]:
    """Returns (source, λ wi) of the sources that take part, the weights as `shares` under `normalize`."""
    indices, weights = participants(settings)
    parts = shares(weights) if settings.shared["normalize"] else weights
    scale = float(settings.shared["lambda"])
    return [(i, scale * part) for i, part in zip(indices, parts, strict=True)]


def add_whole_deltas(block: Block, settings: Settings, parts: Sequence[tuple[int, float]]) -> Tensor:
    """θ0 + Σ ci δi with the coefficients of `scaled_weights`."""
    scale = float(settings.shared["lambda"])
    weights = participants(settings)[1]
    divided = settings.shared["normalize"] and not zero_sum_problem("", weights)
    total = scale if divided else scale * math.fsum(weights)
    return add_deltas(block, [i for i, _ in parts], [factor for _, factor in parts], total)


def linear_combination(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Σ ci xi; where the coefficients sum to one but for float64 rounding, as exact as `affine`."""
    if snap_to_one(math.fsum(coefficients)) == 1.0:
        return affine(tensors, coefficients)
    return weighted_sum(tensors, coefficients)


def from_origin(block: Block, indices: Sequence[int], coefficients: Sequence[float]) -> Tensor:
    """Σ ci xi, xi the weights of the sources; with a base θ0 + Σ ci δi."""
    if block.base is not None:
        return add_deltas(block, indices, coefficients, snap_to_one(math.fsum(coefficients)))
    if not indices:
        return weighted_sum(block.sources, [0.0] * len(block.sources))
    return linear_combination([block.sources[i] for i in indices], coefficients)


def origin_dot(block: Block, left: int, right: int) -> float:
    """Returns the inner product of two sources of `from_origin`: of their deltas where there is a base."""
    return block.statistics.dot(min(left, right), max(left, right), "weights" if block.base is None else "deltas")


def unit_factors(lengths: Sequence[float]) -> list[float]:
    """Returns the factors that make vectors unit vectors, from their lengths; 0 for those that have no direction."""
    least = SMALLEST_LENGTH * max(lengths, default=0.0)
    return [1.0 / length if length > least else 0.0 for length in lengths]


def snap_to_one(total: float) -> float:
    """Returns a sum of float64 coefficients, free of rounding where the maths has it one."""
    return 1.0 if abs(total - 1.0) <= ROUNDING else total


def as_float32(weight: float) -> float:
    """Returns a number rounded to float32, as a Python number."""
    return float(struct.unpack("f", struct.pack("f", weight))[0])


def apply_update(block: Block, indices: Sequence[int], update: Tensor) -> Tensor:
    """θ0 + update; where the update is exactly a source's delta, exactly that source.

    In float32 θ0 + (θi − θ0) need not be θi: the difference is rounded to the precision of the larger of the two.
    """
    import torch

    base = base_of(block)
    result = base + update
    for i in reversed(indices):
        same = update == block.sources[i] - base
        result = torch.where(same, block.sources[i], result)
    return result
