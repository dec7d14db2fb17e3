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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from evomerge.space.baselines import Start, baselines
from evomerge.space.space import SearchSpace
from evomerge.study.budget import End, Reason, StopConditions, StopMonitor
from evomerge.study.candidate import Candidate, Outcome, Proposal, first_generation, number_of
from evomerge.study.interfaces import Algorithm, AlgorithmSettings, Executor, NullTracker, Tracker
from evomerge.study.ranking import best, unmet_constraints
from evomerge.study.record import Record


@dataclass(frozen=True)
class SearchResult:
    """Why a search stopped, in a word and in a sentence, and its candidates."""

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
    stop: StopConditions,
    *,
    seed: int = 0,
    settings: AlgorithmSettings | None = None,
    starts: Sequence[Start] | None = None,
    tracker: Tracker | None = None,
    asynchronous: bool = False,
) -> SearchResult:
    """Searches until a stop condition holds; on a record with candidates, goes on from them.

    Args:
        space: The search space.
        algorithm: Proposes generations.
        executor: Scores the proposals; the caller closes it.
        record: Where the candidates are, and go.
        stop: The budget and the other conditions.
        seed: Seed of the proposals.
        settings: Settings of the algorithm.
        starts: Generation 0, of which those that race come last; default: the baselines.
        tracker: Is told of each candidate after it is recorded.
        asynchronous: Propose a candidate whenever there is room for one, instead of whole generations. The algorithm
            also gets those that are being scored (`state` "pending").

    Returns:
        The reason for the end, after what was under way has been recorded. Ctrl-C ends it too, between records
        ("interrupted").
    """
    loop = _Loop(
        space=space,
        algorithm=algorithm,
        executor=executor,
        record=record,
        stop=stop,
        seed=seed,
        settings=settings or AlgorithmSettings(),
        tracker=tracker or NullTracker(),
        asynchronous=asynchronous,
    )
    try:
        reason, message = loop.run(tuple(baselines(space) if starts is None else starts))
    except KeyboardInterrupt:
        reason, message = "interrupted", f"stopped by the user after {len(record)} candidates"
    return SearchResult(reason, message, record.candidates())


