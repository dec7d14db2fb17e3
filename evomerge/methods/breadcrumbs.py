"""Model breadcrumbs: of each task vector leave out the smallest elements and the few largest, then add them up.

Davari and Belilovsky 2023, "Model Breadcrumbs: scaling multi-task model merging with sparse masks",
https://arxiv.org/abs/2312.06795

`breadcrumbs_ties` elects signs and merges as TIES does. As in mergekit, `density` is what is kept and `gamma` what is
left out of the largest (the paper's β and γ are percentiles: density = γ − β, gamma = 1 − γ).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from evomerge.methods.arithmetic import (
    add_edited_deltas,
    add_whole_deltas,
    base_of,
    participants,
    scaled_weights,
)
from evomerge.methods.contract import Block, Method, Parameter, Settings
from evomerge.methods.shared_parameters import DENSITY, INT8_MASK, LAMBDA, NORMALIZE, RESCALE_TO_MASS, WEIGHT
from evomerge.methods.ties import AVERAGE, CONSENSUS, elect_and_merge
from evomerge.methods.topk import cutoff_mask, mass_factor, trim

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "Davari and Belilovsky 2023, Model Breadcrumbs, https://arxiv.org/abs/2312.06795"

GAMMA = Parameter(
    "gamma",
    default=0.01,
    per_source=True,
    low=0.0,
    high=1.0,
    gene=(0.0, 0.05),
    paper=0.006,
    idle_at=("density", 1.0),
    help="Fraction of each delta that is left out as outliers, the largest magnitudes.",
)


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ wi δ̂i, the weights divided by their sum under `normalize`."""
    parts = scaled_weights(settings)
    if all(settings.sources[i]["density"] >= 1.0 for i, _ in parts):
        return add_whole_deltas(block, settings, parts)
    return add_edited_deltas(block, ((sparse_delta(block, i, settings), factor) for i, factor in parts))


def sparse_delta(block: Block, source: int, settings: Settings) -> Tensor:
    """δ̂: the delta of one source with its smallest and its largest elements set to 0."""
    delta = block.sources[source] - base_of(block)
    own = settings.sources[source]
    if own["density"] >= 1.0:
        return delta
    outliers, rest = block.statistics.band(source, float(own["density"]), float(own["gamma"]))
    delta = trim(delta, *rest, block.start)
    delta.masked_fill_(cutoff_mask(delta.abs(), *outliers, block.start), 0.0)
    if settings.shared["rescale"]:
        delta.mul_(mass_factor(block.statistics.masses(source, rest, outliers)))
    return delta


def merge_ties(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ wi δ̂i [agrees], divided by Σ abs(wi) [agrees] under `normalize`."""
    indices, weights = participants(settings)
    if not indices:
        return base_of(block).clone()
    return elect_and_merge(block, indices, [sparse_delta(block, i, settings) for i in indices], weights, settings)


METHOD = Method(
    name="breadcrumbs",
    paper=PAPER,
    summary="Leave out the smallest and the few largest elements of the deltas, add up the rest.",
    parameters=(
        WEIGHT,
        replace(DENSITY, paper=0.144, help="Fraction of each delta that is kept."),
        GAMMA,
        replace(LAMBDA, paper=0.3),
        replace(NORMALIZE, default=False),
        RESCALE_TO_MASS,
        INT8_MASK,
    ),
    merge=merge,
)

TIES = replace(
    METHOD,
    name="breadcrumbs_ties",
    paper=f"{PAPER}; Yadav et al. 2023, TIES-Merging, https://arxiv.org/abs/2306.01708",
    summary="Leave out the smallest and the few largest elements of the deltas, then elect signs and merge as ties.",
    parameters=(
        *METHOD.parameters[:4],
        replace(NORMALIZE, default=False, help="Divide by the sum of the absolute weights."),
        CONSENSUS,
        AVERAGE,
        RESCALE_TO_MASS,
        INT8_MASK,
    ),
    merge=merge_ties,
)
