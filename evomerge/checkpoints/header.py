"""The safetensors header, read strictly: a file that breaks the format is refused, naming the file and the tensor.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the tensor bytes.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.dtypes import DTYPE_BYTES
from evomerge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
LFS_POINTER = b"version https://git-lfs"
_MAX_ELEMENTS = 2**63 - 1
_NAMED = 5


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, without its bytes: name, shape, and dtype as safetensors spells it ("BF16", "F32", ...)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorSpec):
    """A stored tensor: its bytes are `start` to `end` (exclusive) of its file, counted from the file's first byte."""

    start: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors sorted by name, and the free-form `__metadata__`."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks the header of one `.safetensors` file; no weights are read.

    Raises:
        CheckpointError: The file cannot be read, is truncated, or breaks the format. All problems with its tensors
            are reported at once.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = _header_length(path, file.read(8), size)
            raw = file.read(length)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    entries = _parse_json(path, raw)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    tensors = _tensors(path, entries, data_start=8 + length)
    _check_coverage(path, tensors, data_start=8 + length, size=size)
    return Header(path, tensors, metadata)


def lfs_problem(path: Path) -> str:
    """Says that a repository was cloned without its large files: a text of three lines stands in a file's place."""
    return f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder, or download it"


def shape_text(shape: Iterable[int]) -> str:
    """Writes a shape: (49152, 576) -> "49152x576"; a scalar is "scalar"."""
    return "x".join(map(str, shape)) or "scalar"


def name_some(names: Iterable[str], limit: int = _NAMED) -> str:
    """Lists the first few names, and how many more there are."""
    every = list(names)
    shown = ", ".join(every[:limit])
    return shown if len(every) <= limit else f"{shown} and {len(every) - limit} more"


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{path} is truncated: a safetensors file has at least 8 bytes, this one {size}")
    if prefix == LFS_POINTER[:8]:
        raise CheckpointError(lfs_problem(path))
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header would be {length} bytes long (at most {MAX_HEADER_BYTES})"
        )
    if 8 + length > size:
        raise CheckpointError(f"{path} is truncated: header says {8 + length} bytes, file has {size}")
    return length


class _Malformed(ValueError):
    """JSON that the format forbids."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise _Malformed(f"the key {key!r} occurs twice")
        keys[key] = value
    return keys


def _no_constant(text: str) -> Any:
    raise _Malformed(f"{text} is not JSON")


def parse_strict_json(raw: bytes) -> Any:
    """Parses JSON without duplicate keys, NaN or infinities.

    Raises:
        ValueError: It is not; the message says why.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError as error:
        raise _Malformed("it is nested too deeply") from error


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object")
    try:
        entries = parse_strict_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path} has a corrupt header: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object")
    return entries


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path} has a corrupt header: __metadata__ must map names to strings")
    return value


def _tensors(path: Path, entries: Mapping[str, Any], data_start: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for name in sorted(entries):
        try:
            tensors[name] = _tensor(name, entries[name], data_start)
        except _Malformed as error:
            problems.append(f"{path}: tensor {name!r}: {error}")
    if len(problems) > _NAMED:
        problems = [*problems[:_NAMED], f"{path}: and {len(problems) - _NAMED} more corrupt tensors"]
    if problems:
        raise CheckpointError(problems)
    return tensors


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_ELEMENTS


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    if not name.isprintable() or not name:
        raise _Malformed("its name is empty or not printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Malformed("an entry has exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _Malformed(f"unknown dtype {dtype!r} (known: {', '.join(DTYPE_BYTES)})")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _Malformed(f"shape must be a list of sizes, got {shape!r}")
    if math.prod(size for size in shape if size) > _MAX_ELEMENTS:
        raise _Malformed(f"shape {shape_text(shape)} is absurdly large")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _Malformed(f"data_offsets must be two positions, got {offsets!r}")
    start, end = offsets
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - start != needed:
        raise _Malformed(f"{dtype} {shape_text(shape)} takes {needed} bytes, data_offsets {offsets} give {end - start}")
    return TensorInfo(name, tuple(shape), dtype, data_start + start, data_start + end)


def _check_coverage(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """Checks that tensors follow one another without gap or overlap up to the end of the file, as the format asks."""
    problems: list[str] = []
    position, before = data_start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start < position:
            problems.append(f"{path}: tensor {info.name!r} overlaps {before} by {position - info.start} bytes")
        elif info.start > position:
            problems.append(f"{path}: {info.start - position} unused bytes between {before} and {info.name!r}")
        if info.end >= position:
            position, before = info.end, repr(info.name)
    if position > size:
        problems.insert(0, f"{path} is truncated: header says {position} bytes, file has {size}")
    elif position < size:
        problems.append(f"{path} has {size - position} bytes after its last tensor: header says {position} bytes")
    if problems:
        raise CheckpointError(problems[:_NAMED])
