"""The loop of a search: generation 0, then generations of proposals, scored and recorded one by one.

All state is in the record. The proposals of a generation depend on the candidates of earlier generations only, so a
generation that was interrupted is proposed again, the same, and what is recorded of it is not scored twice.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evomerge.errors import BadInput, OutputError
from evomerge.search.baselines import Start, baselines, first_generation
from evomerge.search.candidate import Candidate, Outcome, Proposal, best, ranked, spent_items
from evomerge.search.front import latest_improvement
from evomerge.search.propose import Algorithm, AlgorithmSettings
from evomerge.search.record import Record
from evomerge.search.space import SearchSpace

FAILURES_IN_A_ROW = 10

Reason = Literal["budget", "exhausted", "stale", "target", "hours", "items", "failures", "interrupted"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stop:
    """When to stop.

    Attributes:
        candidates: The budget: done + failed + pruned.
        hours: Time spent scoring, over all sessions of the run; None for no limit.
        stale_generations: Generations in a row without a better candidate, or with several objectives without more
            hypervolume; None for no limit.
        items: Items scored, over all candidates; None for no limit.
        slope_items: Items that asking for the slopes of one candidate counts as.
        fitness: A fitness that is good enough, of a candidate with a full score at the end of a generation.
        since: The search had ended for want of progress, or because it was good enough, with this many candidates, and
            was extended: staleness counts from there, and a fitness that they had reached ends nothing any more.
    """

    candidates: int
    hours: float | None = None
    stale_generations: int | None = None
    items: int | None = None
    slope_items: int = 0
    fitness: float | None = None
    since: int = 0


@dataclass(frozen=True)
class Finished:
    """Why a search stopped, in a word and in a sentence, and what it found."""

    reason: Reason
    message: str
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        """The best candidate, None when nothing could be scored."""
        return best(self.candidates)


def search(
    space: SearchSpace,
    algorithm: Algorithm,
    evaluate: Callable[[Proposal], Outcome],
    record: Record,
    stop: Stop,
    *,
    seed: int = 0,
    settings: AlgorithmSettings | None = None,
    starts: Sequence[Start] | None = None,
    progress: Callable[[Candidate], None] | None = None,
    before_generation: Callable[[tuple[Candidate, ...]], None] | None = None,
    arrange: Callable[[Sequence[Proposal]], Sequence[int]] | None = None,
) -> Finished:
    """Searches until a stop condition holds; on a record with candidates, goes on from them.

    Args:
        space: The search space.
        algorithm: Proposes generations.
        evaluate: Scores one proposal. What it raises is recorded as that candidate's failure.
        record: Where the candidates are, and go.
        stop: The budget and the other conditions.
        seed: Seed of the proposals.
        settings: Settings of the algorithm.
        starts: Generation 0; default: the baselines.
        progress: Called with each candidate after it is recorded.
        before_generation: Called with the candidates of the earlier generations before any of a generation is scored;
            what `evaluate` takes from there, such as whom to race against, does not depend on timing or on resuming.
        arrange: Gives the order in which a generation's proposals are scored, as positions in it. The candidates and
            their numbers are the same in any order.

    Returns:
        The reason for the end. Ctrl-C ends it too, between records ("interrupted").
    """
    begin = before_generation or (lambda history: None)
    order = arrange or (lambda proposals: range(len(proposals)))
    loop = _Loop(
        space, algorithm, evaluate, record, stop, seed, settings or AlgorithmSettings(), progress, begin, order
    )
    try:
        reason, message = loop.run(tuple(baselines(space) if starts is None else starts))
    except KeyboardInterrupt:
        reason, message = "interrupted", f"stopped by the user after {len(record)} candidates"
    return Finished(reason, message, record.candidates())


@dataclass(frozen=True)
class _Loop:
    space: SearchSpace
    algorithm: Algorithm
    evaluate: Callable[[Proposal], Outcome]
    record: Record
    stop: Stop
    seed: int
    settings: AlgorithmSettings
    progress: Callable[[Candidate], None] | None
    begin: Callable[[tuple[Candidate, ...]], None]
    order: Callable[[Sequence[Proposal]], Sequence[int]]

    def run(self, starts: tuple[Start, ...]) -> tuple[Reason, str]:
        watch = _Watch(self.stop, self.record.candidates())
        if ended := watch.already():
            return ended
        generation = 0
        first = 0
        while first < self.stop.candidates:
            count = len(starts) if generation == 0 else self.settings.population
            numbers = range(first, min(first + count, self.stop.candidates))
            if generation == 0:
                proposals = first_generation(starts, len(numbers))
            else:
                proposals = self._propose(numbers, generation)
            for candidate in self._score(proposals):
                ended = watch.after_candidate(candidate)
                if ended:
                    return ended
            if len(proposals) < len(numbers):
                return "exhausted", f"the space has no new recipe after {len(self.record)} candidates"
            # A generation that the budget cut short says nothing about staleness.
            if len(numbers) == count:
                ended = watch.after_generation(self.record.candidates(), generation)
                if ended and first + count < self.stop.candidates:
                    return ended
            first += count
            generation += 1
        return "budget", f"the budget of {self.stop.candidates} candidates is spent"

    def _propose(self, numbers: range, generation: int) -> list[Proposal]:
        """The generation's proposals; nothing is drawn for one that is recorded in full."""
        candidates = self.record.candidates()
        recorded = [c for c in candidates if c.number in numbers]
        if len(recorded) == len(numbers):
            return list[Proposal](recorded)
        history = tuple(c for c in candidates if c.number < numbers.start)
        return self.algorithm(self.space, history, numbers, generation, self.seed, self.settings)

    def _score(self, proposals: Sequence[Proposal]) -> Iterator[Candidate]:
        known = self.record.candidates()
        recorded = {candidate.number for candidate in known}
        waiting = [proposal for proposal in self._arranged(proposals) if proposal.number not in recorded]
        if waiting:
            self.begin(tuple(c for c in known if c.generation < waiting[0].generation))
        for proposal in waiting:
            candidate = Candidate.of(proposal, self._outcome(proposal))
            self.record.append(candidate)
            if self.progress is not None:
                self.progress(candidate)
            yield candidate

    def _arranged(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """The proposals in the order in which to score them."""
        order = self.order(proposals)
        if sorted(order) != list(range(len(proposals))):
            raise ValueError(f"arrange gave {list(order)}, which is no order of {len(proposals)} proposals")
        return [proposals[position] for position in order]

    def _outcome(self, proposal: Proposal) -> Outcome:
        """The outcome, with the time it took; a candidate that raises has failed and the run goes on."""
        begin = time.perf_counter()
        try:
            outcome = checked(self.evaluate(proposal))
        except (OutputError, BadInput):
            raise  # the run's trouble, not the candidate's
        except Exception as error:
            log.warning("candidate %d failed", proposal.number, exc_info=True)
            outcome = Outcome(None, state="failed", failure=f"{type(error).__name__}: {error}")
        return replace(outcome, seconds={**outcome.seconds, "total": time.perf_counter() - begin})


def checked(outcome: Outcome) -> Outcome:
    """The outcome, or the failure that it is: a done candidate has a finite fitness."""
    values = [outcome.fitness, *(outcome.objectives or ())]
    if outcome.state == "failed":
        return replace(outcome, fitness=None, objectives=None, failure=outcome.failure or "unknown: no reason given")
    if outcome.state == "done" and not all(value is not None and math.isfinite(value) for value in values):
        failure = f"not finite: the fitness is {outcome.fitness}"
        return replace(outcome, state="failed", fitness=None, objectives=None, failure=failure)
    return outcome


class _Watch:
    """Counts what ends a search before its budget does."""

    def __init__(self, stop: Stop, history: tuple[Candidate, ...]) -> None:
        self._stop = stop
        self._seconds = sum(float(c.seconds.get("total", 0.0)) for c in history)
        self._history = list(history)
        self._row = _failing_row(history)
        # A run that was stopped by its failures and is resumed gets another chance.
        if len(self._row) >= FAILURES_IN_A_ROW:
            self._row = []

    def already(self) -> tuple[Reason, str] | None:
        """The end, if the record is at it: what is spent is the same in every session."""
        if self._stop.hours is not None and self._seconds >= self._stop.hours * 3600:
            return "hours", f"{self._stop.hours:g} hours of scoring are over, all sessions together"
        if self._stop.items is None:
            return None
        spent = max(spent_items(self._history, self._stop.slope_items), default=0)
        return ("items", f"{spent} items are scored") if spent >= self._stop.items else None

    def after_candidate(self, candidate: Candidate) -> tuple[Reason, str] | None:
        """The end, if this candidate brings it."""
        self._seconds += float(candidate.seconds.get("total", 0.0))
        self._history.append(candidate)
        self._row = _failing_row((*self._row, candidate))
        if len(self._row) >= FAILURES_IN_A_ROW:
            last = self._row[-1]
            return "failures", (
                f"{len(self._row)} candidates in a row failed with {last.failure_kind}; the last one, {last.number} "
                f"({last.operator}): {last.failure}"
            )
        return self.already()

    def after_generation(self, history: tuple[Candidate, ...], generation: int) -> tuple[Reason, str] | None:
        """The end, if this generation reaches what is good enough, or makes too many without a better candidate."""
        before = [c for c in history if c.number < self._stop.since]
        return self._reached(history, generation, before) or self._stale(history, generation, before)

    def _reached(
        self, history: Sequence[Candidate], generation: int, before: Sequence[Candidate]
    ) -> tuple[Reason, str] | None:
        target = self._stop.fitness
        if target is None or any(c.fitness is not None and c.fitness >= target for c in ranked(before)):
            return None
        leader = next(iter(ranked(c for c in history if c.generation <= generation)), None)
        if leader is None or leader.fitness is None or leader.fitness < target:
            return None
        return "target", f"candidate {leader.number} has a fitness of {leader.fitness:.4f}; {target:g} was asked for"

    def _stale(
        self, history: Sequence[Candidate], generation: int, before: Sequence[Candidate]
    ) -> tuple[Reason, str] | None:
        limit = self._stop.stale_generations
        if limit is None:
            return None
        found = latest_improvement([c for c in history if c.generation <= generation])
        if found is None:
            return None
        start = max([found.generation, *(c.generation for c in before)])
        if generation - start < limit:
            return None
        more = "a better candidate than" if found.objectives is None else "more hypervolume since candidate"
        return "stale", f"{limit} generations without {more} {found.number}"


def _failing_row(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates at the end of the record that failed in the same way."""
    row: list[Candidate] = []
    for candidate in reversed(candidates):
        if candidate.state != "failed" or (row and candidate.failure_kind != row[-1].failure_kind):
            break
        row.append(candidate)
    return row[::-1]
