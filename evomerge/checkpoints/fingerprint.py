"""Content hashes of checkpoints, remembered between processes so that a model is read through once.

Two checkpoints have the same fingerprint when they hold the same tensors under the same names, however they are split
into files.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.weight_files import Signature, signature
from evomerge.errors import OutputError
from evomerge.system.files import cache_folder, write_atomic
from evomerge.system.hashing import digest

if TYPE_CHECKING:
    import torch

_VERSION = "evomerge checkpoint 1"
_HEX_DIGITS = 32
# A file written to twice within one tick of its file system's clock looks unchanged.
_TICK_NS = 2_000_000_000


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
    entries = [
        json.dumps([name, tensors[name].dtype, tensors[name].shape, content]) + "\n"
        for name, content in zip(names, digests, strict=True)
    ]
    return digest(_VERSION, *entries)


def derived_fingerprint(*parts: str) -> str:
    """Gives the fingerprint of something made from fingerprinted parts and settings."""
    return digest(json.dumps([_VERSION, *parts]))


class FingerprintCache:
    """The remembered fingerprint of one set of files, as they were when their headers were read."""

    def __init__(self, signatures: Mapping[Path, Signature]) -> None:
        self._signatures = signatures
        files = sorted([str(path.resolve()), *signed] for path, signed in signatures.items())
        key = derived_fingerprint("files", json.dumps(files))
        self._path = cache_folder("fingerprints") / key

    def get_or(self, compute: Callable[[], str], *, anew: bool = False) -> str:
        """Gives the remembered fingerprint, else computes it and remembers it if the files have not changed.

        Args:
            compute: Computes it.
            anew: Compute it even where one is remembered.
        """
        remembered = None if anew else self._remembered()
        if remembered is not None:
            return remembered
        fingerprint = compute()
        if self._unchanged() and self._old_enough():
            self._remember(fingerprint)
        return fingerprint

    def _remembered(self) -> str | None:
        try:
            text = self._path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        well_formed = len(text) == _HEX_DIGITS and set(text) <= set("0123456789abcdef")
        return text if well_formed and self._unchanged() else None

    def _unchanged(self) -> bool:
        return all(signature(path) == signed for path, signed in self._signatures.items())

    def _old_enough(self) -> bool:
        return all(time.time_ns() - mtime > _TICK_NS for _, mtime, _, _ in self._signatures.values())

    def _remember(self, fingerprint: str) -> None:
        with suppress(OSError, OutputError):  # a cache that cannot be written costs time, nothing else
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, fingerprint)


def _tensor_digest(tensor: torch.Tensor) -> str:
    import torch

    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return digest(raw.data)
