"""Carries out one operation, block by block: float32 inside the block, rounded once on the way out.

What is stored or asked for in float64 is computed whole and in float64, by the method's own function.

A compiled kernel does the work where there is one (`find_kernel`); otherwise the method's own function does, on
float32 blocks. Where the store of statistics is one of a device (`statistics_store`), it always does, there.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.engine.device.sources import BLOCK, NO_ROOM, Room
from evomerge.engine.device.statistics import DeviceStatistics
from evomerge.engine.statistics.operation_statistics import OperationStatistics
from evomerge.engine.statistics.tensor_reader import CHUNK, chunks, for_sums
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.errors import BadInput
from evomerge.methods.contract import Block, Granularity, Stage
from evomerge.methods.plain_statistics import PlainStatistics
from evomerge.methods.registry import STAGES, get_method
from evomerge.planning.operation import COPY, Family, Input, Operation, inputs_of
from evomerge.system.threads import run_all

if TYPE_CHECKING:
    from evomerge.engine.kernel_dispatch import KernelCall

_PIECE = 1 << 21  # elements: large enough that handing a piece to a thread costs nothing


def find_device(name: str, key: str = "--device") -> torch.device | None:
    """Finds the device to compute on; None for the processor, where compiled kernels do the work.

    Raises:
        BadInput: torch knows no such device, or there is none in this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"{key}: '{name}' is no device of torch's, such as cpu, cuda or cuda:1") from None
    if device.type == "meta":
        raise BadInput(f"{key}: 'meta' holds no values to compute with")
    if device.type == "cpu":
        return None
    try:
        torch.empty(1, device=device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # what torch raises differs from build to build
        raise BadInput(f"{key}: '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def statistics_store(
    checkpoints: Mapping[str, Checkpoint],
    device: torch.device | None = None,
    *,
    room: Room = NO_ROOM,
) -> StatisticsStore:
    """Returns the statistics by which operations are computed: where and how they are, follows from it.

    Args:
        checkpoints: Open checkpoints by reference.
        device: Where the methods' own functions compute, and statistics are found; None for compiled kernels in memory.
        room: What stored tensors may take, and what methods keep for the next candidate.
    """
    if device is None:
        return StatisticsStore(checkpoints, room=room.remembered)
    return DeviceStatistics(checkpoints, device, room)


def execute(operation: Operation, store: StatisticsStore, out: Tensor, family: Family = ()) -> None:
    """Writes the operation's result into `out`, rounding once to `out`'s dtype.

    Args:
        operation: What to compute.
        store: Statistics and tensors of the open checkpoints.
        out: Contiguous tensor of the operation's shape.
        family: The inputs that together make the model, for `scope: model`.
    """
    for piece in pieces(operation, store, out, family):
        piece()


@dataclass(frozen=True)
class Part:
    """A bounded part of one operation's result, elements start..stop of the flat tensor."""

    start: int
    stop: int
    _task: _Task

    @property
    def size(self) -> int:
        """How many elements it has."""
        return self.stop - self.start

    def compute(self, out: Tensor) -> None:
        """Writes it into `out`: flat, of its size."""
        self._task.run(self.start, self.stop, out)


def parts(operation: Operation, store: StatisticsStore, family: Family = ()) -> Iterator[Part]:
    """Yields an operation's result in independent parts.

    Args:
        operation, store, family: As for `execute`.
    """
    task = _Task(operation, store, family)
    step = _PIECE if store.device is None else BLOCK
    if operation.method != COPY:
        if get_method(operation.method).merge is None:
            raise ValueError(f"{operation.method} copies layers and has nothing to compute")
        whole, columns = math.prod(operation.shape), math.prod(operation.shape[1:])
        least = {"element": 1, "row": max(1, columns if len(operation.shape) > 1 else whole), "tensor": max(1, whole)}
        step = (
            max(1, whole)
            if task.is_double or task.stages
            else -(-step // least[task.granularity]) * least[task.granularity]
        )
    for start, stop in chunks(math.prod(operation.shape), step):
        yield Part(start, stop, task)


@dataclass(frozen=True)
class Piece:
    """A part of one operation and the place for its result: work for one thread.

    Attributes:
        run: Does it.
        size: How many elements it covers.
        leads: The first of its operation: it also gathers what the others need to know about the whole tensor.
    """

    run: Callable[[], None]
    size: int
    leads: bool

    def __call__(self) -> None:
        self.run()


def pieces(operation: Operation, store: StatisticsStore, out: Tensor, family: Family = ()) -> Iterator[Piece]:
    """Yields the work of `execute` in independent pieces of a bounded size, for several threads."""
    flat = out.view(-1)
    for part in parts(operation, store, family):
        run = functools.partial(part.compute, flat[part.start : part.stop])
        yield Piece(run, part.size, part.start == 0)


def execute_all(work: Iterable[Callable[[], None]], threads: int) -> None:
    """Runs pieces of work on a few threads, each of which computes alone.

    Large tensors start first; the rest of their pieces, for which nothing more has to be found out, come last and even
    out the ends.

    Raises:
        Exception: The first error of a piece, after the others have ended.
    """

    def rank(piece: Callable[[], None]) -> tuple[bool, int]:
        return (not piece.leads, -piece.size) if isinstance(piece, Piece) else (False, 0)

    run_all(sorted(work, key=rank), threads)


def materialise(operation: Operation, store: StatisticsStore, dtype: torch.dtype, family: Family = ()) -> Tensor:
    """Computes the operation's result as a new tensor where the store's device is, rounded once to `dtype`."""
    out = torch.empty(operation.shape, dtype=dtype, device=store.device)
    execute(operation, store, out, family)
    return out


@dataclass(frozen=True)
class _Task:
    """One operation, and what is found out about it once for all its parts."""

    operation: Operation
    store: StatisticsStore
    family: Family
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @functools.cached_property
    def is_double(self) -> bool:
        """Whether this is float64's; not for ``scope: model``, of which one tensor does not know enough."""
        op = self.operation
        if op.method == COPY or op.settings.shared.get("scope") == "model":
            return False
        return op.dtype == "F64" or any(self.store.tensors.flat(t).dtype == torch.float64 for t in inputs_of(op))

    @functools.cached_property
    def granularity(self) -> Granularity:
        return get_method(self.operation.method).granularity(self.operation.settings)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What is still to be done after the method, which has to see the whole tensor."""
        stages = (STAGES[name] for name in self.operation.after)
        return tuple(stage for stage in stages if not stage.idle(self.operation.settings))

    @functools.cached_property
    def statistics(self) -> OperationStatistics:
        op = self.operation
        columns = math.prod(op.shape[1:] if len(op.shape) > 1 else op.shape)
        return OperationStatistics(
            self.store,
            op.base,
            op.sources,
            columns,
            op.output,
            op.seed,
            self.family,
            whole=op.shape,
            inputs_seen=op.activations.means if op.activations else None,
        )

    @functools.cached_property
    def kernel(self) -> KernelCall | None:
        """Returns the compiled work, if there is one."""
        if self.store.device is not None:
            return None
        from evomerge.engine.kernel_dispatch import find_kernel

        return find_kernel(self.operation.method, self.operation.settings, self.statistics)

    def run(self, start: int, stop: int, out: Tensor) -> None:
        """Computes elements start..stop into `out`."""
        if self.operation.method == COPY:
            self._copy(start, stop, out)
            return
        if self.is_double:
            out.copy_(self._in_double().reshape(-1))
            return
        if not self.stages:
            self._merge(start, stop, out)
            return
        size = math.prod(self.operation.shape)
        merged = torch.empty(size, device=self.store.device)
        self._merge(0, size, merged)
        for block in self._blocks(0, size, "tensor"):
            out.copy_(self._after(block, merged.view(self.operation.shape)).reshape(-1))

    def _after(self, block: Block, merged: Tensor) -> Tensor:
        """What the stages make of a whole tensor."""
        settings = self.operation.settings
        block = replace(block, sources=[block.sources[i] for i in settings.taking_part()])
        for stage in self.stages:
            merged = stage.apply(block, merged, settings)
        return merged

    def _merge(self, start: int, stop: int, out: Tensor) -> None:
        with self._lock:
            kernel = self.kernel
        if kernel is None:
            self._call(start, stop, out)
            return
        result = torch.empty(CHUNK)
        for at, inputs in self.store.tensors.rows(self.statistics.inputs(kernel.inputs), start, stop):
            merged = result[: inputs.shape[1]]
            kernel.run(inputs, at, merged.numpy())
            out[at - start : at - start + merged.numel()] = merged

    def _copy(self, start: int, stop: int, out: Tensor) -> None:
        source = self.store.tensors.flat(self.operation.sources[0])[start:stop]
        if self.operation.scale == 1.0:
            out.copy_(source)
            return
        for first, last in chunks(stop - start, self.store.tensors.block):
            part = self.store.tensors.at_hand(source[first:last])
            out[first:last] = (part if part.dtype == torch.float64 else part.float()) * self.operation.scale

    def _in_double(self) -> Tensor:
        op, method = self.operation, get_method(self.operation.method)

        def whole(tensor: Input) -> Tensor:
            return for_sums(self.store.tensors.at_hand(self.store.tensors.flat(tensor))).double().view(op.shape)

        base = None if op.base is None else whole(op.base)
        keys = [self.statistics.key(i) for i in range(len(op.sources))] if method.stochastic else []
        seen = torch.from_numpy(op.activations.means) if op.activations else None
        statistics = PlainStatistics(base, [whole(source) for source in op.sources], keys, seen)
        if method.merge is None:
            raise ValueError(f"{method.name} copies layers and has nothing to compute")
        merged = method.merge(statistics.block(self.granularity), op.settings)
        return self._after(statistics.block("tensor"), merged.view(op.shape))

    def _call(self, start: int, stop: int, out: Tensor) -> None:
        """The method's own function, on float32 blocks."""
        op, merge = self.operation, get_method(self.operation.method).merge
        if merge is None:
            return
        for block in self._blocks(start, stop, self.granularity):
            merged = merge(block, op.settings)
            out[block.start - start : block.start - start + merged.numel()] = merged.reshape(-1)

    def _blocks(self, start: int, stop: int, granularity: Granularity) -> Iterator[Block]:
        """The blocks of elements start..stop, each of as much as a method sees at once."""
        op, tensors = self.operation, self.store.tensors
        whole, columns = math.prod(op.shape), math.prod(op.shape[1:])
        step = tensors.block
        if granularity == "tensor" or (granularity == "row" and len(op.shape) < 2):
            start, stop, step = 0, whole, max(1, whole)
        elif granularity == "row":
            step = max(1, step // max(1, columns)) * max(1, columns)
        origin = () if op.base is None else (op.base,)
        for at, flat in tensors.floats([*origin, *op.sources], start, stop, step):
            shape: tuple[int, ...] = flat[0].shape
            if granularity == "tensor":
                shape = op.shape
            elif granularity == "row":
                shape = (1, whole) if len(op.shape) < 2 else (flat[0].numel() // max(1, columns), columns)
            values = [part.view(shape) for part in flat]
            base, sources = (None, values) if op.base is None else (values[0], values[1:])
            yield Block(base, sources, at, self.statistics.at(at, shape))