@dataclass(frozen=True)
class _Loop:
    space: SearchSpace
    algorithm: Algorithm
    executor: Executor
    record: Record
    stop: StopConditions
    seed: int
    settings: AlgorithmSettings
    tracker: Tracker
    asynchronous: bool

    def run(self, starts: tuple[Start, ...]) -> End:
        monitor = StopMonitor(self.stop, self.record.candidates(), self.executor.slots)
        if ended := monitor.limit_reached():
            return ended
        run = self._run_asynchronously if self.asynchronous else self._run_generations
        return run(starts, monitor)

    @property
    def _spent(self) -> End:
        return "budget", f"the budget of {self.stop.candidates} candidates is spent"

    @property
    def _exhausted(self) -> End:
        return "exhausted", f"the space has no new recipe after {len(self.record)} candidates"

    def _run_generations(self, starts: tuple[Start, ...], monitor: StopMonitor) -> End:
        generation = 0
        first = 0
        while first < self.stop.candidates:
            size = len(starts) if generation == 0 else self.settings.population
            numbers = range(first, min(first + size, self.stop.candidates))
            if generation == 0:
                proposals = first_generation(starts, len(numbers))
            else:
                proposals = self._propose(numbers, generation)
            unraced = _unraced(starts) if generation == 0 else 0
            for part in filter(None, (proposals[:unraced], proposals[unraced:])):
                if ended := self._score(part, monitor):
                    return ended
            if generation == 0:
                self._report_unmet(len(starts))
            if len(proposals) < len(numbers):
                return self._exhausted
            # A generation that the budget cut short says nothing about staleness.
            if len(numbers) == size:
                ended = monitor.after_generation(self.record.candidates(), generation)
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

    def _score(self, proposals: Sequence[Proposal], monitor: StopMonitor) -> End | None:
        """Scores and records what is not recorded of a generation; returns the end, if it comes in the middle."""
        candidates = self.record.candidates()
        before = bisect_left(candidates, proposals[0].number, key=number_of) if proposals else 0
        recorded = {candidate.number for candidate in candidates[before:]}
        waiting = deque(proposal for proposal in proposals if proposal.number not in recorded)
        if waiting:
            self.executor.begin_generation(candidates[:before])
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
            for due in self._take_recordable(finished, turns):
                # Which candidates the items suffice for must not depend on how many were scored at once.
                if ended is None or self.stop.items is None:
                    end = self._append(due, monitor)
                    ended = ended or end
        return ended

    def _take_recordable(self, finished: dict[int, Candidate], turns: deque[int]) -> list[Candidate]:
        """Takes out what to record now: all that have finished, but in turn where items end the search."""
        due = []
        if self.stop.items is None:
            turns = deque(finished)
        while turns and turns[0] in finished:
            due.append(finished.pop(turns.popleft()))
        return due

    def _append(self, candidate: Candidate, monitor: StopMonitor) -> End | None:
        """Records a candidate; returns the end, if that is one."""
        self.record.append(candidate)
        self.tracker.candidate(candidate)
        return monitor.after_candidate(candidate)

    def _report_unmet(self, starts: int) -> None:
        """Says which constraints no candidate of generation 0 meets, once all of it is recorded."""
        first = [candidate for candidate in self.record.candidates() if candidate.generation == 0]
        if len(first) == starts:
            for text in unmet_constraints(first):
                self.tracker.report(text, "warning")

    def _run_asynchronously(self, starts: tuple[Start, ...], monitor: StopMonitor) -> End:
        """Keeps as many candidates under way as there is room for."""
        first = first_generation(starts, self.stop.candidates)
        unraced = _unraced(starts)
        recorded = {candidate.number for candidate in self.record.candidates()}
        free = (number for number in count() if number not in recorded)
        pending: dict[int, Proposal] = {}
        ended = self._after_generations(len(starts), monitor)
        no_more: End | None = None
        while True:
            while not (ended or no_more) and len(pending) < self.executor.slots:
                no_more = self._submit(next(free), first, unraced, pending)
            if not pending:
                return ended or no_more or self._spent
            candidate = Candidate.of(*self.executor.next_finished())
            del pending[candidate.number]
            end = self._append(candidate, monitor)
            if candidate.generation == 0:
                self._report_unmet(len(starts))
            end = end or self._after_generations(len(starts), monitor)
            ended = ended or end

    def _submit(self, number: int, first: Sequence[Proposal], unraced: int, pending: dict[int, Proposal]) -> End | None:
        """Submits a proposal with this number; returns why not, if there is nothing to propose."""
        if number >= self.stop.candidates:
            return self._spent
        candidates = self.record.candidates()
        generation = self._generation(number, len(first))
        if generation == 0:
            drawn = [first[number]]
        else:
            under_way = (Candidate.of(proposal, _PENDING) for proposal in pending.values())
            history = tuple(sorted((*candidates, *under_way), key=number_of))
            numbers = range(number, number + 1)
            drawn = self.algorithm(self.space, history, numbers, generation, self.seed, self.settings)
        if not drawn:
            return self._exhausted
        self.executor.begin_generation(candidates if number >= unraced else ())
        self.executor.submit(drawn[0])
        pending[number] = drawn[0]
        return None

    def _generation(self, number: int, starts: int) -> int:
        return 0 if number < starts else 1 + (number - starts) // self.settings.population

    def _after_generations(self, starts: int, monitor: StopMonitor) -> End | None:
        """Returns the end, if the last generation of which all have finished brings it."""
        if self.stop.stale_generations is None and self.stop.fitness is None:
            return None
        candidates = self.record.candidates()
        missing = _first_missing({candidate.number for candidate in candidates})
        generation = self._generation(missing, starts)
        if generation == 0 or missing >= self.stop.candidates:
            return None
        return monitor.after_generation(candidates, generation - 1)


_PENDING = Outcome(None, state="pending")


def _unraced(starts: Sequence[Start]) -> int:
    """How many of generation 0 come first and are compared with nobody; the others race against these."""
    return sum(not start.raced for start in starts)


def _first_missing(taken: set[int]) -> int:
    return next(number for number in count() if number not in taken)
