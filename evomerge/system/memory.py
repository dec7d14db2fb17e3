"""How much memory this machine has to give, and how often a process collects its garbage. Imports no torch."""

from __future__ import annotations

import gc
import re
from pathlib import Path

from evomerge.errors import BadInput

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def available(meminfo: Path = MEMINFO) -> int | None:
    """Estimates the bytes that can be had without swapping, as the kernel does; None where it does not say."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(parts[1]) * 1024 for parts in fields), None)


def own_memory(status: Path = STATUS) -> int:
    """Returns the bytes that this process has written, without files that it maps; 0 where the kernel does not say."""
    try:
        lines = status.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = (line.split() for line in lines if line.startswith("RssAnon:"))
    return next((int(parts[1]) * 1024 for parts in fields), 0)


def collect_rarely() -> None:
    """Makes full garbage collections rare: what torch's import and a long history hold would be searched each time."""
    gc.set_threshold(100_000, 50, 100)


def parse_size(size: str | int, key: str) -> int:
    """ "5GB" -> 5,000,000,000.

    Args:
        size: Bytes, or text with a unit.
        key: What has this size, for the message.

    Raises:
        BadInput: For anything that is not a number of bytes with a unit.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", size, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise BadInput(f"{key}: '{size}' is no size such as 500MB or 5GB")
    unit = _UNITS[match[2].upper()]
    return int(float(match[1]) * (1024 ** list(_UNITS.values()).index(unit) if match[3] else unit))
