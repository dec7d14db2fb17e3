"""The loop: an exact budget, the same run whatever interrupts it, and an end for every reason."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.errors import CandidateError
from evomerge.executors.in_process import InProcess
from evomerge.space.baselines import baselines
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.study.interfaces import AlgorithmSettings, NullTracker
from evomerge.study.loop import SearchResult, search
from evomerge.study.record import Record
from tests.algorithms.landscapes import COSTLY, Bowl, Memory, every_algorithm, make_space, plain
from tests.study.scripted_run import SPACE, evaluate

POPULATION = 7
SMALL_POPULATION = 2
"""Of the costly algorithms."""
SETTINGS = AlgorithmSettings(population=POPULATION)
STARTS = len(baselines(SPACE))


def go(
    record: Any, stop: StopConditions, algorithm: str = "ga", scorer: Any = evaluate, begin: Any = None, **more: Any
) -> SearchResult:
    settings = AlgorithmSettings(population=SMALL_POPULATION) if algorithm in COSTLY else SETTINGS
    return search(
        SPACE, ALGORITHMS[algorithm], InProcess(scorer, begin), record, stop, seed=5, settings=settings, **more
    )


def budget_of(algorithm: str) -> int:
    """Generation 0, and into generation 2 or 3."""
    return STARTS + (SMALL_POPULATION + 1 if algorithm in COSTLY else 2 * POPULATION + 2)


@functools.cache
def whole_run(algorithm: str) -> SearchResult:
    """What a search gives that nothing interrupts."""
    return go(Memory(), StopConditions(budget_of(algorithm)), algorithm)


@every_algorithm
@pytest.mark.parametrize("budget", [1, STARTS - 1, STARTS, STARTS + 1, STARTS + 17])
def test_the_budget_is_exact_and_no_recipe_is_scored_twice(algorithm: str, budget: int) -> None:
    if algorithm in COSTLY:
        budget = min(budget, STARTS + 2)
    finished = go(Memory(), StopConditions(budget), algorithm)
    assert finished.reason == "budget"
    assert [c.number for c in finished.candidates] == list(range(budget))
    assert len({c.recipe_hash for c in finished.candidates}) == budget


def test_generations_have_the_size_asked_for_and_breed_from_earlier_ones() -> None:
    candidates = go(Memory(), StopConditions(STARTS + 21)).candidates
    assert Counter(c.generation for c in candidates) == {0: STARTS, 1: 7, 2: 7, 3: 7}
    by_number = {c.number: c for c in candidates}
    assert all(by_number[p].generation < c.generation for c in candidates for p in c.parents)
    assert all(c.parents for c in candidates if c.generation > 0 and c.operator != "immigrant")
    assert {"done", "failed", "pruned"} == {c.state for c in candidates}


@every_algorithm
def test_stopped_anywhere_and_resumed_it_is_the_same_run(algorithm: str) -> None:
    budget = budget_of(algorithm)
    whole = plain(whole_run(algorithm).candidates)
    # In generation 0, at the edges of a generation and within one; everywhere for the default.
    places = [0, STARTS - 1, STARTS, STARTS + 3, STARTS + 6, STARTS + 7, budget - 1]
    few = {"ga": range(budget), "tpe": [STARTS - 1, STARTS + 3, STARTS + 7, budget - 1], "gp": [STARTS + 1]}
    for stop_at in few.get(algorithm, places):
        record = Memory()

        def interrupted(proposal: Proposal, last: int = stop_at) -> Outcome:
            if proposal.number == last:
                raise KeyboardInterrupt
            return evaluate(proposal)

        first = go(record, StopConditions(budget), algorithm, interrupted)
        assert (first.reason, len(first.candidates)) == ("interrupted", stop_at)
        second = go(record, StopConditions(budget), algorithm)
        assert second.reason == "budget"
        assert plain(second.candidates) == whole


@every_algorithm
def test_an_extended_run_begins_like_the_long_one(algorithm: str) -> None:
    record = Memory()
    go(record, StopConditions(STARTS + 1), algorithm)
    extended = go(record, StopConditions(budget_of(algorithm)), algorithm)
    assert plain(extended.candidates) == plain(whole_run(algorithm).candidates)


def test_a_hole_in_the_record_is_filled_with_the_same_candidate() -> None:
    whole = go(Memory(), StopConditions(STARTS + 10)).candidates
    record = Memory()
    # As several workers leave it: the later candidates of a generation are done, an earlier one is lost.
    record.kept = [c for c in whole if c.number != STARTS + 4]
    finished = go(record, StopConditions(STARTS + 10))
    assert sorted(plain(finished.candidates), key=lambda c: c["number"]) == plain(whole)


def test_a_failing_candidate_is_recorded_with_its_reason_and_the_run_goes_on() -> None:
    def sometimes(proposal: Proposal) -> Outcome:
        if proposal.number == 2:
            raise MemoryError("no room for the logits")
        if proposal.number == 3:
            return Outcome(float("nan"))
        if proposal.number == 4:
            return Outcome(None, state="failed")
        return Outcome(0.5)

    candidates = go(Memory(), StopConditions(STARTS + 5), scorer=sometimes).candidates
    assert len(candidates) == STARTS + 5
    assert [(c.state, c.failure) for c in candidates[2:5]] == [
        ("failed", "MemoryError: no room for the logits"),
        ("failed", "not finite: the fitness is nan"),
        ("failed", "unknown: no reason given"),
    ]
    assert all(c.fitness is None for c in candidates[2:5])
    assert not {2, 3, 4} & {parent for c in candidates for parent in c.parents}


def test_ten_failures_of_one_kind_in_a_row_stop_with_a_diagnosis_and_a_resumed_run_tries_again() -> None:
    def broken(proposal: Proposal) -> Outcome:
        if proposal.number >= 3:
            raise CandidateError("the task has no items")
        return Outcome(0.1)

    record = Memory()
    finished = go(record, StopConditions(100), scorer=broken)
    assert finished.reason == "failures"
    assert len(finished.candidates) == 13
    assert "10 candidates in a row failed with CandidateError" in finished.message
    assert "the task has no items" in finished.message
    assert go(record, StopConditions(30)).reason == "budget"


def test_failures_of_changing_kinds_do_not_stop() -> None:
    def broken(proposal: Proposal) -> Outcome:
        raise (ValueError if proposal.number % 2 else CandidateError)("no")

    finished = go(Memory(), StopConditions(30), scorer=broken)
    assert (finished.reason, finished.best) == ("budget", None)


def test_candidates_that_a_race_stopped_are_no_failures() -> None:
    """Nor do they join the failures before them and behind them to one row: nine, one raced out, nine."""

    def raced(proposal: Proposal) -> Outcome:
        if proposal.number % 10:
            raise CandidateError("the logits are not finite")
        return Outcome(0.25, state="pruned", failure="raced out: below the cut-off")

    assert go(Memory(), StopConditions(50), scorer=raced).reason == "budget"
    pruned = Outcome(0.25, state="pruned", failure="raced out: below the cut-off")
    assert go(Memory(), StopConditions(50), scorer=lambda proposal: pruned).reason == "budget"


def test_stale_generations_stop_the_run_and_a_better_candidate_restarts_the_count() -> None:
    def flat(proposal: Proposal) -> Outcome:
        return Outcome(0.9 if proposal.number == STARTS + 8 else 0.5)  # in generation 2

    finished = go(Memory(), StopConditions(200, stale_generations=3), scorer=flat)
    assert finished.reason == "stale"
    assert max(c.generation for c in finished.candidates) == 5
    assert f"candidate than {STARTS + 8}" in finished.message


def rising(proposal: Proposal) -> Outcome:
    """Better every generation until generation 3, with the best of each generation at its end."""
    return Outcome(0.1 * min(proposal.generation, 3) + 0.001 * proposal.number / (1 + proposal.generation))


def test_a_fitness_that_is_good_enough_ends_the_run_at_its_generations_end() -> None:
    """Generation 2 begins with 0.2 and a little; a pruned candidate's estimate is not enough."""

    def raced(proposal: Proposal) -> Outcome:
        outcome = rising(proposal)
        return Outcome(0.9, state="pruned") if proposal.number == STARTS else outcome

    whole = go(Memory(), StopConditions(200, fitness=0.2), scorer=raced)
    assert whole.reason == "target"
    assert len(whole.candidates) == STARTS + 14
    assert whole.message.endswith("; 0.2 was asked for")
    # Stopped in the middle of it and resumed: the same.
    record = Memory()

    def interrupted(proposal: Proposal) -> Outcome:
        if len(record) == STARTS + 10:
            raise KeyboardInterrupt
        return raced(proposal)

    go(record, StopConditions(200, fitness=0.2), scorer=interrupted)
    resumed = go(record, StopConditions(200, fitness=0.2), scorer=raced)
    assert resumed.reason == "target"
    assert sorted(plain(resumed.candidates), key=lambda c: c["number"]) == plain(whole.candidates)
    # Its end is where it was, however often it is asked for.
    assert len(go(record, StopConditions(200, fitness=0.2), scorer=raced).candidates) == STARTS + 14
    assert go(Memory(), StopConditions(STARTS, fitness=-1.0), scorer=rising).reason == "budget"


