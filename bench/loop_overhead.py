"""What the search itself costs per candidate: ask, record, tell, with nothing to score.

    python bench/loop_overhead.py                                  # 1,000 candidates, about 100 genes
    python bench/loop_overhead.py --candidates 10000 --genes 200
    python bench/loop_overhead.py --algorithms tpe cmaes --candidates 300

Prints milliseconds of CPU per candidate (user time, which other work on the machine hardly changes) over the whole run
and in windows that end at growing numbers of candidates (a loop that slows down shows there), the bytes a candidate
takes in the journal, the CPU seconds to open it again, and the peak memory; every algorithm in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.executors.in_process import InProcess
from evomerge.space.build import build_space
from evomerge.space.space import SearchSpace
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.study.interfaces import AlgorithmSettings, NullTracker
from evomerge.study.loop import search
from evomerge.study.record import Record
from evomerge.system.memory import collect_rarely

WINDOWS = (0.1, 0.3, 0.5, 1.0)  # each a tenth of the run, by the share of it at which it ends
METHODS = ["linear", "task_arithmetic", "ties", "dare", "dare_ties", "slerp", "dfs"]


def space_of(genes: int) -> SearchSpace:
    """A space of four sources with about `genes` genes in mergekit's usual layout."""
    groups = max(1, round(genes / 10))
    return build_space(
        base="models/base",
        sources={name: f"models/{name}" for name in ("one", "two", "three", "four")},
        layer_count=max(30, groups),
        outer=("model.embed_tokens.weight", "model.norm.weight"),
        methods=METHODS,
        layer_groups=groups,
    )


def score(proposal: Proposal) -> Outcome:
    """A fitness made of the recipe's hash: no landscape, the worst case for nobody."""
    return Outcome(int(proposal.recipe_hash[:8], 16) / 2**32, scores={"search": {"task": {"acc": {"value": 0.5}}}})


def user_seconds() -> float:
    """CPU seconds of this process in its own code."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def measure(algorithm: str, candidates: int, genes: int, population: int | None) -> list[str]:
    """One row of the table."""
    collect_rarely()  # as the command line does
    space = space_of(genes)
    marks: list[float] = []

    class Tick(NullTracker):
        def candidate(self, candidate: Candidate) -> None:
            marks.append(user_seconds())

    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "study.log"
        record = Record.open(journal, "bench", space=space)
        settings = AlgorithmSettings(population or ALGORITHMS[algorithm].population)
        marks.append(user_seconds())
        search(
            space,
            ALGORITHMS[algorithm],
            InProcess(score),
            record,
            StopConditions(candidates),
            settings=settings,
            tracker=Tick(),
        )
        size = journal.stat().st_size
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        begin = user_seconds()
        Record.open(journal, "bench", space=space)
        reopen = user_seconds() - begin

    def span(start: int, stop: int) -> str:
        return f"{(marks[stop] - marks[start]) / (stop - start) * 1e3:.1f}"

    return [
        algorithm,
        str(candidates),
        str(space.size),
        span(0, candidates),
        *(span(round((share - 0.1) * candidates), round(share * candidates)) for share in WINDOWS),
        f"{size / candidates / 1e3:.1f}",
        f"{reopen:.1f}",
        f"{peak:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--genes", type=int, default=100)
    parser.add_argument("--population", type=int, help="default: what suits the algorithm")
    parser.add_argument("--algorithms", nargs="+", default=["ga", "random"], choices=sorted(ALGORITHMS))
    arguments = parser.parse_args()
    windows = [f"to {round(share * arguments.candidates)}" for share in WINDOWS]
    header = ["algorithm", "candidates", "genes", "ms each", *windows, "kB each", "reopen s", "peak MB"]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for algorithm in arguments.algorithms:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            cells = pool.submit(
                measure, algorithm, arguments.candidates, arguments.genes, arguments.population
            ).result()
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
