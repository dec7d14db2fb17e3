"""What a search has spent, and when it stops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

from evomerge.study.candidate import Candidate, step_parent
from evomerge.study.ranking import latest_improvement, ranked

FAILURES_IN_A_ROW = 10

Reason = Literal["budget", "exhausted", "stale", "target", "hours", "items", "failures", "interrupted"]

End = tuple[Reason, str]


@dataclass(frozen=True)
class StopConditions:
    """When to stop.

    Attributes:
        candidates: The budget: done + failed + pruned.
        hours: Time spent scoring, over all sessions of the run, shared by as many candidates as are scored at once;
            None for no limit.
        stale_generations: Generations in a row without a better candidate, or with several objectives without more
            hypervolume; None for no limit.
        items: Items scored, over all candidates; None for no limit.
        jacobian_items: Items that the Jacobian at one candidate counts as.
        fitness: A fitness that is good enough, of a candidate with a full score at the end of a generation.
        since: The search had ended for want of progress, or because it was good enough, with this many candidates, and
            was extended: staleness counts from there, and a fitness that they had reached ends nothing any more.
    """

    candidates: int
    hours: float | None = None
    stale_generations: int | None = None
    items: int | None = None
    jacobian_items: int = 0
    fitness: float | None = None
    since: int = 0

    def share(self, history: Sequence[Candidate], rounds: int, slots: int) -> StopConditions:
        """Returns the part of a round: what some candidates have left over, divided by the rounds that are to come.

        Args:
            history: The candidates of earlier rounds.
            rounds: This round and those after it.
            slots: How many candidates are scored at once.
        """
        seconds = sum(float(candidate.seconds.get("total", 0.0)) for candidate in history)
        spent = max(spent_items(history, self.jacobian_items), default=0)
        return replace(
            self,
            candidates=max(0, -(-(self.candidates - len(history)) // rounds)),
            hours=None if self.hours is None else max(0.0, self.hours - seconds / slots / 3600) / rounds,
            items=None if self.items is None else max(0, -(-(self.items - spent) // rounds)),
            since=max(0, self.since - len(history)),
        )


class EvaluationCounter:
    """Counts item evaluations, candidate by candidate; the Jacobian at a parent counts once.

    Args:
        jacobian_items: Item evaluations that the Jacobian at one candidate is worth.

    Attributes:
        items: The count.
    """

    def __init__(self, jacobian_items: int) -> None:
        self.items = 0
        self._jacobian_items = jacobian_items
        self._step_parents: set[int] = set()

    def add(self, candidate: Candidate) -> int:
        """Adds one more candidate and returns the count."""
        parent = step_parent(candidate)
        if parent is not None and parent not in self._step_parents:
            self._step_parents.add(parent)
            self.items += self._jacobian_items
        self.items += candidate.items
        return self.items


def spent_items(history: Iterable[Candidate], jacobian_items: int) -> Iterator[int]:
    """Yields the item evaluations after each of the candidates, as `EvaluationCounter` counts them."""
    return map(EvaluationCounter(jacobian_items).add, history)


def count_items(history: Iterable[Candidate]) -> dict[str, Any]:
    """Counts the item evaluations of a search, how many they would be without racing, the share saved, and Jacobians.

    What Jacobians cost is not among the evaluations (`spent_items` counts it in): ``jacobians`` is the number of
    candidates at which one led to a step.
    """
    candidates = list(history)
    scored = [candidate for candidate in candidates if candidate.items]
    evaluated = sum(candidate.items for candidate in scored)
    whole = len(scored) * max((candidate.items for candidate in scored), default=0)
    jacobians = len({step_parent(candidate) for candidate in candidates} - {None})
    saved = 1 - evaluated / whole if whole else 0.0
    return {"evaluated": evaluated, "without_racing": whole, "saved": saved, "jacobians": jacobians}


class StopMonitor:
    """Watches for what ends a search before its budget does.

    Args:
        stop: The conditions.
        history: What is recorded already.
        slots: How many candidates are scored at once.
    """

    def __init__(self, stop: StopConditions, history: tuple[Candidate, ...], slots: int) -> None:
        self._stop = stop
        self._slots = slots
        self._seconds = sum(float(c.seconds.get("total", 0.0)) for c in history)
        self._counter = EvaluationCounter(stop.jacobian_items)
        for candidate in history:
            self._counter.add(candidate)
        failed = {c.number: c for c in history if c.state == "failed"}
        # A run that was stopped by its failures and is resumed gets another chance.
        self._failed = {n: c for n, c in failed.items() if len(_failure_streak(failed, n)) < FAILURES_IN_A_ROW}

    def limit_reached(self) -> End | None:
        """Returns the end, if the record is at it: what is spent is the same in every session."""
        if self._stop.hours is not None and self._seconds / self._slots >= self._stop.hours * 3600:
            return "hours", f"{self._stop.hours:g} hours of scoring are over, all sessions together"
        if self._stop.items is not None and self._counter.items >= self._stop.items:
            return "items", f"{self._counter.items} items are scored"
        return None

    def after_candidate(self, candidate: Candidate) -> End | None:
        """Takes one more recorded candidate; returns the end, if it brings it."""
        self._seconds += float(candidate.seconds.get("total", 0.0))
        self._counter.add(candidate)
        if candidate.state == "failed":
            self._failed[candidate.number] = candidate
            row = _failure_streak(self._failed, candidate.number)
            if len(row) >= FAILURES_IN_A_ROW:
                last = row[-1]
                return "failures", (
                    f"{len(row)} candidates in a row failed with {last.failure_kind}; the last one, {last.number} "
                    f"({last.operator}): {last.failure}"
                )
        return self.limit_reached()

    def after_generation(self, history: tuple[Candidate, ...], generation: int) -> End | None:
        """Returns the end, if this generation reaches the target, or makes too many without a better candidate."""
        if self._stop.fitness is None and self._stop.stale_generations is None:
            return None
        before = [c for c in history if c.number < self._stop.since]
        return self._reached(history, generation, before) or self._stale(history, generation, before)

    def _reached(self, history: Sequence[Candidate], generation: int, before: Sequence[Candidate]) -> End | None:
        target = self._stop.fitness
        if target is None or any(_reaches(c, target) for c in ranked(before)):
            return None
        leader = next(iter(ranked(c for c in history if c.generation <= generation)), None)
        if leader is None or not _reaches(leader, target):
            return None
        return "target", f"candidate {leader.number} has a fitness of {leader.fitness:.4f}; {target:g} was asked for"

    def _stale(self, history: Sequence[Candidate], generation: int, before: Sequence[Candidate]) -> End | None:
        limit = self._stop.stale_generations
        if limit is None:
            return None
        latest = latest_improvement([c for c in history if c.generation <= generation])
        if latest is None:
            return None
        start = max([latest.generation, *(c.generation for c in before)])
        if generation - start < limit:
            return None
        more = "a better candidate than" if latest.objectives is None else "more hypervolume since candidate"
        return "stale", f"{limit} generations without {more} {latest.number}"


def _reaches(candidate: Candidate, target: float) -> bool:
    """Whether a candidate is feasible and good enough."""
    return candidate.fitness is not None and candidate.fitness >= target and candidate.violation == 0


def _failure_streak(failed: Mapping[int, Candidate], number: int) -> list[Candidate]:
    """The candidates around a failed one, by number without a gap, that failed in the same way."""
    kind = failed[number].failure_kind

    def alike(n: int) -> bool:
        return n in failed and failed[n].failure_kind == kind

    start = next(n for n in count(number, -1) if not alike(n - 1))
    stop = next(n for n in count(number + 1) if not alike(n))
    return [failed[n] for n in range(start, stop)]
