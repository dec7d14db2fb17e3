"""The loop of a search: generation 0, then generations of proposals, scored by an executor and recorded one by one.

All state is in the record. The proposals of a generation depend on the candidates of earlier generations only, so a
generation that was interrupted is proposed again, the same, and what is recorded of it is not scored twice; and it does
not matter how many are scored at once, or which of them is ready first.

An asynchronous search has no such barrier: whenever there is room, the next candidate is proposed from all that have
finished by then. Which these are is a matter of time, unless only one is scored at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from evomerge.space.baselines import Start, baselines
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Outcome, Proposal, Spending, best, first_generation, number_of, ranked
from evomerge.study.interfaces import Algorithm, AlgorithmSettings, Executor
from evomerge.study.ranking import latest_improvement
from evomerge.study.record import Record

FAILURES_IN_A_ROW = 10

Reason = Literal["budget", "exhausted", "stale", "target", "hours", "items", "failures", "interrupted"]

End = tuple[Reason, str]


@dataclass(frozen=True)
class Stop:
    """When to stop.

    Attributes:
        candidates: The budget: done + failed + pruned.
        hours: Time spent scoring, over all sessions of the run, shared by as many candidates as are scored at once;
            None for no limit.
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
    executor: Executor,
    record: Record,
    stop: Stop,
    *,
    seed: int = 0,
    settings: AlgorithmSettings | None = None,
    starts: Sequence[Start] | None = None,
    progress: Callable[[Candidate], None] | None = None,
    arrange: Callable[[Sequence[Proposal]], Sequence[int]] | None = None,
    asynchronous: bool = False,
) -> Finished:
    """Searches until a stop condition holds; on a record with candidates, goes on from them.

    Args:
        space: The search space.
        algorithm: Proposes generations.
        executor: Scores the proposals; the caller closes it.
        record: Where the candidates are, and go.
        stop: The budget and the other conditions.
        seed: Seed of the proposals.
        settings: Settings of the algorithm.
        starts: Generation 0; default: the baselines.
        progress: Called with each candidate after it is recorded.
        arrange: Gives the order in which a generation's proposals are scored, as positions in it. The candidates and
            their numbers are the same in any order. Nothing is arranged in an asynchronous search.
        asynchronous: Propose a candidate whenever there is room for one, instead of whole generations. The algorithm
            also gets those that are being scored (`state` "pending").

    Returns:
        The reason for the end, after what was under way has been recorded. Ctrl-C ends it too, between records
        ("interrupted").
    """
    order = arrange or (lambda proposals: range(len(proposals)))
    loop = _Loop(
        space, algorithm, executor, record, stop, seed, settings or AlgorithmSettings(), progress, order, asynchronous
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
    executor: Executor
    record: Record
    stop: Stop
    seed: int
    settings: AlgorithmSettings
    progress: Callable[[Candidate], None] | None
    order: Callable[[Sequence[Proposal]], Sequence[int]]
    asynchronous: bool

    def run(self, starts: tuple[Start, ...]) -> End:
        watch = _Watch(self.stop, self.record.candidates(), self.executor.slots)
        if ended := watch.already():
            return ended
        return self._one_by_one(starts, watch) if self.asynchronous else self._by_generations(starts, watch)

    @property
    def _spent(self) -> End:
        return "budget", f"the budget of {self.stop.candidates} candidates is spent"

    @property
    def _exhausted(self) -> End:
        return "exhausted", f"the space has no new recipe after {len(self.record)} candidates"

    def _by_generations(self, starts: tuple[Start, ...], watch: _Watch) -> End:
        generation = 0
        first = 0
        while first < self.stop.candidates:
            size = len(starts) if generation == 0 else self.settings.population
            numbers = range(first, min(first + size, self.stop.candidates))
            if generation == 0:
                proposals = first_generation(starts, len(numbers))
            else:
                proposals = self._propose(numbers, generation)
            if ended := self._score(proposals, watch):
                return ended
            if len(proposals) < len(numbers):
                return self._exhausted
            # A generation that the budget cut short says nothing about staleness.
            if len(numbers) == size:
                ended = watch.after_generation(self.record.candidates(), generation)
                if ended and first + size < self.stop.candidates:
                    return ended
            first += size
            generation += 1
        return self._spent

    def _propose(self, numbers: range, generation: int) -> list[Proposal]:
        """The generation's proposals; nothing is drawn for one that is recorded in full."""
        candidates = self.record.candidates()
        start, stop = (bisect_left(candidates, number, key=number_of) for number in (numbers.start, numbers.stop))
        if stop - start == len(numbers):
            return list[Proposal](candidates[start:stop])
        history = candidates[:start]
        return self.algorithm(self.space, history, numbers, generation, self.seed, self.settings)

    def _score(self, proposals: Sequence[Proposal], watch: _Watch) -> End | None:
        """Scores and records what is not recorded of a generation; the end, if it comes in the middle."""
        known = self.record.candidates()
        before = bisect_left(known, proposals[0].number, key=number_of) if proposals else 0
        recorded = {candidate.number for candidate in known[before:]}
        waiting = deque(proposal for proposal in self._arranged(proposals) if proposal.number not in recorded)
        if waiting:
            self.executor.begin_generation(known[:before])
        turns = deque(proposal.number for proposal in waiting)
        finished: dict[int, Candidate] = {}
        under_way = 0
        ended: End | None = None
        while under_way or (waiting and ended is None):
            while waiting and ended is None and under_way < self.executor.slots:
                self.executor.submit(waiting.popleft())
                under_way += 1
            candidate = Candidate.of(*self.executor.next_finished())
            under_way -= 1
            finished[candidate.number] = candidate
            for due in self._due(finished, turns):
                # Which candidates the items suffice for must not depend on how many were scored at once.
                if ended is None or self.stop.items is None:
                    brought = self._keep(due, watch)
                    ended = ended or brought
        return ended

    def _due(self, finished: dict[int, Candidate], turns: deque[int]) -> list[Candidate]:
        """Takes out what to record now: all that have finished, but in turn where items end the search."""
        due = []
        if self.stop.items is None:
            turns = deque(finished)
        while turns and turns[0] in finished:
            due.append(finished.pop(turns.popleft()))
        return due

    def _keep(self, candidate: Candidate, watch: _Watch) -> End | None:
        """Records a candidate; the end, if it brings it."""
        self.record.append(candidate)
        if self.progress is not None:
            self.progress(candidate)
        return watch.after_candidate(candidate)

    def _arranged(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """The proposals in the order in which to score them."""
        order = self.order(proposals)
        if sorted(order) != list(range(len(proposals))):
            raise ValueError(f"arrange gave {list(order)}, which is no order of {len(proposals)} proposals")
        return [proposals[position] for position in order]

    def _one_by_one(self, starts: tuple[Start, ...], watch: _Watch) -> End:
        """As many candidates under way as there is room for, at any time."""
        first = first_generation(starts, self.stop.candidates)
        recorded = {candidate.number for candidate in self.record.candidates()}
        free = (number for number in count() if number not in recorded)
        pending: dict[int, Proposal] = {}
        ended = self._stale(len(starts), watch)
        no_more: End | None = None
        while True:
            while not (ended or no_more) and len(pending) < self.executor.slots:
                no_more = self._submit(next(free), first, pending)
            if not pending:
                return ended or no_more or self._spent
            candidate = Candidate.of(*self.executor.next_finished())
            del pending[candidate.number]
            brought = self._keep(candidate, watch) or self._stale(len(starts), watch)
            ended = ended or brought

    def _submit(self, number: int, first: Sequence[Proposal], pending: dict[int, Proposal]) -> End | None:
        """Submits a proposal with this number; why not, if there is nothing to propose."""
        if number >= self.stop.candidates:
            return self._spent
        known = self.record.candidates()
        generation = self._generation(number, len(first))
        if generation == 0:
            drawn = [first[number]]
        else:
            under_way = (Candidate.of(proposal, _PENDING) for proposal in pending.values())
            history = tuple(sorted((*known, *under_way), key=number_of))
            numbers = range(number, number + 1)
            drawn = self.algorithm(self.space, history, numbers, generation, self.seed, self.settings)
        if not drawn:
            return self._exhausted
        # Generation 0 is compared with nobody, so that all of it has full scores.
        self.executor.begin_generation(known if generation else ())
        self.executor.submit(drawn[0])
        pending[number] = drawn[0]
        return None

    def _generation(self, number: int, starts: int) -> int:
        """The generation of a number."""
        return 0 if number < starts else 1 + (number - starts) // self.settings.population

    def _stale(self, starts: int, watch: _Watch) -> End | None:
        """The end, if it comes with the last generation of which all have finished."""
        if self.stop.stale_generations is None and self.stop.fitness is None:
            return None
        known = self.record.candidates()
        missing = _lowest({candidate.number for candidate in known})
        generation = self._generation(missing, starts)
        if generation == 0 or missing >= self.stop.candidates:
            return None
        return watch.after_generation(known, generation - 1)


_PENDING = Outcome(None, state="pending")


def _lowest(taken: set[int]) -> int:
    """The lowest number that is not taken."""
    return next(number for number in count() if number not in taken)


class _Watch:
    """Counts what ends a search before its budget does.

    Args:
        stop: The conditions.
        history: What is recorded already.
        slots: How many candidates are scored at once.
    """

    def __init__(self, stop: Stop, history: tuple[Candidate, ...], slots: int) -> None:
        self._stop = stop
        self._slots = slots
        self._seconds = sum(float(c.seconds.get("total", 0.0)) for c in history)
        self._spending = Spending(stop.slope_items)
        for candidate in history:
            self._spending.add(candidate)
        failed = {c.number: c for c in history if c.state == "failed"}
        # A run that was stopped by its failures and is resumed gets another chance.
        self._failed = {n: c for n, c in failed.items() if len(_failing_row(failed, n)) < FAILURES_IN_A_ROW}

    def already(self) -> End | None:
        """The end, if the record is at it: what is spent is the same in every session."""
        if self._stop.hours is not None and self._seconds / self._slots >= self._stop.hours * 3600:
            return "hours", f"{self._stop.hours:g} hours of scoring are over, all sessions together"
        if self._stop.items is not None and self._spending.items >= self._stop.items:
            return "items", f"{self._spending.items} items are scored"
        return None

    def after_candidate(self, candidate: Candidate) -> End | None:
        """The end, if this candidate brings it."""
        self._seconds += float(candidate.seconds.get("total", 0.0))
        self._spending.add(candidate)
        if candidate.state == "failed":
            self._failed[candidate.number] = candidate
            row = _failing_row(self._failed, candidate.number)
            if len(row) >= FAILURES_IN_A_ROW:
                last = row[-1]
                return "failures", (
                    f"{len(row)} candidates in a row failed with {last.failure_kind}; the last one, {last.number} "
                    f"({last.operator}): {last.failure}"
                )
        return self.already()

    def after_generation(self, history: tuple[Candidate, ...], generation: int) -> End | None:
        """The end, if this generation reaches what is good enough, or makes too many without a better candidate."""
        if self._stop.fitness is None and self._stop.stale_generations is None:
            return None
        before = [c for c in history if c.number < self._stop.since]
        return self._reached(history, generation, before) or self._stale(history, generation, before)

    def _reached(self, history: Sequence[Candidate], generation: int, before: Sequence[Candidate]) -> End | None:
        target = self._stop.fitness
        if target is None or any(c.fitness is not None and c.fitness >= target for c in ranked(before)):
            return None
        leader = next(iter(ranked(c for c in history if c.generation <= generation)), None)
        if leader is None or leader.fitness is None or leader.fitness < target:
            return None
        return "target", f"candidate {leader.number} has a fitness of {leader.fitness:.4f}; {target:g} was asked for"

    def _stale(self, history: Sequence[Candidate], generation: int, before: Sequence[Candidate]) -> End | None:
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


def _failing_row(failed: Mapping[int, Candidate], number: int) -> list[Candidate]:
    """The candidates around a failed one, by number without a gap, that failed in the same way."""
    kind = failed[number].failure_kind

    def alike(n: int) -> bool:
        return n in failed and failed[n].failure_kind == kind

    start = next(n for n in count(number, -1) if not alike(n - 1))
    stop = next(n for n in count(number + 1) if not alike(n))
    return [failed[n] for n in range(start, stop)]