def test_a_run_that_was_good_enough_goes_on_when_it_is_extended() -> None:
    record = Memory()
    first = go(record, StopConditions(200, fitness=0.2), scorer=rising)
    count = len(first.candidates)
    assert go(record, StopConditions(count + 20, fitness=0.2, since=count), scorer=rising).reason == "budget"
    # A higher one still counts.
    more = Memory()
    more.kept = list(first.candidates)
    again = go(more, StopConditions(200, fitness=0.3, since=count), scorer=rising)
    assert (again.reason, len(again.candidates)) == ("target", count + 7)


def test_staleness_counts_from_where_a_stale_run_was_extended() -> None:
    """Nothing gets better after generation 3: generations 4 and 5 are stale, and again two from the extension on."""
    record = Memory()
    flat = StopConditions(200, stale_generations=2)

    def level(proposal: Proposal) -> Outcome:
        return Outcome(0.1 * min(proposal.generation, 3))

    first = go(record, flat, scorer=level)
    count = len(first.candidates)
    assert (first.reason, count) == ("stale", STARTS + 5 * 7)
    assert len(go(record, flat, scorer=level).candidates) == count  # not extended: it has ended
    extended = go(record, StopConditions(300, stale_generations=2, since=count), scorer=level)
    assert (extended.reason, len(extended.candidates)) == ("stale", count + 2 * 7)
    # Killed and resumed on the way, it ends there too; and a better candidate on the way restarts the count.
    record.kept = list(extended.candidates[: count + 9])
    assert (
        len(go(record, StopConditions(300, stale_generations=2, since=count), scorer=level).candidates) == count + 2 * 7
    )
    record.kept = list(first.candidates)

    def later(proposal: Proposal) -> Outcome:
        return Outcome(0.9) if proposal.generation == 7 else level(proposal)

    found = go(record, StopConditions(300, stale_generations=2, since=count), scorer=later)
    assert (found.reason, max(c.generation for c in found.candidates)) == ("stale", 9)


