"""Tensors of a checkpoint: views of a memory map, and the pickled ones for those who ask."""

from __future__ import annotations

import json
import mmap
import os
import platform
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from evomerge.checkpoints.dtypes import DTYPE_BYTES, dtype_name, torch_dtype
from evomerge.checkpoints.fingerprint import FingerprintCache, content_fingerprint, derived_fingerprint
from evomerge.checkpoints.header import TensorInfo, TensorSpec
from evomerge.checkpoints.weight_files import TensorIndex, WeightFiles, read_tensor_index, signature
from evomerge.errors import CheckpointError, EvoMergeError
from evomerge.system.inputs import watch_map

# Not in Python's mmap module before 3.13. A private map of a file bigger than the memory may otherwise be refused,
# as if all of it could be written to.
_NO_RESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
_FINITE_CHUNK = 1 << 22


class Weights(Protocol):
    """Where a checkpoint's tensors come from: safetensors, a pickle, or a base with an adapter."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def read(self, name: str) -> torch.Tensor: ...

    def release(self, name: str) -> None: ...

    def fingerprint(self, *, anew: bool = False) -> str: ...


class UnwrittenTensor(EvoMergeError):
    """A tensor was asked for of which only the name, the shape and the dtype are there."""


class UnwrittenWeights:
    """Weights of which only the names, the shapes and the dtypes are there.

    Args:
        specs: These.
        fingerprint: What stands for the content.
    """

    files: tuple[Path, ...] = ()

    def __init__(self, specs: Iterable[TensorSpec], fingerprint: str = "") -> None:
        self.tensors = {spec.name: TensorInfo(spec.name, spec.shape, spec.dtype, 0, spec.nbytes) for spec in specs}
        self._fingerprint = fingerprint

    def read(self, name: str) -> torch.Tensor:
        raise UnwrittenTensor(name)

    def release(self, name: str) -> None:
        """Releases nothing."""

    def fingerprint(self, *, anew: bool = False) -> str:
        return self._fingerprint


class SelectedWeights:
    """Tensors of a checkpoint under other names: renamed, left out, or one of them under two names.

    Args:
        weights: The tensors as they are stored.
        sources: Name -> the name that its tensor is stored under.
    """

    def __init__(self, weights: Weights, sources: Mapping[str, str]) -> None:
        self._weights = weights
        self._sources = dict(sorted(sources.items()))
        self._tensors = {name: replace(weights.tensors[stored], name=name) for name, stored in self._sources.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        return self._weights.files

    def read(self, name: str) -> torch.Tensor:
        return self._weights.read(self._sources[name])

    def release(self, name: str) -> None:
        self._weights.release(self._sources[name])

    def fingerprint(self, *, anew: bool = False) -> str:
        return derived_fingerprint("names", self._weights.fingerprint(anew=anew), json.dumps(self._sources))


class MappedWeights:
    """Safetensors files, each mapped once, on first use."""

    def __init__(self, index: TensorIndex) -> None:
        self._index = index
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._index.tensors

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted(self._index.signatures))

    def read(self, name: str) -> torch.Tensor:
        """Gives a view of the mapped file."""
        info = self._index.tensors[name]
        path = self._index.paths[name]
        try:
            dtype = torch_dtype(info.dtype)
        except KeyError:
            message = f"{path}: tensor {name!r}: this version of torch has no dtype {info.dtype}"
            raise CheckpointError(message) from None
        if not info.numel:
            return torch.empty(info.shape, dtype=dtype)
        buffer = self._map(path)
        if info.start % dtype.itemsize:  # the format does not promise alignment, arithmetic needs it
            part = bytearray(memoryview(buffer)[info.start : info.end])
            return torch.frombuffer(part, dtype=dtype).view(info.shape)
        return torch.frombuffer(buffer, dtype=dtype, count=info.numel, offset=info.start).view(info.shape)

    def release(self, name: str) -> None:
        """Takes the tensor's pages out of this process's memory; a view of them is still good and brings them back."""
        info, mapped = self._index.tensors[name], self._maps.get(self._index.paths[name])
        if mapped is None or not hasattr(mmap, "MADV_DONTNEED") or info.end == info.start:
            return
        start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, info.end - start)

    def fingerprint(self, *, anew: bool = False) -> str:
        return FingerprintCache(self._index.signatures).get_or(
            lambda: content_fingerprint(self.tensors, self.read), anew=anew
        )

    def _map(self, path: Path) -> mmap.mmap:
        with self._lock:
            if path not in self._maps:
                if signature(path) != self._index.signatures[path]:
                    raise CheckpointError(f"{path} has changed since it was opened: open the checkpoint again")
                self._maps[path] = _private_map(path)
                watch_map(path, self._index.signatures[path][0])
            return self._maps[path]


class PickledWeights:
    """A pickled state dict, loaded without running any code in it (`weights_only`)."""

    def __init__(self, files: WeightFiles) -> None:
        self._files = files.paths
        self._signatures = {path: signature(path) for path in files.paths}
        self._state: dict[str, torch.Tensor] = {}
        for path in files.paths:
            self._state |= _load_pickle(path)
        self._tensors = {name: _info_of(name, self._state[name]) for name in sorted(self._state)}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        return self._files

    def read(self, name: str) -> torch.Tensor:
        return self._state[name].detach().contiguous()

    def release(self, name: str) -> None:
        """Does nothing: the whole state dict stays in memory."""

    def fingerprint(self, *, anew: bool = False) -> str:
        return FingerprintCache(self._signatures).get_or(
            lambda: content_fingerprint(self.tensors, self.read), anew=anew
        )


def open_weights(files: WeightFiles, *, allow_pickle: bool = False) -> Weights:
    """Opens files of weights.

    Raises:
        CheckpointError: They are corrupt, or pickled without leave.
    """
    if files.kind == "safetensors":
        return MappedWeights(read_tensor_index(files))
    if not allow_pickle:
        raise CheckpointError(
            f"{files.paths[0]} is a pickle, which can run code when loaded: convert it to safetensors, or allow it "
            "with --allow-pickle (it is then loaded as weights only)"
        )
    return PickledWeights(files)


def is_finite(tensor: torch.Tensor) -> bool:
    """Tells whether no element is NaN or infinite, with a few megabytes of temporary memory."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _FINITE_CHUNK):
        chunk = flat[start : start + _FINITE_CHUNK]
        if tensor.is_complex():
            chunk = torch.view_as_real(chunk)
        elif tensor.dtype.itemsize == 1:
            chunk = chunk.float()
        # Both ends are NaN where any element is; thirty times faster than a mask of every element.
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(chunk)):
            return False
    return True


def _private_map(path: Path) -> mmap.mmap:
    # Private and writable: torch warns of read-only buffers. What is written would stay in this process's memory.
    try:
        with path.open("rb") as file:
            if os.name == "nt":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flags = mmap.MAP_PRIVATE | _NO_RESERVE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be mapped into memory: {error.strerror}") from error


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        state: Any = _torch_load(path)
    except Exception as error:  # whatever a hostile or broken pickle makes the loader raise is the file's fault
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    wrong = [str(name) for name, value in state.items() if not (isinstance(name, str) and _plain(value))]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]!r} is not a dense tensor")
    return state


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # files older than torch 1.6 have no map
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and dtype_name(value.dtype) in DTYPE_BYTES
        and value.device.type == "cpu"
    )


def _info_of(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, tuple(tensor.shape), dtype_name(tensor.dtype), 0, tensor.numel() * tensor.element_size())
