"""Tensors on their way from memory to a device, while the device computes.

Where a device has streams (cuda, xpu), copies have one of their own, fed by a thread: a copy from memory that is not
pinned keeps its caller until it is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yields items, each when the next one has been made."""
    waiting: list[T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


@dataclass(frozen=True)
class Arrival:
    """Tensors of which some may still be on their way.

    Attributes:
        tensors: All of them, on the device.
        copied: Gives the event after which they are there; None where they are.
        streams: The device's module, whose present stream waits for it.
    """

    tensors: list[Tensor]
    copied: Future[Any] | None = None
    streams: Any = None

    def wait(self) -> list[Tensor]:
        """Returns the tensors; what is computed with them from here on waits for them."""
        if self.copied is not None:
            event = self.copied.result()
            self.streams.current_stream(self.tensors[0].device).wait_event(event)
        return self.tensors


class Copier:
    """Copies tensors to a device.

    Args:
        device: Where to.
        streams: The module with its streams and events; None for copies that are done when they are asked for.
    """

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        self._device = device
        self._streams = streams
        if streams is not None:
            self._stream = streams.Stream(device)
            self._thread = ThreadPoolExecutor(1, "copier")

    def start(self, stored: Sequence[Tensor]) -> Arrival:
        """Begins to copy tensors; those on the device already are taken as they are."""
        if self._streams is None or all(tensor.device == self._device for tensor in stored):
            return Arrival([tensor.to(self._device) for tensor in stored])
        # Memory comes from the stream that computes, which will also free it. What it computed there before has to end
        # before the copy begins, and is known here: whatever is computed from now on has not yet been asked for.
        there = [t if t.device == self._device else torch.empty_like(t, device=self._device) for t in stored]
        free = self._streams.current_stream(self._device).record_event()
        moves = [(to, t) for to, t in zip(there, stored, strict=True) if to is not t]
        return Arrival(there, self._thread.submit(self._copy, moves, free), self._streams)

    def _copy(self, moves: Sequence[tuple[Tensor, Tensor]], free: Any) -> Any:
        with self._streams.stream(self._stream):
            self._stream.wait_event(free)
            for to, stored in moves:
                to.copy_(stored, non_blocking=True)
            return self._stream.record_event()


def streams_of(device: torch.device) -> Any:
    """Returns the module with a device's streams and events; None where it has none that work side by side."""
    return torch.get_device_module(device) if device.type in ("cuda", "xpu") else None
