"""Which weight files a folder holds, by itself or by its index.json, and which tensors lie in them."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from evomerge.checkpoints.header import (
    LFS_POINTER,
    Header,
    TensorInfo,
    lfs_problem,
    name_some,
    parse_strict_json,
    read_header,
)
from evomerge.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SINGLE = {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}

Kind = Literal["safetensors", "pickle"]
Signature = tuple[int, int, int, int]


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights.

    Attributes:
        kind: How they are written.
        paths: The files, sorted.
        weight_map: From a sharded folder's index: tensor name -> file name; None for a single file.
        index: Where that index is.
    """

    kind: Kind
    paths: tuple[Path, ...]
    weight_map: Mapping[str, str] | None = None
    index: Path | None = None


@dataclass(frozen=True)
class TensorIndex:
    """Which tensors some safetensors files hold, and where.

    Attributes:
        tensors: By name, sorted.
        paths: Name -> the file that holds it.
        signatures: File -> its (size, mtime and ctime in ns, inode) when the header was read.
    """

    tensors: Mapping[str, TensorInfo]
    paths: Mapping[str, Path]
    signatures: Mapping[Path, Signature]


def signature(path: Path) -> Signature:
    """Gives what changes when a file is written to or replaced: (size, mtime in ns, inode, ctime in ns).

    The last one changes even where somebody puts the time of modification back.

    Raises:
        CheckpointError: The file cannot be looked at, or is a pipe or a device, which might never end.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} cannot be read: it is not an ordinary file")
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file such as config.json; {} when it does not exist.

    Raises:
        CheckpointError: It cannot be read, or is not a JSON object.
    """
    if not path.exists() and not path.is_symlink():
        return {}
    signature(path)
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(LFS_POINTER.decode()):
            raise CheckpointError(lfs_problem(path))
        value = json.loads(text)  # lenient: real configs contain Infinity
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, it is a {type(value).__name__}")
    return value


def find_weights(folder: Path) -> WeightFiles:
    """Finds the weight files of a folder: safetensors before pickle, a single file before shards, as transformers does.

    Raises:
        CheckpointError: There are none, or the index is corrupt, leaves the folder or names missing files.
    """
    kinds: tuple[Kind, ...] = ("safetensors", "pickle")
    for kind in kinds:
        single = folder / _SINGLE[kind]
        if single.is_file():
            return WeightFiles(kind, (single,))
        index = folder / f"{_SINGLE[kind]}.index.json"
        if index.is_file():
            weight_map = _weight_map(index)
            return WeightFiles(kind, _shards(index, weight_map.values()), weight_map, index)
    raise CheckpointError(_no_weights(folder))


def read_tensor_index(files: WeightFiles) -> TensorIndex:
    """Reads every header. What the files hold counts, as for everyone who reads them, not what their index says.

    A tensor that only the index names is not there; one that lies in several files is one, where it is equal in all.

    Raises:
        CheckpointError: With the problems of all files at once.
    """
    problems: list[str] = []
    headers: list[Header] = []
    signatures: dict[Path, Signature] = {}
    for path in files.paths:
        try:
            signatures[path] = signature(path)
            headers.append(read_header(path))
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    holders: dict[str, list[Header]] = {}
    for header in headers:
        for name in header.tensors:
            holders.setdefault(name, []).append(header)
    problems = [text for name, several in holders.items() if len(several) > 1 for text in _different(name, several)]
    if problems:
        raise CheckpointError(problems)
    tensors = {name: several[0].tensors[name] for name, several in sorted(holders.items())}
    return TensorIndex(tensors, {name: several[0].path for name, several in holders.items()}, signatures)


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is an adapter, not a model: write BASE+{folder} to apply it to its base"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if any("-of-" in name for name in others):
        return f"{folder} has shards but no model.safetensors.index.json, which says what they hold"
    message = f"{folder} has no weights: looked for model.safetensors and model.safetensors.index.json"
    return f"{message}; it has {name_some(others)}: give that file itself" if others else message


def _weight_map(index: Path) -> dict[str, str]:
    try:
        raw = index.read_bytes()
        if raw.startswith(LFS_POINTER):
            raise CheckpointError(lfs_problem(index))
        value = parse_strict_json(raw)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} is corrupt: {error}") from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} is corrupt: weight_map must map tensor names to file names")
    if not weight_map:
        raise CheckpointError(f"{index} is corrupt: weight_map is empty")
    return weight_map


def _shards(index: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """Lists the files of an index, all beside or below it: an index that points elsewhere is an attack or a mistake."""
    problems: list[str] = []
    paths: list[Path] = []
    for name in sorted(set(names)):
        if not _stays_inside(name):
            problems.append(f"{index}: weight_map points outside the folder: {name!r}")
            continue
        path = index.parent / name
        try:
            there = path.is_file()
        except OSError:  # a name too long for the file system
            there = False
        if there:
            paths.append(path)
        else:
            problems.append(f"{index}: the shard {name!r} is missing")
    if problems:
        raise CheckpointError(problems)
    return tuple(paths)


def _stays_inside(name: str) -> bool:
    # By the text, not by resolving links: the Hub's cache links every file to a store outside the folder.
    path = PurePosixPath(name)
    windows = PureWindowsPath(name)
    plain = name.isprintable() and "\\" not in name and not windows.drive
    return plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _different(name: str, headers: Sequence[Header]) -> list[str]:
    """Says so where a tensor that lies in several files is not the same in all of them."""
    first, *others = headers
    for other in others:
        one, two = first.tensors[name], other.tensors[name]
        if (one.dtype, one.shape) != (two.dtype, two.shape) or _bytes(first, name) != _bytes(other, name):
            return [f"{first.path} and {other.path} both hold {name}, with different values"]
    return []


def _bytes(header: Header, name: str) -> bytes:
    info = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(info.start)
        return file.read(info.end - info.start)
