"""Which elements of a merge may differ between two right programs, and why: for `parity`.

By a hair: where a threshold is met by several elements, or missed by less than rounding, which of them stay is a matter
of taste (here the first ones); where weighted deltas cancel, rounding elects the sign (here the exact sum does). Common
among fine-tunes stored in bfloat16, whose deltas are small multiples of one step.

On purpose: where this engine follows another rule than mergekit.

Both are worked out from the stored tensors, in float64, and from nothing that either program computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import FLOATS
from evomerge.methods.arcee_fusion import divergence, quartile_ranks, relative
from evomerge.methods.arithmetic import participants
from evomerge.methods.contract import Settings
from evomerge.methods.topk import band_counts, cutoff, keep_count
from evomerge.planning.operation import Input, Operation

ROUNDING = 1e-6
"""Of a sum of float32 numbers, in units of the sum of their magnitudes."""

GUARD = 1e-6
"""mergekit's SCE weighs all models alike where their mean squared deltas sum to less."""


class Reasons(NamedTuple):
    """Elements that may differ, each bool [n]."""

    hair: Tensor
    purpose: Tensor


def reasons(operation: Operation, checkpoints: Mapping[str, Checkpoint]) -> Reasons | None:
    """Which elements of an operation's result may differ; None where nothing may."""
    if operation.dtype not in FLOATS:
        size = math.prod(operation.shape)
        return Reasons(torch.zeros(size, dtype=torch.bool), torch.ones(size, dtype=torch.bool))
    find = _METHODS.get(operation.method)
    if find is None or (operation.base is None and operation.method != "karcher"):
        return None

    def read(tensor: Input) -> Tensor:
        return checkpoints[tensor.model].tensor(tensor.tensor).float()

    base = read(operation.base) if operation.base is not None else torch.zeros(())
    return find(base, [read(source) - base for source in operation.sources], operation.settings)


def _elected(deltas: Sequence[Tensor], weights: Sequence[float], at_threshold: Tensor) -> Reasons:
    """The reasons of TIES over deltas that are trimmed but for what is at a threshold."""
    terms = [delta.double() * weight for delta, weight in zip(deltas, weights, strict=True)]
    mass, total = torch.stack(terms).sum(0), torch.stack(terms).abs().sum(0)
    hair = at_threshold | ((mass.abs() <= ROUNDING * total) & (total > 0))
    # mergekit divides by the sum of the weights that agree: another number where one of them is negative.
    negative = [(term * mass > 0) for term, weight in zip(terms, weights, strict=True) if weight < 0]
    return Reasons(hair, torch.stack(negative).any(0) if negative else torch.zeros_like(hair))


def _ties(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Reasons:
    indices, weights = participants(settings)
    kept, hair = [], torch.zeros(base.numel(), dtype=torch.bool)
    for i in indices:
        delta, density = deltas[i].reshape(-1), float(settings.sources[i]["density"])
        if density < 1.0:
            threshold, _ = cutoff(delta.abs(), keep_count(delta.numel(), density))
            hair |= delta.abs() == threshold
            delta = delta * (delta.abs() > threshold)
        kept.append(delta)
    return _elected(kept, weights, hair)


def _crumbs(deltas: Sequence[Tensor], settings: Settings) -> tuple[list[Tensor], Tensor]:
    """The deltas without their largest and smallest elements, and what is at a threshold."""
    kept, hair = [], torch.zeros(deltas[0].numel(), dtype=torch.bool)
    for i in participants(settings)[0]:
        delta, own = deltas[i].reshape(-1), settings.sources[i]
        size = delta.abs()
        outliers, inside = band_counts(delta.numel(), float(own["density"]), float(own["gamma"]))
        above, below = cutoff(size, outliers)[0], cutoff(size, inside)[0]
        hair |= (size == above) | (size == below)
        kept.append(delta * ((size > below) & (size < above)))
    return kept, hair


def _breadcrumbs(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Reasons:
    _, hair = _crumbs(deltas, settings)
    return Reasons(hair, torch.zeros_like(hair))


def _breadcrumbs_ties(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Reasons:
    kept, hair = _crumbs(deltas, settings)
    return _elected(kept, participants(settings)[1], hair)


def _sce(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Reasons:
    wide, fraction = (
        torch.stack([delta.double().reshape(-1) for delta in deltas]),
        float(settings.shared["select_topk"]),
    )
    hair = torch.zeros(base.numel(), dtype=torch.bool)
    if fraction < 1.0:
        spread = wide.var(0, unbiased=False).float()
        kept = keep_count(int(spread.count_nonzero()), fraction)
        threshold, _ = cutoff(spread, kept)
        hair = (spread - threshold).abs() <= 10 * ROUNDING * threshold
        if int((spread >= threshold).sum()) > kept:  # which of the equals stay moves the weights of all models
            hair = torch.ones_like(hair)
        wide = wide * (spread > threshold)
    mass, total = wide.sum(0), wide.abs().sum(0)
    hair |= (mass.abs() <= ROUNDING * total) & (total > 0)
    alike = float(wide.square().mean(1).sum()) < GUARD
    return Reasons(hair, torch.full_like(hair, alike))


def _model_stock(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Reasons:
    shape = deltas[0].shape if settings.shared["filter_wise"] else (1, -1)
    vectors = [delta.double().reshape(shape) for delta in deltas]
    cosines = [
        (a * b).sum(-1, keepdim=True) / (a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)).clamp(min=1e-300)
        for a, b in itertools.combinations(vectors, 2)
    ]
    apart = torch.stack(cosines).mean(0) < 0
    purpose = apart.expand(vectors[0].shape).reshape(-1)
    return Reasons(torch.zeros_like(purpose), purpose)


def _arcee_fusion(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Reasons:
    rows = base.reshape(-1, base.shape[-1])
    delta = deltas[0].reshape(rows.shape)
    scores = (delta.abs().double() * relative(divergence(rows + delta, rows)).double()).reshape(-1)
    ranks = quartile_ranks(scores.numel())
    third, median, first = (float(scores.kthvalue(scores.numel() - rank + 1).values) for rank in sorted(ranks))
    threshold = median + 1.5 * (third - first)
    hair = (scores - threshold).abs() <= 10 * ROUNDING * threshold
    return Reasons(hair, torch.zeros_like(hair))


def _karcher(base: Tensor, tensors: Sequence[Tensor], settings: Settings) -> Reasons:
    weighted = len({own["weight"] for own in settings.sources}) > 1
    size = tensors[0].numel()
    return Reasons(torch.zeros(size, dtype=torch.bool), torch.full((size,), weighted))


_METHODS: Mapping[str, Callable[[Tensor, Sequence[Tensor], Settings], Reasons]] = {
    "ties": _ties,
    "breadcrumbs": _breadcrumbs,
    "breadcrumbs_ties": _breadcrumbs_ties,
    "sce": _sce,
    "model_stock": _model_stock,
    "arcee_fusion": _arcee_fusion,
    "karcher": _karcher,
}
