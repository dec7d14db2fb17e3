"""The largest of the elements that a random drop leaves, exactly, in one look at the tensor.

The magnitudes before the drop are counted once per run; of a random sample of them the k-th largest is close to where
it was among all. So one look counts what is above a narrow bracket, gathers what is within, and marks what survives,
for the merge to use. Deltas of bfloat16 models take few values, of which one may make up most of the bracket: that
one, the middle, is counted and not gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from evomerge.engine.kernels import dropout as dropping
from evomerge.engine.kernels.jit import TILE
from evomerge.engine.statistics.exact_topk import INFINITY, Floats, Histogram, Parts, bin_of, top
from evomerge.methods.contract import Cut
from evomerge.methods.random_field import LANES
from evomerge.methods.topk import kept_count

_DEVIATIONS = 6.0  # of a sample's threshold
_FEW = 1 << 16  # elements of a bracket that may be gathered, whatever the size of the tensor

Marks = NDArray[np.uint16]
"""A bit for every element of a tensor, the lowest for the first of 16."""


@dataclass(frozen=True)
class Drop:
    """What is dropped at random of a delta.

    Attributes:
        chance: Probability to stay.
        keep: Elements whose number in the random field is below this stay; above 0.
        key: Of that field, uint64 [2].
        factor: What stays is multiplied by this.
    """

    chance: float
    keep: int
    key: NDArray[np.uint64]
    factor: np.float32


def cut_survivors(parts: Parts, population: Histogram, size: int, density: float, drop: Drop, marks: Marks) -> Cut:
    """The cut of the top floor(density · n) of the n numbers that survive.

    Args:
        parts: The delta before the drop.
        population: Its magnitudes.
        size: Its elements, those included that are no number.
        density: Above 0 and below 1.
        drop: What is dropped.
        marks: Filled with what survives.
    """
    bounds = bracket(population, density, drop.chance, drop.factor)
    look = _look(parts, drop, bounds, marks, max(_FEW, size // 4))
    found = None if look is None else look.cut(parts, drop, density, marks)
    return top(partial(_scores, parts, drop, marks), size, density) if found is None else found


def bracket(population: Histogram, density: float, chance: float, factor: np.float32) -> NDArray[np.uint32]:
    """Where the threshold of a random sample of known magnitudes is, but for one in a thousand million samples.

    Args:
        population: The magnitudes that are drawn from.
        density: What is kept of the sample.
        chance: Probability to be drawn.
        factor: What a drawn magnitude is multiplied by, in float32.

    Returns:
        Bits of the smallest magnitude, of one that is likely, and of the largest.
    """
    sample = max(1.0, chance * population.total)
    apart = _DEVIATIONS * math.sqrt(density * (1.0 - density) / sample) + 2.0 / sample
    ranks = (math.ceil((density + apart) * population.total), math.floor((density - apart) * population.total))
    low, middle, high = 0, 0, INFINITY
    if ranks[0] < population.total:
        low = bin_of(population, ranks[0])[0] << population.shift
    if population.total > 0:
        middle = bin_of(population, kept_count(population.total, density))[0] << population.shift
    if ranks[1] > 0:
        high = ((bin_of(population, ranks[1])[0] + 1) << population.shift) - 1
    bounds = np.array([low, middle, min(high, INFINITY)], dtype=np.uint32)
    return (bounds.view(np.float32) * factor).view(np.uint32)


@dataclass(frozen=True)
class _Look:
    """What one look at the survivors found.

    Attributes:
        middle: A magnitude's bits.
        alive: Survivors that are numbers.
        above: Of those, the ones above the bracket.
        equals: For each part how many of the middle magnitude are in each of its tiles.
        places, sizes: The others within the bracket.
    """

    middle: np.uint32
    alive: int
    above: int
    equals: list[NDArray[np.int64]]
    places: NDArray[np.int64]
    sizes: NDArray[np.uint32]

    def cut(self, parts: Parts, drop: Drop, density: float, marks: Marks) -> Cut | None:
        """The cut; None where its threshold is not within the bracket."""
        keep = kept_count(self.alive, density)
        if keep >= self.alive:
            return (-1.0, -1) if keep else (math.inf, -1)
        larger = int((self.sizes > self.middle).sum())
        same = sum(int(each.sum()) for each in self.equals)
        wanted = keep - self.above
        if larger < wanted <= larger + same:
            last = self._find(parts, drop, marks, wanted - larger)
            return float(self.middle.view(np.float32)), last
        wanted -= same if wanted > larger else 0
        if not 0 < wanted <= self.sizes.size:
            return None
        threshold = np.partition(self.sizes, self.sizes.size - wanted)[self.sizes.size - wanted]
        equal = self.places[self.sizes == threshold]
        last = int(equal[wanted - int((self.sizes > threshold).sum()) - 1])
        return float(threshold.view(np.float32)), last

    def _find(self, parts: Parts, drop: Drop, marks: Marks, wanted: int) -> int:
        """Flat index of the `wanted`-th survivor of the middle magnitude."""
        for (start, ours, theirs), equals in zip(parts(), self.equals, strict=True):
            upto = equals.cumsum()
            if wanted > upto[-1]:
                wanted -= int(upto[-1])
                continue
            tile = int(np.searchsorted(upto, wanted))
            wanted -= int(upto[tile] - equals[tile])
            first = tile * TILE
            ours, theirs = ours[first : first + TILE], theirs[first : first + TILE]
            marked = marks[(start + first) // LANES :]
            index = dropping.find_survivor(ours, theirs, drop.factor, marked, int(self.middle), wanted)
            return start + first + int(index)
        raise IndexError(f"{wanted} elements of magnitude {self.middle:#x} are missing: the tensor changed")


def _look(parts: Parts, drop: Drop, bounds: NDArray[np.uint32], marks: Marks, limit: int) -> _Look | None:
    """What one look finds; None where more than `limit` are within the bracket. The marks are filled all the same."""
    places, sizes = np.empty(0, np.int64), np.empty(0, np.uint32)
    gathered: list[tuple[NDArray[np.int64], NDArray[np.uint32]]] = []
    every: list[NDArray[np.int64]] = []
    alive = above = held = 0
    for start, ours, theirs in parts():
        if ours.size > places.size:
            places, sizes = np.empty(ours.size, np.int64), np.empty(ours.size, np.uint32)
        equals = np.empty(-(-ours.size // TILE), np.int64)
        arguments = (drop.keep, drop.key, drop.factor, bounds, marks[start // LANES :], equals, places, sizes)
        numbers, larger, found = dropping.look_at_survivors(ours, theirs, start, *arguments)
        alive, above, held = alive + numbers, above + larger, held + found
        every.append(equals)
        if held <= limit:
            gathered.append((places[:found] + start, sizes[:found].copy()))
    if held > limit or not gathered:
        return None
    every_place, every_size = (np.concatenate(found) for found in zip(*gathered, strict=True))
    return _Look(bounds[1], alive, above, every, every_place, every_size)


def _scores(parts: Parts, drop: Drop, marks: Marks) -> Iterator[tuple[int, Floats]]:
    """The delta after the drop, NaN where it is dropped."""
    for start, ours, theirs in parts():
        out = np.empty(ours.size, dtype=np.float32)
        dropping.survivors(ours, theirs, drop.factor, marks[start // LANES :], out)
        yield start, out
