"""Whole-tensor statistics for methods that see one block at a time, computed once per run.

A trim threshold for any density comes from a histogram of the magnitudes kept per (source, tensor); see `selection`.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.engine.statistics.exact_topk import (
    COARSE,
    FINE,
    Histogram,
    JointCutoff,
    Reductions,
    compiled,
    count_magnitudes,
    joint_cutoff,
    last_index,
    merge_histograms,
    values_at,
)
from evomerge.engine.statistics.row_ranks import SEGMENT, LruCache, row_rank_levels
from evomerge.engine.statistics.sce_selection import (
    Levels,
    Selection,
    VarianceCounts,
    count_variances,
    select,
    variance_levels,
)
from evomerge.engine.statistics.tensor_reader import SCAN, Pair, TensorReader, for_sums
from evomerge.methods import arcee_fusion
from evomerge.methods.contract import Cutoff
from evomerge.methods.random_field import uniform16
from evomerge.methods.topk import band_counts, keep_count
from evomerge.planning.operation import Family, FamilyMember, Input

_RANK_SEGMENTS = 32  # segments of ranks: for the chunks that follow
_FAMILIES = 16  # models whose tensors are trimmed together


@dataclass(frozen=True, eq=False)
class JointDeltas:
    """The deltas of one source over a whole model, whose largest elements are sought together.

    Attributes:
        pairs: In the model's order.
        places: Where the first of equal members of the family is.
        whole: The magnitudes of all, counted.
    """

    pairs: tuple[Pair, ...]
    positions: Mapping[FamilyMember, int]
    whole: Histogram


@dataclass
class _Once:
    """A value that the first to ask for computes while the others wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    done: bool = False
    value: Any = None


