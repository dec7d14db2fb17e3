"""What every executor does alike, whatever it scores with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evomerge.errors import OutputError
from evomerge.executors.in_process import InProcess
from evomerge.space.baselines import baselines
from evomerge.study.candidate import Candidate, Outcome, Proposal, first_generation
from evomerge.study.interfaces import Executor
from tests.executors.scripted_worker import actors, numbers, open_scripted, workers
from tests.study.scripted_run import SPACE

PROPOSALS = first_generation(baselines(SPACE), 6)
DEEDS = {1: "fails", 2: "out of memory", 5: "disk full"}


def in_process(folder: Path, count: int) -> Executor:
    opened = open_scripted(folder, DEEDS, 0.0)
    return InProcess(opened.evaluate, lambda history: opened.begin(numbers(history)))


Make = Callable[[Path, int], Executor]
EXECUTORS: dict[str, Make] = {
    "in_process": in_process,
    "local": lambda folder, count: workers(folder, count, DEEDS),
    "ray": lambda folder, count: actors(folder, count, DEEDS),
}


@pytest.fixture(params=["in_process", "local", pytest.param("ray", marks=pytest.mark.slow)])
def executor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Executor]:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    made = EXECUTORS[request.param](tmp_path, 2)
    yield made
    made.close()


def score_all(executor: Executor, proposals: list[Proposal]) -> dict[int, Outcome]:
    """Keeps as many under way as there are slots."""
    waiting, under_way, outcomes = list(proposals), set(), {}
    while waiting or under_way:
        while waiting and len(under_way) < executor.slots:
            executor.submit(waiting[0])
            under_way.add(waiting.pop(0).number)
        proposal, outcome = executor.next_finished()
        under_way.remove(proposal.number)
        outcomes[proposal.number] = outcome
    return outcomes


def test_every_proposal_has_one_outcome_and_a_candidate_s_failure_is_one(executor: Executor) -> None:
    assert executor.slots >= 1
    history = (Candidate.of(PROPOSALS[0], Outcome(0.5)),)
    executor.begin_generation(())
    first = score_all(executor, PROPOSALS[:1])
    executor.begin_generation(history)
    rest = score_all(executor, PROPOSALS[1:5])
    assert sorted({**first, **rest}) == [0, 1, 2, 3, 4]
    for outcome in (*first.values(), *rest.values()):
        assert outcome.seconds["total"] >= 0
        assert (outcome.fitness is None) == (outcome.state == "failed")
    assert rest[1].failure == "CandidateError: the logits are not finite"
    assert rest[2].failure == "MemoryError: "
    assert {o.scores["known"] for o in first.values() if o.state != "failed"} <= {None}
    assert {o.scores["known"] for o in rest.values() if o.state != "failed"} == {(0,)}


def test_the_run_s_trouble_is_raised(executor: Executor) -> None:
    executor.begin_generation(())
    executor.submit(PROPOSALS[5])
    with pytest.raises(OutputError, match="no space left on the disk"):
        executor.next_finished()


def test_closing_twice_is_closing_once(executor: Executor) -> None:
    executor.submit(PROPOSALS[3])
    executor.close()
    executor.close()


def test_only_the_executor_in_this_process_scores_in_it(executor: Executor) -> None:
    outcome = score_all(executor, PROPOSALS[3:5])
    processes = {o.scores["process"] for o in outcome.values() if o.state != "failed"}
    assert (processes == {os.getpid()}) == isinstance(executor, InProcess)
