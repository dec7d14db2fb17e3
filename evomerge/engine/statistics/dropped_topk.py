"""The largest of the elements that a random drop leaves, exactly, in one pass over the tensor.

The magnitudes before the drop are counted once per run; of a random sample of them the k-th largest is close to where
it was among all. So one pass counts what is above a narrow bracket, gathers what is within, and marks what is kept,
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

from evomerge.engine.kernels import dropout
from evomerge.engine.kernels.jit import TILE
from evomerge.engine.statistics.exact_topk import INFINITY, Floats, Histogram, Parts, bin_of, density_cutoff
from evomerge.methods.contract import Cutoff
from evomerge.methods.random_field import LANES
from evomerge.methods.topk import keep_count

_DEVIATIONS = 6.0  # of a sample's threshold
_FEW = 1 << 16  # elements of a bracket that may be gathered, whatever the size of the tensor

Marks = NDArray[np.uint16]
"""A bit for every element of a tensor, the lowest for the first of 16."""


@dataclass(frozen=True)
class Dropout:
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


def dropped_topk_cutoff(
    parts: Parts, population: Histogram, size: int, density: float, drop: Dropout, marks: Marks
) -> Cutoff:
    """Returns the cutoff of the top floor(density · n) of the n numbers that are kept.

    Args:
        parts: The delta before the drop.
        population: Its magnitudes.
        size: Its elements, those included that are no number.
        density: Above 0 and below 1.
        drop: What is dropped.
        marks: Filled with what is kept.
    """
    bounds = bracket(population, density, drop.chance, drop.factor)
    scan = _scan(parts, drop, bounds, marks, max(_FEW, size // 4))
    cutoff = None if scan is None else scan.cut(parts, drop, density, marks)
    return density_cutoff(partial(_scores, parts, drop, marks), size, density) if cutoff is None else cutoff


def bracket(population: Histogram, density: float, chance: float, factor: np.float32) -> NDArray[np.uint32]:
    """Finds where the threshold of a random sample of known magnitudes is, but for one in a thousand million samples.

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
        middle = bin_of(population, keep_count(population.total, density))[0] << population.shift
    if ranks[1] > 0:
        high = ((bin_of(population, ranks[1])[0] + 1) << population.shift) - 1
    bounds = np.array([low, middle, min(high, INFINITY)], dtype=np.uint32)
    return (bounds.view(np.float32) * factor).view(np.uint32)


@dataclass(frozen=True)
class _Scan:
    """What one pass over the kept elements counts.

    Attributes:
        middle: A magnitude's bits.
        alive: Kept elements that are numbers.
        above: Of those, the ones above the bracket.
        equals: For each part how many of the middle magnitude are in each of its tiles.
        places, sizes: The others within the bracket.
    """

    middle: np.uint32
    alive: int
    above: int
    equals: list[NDArray[np.int64]]
    indices: NDArray[np.int64]
    sizes: NDArray[np.uint32]

    def cut(self, parts: Parts, drop: Dropout, density: float, marks: Marks) -> Cutoff | None:
        """Returns the cut; None where its threshold is not within the bracket."""
        keep = keep_count(self.alive, density)
        if keep >= self.alive:
            return (-1.0, -1) if keep else (math.inf, -1)
        larger = int((self.sizes > self.middle).sum())
        same = sum(int(each.sum()) for each in self.equals)
        rank = keep - self.above
        if larger < rank <= larger + same:
            last = self._find(parts, drop, marks, rank - larger)
            return float(self.middle.view(np.float32)), last
        rank -= same if rank > larger else 0
        if not 0 < rank <= self.sizes.size:
            return None
        threshold = np.partition(self.sizes, self.sizes.size - rank)[self.sizes.size - rank]
        equal = self.indices[self.sizes == threshold]
        last = int(equal[rank - int((self.sizes > threshold).sum()) - 1])
        return float(threshold.view(np.float32)), last

    def _find(self, parts: Parts, drop: Dropout, marks: Marks, rank: int) -> int:
        """Flat index of the `rank`-th kept element of the middle magnitude."""
        for (start, base_bits, source_bits), equals in zip(parts(), self.equals, strict=True):
            upto = equals.cumsum()
            if rank > upto[-1]:
                rank -= int(upto[-1])
                continue
            tile = int(np.searchsorted(upto, rank))
            rank -= int(upto[tile] - equals[tile])
            first = tile * TILE
            base_bits, source_bits = base_bits[first : first + TILE], source_bits[first : first + TILE]
            marked = marks[(start + first) // LANES :]
            index = dropout.find_kept(base_bits, source_bits, drop.factor, marked, int(self.middle), rank)
            return start + first + int(index)
        raise IndexError(f"{rank} elements of magnitude {self.middle:#x} are missing: the tensor changed")


def _scan(parts: Parts, drop: Dropout, bounds: NDArray[np.uint32], marks: Marks, limit: int) -> _Scan | None:
    """What one pass counts; None where more than `limit` are within the bracket. The marks are filled all the same."""
    indices, sizes = np.empty(0, np.int64), np.empty(0, np.uint32)
    gathered: list[tuple[NDArray[np.int64], NDArray[np.uint32]]] = []
    every: list[NDArray[np.int64]] = []
    alive = above = near_total = 0
    for start, base_bits, source_bits in parts():
        if base_bits.size > indices.size:
            indices, sizes = np.empty(base_bits.size, np.int64), np.empty(base_bits.size, np.uint32)
        equals = np.empty(-(-base_bits.size // TILE), np.int64)
        arguments = (drop.keep, drop.key, drop.factor, bounds, marks[start // LANES :], equals, indices, sizes)
        numbers, larger, near = dropout.mark_kept(base_bits, source_bits, start, *arguments)
        alive, above, near_total = alive + numbers, above + larger, near_total + near
        every.append(equals)
        if near_total <= limit:
            gathered.append((indices[:near] + start, sizes[:near].copy()))
    if near_total > limit or not gathered:
        return None
    near_indices, near_sizes = (np.concatenate(near) for near in zip(*gathered, strict=True))
    return _Scan(bounds[1], alive, above, every, near_indices, near_sizes)


def _scores(parts: Parts, drop: Dropout, marks: Marks) -> Iterator[tuple[int, Floats]]:
    """The delta after the drop, NaN where it is dropped."""
    for start, base_bits, source_bits in parts():
        out = np.empty(base_bits.size, dtype=np.float32)
        dropout.delta_after_drop(base_bits, source_bits, drop.factor, marks[start // LANES :], out)
        yield start, out
