"""How much memory this machine has to give, and how often a process collects its garbage. Imports no torch."""

from __future__ import annotations

import gc
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")


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
