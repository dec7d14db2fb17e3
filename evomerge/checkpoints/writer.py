"""Writes a checkpoint: complete under its name, or not there at all.

The files are made in a temporary folder beside the output, at their final size from the start: a full disk is found
before any work is spent, and tensors are written at their place in any order. Renames make them the output.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from evomerge.checkpoints.dtypes import DTYPE_BYTES, dtype_name
from evomerge.checkpoints.header import TensorInfo, TensorSpec, name_some, shape_text
from evomerge.checkpoints.tokenizer import is_tokenizer_file
from evomerge.errors import OutputError
from evomerge.system.locks import exclusive

if TYPE_CHECKING:
    import torch

# For a larger write the kernel looks for long runs of free memory, which a virtual machine may have given back to its
# host and is slow to get again: writing took up to six times as long.
_MAX_WRITE = 1 << 17
# What a new checkpoint replaces in the folder of an old one; all else there is somebody's own.
_OF_CHECKPOINT = re.compile(
    r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|config(_sentence_transformers)?\.json|README\.md"
    r"|generation_config\.json|recipe\.yaml|scores\.json|mergekit_config\.ya?ml|(\w+_)?(pre)?processor_config\.json"
    r"|modules\.json|sentence_\w+_config\.json|\d+_[A-Z]\w*"
)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Shard:
    """One file to write: its header, and where each tensor's bytes go."""

    file: str
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.tensors[-1].end if self.tensors else len(self.header)


