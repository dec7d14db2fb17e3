"""A few threads, each of which computes alone.

One torch thread per worker and no barrier between them: torch's own threads wait for each other at the end of every
small operation, which costs most where other processes compete for the cores, and what one worker reads and writes
fits in its own core's cache.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


def run_all(work: Iterable[Callable[[], T]], threads: int) -> list[T]:
    """Runs pieces of work, started in their order, and gives their results in that order.

    Raises:
        Exception: The first error of a piece, after the others have ended.
    """
    pool = _workers(os.getpid(), threads)
    futures = [pool.submit(piece) for piece in work]
    try:
        wait(futures)
    finally:  # stopped by the user: nothing may go on writing
        for future in futures:
            future.cancel()
        wait(futures)
    return [future.result() for future in futures]


@functools.lru_cache(maxsize=2)
def _workers(process: int, threads: int) -> ThreadPoolExecutor:
    """Keeps some threads, so that they use again what they free; a forked process needs its own."""
    before, started = torch.get_num_threads(), threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first question takes over the common number: ask before setting its own
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "worker", initializer=start)
    for _ in range(threads):  # a thread that waits takes no work, so each of these starts another
        pool.submit(int)
    started.wait()
    torch.set_num_threads(before)  # torch hands the last number set to every thread that starts from here on
    return pool
