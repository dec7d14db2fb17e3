"""Draws fewer items for the same comparison: those that tell candidates apart more often, counting for less.

A few models that are scored on every item (the parents and the other baselines) say where models differ.
Items are put into strata by that, each stratum gets its share of the draw (Neyman, 1934,
https://doi.org/10.2307/2342192, with a floor), and every drawn item stands for N_h / n_h items of its stratum (Horvitz
and Thompson, 1952, https://doi.org/10.1080/01621459.1952.10483446): the weighted mean is an unbiased estimate of the
mean over all items, whatever these models say. They decide only how precise it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.evaluation.scores import ItemScores
from evomerge.system.arrays import FloatArray, IntArray
from evomerge.system.hashing import digest_bytes

STRATA = 4
FLOOR = 1 / 3
"""The part of the draw that is shared evenly, so that no stratum's items count for more than 1 / (FLOOR · fraction)."""


@dataclass(frozen=True)
class Sample:
    """Some of a task's items, and what they stand for.

    Attributes:
        items: The drawn items' ids, in the order of the whole.
        weights: For each, the number of items that it stands for.
        strata: For each stratum, from the items that differ least: (all its items, those drawn).
    """

    items: tuple[str, ...]
    weights: tuple[float, ...]
    strata: tuple[tuple[int, int], ...]

    @property
    def effective(self) -> float:
        """Kish's effective sample size: how many items of equal weight would be as uneven as none."""
        weights = np.array(self.weights)
        return float(weights.sum() ** 2 / (weights**2).sum())

    def to_json(self) -> dict[str, Any]:
        """Returns the sample as JSON."""
        return {
            "items": list(self.items),
            "weights": list(self.weights),
            "strata": [list(pair) for pair in self.strata],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """Reads what `to_json` wrote."""
        strata = tuple((int(size), int(count)) for size, count in data["strata"])
        return cls(tuple(data["items"]), tuple(map(float, data["weights"])), strata)


def draw_samples(
    baselines: Sequence[Mapping[str, ItemScores]], metrics: Mapping[str, str], fraction: float, seed: int
) -> dict[str, Sample]:
    """Draws the items of every task that are scored from now on.

    Args:
        baselines: Scores of a few models on all items.
        metrics: Task to the metric by which they are compared. A task whose metric is no mean or ratio of items
            is left out: its items cannot be weighted.
        fraction: The part of each task's items to draw.
        seed: Another seed gives another draw.
    """
    samples = {}
    for task, metric in metrics.items():
        parts = [scores[task] for scores in baselines]
        if all(part.is_itemwise(metric) for part in parts):
            key = digest_bytes(f"{seed}\0{task}", size=8)
            generator = np.random.default_rng(int.from_bytes(key))
            samples[task] = draw(parts[0].items, item_spread(parts, metric), fraction, generator)
    return samples


def item_spread(models: Sequence[ItemScores], metric: str) -> FloatArray:
    """Estimates how much candidates may differ on each item, [n]; 0 for an item without a value.

    Of a share (all values in [0, 1]) with mean m over the models it is sqrt(m (1 - m)): large where the models disagree
    and where they all waver. Of any other metric it is the models' standard deviation.
    """
    values = np.array([model.values(metric) for model in models])
    scored = np.isfinite(values).all(axis=0)
    values = np.where(scored, values, 0.0)
    mean = values.mean(axis=0)
    share = bool(((values >= 0) & (values <= 1)).all())
    spread: FloatArray = np.sqrt(mean * (1 - mean)) if share else values.std(axis=0)
    return np.where(scored, spread, 0.0)


def draw(items: Sequence[str], spread: FloatArray, fraction: float, generator: np.random.Generator) -> Sample:
    """Draws a part of the items, more of those on which models differ.

    Args:
        items: Item ids.
        spread: How much models differ on each, [n].
        fraction: The part of the items to draw, in (0, 1].
        generator: Decides within a stratum.
    """
    shuffled = generator.permutation(len(items))
    order = shuffled[np.argsort(spread[shuffled], kind="stable")]  # equal spreads in random order
    strata = [part for part in np.array_split(order, min(STRATA, len(items))) if len(part)]
    sizes = np.array([len(part) for part in strata])
    spreads = np.array([float(np.sqrt(np.mean(spread[part] ** 2))) for part in strata])
    counts = allocate(sizes, spreads, max(1, round(fraction * len(items))))
    chosen: dict[int, float] = {}
    for part, count in zip(strata, counts, strict=True):
        picked = generator.choice(part, size=count, replace=False)
        chosen |= {int(k): len(part) / count for k in picked}
    kept = sorted(chosen)
    return Sample(
        tuple(items[k] for k in kept),
        tuple(chosen[k] for k in kept),
        tuple((int(size), int(count)) for size, count in zip(sizes, counts, strict=True)),
    )


def allocate(sizes: IntArray, spreads: FloatArray, total: int) -> IntArray:
    """Allocates the draw to strata: in proportion to size times spread, over a floor; at least one item, at most all.

    Args:
        sizes: Items of each stratum.
        spreads: Their spread.
        total: Items to draw; at least one per stratum is drawn even where that is more.
    """
    neyman = sizes * spreads
    even = sizes / sizes.sum()
    share = FLOOR * even + (1 - FLOOR) * (neyman / neyman.sum() if neyman.sum() > 0 else even)
    counts = np.ones_like(sizes)
    for _ in range(max(0, min(total, int(sizes.sum())) - len(sizes))):
        short = np.where(counts < sizes, share * total - counts, -np.inf)
        counts[int(np.argmax(short))] += 1
    return counts
