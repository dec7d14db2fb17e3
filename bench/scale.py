"""What it costs to score with many workers: Ray on this machine, and a cluster of which only the driver is real.

    python bench/scale.py                    # both, about two minutes
    python bench/scale.py --simulated        # the second alone, no Ray needed

Actors: one to four of them score candidates that sleep. A candidate's overhead is the time of the whole search over
what the sleeping alone would take, per candidate of one actor; the efficiency is the sleeping over the time.

Cluster: up to 256 workers with a clock of their own, which stands still while the driver works and jumps to the next
event otherwise. What is measured is the driver's own time a candidate (proposals, messages, the record), and so how
many workers it could keep busy. The efficiency has in it that a generation waits for its last candidate.
"""

from __future__ import annotations

import argparse
import heapq
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.executors.pool import Begin, Message, Pool, Worker
from evomerge.executors.ray import RayWorkers
from evomerge.report.tables import table
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.loop import search
from evomerge.study.record import Record
from tests.algorithms.landscapes import Bowl
from tests.executors.scripted_worker import OPENER, numbers
from tests.study.scripted_run import SPACE


def searched(pool: Pool, candidates: int, population: int) -> tuple[float, tuple[Candidate, ...]]:
    """Runs a generational search of random recipes; returns its seconds and its candidates."""
    with tempfile.TemporaryDirectory() as folder:
        record = Record.open(Path(folder) / "study.log", "scale", space=SPACE)
        settings = AlgorithmSettings(population=population)
        begin = time.perf_counter()
        stop = StopConditions(candidates)
        found = search(SPACE, ALGORITHMS["random"], pool, record, stop, starts=(), settings=settings).candidates
        return time.perf_counter() - begin, found


def on_this_machine(counts: Sequence[int], pause: float, each: int) -> str:
    """Measures actors that sleep, once they are there."""
    import ray

    rows = []
    for count in counts:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            pool = Pool(RayWorkers(OPENER, (Path(folder), {}, pause), count, {"CPU": 1}), count, numbers)
            try:
                searched(pool, 4 * count, 4 * count)  # which starts them
                started = time.perf_counter() - begin
                seconds, _ = searched(pool, each * count, each * count)
            finally:
                pool.close()
        rows.append(
            [
                str(count),
                f"{started:.1f} s",
                f"{seconds:.2f} s",
                f"{1000 * (seconds / each - pause):.1f} ms",
                f"{pause * each / seconds:.3f}",
            ]
        )
    head = ["actors", "until all are there", f"{each} candidates each", "overhead a candidate", "efficiency"]
    return f"Ray {ray.__version__}, {os.cpu_count()} cores, candidates that sleep {pause:g} s\n{table(head, rows)}"


@dataclass(eq=False)
class Simulated:
    """A worker that takes its time on a clock that is none."""

    name: str
    cluster: Cluster
    proposal: Proposal | None = None

    def give(self, proposal: Proposal, begin: Begin, attached: Any) -> None:
        """Has the outcome ready some seconds later, on the cluster's clock."""
        self.proposal = proposal
        self.cluster.schedule(self, self.cluster.seconds * (0.5 + proposal.number * 0.618 % 1.0))

    def end(self) -> None:
        """Has nothing to end."""


@dataclass
class Cluster:
    """Workers that exist as events on a virtual clock.

    Attributes:
        seconds: What a candidate takes on average.
        clock: Virtual seconds.
    """

    seconds: float
    logs: str = "nowhere"
    clock: float = 0.0
    _events: list[tuple[float, int, Simulated]] = field(default_factory=list)
    _count: int = 0

    def schedule(self, worker: Simulated, seconds: float) -> None:
        """Has a worker answer after some seconds."""
        self._count += 1
        heapq.heappush(self._events, (self.clock + seconds, self._count, worker))

    def start(self, slot: int) -> Worker:
        """Starts a worker, which is ready in a second."""
        worker = Simulated(f"worker {slot}", self)
        self.schedule(worker, 1.0)
        return worker

    def wait(self, workers: Sequence[Worker]) -> tuple[Worker, Message] | None:
        """Takes the next event."""
        self.clock, _, worker = heapq.heappop(self._events)
        if worker.proposal is None:
            return worker, ("ready", {})
        outcome = Bowl(SPACE, 0)(worker.proposal)
        return worker, ("outcome", (outcome, None))

    def close(self) -> None:
        """Has nothing to give back."""


def simulated(counts: Sequence[int], seconds: float, each: int) -> str:
    """Measures the driver of clusters that are not there."""
    rows = []
    for count in counts:
        cluster = Cluster(seconds)
        pool = Pool(cluster, count, numbers)
        real, _ = searched(pool, each * count, 2 * count)
        own = real / (each * count)
        rows.append(
            [
                str(count),
                f"{cluster.clock:.0f} s",
                f"{1000 * own:.2f} ms",
                f"{min(1.0, seconds * each / (cluster.clock + real)):.3f}",
                f"{seconds / own:.0f}",
            ]
        )
    head = ["workers", "virtual time", "driver's own time a candidate", "efficiency", "workers it could keep busy"]
    return f"simulated, candidates of {seconds:g} s, generations of twice the workers\n{table(head, rows)}"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--simulated", action="store_true", help="only the simulated cluster")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds that a candidate sleeps")
    parser.add_argument("--each", type=int, default=20, help="candidates for each actor")
    options = parser.parse_args()
    print(simulated([1, 4, 16, 64, 256], 10.0, 8), flush=True)
    if not options.simulated:
        print(on_this_machine([1, 2, 3, 4], options.pause, options.each))


if __name__ == "__main__":
    main()