def plan_shards(tensors: Iterable[TensorSpec], max_shard_bytes: int) -> list[Shard]:
    """Divides tensors into files, in their order; one that is larger than a file may be gets a file of its own.

    Returns:
        At least one shard. Within a file wide dtypes come first, so that every tensor is aligned to its element.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in tensors:
        if groups[-1] and size + spec.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    count = len(groups)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return [
        _shard(name, group) for name, group in zip(["model.safetensors"] if count == 1 else names, groups, strict=True)
    ]


class CheckpointWriter:
    """Writes the weights of one checkpoint; leaving the context without an error makes them the output.

    Args:
        out: The folder to make. Folders above it are made too.
        tensors: Every tensor to come: name, shape, dtype.
        max_shard_bytes: No file gets larger, unless one tensor is.
        overwrite: Replace a checkpoint that is there, whole, when the new one is complete.

    What else lies in a folder that is replaced (notes, a repository) is in the new one as well.

    Raises:
        OutputError: On entry when the folder is taken, being written by someone else, or the disk is too full; from
            `put` or on leaving when writing fails or tensors are missing. What was there before is then intact.
        ValueError: Two tensors of the same name.
    """

    def __init__(
        self, out: Path, tensors: Iterable[TensorSpec], *, max_shard_bytes: int = 5_000_000_000, overwrite: bool = False
    ) -> None:
        self.out = out.resolve()
        self._shards = plan_shards(tensors, max_shard_bytes)
        self._slots = {info.name: (shard, info) for shard in self._shards for info in shard.tensors}
        if len(self._slots) != sum(len(shard.tensors) for shard in self._shards):
            raise ValueError("two tensors have the same name")
        self._overwrite = overwrite
        self._missing = {name: math.prod(info.shape) for name, (_, info) in self._slots.items()}
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        self._stack = ExitStack()

    @property
    def folder(self) -> Path:
        """The temporary folder: add config.json, tokenizer and card here before leaving."""
        return self._beside("partial", str(os.getpid()))

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.nbytes for shard in self._shards)

    def __enter__(self) -> CheckpointWriter:
        with ExitStack() as stack, self._own_errors():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            lock = self.out.parent / f".{self.out.name}.lock"
            stack.enter_context(exclusive(lock, str(self.out), error=OutputError, remove=True))
            self._recover()
            refuse_taken(self.out, self._overwrite)
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.folder.mkdir()
            self._refuse_full_disk()
            for shard in self._shards:
                self._files[shard.file] = _allocate(self.folder / shard.file, shard)
                stack.callback(os.close, self._files[shard.file])
            self._stack = stack.pop_all()
        return self

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor; several threads may, in any order.

        Args:
            name: Its name, one of those announced.
            tensor: Its value, of the shape and dtype announced.

        Raises:
            OutputError: Writing failed.
            ValueError: The tensor was not announced, is another than announced, or was written before.
        """
        _refuse_other(self._slot(name)[1], tensor, whole=True)
        self.put_part(name, 0, tensor.detach().reshape(-1))

    def put_part(self, name: str, start: int, values: torch.Tensor) -> None:
        """Writes some elements of a tensor; several threads may, in any order, each element once.

        Args:
            name: The tensor's name.
            start: Index of the first element in the flat tensor.
            values: The elements, flat, of the dtype announced.

        Raises:
            OutputError, ValueError: As for `put`.
        """
        shard, info = self._slot(name)
        _refuse_other(info, values)
        raw = _bytes_of(values)
        with self._lock:
            self._missing[name] = self._missing.get(name, 0) - values.numel()
            if self._missing[name] < 0:
                raise ValueError(f"tensor {name!r} was written before")
        with self._own_errors():
            position = info.start + start * values.element_size()
            _write_at(self._files[shard.file], raw, position)
            _start_flush(self._files[shard.file], position, len(raw))

    def _slot(self, name: str) -> tuple[Shard, TensorInfo]:
        if name not in self._slots:
            raise ValueError(f"tensor {name!r} was not announced")
        return self._slots[name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack, self._own_errors():
            if isinstance(error, OSError) and error.errno in (*_FULL, errno.EFBIG):
                raise error  # a full disk met outside of `put` gets the same message
            if error is None:
                self._commit()

    def _commit(self) -> None:
        missing = sorted(name for name, count in self._missing.items() if count)
        if missing:
            raise OutputError(f"{self.out} is incomplete: {name_some(missing)} were never written")
        self._write_index()
        self._sync()
        self._keep_others()  # which are on the disk already
        _fsync(self.folder)
        self._replace_output()

    def _beside(self, role: str, mark: str) -> Path:
        return self.out.parent / f".{self.out.name}.{role}-{mark}"

    def _recover(self) -> None:
        """Clears what a killed writer left. The lock is held, so nobody is at work on any of it."""
        for old in self._leftovers("previous"):
            if self.out.exists():
                shutil.rmtree(old)
            else:  # killed between the two renames: the previous output comes back
                old.rename(self.out)
        for partial in self._leftovers("partial"):
            shutil.rmtree(partial)

    def _leftovers(self, role: str) -> list[Path]:
        pattern = re.compile(re.escape(self._beside(role, "").name) + r"\d+")
        return sorted(path for path in self.out.parent.iterdir() if pattern.fullmatch(path.name))

    def _refuse_full_disk(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < self.nbytes:
            raise OutputError(_too_full(self.out, self.nbytes, free))

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        weight_map = {name: shard.file for name, (shard, _) in sorted(self._slots.items())}
        sizes = [info.nbytes for _, info in self._slots.values()]
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        path = self.folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _keep_others(self) -> None:
        """Puts what is no part of a checkpoint into the new folder as well, by links that cost nothing."""
        for path in sorted(self.out.iterdir()) if self.out.is_dir() else ():
            new = self.folder / path.name
            if _OF_CHECKPOINT.fullmatch(path.name) or is_tokenizer_file(path.name) or os.path.lexists(new):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, new, symlinks=True, copy_function=_link)
            else:
                _link(path, new)

    def _sync(self) -> None:
        for path in sorted(self.folder.rglob("*")):
            _fsync(path)
        _fsync(self.folder)

    def _replace_output(self) -> None:
        """Swaps names in one exchange where the system has it: there is no moment without an output."""
        if self.out.exists() and _exchange(self.folder, self.out):
            _fsync(self.out.parent)
            return  # what is called a temporary folder now is the previous output, and is cleared on leaving
        previous = self._beside("previous", str(os.getpid()))
        replacing = self.out.exists()
        if replacing:
            self.out.rename(previous)
        try:
            self.folder.rename(self.out)
        except BaseException:
            if replacing:
                previous.rename(self.out)
            raise
        _fsync(self.out.parent)
        if replacing:
            shutil.rmtree(previous, ignore_errors=True)

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Turns the operating system's errors into ours."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                free = shutil.disk_usage(_existing(self.out)).free
                raise OutputError(_too_full(self.out, self.nbytes, free)) from error
            if error.errno == errno.EFBIG:
                raise OutputError(_too_long(self.out, max(shard.nbytes for shard in self._shards))) from error
            raise OutputError(f"{self.out} cannot be written: {error.strerror or error}") from error


def refuse_taken(out: Path, overwrite: bool) -> None:
    """Raises OutputError where `out` is something that a checkpoint may not take the place of."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file: a checkpoint is a folder")
    content = sorted(path.name for path in out.iterdir())
    if content and not overwrite:
        raise OutputError(f"{out} is not empty: choose another folder, or allow overwriting it")
    weights = [name for name in content if name == "config.json" or name.endswith(".safetensors")]
    if content and not weights:
        raise OutputError(f"{out} is not overwritten: it holds {name_some(content)} and no checkpoint")


def _link(source: str | Path, target: str | Path) -> None:
    """Gives a file a second name, or copies it where the file system cannot."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _shard(file: str, specs: list[TensorSpec]) -> Shard:
    ordered = sorted(specs, key=lambda spec: -DTYPE_BYTES[spec.dtype])
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in ordered:
        offsets = [position, position + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # Data starts as memory does, at a multiple of 64: some processors copy from a buffer into a file at a fraction of
    # their speed where the place in the file is a few bytes ahead of the buffer's, within their pages.
    text += b" " * (-(8 + len(text)) % 64)
    header = len(text).to_bytes(8, "little") + text
    infos, position = [], len(header)
    for spec in ordered:
        infos.append(TensorInfo(spec.name, spec.shape, spec.dtype, position, position + spec.nbytes))
        position += spec.nbytes
    return Shard(file, header, tuple(infos))


def _allocate(path: Path, shard: Shard) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _reserve(descriptor, shard.nbytes)
        _write_at(descriptor, memoryview(shard.header), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)  # a system or file system that cannot reserve: a full disk shows when writing


def _refuse_other(info: TensorInfo, tensor: torch.Tensor, *, whole: bool = False) -> None:
    """Refuses another dtype than announced, and for a whole tensor another shape."""
    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape) if whole else info.shape
    if (dtype, shape) != (info.dtype, info.shape):
        got, announced = (f"{d} {shape_text(s)}" for d, s in ((dtype, shape), (info.dtype, info.shape)))
        raise ValueError(f"tensor {info.name!r} is {got}, announced was {announced}")


def _bytes_of(values: torch.Tensor) -> memoryview:
    import torch

    flat = values.cpu().contiguous()
    return memoryview(flat.view(torch.uint8).numpy().data).cast("B") if flat.numel() else memoryview(b"")


def _write_at(descriptor: int, raw: memoryview, position: int) -> None:
    done = 0
    while done < len(raw):
        done += os.pwrite(descriptor, raw[done : done + _MAX_WRITE], position + done)


def _start_flush(descriptor: int, position: int, size: int) -> None:
    """Has the disk begin with what was written, so that the sync at the end finds most of it done.

    Advice that dirty pages are not needed makes the kernel write them out, without waiting and without dropping them.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, position, size, os.POSIX_FADV_DONTNEED)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(left: Path, right: Path) -> bool:
    """Swaps the names of two folders at once; False where the system or the file system cannot (then nothing is done).

    Linux's renameat2 with RENAME_EXCHANGE, https://man7.org/linux/man-pages/man2/rename.2.html
    """
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(left), here, os.fsencode(right), exchange) == 0


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _too_full(out: Path, needed: int, free: int) -> str:
    return f"{out} cannot be written: the disk is full ({needed} bytes needed, {free} free)"


def _too_long(out: Path, longest: int) -> str:
    return (
        f"{out} cannot be written: a file of {longest} bytes is longer than the file system or this user's limit "
        "(ulimit -f) allows; a smaller --max-shard-size makes smaller files"
    )
