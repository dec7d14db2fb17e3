"""What a method may ask about one operation's tensors (`Statistics`), answered from those of the whole run."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.engine.statistics.exact_topk import Histogram, Parts
from evomerge.engine.statistics.sce_selection import Selection
from evomerge.engine.statistics.tensor_reader import for_sums
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.methods.contract import Cutoff, Scope
from evomerge.methods.random_field import field_key, keep_threshold
from evomerge.methods.topk import cutoff_mask
from evomerge.planning.operation import Family, FamilyMember, Input

T = TypeVar("T")


def _pick(base: Input | None, sources: tuple[Input, ...], index: int) -> Input:
    if index >= 0:
        return sources[index]
    if base is None:
        raise ValueError("an operation without a base has no base to multiply")
    return base


@dataclass(frozen=True)
class OperationStatistics:
    """`Statistics` of one operation, over the run's `StatisticsStore`; `at` gives those of one of its blocks.

    Attributes:
        store: Where statistics of whole tensors are kept.
        base: The base's tensor.
        sources: The sources' tensors.
        columns: Row length of the tensor: its size over its first dimension, or its size where it is a vector.
        output: Name of the output tensor, which seeds the random field.
        seed: The recipe's seed.
        family: The operation's tensors and its fellows' for `scope: model`: one (base, sources) per tensor, in order.
        shape: Shape of the block.
        start: Flat index of its first element.
        whole: Shape of the tensor.
        inputs_seen: Mean magnitudes of the matrix's inputs, [in]; None where they are not known.
        answers: What of this operation was asked for already.
    """

    store: StatisticsStore
    base: Input | None
    sources: tuple[Input, ...]
    columns: int
    output: str
    seed: int
    family: Family = ()
    shape: tuple[int, ...] = ()
    start: int = 0
    whole: tuple[int, ...] = ()
    inputs_seen: NDArray[np.float32] | None = None
    answers: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Elements of the tensor."""
        return self.store.tensors.flat(self.sources[0]).numel()

    def at(self, start: int, shape: tuple[int, ...]) -> OperationStatistics:
        """Returns the statistics as seen from one block."""
        return replace(self, start=start, shape=shape)

    def trim(self, source: int, density: float, scope: Scope = "tensor") -> Cutoff:
        def find() -> Cutoff:
            if scope == "model":
                return self.store.trim_model(self.family, (self.base, self.sources), source, density)
            return self.store.trim((self.base, self.sources[source]), density)

        return self._asked(("trim", source, density, scope), find)

    def band(self, source: int, density: float, gamma: float) -> tuple[Cutoff, Cutoff]:
        pair = (self.base, self.sources[source])
        return self._asked(("band", source, density, gamma), lambda: self.store.band(pair, density, gamma))

    def masses(self, source: int, kept: Cutoff, outliers: Cutoff) -> tuple[float, float]:
        def find() -> tuple[float, float]:
            whole = inside = 0.0
            for start, (base, model) in self.store.tensors.floats(self.inputs([-1, source])):
                sizes = model.sub(base).abs_()
                stays = cutoff_mask(sizes, *kept, start) & ~cutoff_mask(sizes, *outliers, start)
                whole += float(for_sums(sizes).sum(dtype=torch.float64))
                inside += float(for_sums(sizes[stays]).sum(dtype=torch.float64))
            return whole, inside

        return self._asked(("masses", source, kept, outliers), find)

    def selection(self, fraction: float) -> tuple[Cutoff, list[float]]:
        selection = self._asked(("selection", fraction), lambda: self.marked_selection(fraction))
        return selection.cut, selection.energies

    def marked_selection(self, fraction: float) -> Selection:
        """Returns what `selection` says, and which elements it keeps."""
        base, *sources = self.inputs([-1, *range(len(self.sources))])
        return self.store.select(base, tuple(sources), fraction)

    def _asked(self, key: tuple[Any, ...], find: Callable[[], T]) -> T:
        """The answer to a question of this operation; asked of the store once."""
        if key not in self.answers:
            self.answers[key] = find()
        answer: T = self.answers[key]
        return answer

    def magnitudes(self, source: int) -> Histogram:
        """Returns the magnitudes of a source's delta, counted."""
        return self.store.histogram(self.base, self.sources[source])

    def parts(self, source: int) -> Parts:
        """Returns the bits of a source's delta, part by part."""
        return self.store.tensors.parts((self.base, self.sources[source]))

    def dot(self, left: int, right: int, of: Literal["weights", "deltas"], scope: Scope = "tensor") -> float:
        def one(member: FamilyMember) -> float:
            base, sources = member
            pair = _pick(base, sources, left), _pick(base, sources, right)
            if of == "deltas":
                return self.store.dot(base, *pair, sources)
            return self.store.dot(None, *pair, sources if base is None else (base, *sources))

        if scope == "tensor":
            return one((self.base, self.sources))
        return self.store.dot_model(self.family, (left, right, of), one)

    def products(
        self, left: int, right: int, of: Literal["weights", "deltas"], along: Literal["rows", "columns"]
    ) -> Tensor:
        one, other = (_pick(self.base, self.sources, index) for index in (left, right))
        shape = self.whole if len(self.whole) > 1 else (1, self.size)
        along = along if len(self.whole) > 1 else "rows"
        products = self.store.products(self.base if of == "deltas" else None, one, other, shape, along)
        if along == "columns":
            return products.view(1, -1, 1)
        vectors = math.prod(shape[1:-1])
        return self._rows_here(products.view(-1, vectors, 1))

    def variance(self, source: int, scope: Literal["tensor", "row"] = "tensor") -> Tensor:
        if scope == "tensor":
            return self.store.variance(self.base, self.sources[source], None)
        return self._rows_here(self.store.variance(self.base, self.sources[source], self.columns)).unsqueeze(1)

    def activations(self) -> Tensor:
        if self.inputs_seen is None:
            raise ValueError("there are no activations of this tensor")
        return torch.from_numpy(self.inputs_seen).to(self.store.device)

    def overlaps(self, epsilon: float) -> list[tuple[int, int]]:
        base, *sources = self.inputs([-1, *range(len(self.sources))])
        return self.store.overlaps(base, tuple(sources), epsilon)

    def importance(self, source: int) -> tuple[Tensor, float]:
        base, source_input = self.inputs([-1, source])
        factors, threshold = self.store.importance(base, source_input, max(1, self.columns))
        return self._rows_here(factors).to(self.store.device), threshold

    def _rows_here(self, each: Tensor) -> Tensor:
        first = self.start // self.columns if self.columns else 0
        return each[first : first + self.shape[0]]

    def rank_levels(self, source: int) -> Tensor:
        stop = self.start + math.prod(self.shape)
        levels = self.store.rank_levels(self.base, self.sources[source], max(1, self.columns), self.start, stop)
        return levels.view(self.shape)

    def field(self, source: int) -> Tensor:
        return self.store.field(self.key(source), self.start, math.prod(self.shape)).view(self.shape)

    def remember(self, key: Hashable, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return self.store.remember((key, self.base, self.sources), compute)

    def key(self, source: int) -> tuple[int, int]:
        """Returns the key of a source's random field for this tensor."""
        return field_key(self.seed, self.output, self.sources[source].fingerprint)

    def keep_mask(self, source: int, density: float) -> Tensor:
        return self.field(source) < keep_threshold(density)

    def inputs(self, indices: Sequence[int]) -> tuple[Input, ...]:
        """Returns the tensors of these sources; -1 is the base.

        Raises:
            ValueError: There is no base.
        """
        tensors = tuple(self.base if index < 0 else self.sources[index] for index in indices)
        if any(tensor is None for tensor in tensors):
            raise ValueError("this operation has no base")
        return tuple(tensor for tensor in tensors if tensor is not None)
