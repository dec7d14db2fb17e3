"""Which weight files a folder holds, and its index.json: checked against the headers in both directions."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from evomerge.checkpoints.header import Header, TensorInfo, name_some, parse_strict_json, read_header
from evomerge.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SINGLE = {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}

Kind = Literal["safetensors", "pickle"]
Signature = tuple[int, int, int]


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
        signatures: File -> its (size, mtime in ns, inode) when the header was read.
    """

    tensors: Mapping[str, TensorInfo]
    paths: Mapping[str, Path]
    signatures: Mapping[Path, Signature]


def signature(path: Path) -> Signature:
    """Gives what changes when a file is written to or replaced: (size, mtime in ns, inode).

    Raises:
        CheckpointError: The file cannot be looked at, or is a pipe or a device, which might never end.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} cannot be read: it is not an ordinary file")
    return status.st_size, status.st_mtime_ns, status.st_ino


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file such as config.json; {} when it does not exist.

    Raises:
        CheckpointError: It cannot be read, or is not a JSON object.
    """
    if not path.exists() and not path.is_symlink():
        return {}
    signature(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))  # lenient: real configs contain Infinity
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
    """Reads every header and checks it against the index.

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
    if not problems and files.weight_map is not None and files.index is not None:
        problems += _against_index(files.index, files.weight_map, headers)
    if problems:
        raise CheckpointError(problems)
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    paths = {name: header.path for header in headers for name in header.tensors}
    return TensorIndex(dict(sorted(tensors.items())), paths, signatures)


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
        value = parse_strict_json(index.read_bytes())
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


def _against_index(index: Path, weight_map: Mapping[str, str], headers: list[Header]) -> list[str]:
    problems: list[str] = []
    for header in headers:
        shard = header.path.relative_to(index.parent).as_posix()
        promised = {name for name, file in weight_map.items() if PurePosixPath(file).as_posix() == shard}
        if absent := sorted(promised - set(header.tensors)):
            problems.append(f"{header.path} lacks {name_some(absent)}, which {index.name} says it holds")
        if extra := sorted(set(header.tensors) - promised):
            problems.append(f"{header.path} holds {name_some(extra)}, which {index.name} does not say")
    return problems
