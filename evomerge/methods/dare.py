"""DARE: drop elements of each task vector at random and rescale the rest, then add them up.

Yu et al. 2023, "Language models are super Mario", https://arxiv.org/abs/2311.03099

`dare` divides by the sum of the weights; `dare_linear` is the same without, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evomerge.methods.arithmetic import (
    add_edited_deltas,
    add_whole_deltas,
    base_of,
    scaled_weights,
)
from evomerge.methods.contract import Block, Method, Settings
from evomerge.methods.random_field import keep_threshold
from evomerge.methods.shared_parameters import DENSITY, DROP_RATE, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "Yu et al. 2023, Language models are super Mario, https://arxiv.org/abs/2311.03099"


def keep_probability(source: Mapping[str, Any]) -> float:
    """1 − drop_rate where that is given, else the density; 0 where the field is too coarse to keep anything."""
    drop_rate = source["drop_rate"]
    probability = float(source["density"]) if drop_rate is None else 1.0 - float(drop_rate)
    return probability if keep_threshold(probability) > 0 else 0.0


def drop_and_rescale(block: Block, source: int, probability: float, rescale: bool) -> Tensor:
    """δ̃ (equation 1 of the paper): the delta with elements kept at `probability`, and divided by it under `rescale`."""
    delta = block.sources[source] - base_of(block)
    if probability >= 1.0:
        return delta
    if probability <= 0.0:
        return delta.zero_()
    delta.mul_(block.statistics.keep_mask(source, probability))
    return delta.mul_(1.0 / probability) if rescale else delta


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ wi δ̃i, the weights divided by their sum under `normalize`."""
    parts = terms(settings)
    if all(chance >= 1.0 for _, _, chance in parts):
        return add_whole_deltas(block, settings, [(i, factor) for i, factor, _ in parts])
    return add_edited_deltas(
        block,
        ((drop_and_rescale(block, i, chance, rescale=False), factor) for i, factor, chance in parts if chance > 0.0),
    )


def terms(settings: Settings) -> list[tuple[int, float, float]]:
    """(source, factor of what is kept of its delta, probability to keep) of the sources that take part."""
    rescale = settings.shared["rescale"]
    triples = []
    for i, factor in scaled_weights(settings):
        chance = keep_probability(settings.sources[i])
        triples.append((i, factor / chance if rescale and chance > 0.0 else factor, chance))
    return triples


METHOD = Method(
    name="dare",
    paper=PAPER,
    summary="Drop elements of the deltas at random, rescale the rest, average.",
    parameters=(
        WEIGHT,
        replace(DENSITY, paper=0.1, help="Probability to keep an element of a delta."),
        DROP_RATE,
        LAMBDA,
        NORMALIZE,
        RESCALE,
        INT8_MASK,
    ),
    merge=merge,
    stochastic=True,
)

LINEAR = replace(
    METHOD,
    name="dare_linear",
    summary="Drop elements of the deltas at random, rescale the rest, add up.",
    parameters=tuple(replace(p, default=False) if p.name == "normalize" else p for p in METHOD.parameters),
)
