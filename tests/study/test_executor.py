"""Searches by an executor that scores several candidates at once and is ready with them in any order."""

from __future__ import annotations

import functools
import itertools
import random
import re
from typing import Any

import pytest

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.errors import CandidateError, OutputError
from evomerge.executors.in_process import InProcess, attempt
from evomerge.space.baselines import baselines
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.study.interfaces import AlgorithmSettings, Executor
from evomerge.study.loop import SearchResult, search
from tests.algorithms.landscapes import COSTLY, Memory, plain
from tests.study.scripted_run import SPACE, evaluate

able = [name for name in sorted(ALGORITHMS) if ALGORITHMS[name].asynchronous]
every_asynchronous = pytest.mark.parametrize("algorithm", able)
STARTS = len(baselines(SPACE))
UNRACED = sum(not start.raced for start in baselines(SPACE))
POPULATION = 7
SMALL_POPULATION = 2
"""Of the costly algorithms."""


def population_of(algorithm: str) -> int:
    return SMALL_POPULATION if algorithm in COSTLY else POPULATION


def budget_of(algorithm: str) -> int:
    """Generation 0, and into generation 2 or 3."""
    return STARTS + (SMALL_POPULATION + 1 if algorithm in COSTLY else 2 * POPULATION + 3)


class Shuffled:
    """Takes several proposals and finishes any of them; interrupted by the user after so many."""

    def __init__(self, slots: int, seed: int = 0, scorer: Any = evaluate, last: int | None = None) -> None:
        self.slots = slots
        self.random = random.Random(seed)
        self.scorer = scorer
        self.left = last
        self.under_way: list[Proposal] = []
        self.sizes: list[int] = []
        self.begun: list[tuple[Candidate, ...]] = []
        self.submitted: list[tuple[Proposal, tuple[Candidate, ...]]] = []

    def begin_generation(self, history: tuple[Candidate, ...]) -> None:
        self.begun.append(history)

    def submit(self, proposal: Proposal) -> None:
        self.under_way.append(proposal)
        self.submitted.append((proposal, self.begun[-1]))
        assert len(self.under_way) <= self.slots

    def next_finished(self) -> tuple[Proposal, Outcome]:
        self.sizes.append(len(self.under_way))
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        proposal = self.under_way.pop(self.random.randrange(len(self.under_way)))
        return proposal, attempt(self.scorer, proposal)

    def close(self) -> None:
        self.under_way.clear()


def go(record: Any, executor: Any, stop: StopConditions | int, algorithm: str = "ga", **more: Any) -> SearchResult:
    conditions = StopConditions(stop) if isinstance(stop, int) else stop
    settings = AlgorithmSettings(population=population_of(algorithm))
    return search(SPACE, ALGORITHMS[algorithm], executor, record, conditions, seed=5, settings=settings, **more)


@functools.cache
def whole_run(algorithm: str, asynchronous: bool = False) -> SearchResult:
    """What one at a time gives, if nobody interrupts it."""
    return go(Memory(), InProcess(evaluate), budget_of(algorithm), algorithm, asynchronous=asynchronous)


def ordered(found: tuple[Candidate, ...]) -> list[Any]:
    return sorted(plain(found), key=lambda c: c["number"])


@pytest.mark.parametrize(
    ("algorithm", "slots"),
    [(name, slots) for name in sorted(ALGORITHMS) for slots in ([3] if name in COSTLY else [2, 3, 11])],
)
def test_a_generational_search_is_the_same_for_any_number_at_once(algorithm: str, slots: int) -> None:
    budget, whole = budget_of(algorithm), whole_run(algorithm)
    record = Memory()
    shuffled = go(record, Shuffled(slots), budget, algorithm)
    assert [c.number for c in record.kept] != list(range(budget))  # recorded as they finish
    assert ordered(shuffled.candidates) == plain(whole.candidates)
    assert (shuffled.reason, shuffled.best) == (whole.reason, record.kept[0] if whole.best is None else shuffled.best)
    assert shuffled.best is not None
    assert whole.best is not None
    assert shuffled.best.number == whole.best.number


