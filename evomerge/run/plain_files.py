"""Plain safetensors files, key by key: whatever tensors they hold, with no model or layout behind them."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import FLOATS
from evomerge.checkpoints.header import name_some, shape_text
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.engine.to_disk import Progress, write_checkpoint
from evomerge.errors import CheckpointError, OutputError
from evomerge.methods.contract import Settings
from evomerge.methods.registry import get_method
from evomerge.planning.operation import COPY, Input, Operation
from evomerge.planning.plan import Plan
from evomerge.system.locks import exclusive


def plan_files(
    checkpoints: Mapping[str, Checkpoint],
    base: str,
    files: Sequence[str],
    method: str,
    settings: Mapping[str, Any],
    *,
    seed: int = 0,
) -> tuple[list[Operation], list[str]]:
    """Returns one operation for each of the base's tensors, over the files that have it.

    Args:
        checkpoints: Open files by reference.
        base: The base's.
        files: Those to merge into it.
        method: A method that needs a base.
        settings: Its per-source parameters, the same for every file.
        seed: For methods that draw random numbers.

    Returns:
        The operations; and what is odd: tensors that not every file has. What no file has, and what is not of floating
        point, is copied from the base.

    Raises:
        CheckpointError: Shapes or dtypes that do not fit, or a file that has none of the base's tensors.
    """
    origin = checkpoints[base]
    checks = [_fit(origin, name, checkpoints[name]) for name in dict.fromkeys(files)]
    if problems := [problem for file in checks for problem in file[0]]:
        raise CheckpointError(problems)
    drawing = get_method(method).stochastic
    operations = []
    for key, info in origin.tensors.items():
        holders = [name for name in files if key in checkpoints[name].tensors] if info.dtype in FLOATS else []
        base_input = Input(base, key, "")
        if holders:
            sources = tuple(Input(name, key, checkpoints[name].fingerprint if drawing else "") for name in holders)
            values = get_method(method).settings([settings] * len(holders))
            operations.append(Operation(key, info.shape, info.dtype, method, base_input, sources, values, seed))
        else:
            operations.append(Operation(key, info.shape, info.dtype, COPY, None, (base_input,), Settings()))
    return operations, [note for file in checks for note in file[1]]


def _fit(base: Checkpoint, name: str, file: Checkpoint) -> tuple[list[str], list[str]]:
    """(why a file cannot be merged into the base, what is odd about it)."""
    file_tensors, base_tensors = file.tensors, base.tensors
    shared = sorted(file_tensors.keys() & base_tensors.keys())
    if not shared:
        return [f"{name}: has none of the tensors of {base.reference}"], []
    notes, problems = [], []
    if lacking := sorted(base_tensors.keys() - file_tensors.keys()):
        notes.append(f"{name}: lacks {name_some(lacking)}: it takes no part there")
    if extra := sorted(file_tensors.keys() - base_tensors.keys()):
        notes.append(f"{name}: has {name_some(extra)}, which {base.reference} lacks: left out")
    for key in shared:
        if file_tensors[key].shape != base_tensors[key].shape:
            shapes = f"{shape_text(file_tensors[key].shape)} against {shape_text(base_tensors[key].shape)}"
            problems.append(f"{name}: {key}: its shape is not the base's ({shapes})")
        elif (file_tensors[key].dtype in FLOATS) != (base_tensors[key].dtype in FLOATS):
            problems.append(f"{name}: {key}: is {file_tensors[key].dtype}, the base's is {base_tensors[key].dtype}")
    return problems, notes


def largest_deltas(operation: Operation, store: StatisticsStore) -> list[float]:
    """Returns the largest magnitude of each source's delta, read chunk by chunk; NaN where an element is."""
    largest = np.zeros(len(operation.sources))
    if operation.base is None or math.prod(operation.shape) == 0:
        return [float(size) for size in largest]
    for _, rows in store.tensors.rows([operation.base, *operation.sources]):
        largest = np.maximum(largest, np.abs(rows[1:] - rows[0]).max(axis=1))
    return [float(size) for size in largest]


def write_file(
    operations: Sequence[Operation],
    checkpoints: Mapping[str, Checkpoint],
    out: Path,
    *,
    progress: Progress | None = None,
) -> None:
    """Carries out operations into one safetensors file, streamed; it gets its name when it is complete.

    Raises:
        BadInput: NaN or infinite weights, by file and tensor.
        OutputError: Writing failed; a file that was there is intact.
    """
    whole = out.resolve()
    folder = whole.with_name(f".{whole.name}.writing")
    plan = Plan(tuple(operations), {}, "", (), next(iter(checkpoints)))
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(whole.with_name(f".{whole.name}.lock"), str(out), error=OutputError, remove=True):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                write_checkpoint(plan, checkpoints, folder, card="", max_shard_size=sys.maxsize, progress=progress)
                (folder / "model.safetensors").replace(whole)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
