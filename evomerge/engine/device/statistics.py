"""Statistics of the tensors of a run, found on the device that merges them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.engine.device import random_field
from evomerge.engine.device.reductions import REDUCTIONS, from_zero, values_at
from evomerge.engine.device.sources import NO_ROOM, DeviceSources, Room
from evomerge.engine.statistics.exact_topk import (
    COARSE,
    Histogram,
    Reductions,
    count_magnitudes,
    joint_cutoff,
    last_index,
)
from evomerge.engine.statistics.sce_selection import Selection
from evomerge.engine.statistics.tensor_reader import for_sums
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.methods import della, sce
from evomerge.methods.topk import NONE, cutoff_mask, keep_count
from evomerge.planning.operation import Input


class DeviceStatistics(StatisticsStore):
    """`StatisticsStore` in torch on a device: the same thresholds, ranks and counts; sums up to their rounding.

    Args:
        checkpoints: Open checkpoints by reference.
        device: Where they are found, and where the methods' own functions compute.
        room: What stored tensors, and what methods ask to `remember`, may take.
        block: Elements of a block; None for what suits the device.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        device: torch.device,
        room: Room = NO_ROOM,
        block: int | None = None,
    ) -> None:
        super().__init__(checkpoints, room=room.remembered)
        self.tensors: DeviceSources = DeviceSources(checkpoints, device, room, block)
        self.device = self.tensors.device

    def _reductions(self) -> Reductions:
        return REDUCTIONS

    def _gram(self, base: Input | None, operands: tuple[Input, ...]) -> dict[frozenset[Input], float]:
        pairs = list(itertools.combinations_with_replacement(range(len(operands)), 2))
        sums: dict[frozenset[Input], list[float]] = {frozenset((operands[i], operands[j])): [] for i, j in pairs}
        inputs = operands if base is None else (*operands, base)
        for _, values in self.tensors.floats(inputs):
            wide = [for_sums(v if base is None else v - values[-1]).double() for v in values[: len(operands)]]
            products = torch.stack([(wide[i] * wide[j]).sum() for i, j in pairs]).tolist()
            for partial_sums, product in zip(sums.values(), products, strict=True):
                partial_sums.append(product)
        return {key: math.fsum(partial_sums) for key, partial_sums in sums.items()}

    def _variance(self, base: Input | None, source: Input, width: int) -> Tensor:
        size = self.tensors.flat(source).numel()

        def deltas(step: int | None = None) -> Iterator[Tensor]:
            for _, (values, *origin) in self.tensors.floats([source] if base is None else [source, base], step=step):
                yield for_sums(values - origin[0] if origin else values).double()

        if width < size or size <= self.tensors.block:
            rows = deltas(max(1, self.tensors.block // width) * width)
            variances = [part.view(-1, width).var(dim=1, correction=0).cpu() for part in rows]
            return torch.cat(variances or [torch.empty(0, dtype=torch.float64)])
        mean = math.fsum(float(part.sum()) for part in deltas()) / size
        squares = math.fsum(float(part.sub_(mean).square_().sum()) for part in deltas())
        return torch.tensor([squares / size], dtype=torch.float64)

    def _levels_of(self, magnitudes: Tensor) -> Tensor:
        return della.rank_levels(magnitudes)

    def select(self, base: Input, sources: tuple[Input, ...], fraction: float) -> Selection:
        """See `Statistics.selection`; without marks."""
        if fraction >= 1.0:
            return super().select(base, sources, fraction)

        def deltas() -> Iterator[tuple[int, list[Tensor]]]:
            for start, (origin, *values) in self.tensors.floats((base, *sources)):
                yield start, [value - origin for value in values]

        parts = from_zero(lambda: ((start, sce.element_variance(values)) for start, values in deltas()))

        def count() -> tuple[Histogram, int]:
            varying = sum(int((scores > 0.0).sum()) for _, _, scores in parts())
            return count_magnitudes(parts, COARSE, REDUCTIONS), varying

        histogram, varying = self._once(("device variances", base, sources), count)
        keep = keep_count(varying, fraction)
        if keep == 0:
            return Selection(NONE, [0.0] * len(sources), None)
        largest = joint_cutoff([parts], [histogram], histogram, keep, REDUCTIONS)
        cut = largest.threshold, last_index(parts, largest.bits, largest.stay[0], REDUCTIONS)
        squares: list[list[float]] = [[] for _ in sources]
        for start, values in deltas():
            mask = cutoff_mask(sce.element_variance(values), *cut, start)
            for delta, sums in zip(values, squares, strict=True):
                sums.append(float(for_sums(delta[mask]).double().square_().sum()))
        return Selection(cut, list(map(math.fsum, squares)), None)

    def _overlaps(self, base: Input, sources: tuple[Input, ...], epsilon: float) -> list[tuple[int, int]]:
        counts = [(0, 0)] * len(sources)
        for _, (origin, *values) in self.tensors.floats((base, *sources)):
            moved = [(value - origin).abs_() > epsilon for value in values]
            together = sum((mask.int() for mask in moved[1:]), moved[0].int()) > 1
            counts = [
                (shared + int((mask & together).sum()), alone + int((mask & ~together).sum()))
                for (shared, alone), mask in zip(counts, moved, strict=True)
            ]
        return counts

    def _values_at(
        self, scores: Callable[[], Iterator[tuple[int, Tensor]]], size: int, ranks: Sequence[int]
    ) -> list[float]:
        return values_at(scores, ranks)

    def field(self, key: tuple[int, int], start: int, count: int) -> Tensor:
        """Returns elements start .. start + count of a random field: int32."""
        return random_field.uniform16(key, start, count, self.device)
