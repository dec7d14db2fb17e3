"""SLERP: interpolate along the arc between the flattened tensors instead of the chord.

Shoemake 1985, "Animating rotation with quaternion curves", https://doi.org/10.1145/325165.325242

Which models, and what they are interpolated by:

- ``t``: the base model (t = 0) and the one source (t = 1), as in mergekit. On deltas with two sources, the first (t =
  0) and the second (t = 1). Where ``t`` is given, weights are not looked at.
- ``weight``: the sources, folded in listed order with t = wk / Σj≤k wj. On weights no base is needed, and a base that
  the recipe lists among its models is a source like the others.
- ``on: deltas``: the sources' deltas take the place of the weights, and the base is added at the end; the base is
  needed.

A SLERP of SLERPs is a linear combination of the sources, with coefficients that need their inner products only. So
the angle of every fold is known before the first element is read, and the merge works by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evomerge.errors import RecipeError
from evomerge.methods.arithmetic import add_deltas, affine, base_of, participants, weighted_sum
from evomerge.methods.contract import Block, Method, Parameter, Settings
from evomerge.methods.shared_parameters import SCOPE, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

PARALLEL = 0.9995
"""Above this cosine (of either sign) the arc is replaced by the chord: sin Ω is too small to divide by."""

BASE = -1
"""Index of the base among the operands, as in `Statistics.dot`."""


def arc(aa: float, ab: float, bb: float, t: float, *, zero_has_angle: bool = False) -> tuple[float, float, bool]:
    """Coefficients of a and b at t, from their inner products: (of a, of b, whether they are the chord's).

    Args:
        aa, ab, bb: The inner products.
        t: The way from a (0) to b (1), or beyond.
        zero_has_angle: A tensor of zeros beside one that is none is taken as orthogonal to it, as in mergekit, and not
            as being without an arc.
    """
    if zero_has_angle and (aa > 0.0) != (bb > 0.0):
        return math.sin((1.0 - t) * math.pi / 2), math.sin(t * math.pi / 2), False
    if aa > 0.0 and bb > 0.0:
        cosine = ab / (math.sqrt(aa) * math.sqrt(bb))
        if abs(cosine) <= PARALLEL:
            angle = math.acos(cosine)
            return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle), False
    return 1.0 - t, t, True


def fold(
    count: int, steps: Sequence[float], dot: Callable[[int, int], float], *, zero_has_angle: bool = False
) -> tuple[list[float], bool]:
    """Coefficients of operands folded in order.

    Args:
        count: Number of operands.
        steps: t of each fold, count − 1 of them.
        dot: Inner product of two operands, by position.
        zero_has_angle: As for `arc`.

    Returns:
        The coefficient of each operand, and whether every fold was a chord (then they sum to one).
    """
    coefficients, chords = [1.0], True
    for k, t in enumerate(steps, start=1):
        aa = sum(x * y * dot(i, j) for i, x in enumerate(coefficients) for j, y in enumerate(coefficients))
        ab = sum(x * dot(i, k) for i, x in enumerate(coefficients))
        of_a, of_b, chord = arc(aa, ab, dot(k, k), t, zero_has_angle=zero_has_angle)
        coefficients = [x * of_a for x in coefficients] + [of_b]
        chords = chords and chord
    return coefficients[:count], chords


def operands(settings: Settings) -> tuple[list[int], list[float]]:
    """(indices of what is folded, t of each fold)."""
    t = settings.shared["t"]
    if t is not None:
        return ([BASE, 0] if len(settings.sources) == 1 else [0, 1]), [float(t)]
    indices, weights = participants(settings)
    return indices, [weights[k] / math.fsum(weights[: k + 1]) for k in range(1, len(weights))]


def merge(block: Block, settings: Settings) -> Tensor:
    """sin((1−t)Ω)/sinΩ · a + sin(tΩ)/sinΩ · b, folded over the operands."""
    if problems := check(settings):
        raise RecipeError(problems)
    indices, steps = operands(settings)
    on, scope = settings.shared["on"], settings.shared["scope"]

    def dot(i: int, j: int) -> float:
        left, right = indices[i], indices[j]
        if on == "deltas" and BASE in (left, right):
            return 0.0
        return block.statistics.dot(min(left, right), max(left, right), on, scope)

    coefficients, chords = fold(len(indices), steps, dot, zero_has_angle=on == "weights")
    if on == "deltas":
        moved = [(i, c) for i, c in zip(indices, coefficients, strict=True) if i != BASE]
        total = 1.0 if chords and BASE not in indices else math.fsum(c for _, c in moved)
        return add_deltas(block, [i for i, _ in moved], [c for _, c in moved], total)
    tensors = [base_of(block) if i == BASE else block.sources[i] for i in indices]
    return affine(tensors, coefficients) if chords else weighted_sum(tensors, coefficients)


def check(settings: Settings) -> list[str]:
    """Refuses too many models for `t`, and weights that are missing or all 0 without it."""
    count, on = len(settings.sources), settings.shared["on"]
    if settings.shared["t"] is not None:
        if count == 1 or (count == 2 and on == "deltas"):
            return []
        return [
            f"slerp: t interpolates between base_model and one other model, got {count} others; use weight for more"
        ]
    weights = settings.column("weight")
    if any(weight is None for weight in weights):
        return ["slerp: give t (base_model and one other model), or a weight for every model"]
    if not any(weights):
        return ["slerp: the weights sum to zero, so no model is left to interpolate; change a weight"]
    return []


def needs_base(shared: Mapping[str, Any]) -> bool:
    """Returns whether a base is needed: it is an operand of `t`, and the origin of the deltas."""
    return shared.get("t") is not None or shared.get("on") == "deltas"


METHOD = Method(
    name="slerp",
    paper="Shoemake 1985, Animating rotation with quaternion curves, https://doi.org/10.1145/325165.325242",
    summary="Interpolate along the arc between two models, or fold several.",
    parameters=(
        Parameter(
            "t",
            gene=(0.0, 1.0),
            gene_sources=1,
            instead_of="weight",
            help="Way from base_model (0) to the other model (1); beyond them it goes on along the arc.",
        ),
        replace(
            WEIGHT, required=False, low=0.0, only_ratios=True, help="Share of the source in its fold; 0 takes no part."
        ),
        Parameter(
            "on",
            default="weights",
            kind="choice",
            choices=("weights", "deltas"),
            paper="deltas",
            help="Interpolate the weights, or the deltas that are then added to the base.",
        ),
        SCOPE,
    ),
    merge=merge,
    needs_base=False,
    needs_base_when=needs_base,
    order_matters=True,
    check=check,
)
