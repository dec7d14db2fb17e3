"""Stored tensors, read block by block: as float32 tensors, as rows side by side, or as the bits of their elements."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.engine.statistics.exact_topk import Bits, Parts
from evomerge.planning.operation import Input

CHUNK = 1 << 17  # elements: float32 temporaries of this size stay in the caches, and Python has few of them to hand out
SCAN = 1 << 20  # elements that are only counted
_READ_AT_ONCE = 64  # tensors; those of an adapter cost a matrix product each

Pair = tuple[Input | None, Input]
"""A base, or None for zeros, and a source: their delta."""


def chunks(count: int, step: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Ranges that cover 0..count in steps."""
    return spans(0, count, step)


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover start..stop in steps."""
    for first in range(start, stop, step):
        yield first, min(stop, first + step)


def for_sums(tensor: Tensor) -> Tensor:
    """Returns a tensor where it can be added up in float64: in memory where it is on a device without it (mps)."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


class TensorReader:
    """Reads the tensors of a set of checkpoints.

    Args:
        checkpoints: Open checkpoints by reference.
    """

    block = CHUNK  # elements that are computed with at once

    def __init__(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._read: OrderedDict[Input, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def flat(self, tensor: Input) -> Tensor:
        """Returns the stored tensor, flat: a view of the memory map; with an adapter, computed and kept for a while."""
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

    def in_turn(self, requests: Iterable[Sequence[Input]]) -> Iterator[None]:
        """Yields once for each request, whose tensors are then where they are computed with: here they always are."""
        for _ in requests:
            yield

    def at_hand(self, stored: Tensor) -> Tensor:
        """Returns a stored tensor, or a part of one, where it is computed with."""
        return stored

    def floats(
        self, tensors: Sequence[Input], start: int = 0, stop: int | None = None, step: int | None = None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """(flat index of the first element, float32 parts of the tensors) over elements start..stop, block by block.

        Args:
            tensors: Which ones; all of one size.
            start, stop: Where to begin and to end; None for the tensors' end.
            step: Elements of a block; None for what suits.
        """
        stored = [self.flat(tensor) for tensor in tensors]
        for first, last in spans(start, stored[0].numel() if stop is None else stop, step or self.block):
            yield first, [tensor[first:last].float() for tensor in stored]

    def bits(self, *tensors: Input | None) -> Iterator[tuple[int, list[Bits]]]:
        """(start, bits of each tensor, zeros where it is None) over flat tensors, in pieces and one dtype."""
        stored = [None if tensor is None else self.flat(tensor) for tensor in tensors]
        given = [value for value in stored if value is not None]
        dtype, size = given[0].dtype, given[0].numel()
        direct = dtype in (torch.bfloat16, torch.float32) and all(value.dtype == dtype for value in given)
        for start, stop in chunks(size, SCAN if direct else CHUNK):
            parts = [torch.zeros(stop - start, dtype=dtype) if value is None else value[start:stop] for value in stored]
            yield start, [_bits_of(part if direct else part.float()) for part in parts]

    def parts(self, pair: Pair) -> Parts:
        """Returns the bits of a delta, part by part."""

        def parts() -> Iterator[tuple[int, Bits, Bits]]:
            for start, (base_bits, source_bits) in self.bits(*pair):
                yield start, base_bits, source_bits

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
            chunk = stage[: len(stored) * (last - first)].view(len(stored), last - first)
            for row, tensor in zip(chunk, stored, strict=True):
                row.copy_(tensor[first:last])
            yield start + first, chunk.numpy()


def _bits_of(tensor: Tensor) -> Bits:
    """The bits of bfloat16 or float32 elements, in place where they lie on even addresses."""
    bits = tensor.view(torch.uint16 if tensor.dtype == torch.bfloat16 else torch.uint32).numpy()
    return bits if bits.flags.aligned else bits.copy()
