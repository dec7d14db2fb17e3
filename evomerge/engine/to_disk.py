"""A plan to a checkpoint on disk: streamed tensor by tensor, complete or not there at all."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import torch_dtype
from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.tensors import is_finite
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.engine.companions import write_companions
from evomerge.engine.execute import execute_all, find_device, parts, statistics_store
from evomerge.errors import BadInput, CheckpointError, OutputError, RecipeError
from evomerge.planning.operation import Operation, inputs_of
from evomerge.planning.plan import Plan
from evomerge.system.memory import parse_size

Progress = Callable[[int, int], None]


def write_checkpoint(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    out: Path,
    *,
    card: str,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    device: str = "cpu",
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes a plan's result as a complete Hugging Face checkpoint.

    Args:
        plan: What to write.
        checkpoints: Open checkpoints by reference.
        out: The folder.
        card: Text of README.md.
        overwrite: Replace a folder that is there.
        max_shard_size: Largest file: bytes, or text such as "5GB".
        device: Where to compute: "cpu", or a device of torch such as "cuda:0", where tensors go block by block.
        progress: Called with (tensors written, tensors in all), by the thread that wrote the last one.
        finish: Called with the folder before it gets its final name, to add to it.
        warn: Called with what of the reference model's folder is left out.

    Raises:
        OutputError: When writing fails.
    """
    torch_device = find_device(device)
    refuse_inputs(out, checkpoints)
    specs = [TensorSpec(op.output, op.shape, op.dtype) for op in plan.operations]
    with CheckpointWriter(
        out, specs, max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"), overwrite=overwrite
    ) as writer:
        _write_weights(plan, checkpoints, writer, progress, torch_device)
        for text in write_companions(plan, checkpoints[plan.reference], writer.folder):
            warn(text)
        (writer.folder / "README.md").write_text(card, encoding="utf-8")
        if finish is not None:
            finish(writer.folder)


def refuse_inputs(out: Path, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Refuses an output that would take the place of a file of a model, or of what holds one, through no link either.

    Raises:
        OutputError: With the name of the first such model.
    """
    for reference, checkpoint in checkpoints.items():
        files = [path for path in checkpoint.inputs if path.exists()]
        paths = {at for path in files for at in (path.resolve(), path.parent.resolve())}
        if any(path.is_relative_to(out.resolve()) for path in paths):
            raise OutputError(f"{out} is not overwritten: {reference}, which is merged, lies there")


def _write_weights(
    plan: Plan,
    checkpoints: Mapping[str, Checkpoint],
    writer: CheckpointWriter,
    progress: Progress | None,
    device: torch.device | None,
) -> None:
    """Computes and writes the tensors, one per thread, the largest first.

    A thread holds one part of its tensor and no more: where what is found out about a tensor serves no other one, it
    is forgotten with it, and the inputs' pages are given back.
    """
    whole = statistics_store(checkpoints, device) if any(_spans_model(op) for op in plan.operations) else None
    order = sorted(plan.operations, key=lambda operation: -math.prod(operation.shape))
    done = itertools.count(1)

    def one(operation: Operation) -> None:
        store = whole or statistics_store(checkpoints, device)
        for part in parts(operation, store, plan.family):
            values = _buffer(part.size, torch_dtype(operation.dtype))
            part.compute(values)
            if not is_finite(values):
                raise _not_finite(operation, checkpoints)
            writer.put_part(operation.output, part.start, values)
        for tensor in inputs_of(operation):
            checkpoints[tensor.model].release(tensor.tensor)
        if progress is not None:
            progress(next(done), len(order))

    execute_all((functools.partial(one, operation) for operation in order), torch.get_num_threads())


_buffers = threading.local()


def _buffer(size: int, dtype: torch.dtype) -> Tensor:
    """Room for `size` elements, this thread's own and the same every time: fresh memory costs more than arithmetic."""
    buffer: Tensor | None = getattr(_buffers, "bytes", None)
    if buffer is None or buffer.numel() < size * dtype.itemsize:
        buffer = _buffers.bytes = torch.empty(size * dtype.itemsize, dtype=torch.uint8)
    return buffer[: size * dtype.itemsize].view(dtype)


def _spans_model(operation: Operation) -> bool:
    return operation.settings.shared.get("scope") == "model"


def _not_finite(operation: Operation, checkpoints: Mapping[str, Checkpoint]) -> BadInput:
    """Says whose fault it is that a merged tensor has NaN or infinite elements."""
    broken = [i for i in inputs_of(operation) if not is_finite(checkpoints[i.model].tensor(i.tensor))]
    if broken:
        return CheckpointError([f"{i.model}: NaN or infinite weights in {i.tensor}" for i in broken])
    return RecipeError(
        f"{operation.output} has no finite value in {operation.dtype} under {operation.method}: "
        "give a wider out_dtype, or smaller weights"
    )
