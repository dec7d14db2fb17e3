"""Whole-tensor facts for methods that see one block at a time, computed once per run.

A trim threshold for any density comes from a histogram of the magnitudes kept per (source, tensor); see `selection`.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.engine.operation import Input
from evomerge.engine.selection import COARSE, FINE, Bits, Cut, Histogram, Parts, count, cut, last_index
from evomerge.methods.declaration import Scope
from evomerge.methods.random_field import field_key, kept_elements
from evomerge.methods.trim import kept_count

CHUNK = 1 << 15  # elements: float32 temporaries of this size stay in a processor's second-level cache
_LOOK = 1 << 20  # elements that are only looked at
_READ_AT_ONCE = 64  # tensors; those of an adapter cost a matrix product each

Pair = tuple[Input | None, Input]
Members = tuple[tuple[Input | None, tuple[Input, ...]], ...]


def chunks(count: int, step: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Ranges that cover 0..count in steps."""
    for start in range(0, count, step):
        yield start, min(count, start + step)


@dataclass
class _Once:
    """A value that the first to ask for computes while the others wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    done: bool = False
    value: Any = None


class FactStore:
    """Facts about the tensors of a set of checkpoints; what was computed once is kept.

    Args:
        checkpoints: Open checkpoints by reference.
        thresholds: How many exact trim thresholds to remember.
    """

    def __init__(self, checkpoints: Mapping[str, Checkpoint], thresholds: int = 1 << 14) -> None:
        self._checkpoints = checkpoints
        self._kept: dict[Hashable, _Once] = {}
        self._read: OrderedDict[Input, Tensor] = OrderedDict()
        self._thresholds: OrderedDict[Hashable, _Once] = OrderedDict()
        self._limit = thresholds
        self._lock = threading.Lock()

    def flat(self, tensor: Input) -> Tensor:
        """The stored tensor, flat: a view of the memory map; with an adapter, computed and kept for a while."""
        with self._lock:
            if tensor in self._read:
                self._read.move_to_end(tensor)
                return self._read[tensor]
        value = self._checkpoints[tensor.model].tensor(tensor.tensor).reshape(-1)
        with self._lock:
            self._read[tensor] = value
            if len(self._read) > _READ_AT_ONCE:
                self._read.popitem(last=False)
        return value

    def _once(self, key: Hashable, compute: Callable[[], Any], limit: int | None = None) -> Any:
        """The value of a fact; computed by the first who asks, while those who ask for the same one wait."""
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

    def _bits(self, *tensors: Input | None) -> Iterator[tuple[int, list[Bits]]]:
        """(start, bits of each tensor, zeros where it is None) over flat tensors, in pieces and one dtype."""
        stored = [None if tensor is None else self.flat(tensor) for tensor in tensors]
        held = [value for value in stored if value is not None]
        dtype, size = held[0].dtype, held[0].numel()
        direct = dtype in (torch.bfloat16, torch.float32) and all(value.dtype == dtype for value in held)
        for start, stop in chunks(size, _LOOK if direct else CHUNK):
            parts = [torch.zeros(stop - start, dtype=dtype) if value is None else value[start:stop] for value in stored]
            yield start, [_bits_of(part if direct else part.float()) for part in parts]

    def _parts(self, pair: Pair) -> Parts:
        def parts() -> Iterator[tuple[int, Bits, Bits]]:
            for start, (ours, theirs) in self._bits(*pair):
                yield start, ours, theirs

        return parts

    def rows(
        self, tensors: Sequence[Input], start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(flat index of the first column, float32 [tensors, columns]) over elements start..stop, chunk by chunk.

        The array is the same one every time.
        """
        stored = [self.flat(tensor)[start:stop] for tensor in tensors]
        size = stored[0].numel()
        stage = torch.empty(len(stored) * min(CHUNK, size))
        for first, last in chunks(size):
            held = stage[: len(stored) * (last - first)].view(len(stored), last - first)
            for row, tensor in zip(held, stored, strict=True):
                row.copy_(tensor[first:last])
            yield start + first, held.numpy()

    def histogram(self, base: Input | None, source: Input) -> Histogram:
        """Magnitudes of the delta, counted by their upper bits."""

        def compute() -> Histogram:
            stored = [self.flat(tensor).dtype for tensor in (base, source) if tensor is not None]
            return count(self._parts((base, source)), FINE if all(d.itemsize == 2 for d in stored) else COARSE)

        return self._once(("histogram", base, source), compute)  # type: ignore[no-any-return]

    def trim(self, pairs: tuple[Pair, ...], here: int, density: float) -> tuple[float, int]:
        """Threshold and last index (see `Facts.trim`) over the concatenation of `pairs`, for the tensor `here`."""
        if density <= 0:
            return math.inf, -1
        found: Cut | None = self._once(("cut", pairs, density), lambda: self._cut(pairs, density), self._limit)
        if found is None:
            return -1.0, -1
        pair, bits, stay = pairs[here], found.bits, found.stay[here]
        last = self._once(("last", pair, bits, stay), lambda: last_index(self._parts(pair), bits, stay), self._limit)
        return found.threshold, last

    def _cut(self, pairs: tuple[Pair, ...], density: float) -> Cut | None:
        """None where everything stays."""
        histograms = [self.histogram(*pair) for pair in pairs]
        total = sum(h.total for h in histograms)
        keep = kept_count(total, density)
        return cut([self._parts(pair) for pair in pairs], histograms, keep) if keep < total else None

    def dot(self, base: Input | None, left: Input, right: Input) -> float:
        """Inner product of two tensors, or of their deltas where `base` is given; float64."""

        def compute() -> float:
            from evomerge.engine.kernels import looking

            sums = np.zeros(looking.PARTIAL)
            for _, (ours, one, other) in self._bits(base, left, right):
                looking.add_products(ours, one, other, sums)
            return math.fsum(sums)

        return self._once(("dot", base, *sorted((left, right), key=str)), compute)  # type: ignore[no-any-return]

    def variance(self, base: Input | None, source: Input, columns: int | None) -> Tensor:
        """Population variance of a delta: [1], or [rows] with `columns` given; float64."""

        def compute() -> Tensor:
            from evomerge.engine.kernels import looking

            size = self.flat(source).numel()
            width = columns or size
            if width == 0:
                return torch.zeros(1, dtype=torch.float64)
            means, squares = np.zeros(size // width), np.zeros(size // width)
            for start, (ours, theirs) in self._bits(base, source):
                looking.add_moments(ours, theirs, start, width, means, squares)
            return torch.from_numpy(squares / width)

        return self._once(("variance", base, source, columns), compute)  # type: ignore[no-any-return]


def _bits_of(tensor: Tensor) -> Bits:
    """The bits of bfloat16 or float32 elements, in place where they lie on even addresses."""
    bits = tensor.view(torch.uint16 if tensor.dtype == torch.bfloat16 else torch.uint32).numpy()
    return bits if bits.flags.aligned else bits.copy()


@dataclass(frozen=True)
class OperationFacts:
    """`Facts` of one operation, over the run's `FactStore`; `at` gives those of one of its blocks.

    Attributes:
        store: Where whole-tensor facts are kept.
        base: The base's tensor.
        sources: The sources' tensors.
        columns: Row length of the tensor (its size over its first dimension).
        output: Name of the output tensor, which seeds the random field.
        seed: The recipe's seed.
        family: The operation's tensors and its fellows' for `scope: model`: one (base, sources) per tensor, in order.
        shape: Shape of the block.
        start: Flat index of its first element.
        cuts: The trims of this operation that were asked for already.
    """

    store: FactStore
    base: Input | None
    sources: tuple[Input, ...]
    columns: int
    output: str
    seed: int
    family: Members = ()
    shape: tuple[int, ...] = ()
    start: int = 0
    cuts: dict[tuple[int, float, Scope], tuple[float, int]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Elements of the tensor."""
        return self.store.flat(self.sources[0]).numel()

    def at(self, start: int, shape: tuple[int, ...]) -> OperationFacts:
        """The facts as seen from one block."""
        return replace(self, start=start, shape=shape)

    def _members(self, scope: Scope) -> Members:
        return self.family if scope == "model" else ((self.base, self.sources),)

    def trim(self, source: int, density: float, scope: Scope = "tensor") -> tuple[float, int]:
        key = (source, density, scope)
        if key not in self.cuts:
            members = self._members(scope)
            here = members.index((self.base, self.sources))
            pairs = tuple((base, sources[source]) for base, sources in members)
            self.cuts[key] = self.store.trim(pairs, here, density)
        return self.cuts[key]

    def magnitudes(self, source: int) -> Histogram:
        """The magnitudes of a source's delta, counted."""
        return self.store.histogram(self.base, self.sources[source])

    def dot(self, left: int, right: int, of: Literal["weights", "deltas"], scope: Scope = "tensor") -> float:
        def pick(base: Input | None, sources: tuple[Input, ...], index: int) -> Input:
            if index >= 0:
                return sources[index]
            if base is None:
                raise ValueError("an operation without a base has no base to multiply")
            return base

        return math.fsum(
            self.store.dot(base if of == "deltas" else None, pick(base, sources, left), pick(base, sources, right))
            for base, sources in self._members(scope)
        )

    def variance(self, source: int, scope: Literal["tensor", "row"] = "tensor") -> Tensor:
        if scope == "tensor":
            return self.store.variance(self.base, self.sources[source], None)
        rows = self.store.variance(self.base, self.sources[source], self.columns)
        first = self.start // self.columns if self.columns else 0
        return rows[first : first + self.shape[0]].unsqueeze(1)

    def key(self, source: int) -> tuple[int, int]:
        """The key of a source's random field for this tensor."""
        return field_key(self.seed, self.output, self.sources[source].fingerprint)

    def keep(self, source: int, density: float) -> Tensor:
        mask = kept_elements(self.key(source), self.start, math.prod(self.shape), density)
        return torch.from_numpy(mask).view(self.shape)

    def inputs(self, indices: Sequence[int]) -> tuple[Input, ...]:
        """The tensors of these sources; -1 is the base.

        Raises:
            ValueError: There is no base.
        """
        found = tuple(self.base if index < 0 else self.sources[index] for index in indices)
        if any(tensor is None for tensor in found):
            raise ValueError("this operation has no base")
        return tuple(tensor for tensor in found if tensor is not None)
