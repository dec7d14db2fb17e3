"""A search to be killed: ``python -m tests.study.scripted_run FOLDER ALGORITHM BUDGET``; run again, it goes on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.errors import CandidateError
from evomerge.executors.in_process import InProcess
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.study.interfaces import AlgorithmSettings, NullTracker
from evomerge.study.loop import SearchResult, search
from evomerge.study.record import Record
from tests.algorithms.landscapes import Bowl, make_space

SPACE = make_space(layer_groups=2)


def evaluate(proposal: Proposal, pause: float = 0.0) -> Outcome:
    """A landscape with failures and pruned candidates in it, decided by the recipe."""
    time.sleep(pause)
    digit = int(proposal.recipe_hash[0], 16)
    if digit < 2:
        raise CandidateError("the logits are not finite")
    outcome = Bowl(SPACE, 0)(proposal)
    score = float(outcome.fitness or 0.0)
    scores = {"search": {"task": {"acc": {"value": score, "n": 7}}}}
    if digit < 4:
        return Outcome(score, scores, "pruned", "raced out: after 3 of 7 items", estimates={3: score})
    return Outcome(score, scores, estimates={3: score - 0.0625, 7: score})


class Printing(NullTracker):
    """Prints the number of each candidate as soon as it is recorded."""

    def candidate(self, candidate: Candidate) -> None:
        print(candidate.number, flush=True)


def run(folder: Path, algorithm: str, budget: int, pause: float = 0.0) -> SearchResult:
    """Starts or goes on with the run in `folder`."""
    record = Record.open(folder / "study.log", "run", space=SPACE)
    settings = AlgorithmSettings(population=7)
    return search(
        SPACE,
        ALGORITHMS[algorithm],
        InProcess(lambda proposal: evaluate(proposal, pause)),
        record,
        StopConditions(budget),
        seed=5,
        settings=settings,
        tracker=Printing(),
    )


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), pause=0.01)
