"""Safetensors files made byte by byte, right and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """Writes a file with this header and these tensor bytes.

    A header in bytes is taken as it is; another is encoded and filled up, so that the data start at a multiple of 8.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if not isinstance(header, bytes):
        text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