class StatisticsStore:
    """Statistics of the tensors of a set of checkpoints; what was computed once is kept.

    Args:
        checkpoints: Open checkpoints by reference.
        thresholds: How many exact trim thresholds to remember.
        room: Bytes for what methods ask to `remember`; none for a merge that is done once.
    """

    device: torch.device | None = None
    """Where the methods' own functions compute; None for memory, where compiled kernels stand in for some of them."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], thresholds: int = 1 << 14, room: int = 0) -> None:
        self.tensors = TensorReader(checkpoints)
        self._kept: dict[Hashable, _Once] = {}
        self._families: OrderedDict[Family, int] = OrderedDict()
        self._family: tuple[Family, int] = ((), -1)
        self._numbers = itertools.count(1)
        self._thresholds: OrderedDict[Hashable, _Once] = OrderedDict()
        self._limit = thresholds
        self._remembered: dict[Hashable, tuple[Tensor, ...]] = {}
        self._room = room
        self._latest = LruCache(_RANK_SEGMENTS)
        self._lock = threading.Lock()

    def _once(self, key: Hashable, compute: Callable[[], Any], limit: int | None = None) -> Any:
        """A statistic; computed by the first who asks, while those who ask for the same one wait."""
        with self._lock:
            if limit is None:
                entry = self._kept.setdefault(key, _Once())
            else:
                entry = self._thresholds.setdefault(key, _Once())
                self._thresholds.move_to_end(key)
                if len(self._thresholds) > limit:
                    self._thresholds.popitem(last=False)
        with entry.lock:
            if not entry.done:
                entry.value, entry.done = compute(), True
        return entry.value

    def remember(self, key: Hashable, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Returns what `compute` gave for this key, kept while there is room.

        What was kept first stays: candidates ask for the same tensors in turn, and whichever of them replaced others
        would be gone itself before it is asked for again.
        """
        with self._lock:
            if key in self._remembered:
                return self._remembered[key]
        value = compute()
        size = sum(tensor.nbytes for tensor in value)
        with self._lock:
            if key not in self._remembered and size <= self._room:
                self._remembered[key] = value
                self._room -= size
        return value

    def histogram(self, base: Input | None, source: Input) -> Histogram:
        """Magnitudes of the delta, counted by their upper bits."""

        def compute() -> Histogram:
            stored = [self.tensors.flat(tensor).dtype for tensor in (base, source) if tensor is not None]
            return count_magnitudes(
                self.tensors.parts((base, source)),
                FINE if all(d.itemsize == 2 for d in stored) else COARSE,
                self._reductions(),
            )

        return self._once(("histogram", base, source), compute)  # type: ignore[no-any-return]

    def trim(self, pair: Pair, density: float) -> Cutoff:
        """Returns the threshold and last index (see `Statistics.trim`) of one delta."""
        if density <= 0:
            return math.inf, -1
        whole = self.histogram(*pair)
        return self._largest(pair, (pair,), 0, keep_count(whole.total, density), whole)

    def trim_model(self, family: Family, member: FamilyMember, source: int, density: float) -> Cutoff:
        """Returns the same over all deltas of a source, for one tensor of the family."""
        if density <= 0:
            return math.inf, -1
        key = ("joint", self._number(family), source)
        joint: JointDeltas = self._once(key, lambda: self._joint_deltas(family, source), self._limit)
        keep = keep_count(joint.whole.total, density)
        return self._largest(joint, joint.pairs, joint.positions[member], keep, joint.whole)

    def _joint_deltas(self, family: Family, source: int) -> JointDeltas:
        pairs = tuple((base, sources[source]) for base, sources in family)
        positions: dict[FamilyMember, int] = {}
        for position, member in enumerate(family):
            positions.setdefault(member, position)
        return JointDeltas(pairs, positions, merge_histograms([self.histogram(*pair) for pair in pairs]))

    def _number(self, family: Family) -> int:
        """Stands for a family in the keys of statistics, which are looked up for each of its tensors."""
        with self._lock:
            last, number = self._family
            if last is not family:
                number = self._families.pop(family, 0) or next(self._numbers)
                self._families[family] = number
                if len(self._families) > _FAMILIES:
                    self._families.popitem(last=False)
                self._family = family, number
            return number

    def band(self, pair: Pair, density: float, gamma: float) -> tuple[Cutoff, Cutoff]:
        """See `Statistics.band`."""
        whole = self.histogram(*pair)
        counts = band_counts(whole.total, density, gamma)
        outliers, inside = (self._largest(pair, (pair,), 0, n, whole) for n in counts)
        return outliers, inside

    def _largest(self, name: Hashable, pairs: tuple[Pair, ...], here: int, keep: int, whole: Histogram) -> Cutoff:
        """What keeps the `keep` largest of all, whose magnitudes are counted; `name` stands for the pairs."""
        if keep <= 0:
            return math.inf, -1
        if keep >= whole.total:
            return -1.0, -1
        cutoff: JointCutoff = self._once(
            ("cut", name, keep), lambda: self._joint_cutoff(pairs, whole, keep), self._limit
        )
        pair, bits, stay = pairs[here], cutoff.bits, cutoff.stay[here]
        last = self._once(
            ("last", pair, bits, stay),
            lambda: last_index(self.tensors.parts(pair), bits, stay, self._reductions()),
            self._limit,
        )
        return cutoff.threshold, last

    def _joint_cutoff(self, pairs: tuple[Pair, ...], whole: Histogram, keep: int) -> JointCutoff:
        return joint_cutoff(
            [self.tensors.parts(pair) for pair in pairs],
            [self.histogram(*pair) for pair in pairs],
            whole,
            keep,
            self._reductions(),
        )

    def _reductions(self) -> Reductions:
        """What counts magnitudes."""
        return compiled()

    def dot(self, base: Input | None, left: Input, right: Input, others: Sequence[Input] = ()) -> float:
        """Returns the inner product of two tensors, or of their deltas where `base` is given; float64.

        Args:
            base, left, right: The tensors.
            others: Tensors whose products will be asked for too: all are found in one reading.
        """
        operands = tuple(sorted({left, right, *others}, key=str))
        products: dict[frozenset[Input], float] = self._once(
            ("gram", base, operands), lambda: self._gram(base, operands)
        )
        return products[frozenset((left, right))]

    def dot_model(self, family: Family, name: Hashable, one: Callable[[FamilyMember], float]) -> float:
        """Returns a sum of inner products over a family; `name` says of which."""
        key = ("dot", self._number(family), name)
        return self._once(key, lambda: math.fsum(map(one, family)), self._limit)  # type: ignore[no-any-return]

    def _gram(self, base: Input | None, operands: tuple[Input, ...]) -> dict[frozenset[Input], float]:
        from evomerge.engine.kernels import reductions

        pairs = list(itertools.combinations(range(len(operands)), 2)) or [(0, 0)]
        sums = np.zeros((len(pairs), 3, reductions.PARTIAL))
        for _, (base_bits, *source_bits) in self.tensors.bits(base, *operands):
            for (i, j), partial_sums in zip(pairs, sums, strict=True):
                reductions.add_gram(base_bits, source_bits[i], source_bits[j], base is not None, partial_sums)
        products: dict[frozenset[Input], float] = {}
        for (i, j), partial_sums in zip(pairs, sums, strict=True):
            one, other = operands[i], operands[j]
            keys = (frozenset((one,)), frozenset((one, other)), frozenset((other,)))
            products |= {
                key: math.fsum(row) for key, row in zip(keys, partial_sums, strict=True) if key not in products
            }
        return products

    def products(
        self, base: Input | None, left: Input, right: Input, shape: tuple[int, ...], along: Literal["rows", "columns"]
    ) -> Tensor:
        """Returns the inner products of two tensors (of their deltas where `base` is given) by vector, flat float64.

        Args:
            base, left, right: The tensors.
            shape: Theirs.
            along: As in `Statistics.products`.
        """

        def compute() -> Tensor:
            columns, length = math.prod(shape[1:]), shape[-1]
            products = torch.zeros(columns if along == "columns" else math.prod(shape[:-1]), dtype=torch.float64)
            step = max(1, columns, self.tensors.block // max(1, columns) * columns)
            inputs = [left, right] if base is None else [left, right, base]
            for start, (one, other, *origin) in self.tensors.floats(inputs, step=step):
                a, b = (for_sums(values if base is None else values - origin[0]).double() for values in (one, other))
                if along == "columns":
                    products += (a * b).view(-1, columns).sum(0).cpu()
                else:
                    products[start // length : (start + one.numel()) // length] = (a * b).view(-1, length).sum(1).cpu()
            return products

        key = ("products", base, *sorted((left, right), key=str), along)
        return self._once(key, compute)  # type: ignore[no-any-return]

    def variance(self, base: Input | None, source: Input, columns: int | None) -> Tensor:
        """Returns the population variance of a delta: [1], or [rows] with `columns` given; float64."""

        def compute() -> Tensor:
            width = columns or self.tensors.flat(source).numel()
            return torch.zeros(1, dtype=torch.float64) if width == 0 else self._variance(base, source, width)

        return self._once(("variance", base, source, columns), compute)  # type: ignore[no-any-return]

    def _variance(self, base: Input | None, source: Input, width: int) -> Tensor:
        from evomerge.engine.kernels import reductions

        size = self.tensors.flat(source).numel()
        means, squares = np.zeros(size // width), np.zeros(size // width)
        for start, (base_bits, source_bits) in self.tensors.bits(base, source):
            reductions.add_moments(base_bits, source_bits, start, width, means, squares)
        return torch.from_numpy(squares / width)

    def rank_levels(self, base: Input | None, source: Input, columns: int, start: int, stop: int) -> Tensor:
        """See `Statistics.rank_levels`, of elements start..stop: uint8, flat."""
        step = max(1, SEGMENT // columns) * columns
        segments = []
        for first in range(start // step * step, stop, step):
            segment = self._segment(base, source, columns, first, first + step)
            segments.append(segment[max(start - first, 0) : stop - first])
        return segments[0] if len(segments) == 1 else torch.cat(segments or [torch.empty(0, dtype=torch.uint8)])

    def _segment(self, base: Input | None, source: Input, columns: int, start: int, stop: int) -> Tensor:
        """The levels of whole rows."""

        def compute() -> tuple[Tensor]:
            delta = self.tensors.at_hand(self.tensors.flat(source)[start:stop]).float()
            if base is not None:
                delta = delta - self.tensors.at_hand(self.tensors.flat(base)[start:stop]).float()
            return (self._levels_of(delta.abs().view(-1, columns)).reshape(-1),)

        key = ("levels", base, source, columns, start)
        return self._latest.get(key, lambda: self.remember(key, compute)[0])

    def _levels_of(self, magnitudes: Tensor) -> Tensor:
        return torch.from_numpy(row_rank_levels(magnitudes.numpy()))

    def select(self, base: Input, sources: tuple[Input, ...], fraction: float) -> Selection:
        """See `Statistics.selection`; with a fraction of 1 without marks."""
        if fraction >= 1.0:
            return Selection((-1.0, -1), [self.dot(base, source, source, sources) for source in sources], None)
        rows = partial(self.tensors.rows, (base, *sources))
        variances: VarianceCounts = self._once(
            ("variances", base, sources), lambda: count_variances(rows, len(sources))
        )

        def levels() -> Levels:
            key = ("variance levels", base, sources)
            return self.remember(key, lambda: (torch.from_numpy(variance_levels(rows, variances)),))[0].numpy()

        def gather(start: int, indices: NDArray[np.int32]) -> NDArray[np.float32]:
            at = torch.from_numpy(indices)
            last = start + int(indices[-1]) + 1
            read = [self.tensors.flat(tensor)[start:last].index_select(0, at).float() for tensor in (base, *sources)]
            return torch.stack(read).numpy()

        return select(variances, levels, gather, fraction)

    def overlaps(self, base: Input, sources: tuple[Input, ...], epsilon: float) -> list[tuple[int, int]]:
        """See `Statistics.overlaps`."""
        key = ("overlaps", base, sources, epsilon)
        return self._once(key, lambda: self._overlaps(base, sources, epsilon), self._limit)  # type: ignore[no-any-return]

    def _overlaps(self, base: Input, sources: tuple[Input, ...], epsilon: float) -> list[tuple[int, int]]:
        from evomerge.engine.kernels import reductions

        counts = np.zeros((2, len(sources)), np.int64)
        for _, rows in self.tensors.rows((base, *sources)):
            reductions.count_overlaps(rows[0], rows[1:], np.float32(epsilon), counts)
        return [(int(shared), int(alone)) for shared, alone in counts.T]

    def importance(self, base: Input, source: Input, columns: int) -> tuple[Tensor, float]:
        """See `Statistics.importance`, of all rows."""
        step = max(1, SCAN // columns) * columns
        size = self.tensors.flat(source).numel()

        def rows() -> Iterator[tuple[int, Tensor, Tensor]]:
            for start, (source_part, base_part) in self.tensors.floats([source, base], step=step):
                yield start, source_part.view(-1, columns), base_part.view(-1, columns)

        def compute() -> tuple[Tensor, float]:
            divergences = (arcee_fusion.divergence(for_sums(one), for_sums(other)) for _, one, other in rows())
            factors = arcee_fusion.relative(torch.cat(list(divergences))).to(self.device)

            def scores() -> Iterator[tuple[int, Tensor]]:
                for start, source_rows, base_rows in rows():
                    first = start // columns
                    here = factors[first : first + source_rows.shape[0]]
                    yield start, source_rows.sub(base_rows).abs_().mul_(here).reshape(-1)

            return factors, arcee_fusion.threshold(self._values_at(scores, size, arcee_fusion.quartile_ranks(size)))

        return self._once(("importance", base, source, columns), compute)  # type: ignore[no-any-return]

    def _values_at(
        self, scores: Callable[[], Iterator[tuple[int, Tensor]]], size: int, ranks: Sequence[int]
    ) -> list[float]:
        """Finds the scores at these ranks, from the largest (1) down."""
        return values_at(lambda: ((start, values.numpy()) for start, values in scores()), size, ranks)

    def field(self, key: tuple[int, int], start: int, count: int) -> Tensor:
        """Returns elements start .. start + count of a random field: int32."""
        return torch.from_numpy(uniform16(key, start, count).astype(np.int32))
