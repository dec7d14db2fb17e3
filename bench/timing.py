"""Seconds of a piece of work, by the clock and by the processor: for the other scripts."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock, and of the processor over all threads."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Cost:
    """Does some work and returns what it cost."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def best_in_turn(runs: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, Cost]:
    """Returns the least that each run cost in some rounds in which all take turns.

    Other programs may share the machine: what runs in turn meets the same of them.
    """
    costs: dict[Key, list[Cost]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            costs[name].append(timed(run))
    return {name: Cost(min(c.wall for c in some), min(c.cpu for c in some)) for name, some in costs.items()}
