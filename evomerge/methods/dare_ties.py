"""DARE-TIES: drop elements of each task vector at random, then elect signs and merge as TIES does.

Yu et al. 2023, https://arxiv.org/abs/2311.03099, with Yadav et al. 2023, https://arxiv.org/abs/2306.01708

Without `drop_rate`, `density` is the probability to keep an element, as in mergekit. With `drop_rate`, `density` is the
trim that follows: of the n elements that the drop leaves, exactly the top floor(density · n) stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evomerge.methods.arithmetic import base_of, participants
from evomerge.methods.contract import Block, Granularity, Method, Settings
from evomerge.methods.dare import PAPER, drop_and_rescale, keep_probability
from evomerge.methods.shared_parameters import DENSITY, DROP_RATE, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, WEIGHT
from evomerge.methods.ties import AVERAGE, CONSENSUS, elect_and_merge
from evomerge.methods.topk import density_mask

if TYPE_CHECKING:
    from torch import Tensor


def merge(block: Block, settings: Settings) -> Tensor:
    """θ0 + λ Σ wi δ̃i [agrees], divided by Σ abs(wi) [agrees] under `normalize`."""
    indices, weights = participants(settings)
    if not indices:
        return base_of(block).clone()
    deltas = [drop_and_trim(block, i, settings) for i in indices]
    return elect_and_merge(block, indices, deltas, weights, settings)


def drop_and_trim(block: Block, source: int, settings: Settings) -> Tensor:
    """δ̃ of one source, trimmed to its top `density` where `drop_rate` is given."""
    own, rescale = settings.sources[source], settings.shared["rescale"]
    chance = keep_probability(own)
    delta = drop_and_rescale(block, source, chance, rescale)
    if not trims_after_drop(own) or chance <= 0.0:
        return delta
    if chance >= 1.0:
        return delta.mul_(density_mask(delta.abs(), own["density"]))
    stays = block.statistics.keep_mask(source, chance).clone()
    stays[stays.clone()] = density_mask(delta.abs()[stays], own["density"])
    return delta.mul_(stays)


def trims_after_drop(source: Mapping[str, Any]) -> bool:
    """Returns whether a source's settings ask for a trim after the drop."""
    return source["drop_rate"] is not None and float(source["density"]) < 1.0


def granularity(settings: Settings) -> Granularity:
    """Sees the whole tensor for a trim after the drop; the rest works by element."""
    return "tensor" if any(trims_after_drop(source) for source in settings.sources) else "element"


METHOD = Method(
    name="dare_ties",
    paper=f"{PAPER}; Yadav et al. 2023, TIES-Merging, https://arxiv.org/abs/2306.01708",
    summary="Drop elements of the deltas at random, elect a sign for each element, add the deltas that agree.",
    parameters=(
        WEIGHT,
        replace(DENSITY, paper=0.1, help="Probability to keep an element; with drop_rate, the trim of what is kept."),
        replace(DROP_RATE, instead_of=None, help="Probability to drop an element; density is then a trim."),
        LAMBDA,
        replace(NORMALIZE, default=False, help="Divide by the sum of the absolute weights."),
        RESCALE,
        CONSENSUS,
        AVERAGE,
        INT8_MASK,
    ),
    merge=merge,
    stochastic=True,
    granularity=granularity,
)