def test_what_the_user_interrupts_goes_on_with_another_number_at_once() -> None:
    budget = budget_of("ga")
    whole = plain(whole_run("ga").candidates)
    for last in range(0, budget, 3):
        record = Memory()
        first = go(record, Shuffled(3, last, last=last), budget)
        assert (first.reason, len(first.candidates)) == ("interrupted", last)
        assert ordered(go(record, Shuffled(1 + last % 4, last), budget).candidates) == whole


@pytest.mark.parametrize(
    ("algorithm", "slots", "budget"),
    [
        (name, *pair)
        for name in able
        for pair in (
            [(1, 1), (2, budget_of(name)), (5, STARTS + 1)]
            if name in COSTLY
            else itertools.product([1, 2, 5], [1, STARTS, STARTS + 1, budget_of(name)])
        )
    ],
)
def test_asynchronous_budgets_are_exact_and_nobody_idles(algorithm: str, slots: int, budget: int) -> None:
    record, executor = Memory(), Shuffled(slots, 1)
    finished = go(record, executor, budget, algorithm, asynchronous=True)
    assert finished.reason == "budget"
    assert sorted(c.number for c in record.kept) == list(range(budget))
    assert len({c.recipe_hash for c in record.kept}) == budget
    # All slots are taken until there is nothing left to propose.
    assert executor.sizes == [min(slots, budget - done) for done in range(budget)]
    for candidate in record.kept:
        assert candidate.generation == max(0, 1 + (candidate.number - STARTS) // population_of(algorithm))
    places = {c.number: place for place, c in enumerate(record.kept)}
    for proposal, known in executor.submitted:
        assert set(proposal.parents) <= {c.number for c in record.kept[: places[proposal.number]]}
        if proposal.number >= UNRACED:
            # Compared with, and bred from, what had finished by then, of whatever generation.
            assert set(proposal.parents) <= {c.number for c in known}
            assert {c.state for c in known} <= {"done", "failed", "pruned"}
        else:
            assert known == ()


@every_asynchronous
def test_an_asynchronous_search_of_one_at_a_time_is_the_same_whenever_it_is_stopped(algorithm: str) -> None:
    budget = budget_of(algorithm)
    whole = plain(whole_run(algorithm, asynchronous=True).candidates)
    places = {"gp": [STARTS + 1], "tpe": [STARTS - 1, STARTS + 3, STARTS + POPULATION, budget - 1]}
    for last in places.get(algorithm, range(0, budget, 2)):
        record = Memory()
        go(record, Shuffled(1, last=last), budget, algorithm, asynchronous=True)
        assert plain(go(record, InProcess(evaluate), budget, algorithm, asynchronous=True).candidates) == whole


def test_an_asynchronous_search_goes_on_from_its_record() -> None:
    """With holes in it, where the interruption has cost what was under way: each number is given out once."""
    budget, holes = budget_of("ga"), 0
    for last in range(1, budget, 2):
        record = Memory()
        go(record, Shuffled(4, last, last=last), budget, asynchronous=True)
        before = list(record.kept)
        holes += [c.number for c in sorted(before, key=lambda c: c.number)] != list(range(len(before)))
        assert go(record, Shuffled(3, last), budget, asynchronous=True).reason == "budget"
        assert record.kept[: len(before)] == before
        assert sorted(c.number for c in record.kept) == list(range(budget))
        assert len({c.recipe_hash for c in record.kept}) == budget
    assert holes > 5


def test_algorithms_see_what_is_under_way_as_pending() -> None:
    seen: list[tuple[Candidate, ...]] = []

    def looking(space: Any, history: tuple[Candidate, ...], *rest: Any) -> list[Proposal]:
        seen.append(history)
        return ALGORITHMS["ga"](space, history, *rest)

    settings = AlgorithmSettings(population=POPULATION)
    record: Any = Memory()
    search(SPACE, looking, Shuffled(3), record, StopConditions(STARTS + 9), settings=settings, asynchronous=True)
    for history in seen:
        assert [c.number for c in history] == list(range(len(history)))
        waiting = [c for c in history if c.state == "pending"]
        assert len(waiting) == 2
        assert all(c.fitness is None for c in waiting)
    assert "pending" not in {c.state for c in record.kept}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ten_consecutive_numbers_that_fail_stop_a_search(asynchronous: bool) -> None:
    """By number, whatever finishes first; what is under way is still recorded."""

    def broken(proposal: Proposal) -> Outcome:
        if proposal.number == 8 or proposal.number < 3:
            return Outcome(0.1)
        raise CandidateError("the task has no items")

    record = Memory()
    finished = go(record, Shuffled(4, 3, broken), 100, asynchronous=asynchronous)
    assert finished.reason == "failures"
    found = re.match(r"(\d+) candidates in a row failed with CandidateError; the last one, (\d+) ", finished.message)
    assert found is not None
    row, last = int(found[1]), int(found[2])
    assert row >= 10
    assert last - row >= 8  # 8 is not one of them
    numbers = sorted(c.number for c in record.kept)
    assert set(range(last - row + 1, last + 1)) <= set(numbers)
    assert len(numbers) <= 30
    # Another chance: as many again.
    assert go(record, Shuffled(4, 3, broken), 100, asynchronous=asynchronous).reason == "failures"
    assert len(record.kept) >= len(numbers) + 10


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_items_suffice_for_the_same_candidates(slots: int) -> None:
    def scored(proposal: Proposal) -> Outcome:
        items = 3 + proposal.number % 4
        return Outcome(0.5 + proposal.number / 1000, estimates={items: 0.5})

    alone = go(Memory(), InProcess(scored), StopConditions(100, items=120))
    for seed in range(5):
        record = Memory()
        finished = go(record, Shuffled(slots, seed, scored), StopConditions(100, items=120))
        assert finished.reason == "items"
        assert plain(record.kept) == plain(alone.candidates)
        again = go(record, Shuffled(slots, seed, scored), StopConditions(100, items=120))
        assert (again.reason, len(record.kept)) == ("items", len(alone.candidates))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_stale_generations_stop_a_search_of_several_at_once(asynchronous: bool) -> None:
    def flat(proposal: Proposal) -> Outcome:
        return Outcome(0.9 if proposal.number == STARTS + 8 else 0.5)  # in generation 2

    record = Memory()
    stop = StopConditions(200, stale_generations=3)
    finished = go(record, Shuffled(3, 0, flat), stop, asynchronous=asynchronous)
    assert finished.reason == "stale"
    assert f"candidate than {STARTS + 8}" in finished.message
    # Generation 5 is complete: the third after that of the best.
    assert set(range(STARTS + 5 * POPULATION)) <= {c.number for c in record.kept}
    # Asynchronously, others are proposed until the last of generation 5 has finished.
    assert len(record.kept) < STARTS + (7 if asynchronous else 5) * POPULATION + 1
    again = go(record, Shuffled(3, 0, flat), stop, asynchronous=asynchronous)
    assert (again.reason, again.candidates) == ("stale", finished.candidates)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_hours_are_shared_by_what_is_scored_at_once(asynchronous: bool) -> None:
    """Eight candidates of a second each are four seconds of two at a time."""

    class Slow(Shuffled):
        def next_finished(self) -> tuple[Proposal, Outcome]:
            proposal, _ = super().next_finished()
            return proposal, Outcome(0.5, seconds={"total": 1.0})

    record = Memory()
    finished = go(record, Slow(2), StopConditions(100, hours=4 / 3600), asynchronous=asynchronous)
    assert finished.reason == "hours"
    assert len(record.kept) == 9  # with the one that was under way


def test_an_exhausted_space_ends_an_asynchronous_search() -> None:
    def dry(space: Any, history: Any, numbers: range, *rest: Any) -> list[Proposal]:
        return [] if numbers.start > STARTS + 4 else ALGORITHMS["random"](space, history, numbers, *rest)

    record: Any = Memory()
    finished = search(SPACE, dry, Shuffled(3), record, StopConditions(100), asynchronous=True)
    assert finished.reason == "exhausted"
    assert len(record.kept) == STARTS + 5


def test_the_run_s_trouble_is_not_the_candidate_s() -> None:
    def full(proposal: Proposal) -> Outcome:
        raise OutputError("no space left on the disk")

    executors: list[Executor] = [Shuffled(2, 0, full), InProcess(full)]
    for executor in executors:
        with pytest.raises(OutputError, match="no space left"):
            go(Memory(), executor, 10)
