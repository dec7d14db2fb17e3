"""Content hashes of checkpoints, remembered between processes so that a model is read through once.

Two checkpoints have the same fingerprint when they hold the same tensors under the same names, however they are split
into files.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.weight_files import Signature, signature

if TYPE_CHECKING:
    import torch

_VERSION = "evomerge checkpoint 1"
_DIGEST_BYTES = 16
# A file written to twice within one tick of its file system's clock looks unchanged.
_SETTLED_NS = 2_000_000_000


def cache_folder() -> Path:
    """Where EvoMerge keeps what it can compute again: $EVOMERGE_CACHE, else the platform's cache folder."""
    if given := os.environ.get("EVOMERGE_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "evomerge"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "evomerge" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evomerge"


def content_fingerprint(tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> str:
    """Hashes names, dtypes, shapes and bytes, in the order of the names; tensors are hashed by several threads.

    Args:
        tensors: The tensors by name.
        read: Gives one of them.

    Returns:
        32 hexadecimal digits.
    """
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda name: _tensor_digest(read(name)), names))
    whole = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    whole.update(_VERSION.encode())
    for name, digest in zip(names, digests, strict=True):
        entry = json.dumps([name, tensors[name].dtype, tensors[name].shape, digest])
        whole.update(f"{entry}\n".encode())
    return whole.hexdigest()


def derived_fingerprint(*parts: str) -> str:
    """The fingerprint of something made from fingerprinted parts and settings."""
    text = json.dumps([_VERSION, *parts])
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


class Fingerprints:
    """The remembered fingerprint of one set of files, as they were when their headers were read."""

    def __init__(self, signatures: Mapping[Path, Signature]) -> None:
        self._signatures = signatures
        files = sorted([str(path.resolve()), *signed] for path, signed in signatures.items())
        key = derived_fingerprint("files", json.dumps(files))
        self._path = cache_folder() / "fingerprints" / key

    def get_or(self, compute: Callable[[], str]) -> str:
        """The remembered fingerprint, else the computed one, which is then remembered if the files have not moved."""
        known = self._remembered()
        if known is not None:
            return known
        fingerprint = compute()
        if self._unchanged() and self._settled():
            self._remember(fingerprint)
        return fingerprint

    def _remembered(self) -> str | None:
        try:
            text = self._path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        well_formed = len(text) == 2 * _DIGEST_BYTES and set(text) <= set("0123456789abcdef")
        return text if well_formed and self._unchanged() else None

    def _unchanged(self) -> bool:
        return all(signature(path) == signed for path, signed in self._signatures.items())

    def _settled(self) -> bool:
        return all(time.time_ns() - mtime > _SETTLED_NS for _, mtime, _ in self._signatures.values())

    def _remember(self, fingerprint: str) -> None:
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with suppress(OSError):  # a cache that cannot be written costs time, nothing else
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(fingerprint, encoding="ascii")
            temporary.replace(self._path)


def _tensor_digest(tensor: torch.Tensor) -> str:
    import torch

    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=_DIGEST_BYTES).hexdigest()