def test_hours_count_over_all_sessions() -> None:
    """A session that finds them spent scores nothing; with more of them it goes on."""
    record = Memory()
    first = go(record, StopConditions(9), scorer=lambda proposal: Outcome(0.5))
    spent = sum(float(c.seconds["total"]) for c in first.candidates) / 3600
    finished = go(record, StopConditions(100, hours=0.9 * spent), scorer=lambda proposal: Outcome(0.5))
    assert (finished.reason, len(finished.candidates)) == ("hours", 9)
    finished = go(record, StopConditions(100, hours=spent + 1e-12), scorer=lambda proposal: Outcome(0.5))
    assert (finished.reason, len(finished.candidates)) == ("hours", 10)


def test_an_exhausted_space_ends_the_run() -> None:
    fixed = {name: {"low": 1.0, "high": 1.0} for name in ("weight", "lambda", "density")}
    space = make_space(methods=("task_arithmetic", "ties"), layer_groups=1, gene_overrides=fixed)
    record: Any = Memory()
    finished = search(
        space, ALGORITHMS["ga"], InProcess(Bowl(space, 0)), record, StopConditions(100), settings=SETTINGS
    )
    assert finished.reason == "exhausted"
    assert len(finished.candidates) <= len(baselines(space)) + 1


def test_the_tracker_sees_each_candidate_after_it_is_recorded(tmp_path: Path) -> None:
    record = Record.open(tmp_path / "study.log", "run", space=SPACE)
    seen: list[tuple[int, int]] = []

    class Look(NullTracker):
        def candidate(self, candidate: Candidate) -> None:
            seen.append((candidate.number, len(record)))

    go(record, StopConditions(5), tracker=Look())
    assert seen == [(n, n + 1) for n in range(5)]


def test_before_a_generation_is_scored_the_earlier_ones_are_shown() -> None:
    """On a resumed record too, and never those of the generation itself, but for the unraced of generation 0."""
    unraced = sum(not start.raced for start in baselines(SPACE))
    assert 0 < unraced < STARTS
    shown: list[tuple[int, ...]] = []
    record = Memory()

    def begin(history: tuple[Candidate, ...]) -> None:
        shown.append(tuple(c.number for c in history))

    go(record, StopConditions(STARTS + 3), begin=begin)
    assert shown == [(), tuple(range(unraced)), tuple(range(STARTS))]
    go(record, StopConditions(STARTS + 9), begin=begin)
    assert shown[3:] == [tuple(range(STARTS)), tuple(range(STARTS + 7))]


def test_items_end_a_search_where_they_ended_it_before() -> None:
    """Five items a candidate: 23 are reached with the fifth; the same record has no room for a sixth."""
    record = Memory()
    for _ in range(2):
        finished = go(
            record, StopConditions(100, items=23), scorer=lambda proposal: Outcome(0.5, estimates={2: 0.4, 5: 0.5})
        )
        assert (finished.reason, len(finished.candidates)) == ("items", 5)


def test_a_pruned_candidate_is_bred_from_with_its_estimate_and_never_the_best() -> None:
    def raced(proposal: Proposal) -> Outcome:
        return Outcome(0.9, state="pruned") if proposal.number in (2, 3) else Outcome(0.1)

    finished = go(Memory(), StopConditions(STARTS + 7), scorer=raced)
    assert finished.best is not None
    assert finished.best.number == 0
    used = [parent for c in finished.candidates for parent in c.parents]
    assert {2, 3} & set(used)
