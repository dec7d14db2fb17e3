"""Stored tensors of a run, for computing on a device: where each of them lies, and how it gets there.

While a budget lasts they are kept on the device. The others wait in pinned memory, while there is room, else in the
files' memory map, and are copied for the operation whose turn is next while the present one computes. What is too large
to be there whole comes block by block, in the same way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.engine.device.copier import Arrival, Copier, ahead, streams_of
from evomerge.engine.statistics.exact_topk import Parts
from evomerge.engine.statistics.tensor_reader import CHUNK, Pair, TensorReader, spans
from evomerge.planning.operation import Input

BLOCK = 1 << 24  # elements that are computed with at once: 64 MB in float32
_MOST_AHEAD = 1 << 30  # bytes of one operation's tensors that are copied whole
_MOST_REMEMBERED = 1 << 30  # bytes


@dataclass(frozen=True)
class Room:
    """What stored tensors may take.

    Attributes:
        kept: Bytes of the device for those that stay there for the run.
        ahead: Bytes of the device for the tensors of one operation; twice that, for the next one's.
        pinned: Bytes of memory that may be pinned.
        remembered: Bytes, where methods compute, for what they keep for the next candidate: singular vectors, ranks.
    """

    kept: int = 0
    ahead: int = 0
    pinned: int = 0
    remembered: int = 0

    @classmethod
    def within(cls, budget: int, stored: int, pinned: int) -> Room:
        """Divides a budget of the device's: nothing comes and goes where all of `stored` bytes can stay."""
        remembered = min(_MOST_REMEMBERED, budget // 8)
        if stored <= budget - remembered:
            return cls(kept=stored, remembered=remembered)
        most = min(_MOST_AHEAD, budget // 4)
        return cls(budget - remembered - 2 * most, most, pinned, remembered)


NO_ROOM = Room()


class DeviceSources(TensorReader):
    """Reads the tensors of a set of checkpoints on a device.

    Args:
        checkpoints: Open checkpoints by reference.
        device: Where they are computed with.
        room: What they may take there, and of pinned memory.
        block: Elements of a block; None for what suits the device.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        device: torch.device,
        room: Room = NO_ROOM,
        block: int | None = None,
    ) -> None:
        super().__init__(checkpoints)
        self.device = torch.empty(0, device=device).device  # cuda:0 where cuda was said
        self.block = block or (CHUNK if self.device.type == "cpu" else BLOCK)
        streams = streams_of(self.device)
        self._copier = Copier(self.device, streams)
        self._pinned = _PinnedMemory(room.pinned if streams else 0)
        self._ahead = room.ahead
        self._left = room.kept
        self._staying: set[Input] = set()
        self._kept: dict[Input, Tensor] = {}
        self._arrived: dict[Input, Tensor] = {}
        self._placing = threading.Lock()

    def flat(self, tensor: Input) -> Tensor:
        """Returns the stored tensor, flat: on the device where it is there, else in memory."""
        for there in (self._kept, self._arrived, self._pinned.tensors):
            if (value := there.get(tensor)) is not None:
                return value
        return super().flat(tensor)

    def at_hand(self, stored: Tensor) -> Tensor:
        return stored.to(self.device)

    def in_turn(self, requests: Iterable[Sequence[Input]]) -> Iterator[None]:
        try:
            for arrivals in ahead(self._fetch(request) for request in requests):
                self._arrived = arrivals.wait()
                with self._placing:
                    self._kept |= {name: value for name, value in self._arrived.items() if name in self._staying}
                del arrivals
                yield
                self._arrived = {}
        finally:
            self._arrived = {}

    def floats(
        self, tensors: Sequence[Input], start: int = 0, stop: int | None = None, step: int | None = None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        stored = [self._settled(tensor) for tensor in tensors]
        blocks = spans(start, stored[0].numel() if stop is None else stop, step or self.block)
        arrivals = ((a, self._copier.start([tensor[a:b] for tensor in stored])) for a, b in blocks)
        for first, arrival in ahead(arrivals):
            values = [part.float() for part in arrival.wait()]
            del arrival
            yield first, values
            del values

    def parts(self, pair: Pair) -> Parts:
        """Returns the float32 values of a base (0 where there is none) and a source, part by part."""
        base, source = pair

        def parts() -> Iterator[tuple[int, Tensor, Tensor]]:
            for start, (values, *origin) in self.floats([source] if base is None else [source, base]):
                yield start, origin[0] if origin else values.new_zeros(()), values

        return parts

    def _settled(self, tensor: Input) -> Tensor:
        """The stored tensor; on the device from here on, where there is room for it."""
        value = self.flat(tensor)
        if value.device != self.device and self._stays(tensor, value):
            value = value.to(self.device)
            with self._placing:
                value = self._kept.setdefault(tensor, value)
        return value

    def _fetch(self, request: Sequence[Input]) -> _Arrivals:
        """Begins to copy what one operation reads, as far as there is room."""
        away = {
            tensor: value for tensor in dict.fromkeys(request) if (value := self.flat(tensor)).device != self.device
        }
        passing = {tensor: value for tensor, value in away.items() if not self._stays(tensor, value)}
        if sum(value.nbytes for value in passing.values()) > self._ahead:
            away = {tensor: value for tensor, value in away.items() if tensor not in passing}
        for tensor, value in passing.items():
            passing[tensor] = self._pinned.take(tensor, value)
        away |= {tensor: passing[tensor] for tensor in away.keys() & passing.keys()}
        return _Arrivals(tuple(away), self._copier.start(list(away.values())))

    def _stays(self, tensor: Input, value: Tensor) -> bool:
        """Whether a tensor is one of those that are kept on the device; it takes its room."""
        with self._placing:
            if tensor not in self._staying and value.nbytes <= self._left:
                self._staying.add(tensor)
                self._left -= value.nbytes
            return tensor in self._staying


@dataclass(frozen=True)
class _Arrivals:
    """Stored tensors on their way."""

    names: tuple[Input, ...]
    arrival: Arrival

    def wait(self) -> dict[Input, Tensor]:
        return dict(zip(self.names, self.arrival.wait(), strict=True))


class _PinnedMemory:
    """Tensors in memory that a device copies from by itself.

    Args:
        room: Bytes that it may take.
    """

    _SLAB = 1 << 28  # bytes: torch rounds what is pinned up to a power of two

    def __init__(self, room: int) -> None:
        self.tensors: dict[Input, Tensor] = {}
        self._left = room
        self._slab = torch.empty(0, dtype=torch.uint8)

    def take(self, tensor: Input, value: Tensor) -> Tensor:
        """Returns the tensor, in pinned memory where there is room for it."""
        if tensor in self.tensors:
            return self.tensors[tensor]
        size = -(-value.nbytes // 64) * 64
        if size > self._slab.numel():
            taken = max(self._SLAB, 1 << math.ceil(math.log2(max(1, size))))
            if taken > self._left:
                return value
            self._left -= taken
            self._slab = torch.empty(taken, dtype=torch.uint8, pin_memory=True)
        here, self._slab = self._slab[: value.nbytes], self._slab[size:]
        self.tensors[tensor] = here.view(value.dtype).copy_(value)
        return self.tensors[tensor]
