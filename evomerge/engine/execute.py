"""Carries out one operation, block by block: float32 inside the block, rounded once on the way out.

What is stored or asked for in float64 is computed whole and in float64, by the method's own function.

A compiled kernel does the work where there is one (`find_kernel`); otherwise the method's own function does, on
float32 blocks. On another device it always does: blocks are sent there one by one, and statistics of whole tensors
come from here.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomerge.engine.statistics.operation_statistics import OperationStatistics
from evomerge.engine.statistics.tensor_reader import CHUNK, chunks
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
_SENT = 1 << 24  # elements of a block that is sent to a device: 64 MB in float32


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


def execute(
    operation: Operation, store: StatisticsStore, out: Tensor, family: Family = (), device: torch.device | None = None
) -> None:
    """Writes the operation's result into `out`, rounding once to `out`'s dtype.

    Args:
        operation: What to compute.
        store: Statistics and tensors of the open checkpoints.
        out: Contiguous tensor of the operation's shape.
        family: The inputs that together make the model, for `scope: model`.
        device: Where the method's own function computes; None for compiled kernels where there are some.
    """
    for piece in pieces(operation, store, out, family, device):
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


def parts(
    operation: Operation, store: StatisticsStore, family: Family = (), device: torch.device | None = None
) -> Iterator[Part]:
    """Yields an operation's result in independent parts.

    Args:
        operation, store, family, device: As for `execute`.
    """
    task = _Task(operation, store, family, device)
    step = _PIECE if device is None else _SENT
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


def pieces(
    operation: Operation, store: StatisticsStore, out: Tensor, family: Family = (), device: torch.device | None = None
) -> Iterator[Piece]:
    """Yields the work of `execute` in independent pieces of a bounded size, for several threads."""
    flat = out.view(-1)
    for part in parts(operation, store, family, device):
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


def materialise(
    operation: Operation,
    store: StatisticsStore,
    dtype: torch.dtype,
    family: Family = (),
    device: torch.device | None = None,
) -> Tensor:
    """Computes the operation's result as a new tensor in memory, rounded once to `dtype`; `device` as for `execute`."""
    out = torch.empty(operation.shape, dtype=dtype)
    execute(operation, store, out, family, device)
    return out


@dataclass(frozen=True)
class _Task:
    """One operation, and what is found out about it once for all its parts."""

    operation: Operation
    store: StatisticsStore
    family: Family
    device: torch.device | None = None
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
            device=self.device,
            inputs_seen=op.activations.means if op.activations else None,
        )

    @functools.cached_property
    def kernel(self) -> KernelCall | None:
        """Returns the compiled work, if there is one."""
        if self.device is not None:
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
        merged = torch.empty(math.prod(self.operation.shape))
        self._merge(0, merged.numel(), merged)
        op = self.operation
        base = None if op.base is None else self._part(op.base, 0, op.shape)
        sources = [self._part(source, 0, op.shape) for source in op.sources]
        block = Block(base, sources, 0, self.statistics.at(0, op.shape))
        out.copy_(self._after(block, merged.to(self.device).view(op.shape)).reshape(-1))

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
        for first, last in chunks(stop - start):
            part = source[first:last]
            out[first:last] = (part if part.dtype == torch.float64 else part.float()) * self.operation.scale

    def _in_double(self) -> Tensor:
        op, method = self.operation, get_method(self.operation.method)

        def whole(tensor: Input) -> Tensor:
            return self.store.tensors.flat(tensor).double().view(op.shape)

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
        limit = CHUNK if self.device is None else _SENT
        for at, shape in _extents(op.shape, self.granularity, start, stop, limit):
            base = None if op.base is None else self._part(op.base, at, shape)
            sources = [self._part(source, at, shape) for source in op.sources]
            merged = merge(Block(base, sources, at, self.statistics.at(at, shape)), op.settings)
            out[at - start : at - start + merged.numel()] = merged.reshape(-1)

    def _part(self, tensor: Input, start: int, shape: tuple[int, ...]) -> Tensor:
        stored = self.store.tensors.flat(tensor)[start : start + math.prod(shape)]
        return (stored if self.device is None else stored.to(self.device)).float().view(shape)


def _extents(
    shape: tuple[int, ...], granularity: Granularity, start: int, stop: int, limit: int
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(flat start, block shape) of each block of a piece."""
    columns = math.prod(shape[1:])
    if granularity == "tensor":
        yield 0, shape
    elif granularity == "row" and len(shape) > 1:
        width = max(1, columns)
        for first, last in chunks((stop - start) // width, max(1, limit // width)):
            yield start + first * width, (last - first, columns)
    elif granularity == "row":
        yield 0, (1, math.prod(shape))
    else:
        for first, last in chunks(stop - start, limit):
            yield start + first, (last - first,)
