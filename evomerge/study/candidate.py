"""The records of a search: what is proposed, what came of it. Frozen; the history is a tuple of candidates."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, get_args

import numpy as np

from evomerge.space.baselines import Start
from evomerge.space.decode import recipe_hash
from evomerge.space.genome import Genome
from evomerge.study import pareto

SLOPES = "gradient"
"""How the operators are called that take the slopes of the first parent."""
DRAW = "draw"
"""How the operator is called that draws from what the fitness may be."""

State = Literal["done", "failed", "pruned"]
"""What is recorded of a candidate. One that is being scored is "pending", to algorithms that ask meanwhile."""


@dataclass(frozen=True)
class Proposal:
    """A candidate before it is scored.

    Attributes:
        number: Counts the candidates of a run from 0.
        generation: 0 for the baselines.
        genome: Its genes; for a baseline that the space cannot express, the nearest genome.
        recipe: What to merge.
        phenotype: The recipe's identity.
        parents: Numbers of the candidates it was made from.
        operator: What made it, such as ``crossover by layers``, or a baseline's name.
    """

    number: int
    generation: int
    genome: Genome
    recipe: Mapping[str, Any] = field(hash=False)
    phenotype: str
    parents: tuple[int, ...]
    operator: str


def first_generation(starts: Sequence[Start], budget: int) -> list[Proposal]:
    """Proposes generation 0, as much of it as the budget allows."""
    return [
        Proposal(number, 0, start.genome, start.recipe, recipe_hash(start.recipe), (), start.name)
        for number, start in enumerate(starts[:budget])
    ]


@dataclass(frozen=True)
class Outcome:
    """What the evaluation of one proposal gave.

    Attributes:
        fitness: Higher is better; None when failed. A pruned candidate carries the estimate it was stopped at.
        scores: Per-task scores, as JSON.
        state: done, failed or pruned; pending where there is no outcome yet.
        failure: Why it failed or was stopped, beginning with a kind and a colon.
        seconds: Time by stage.
        objectives: One value per objective of a search with several, higher is better.
        estimates: Items seen -> what the fitness was taken to be then; the last entry is the fitness.
    """

    fitness: float | None
    scores: Mapping[str, Any] = field(default_factory=dict, hash=False)
    state: State | Literal["pending"] = "done"
    failure: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict, hash=False)
    objectives: tuple[float, ...] | None = None
    estimates: Mapping[int, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Candidate(Proposal):
    """A proposal and its outcome: one line of the record. Attributes as in `Proposal` and `Outcome`."""

    state: State | Literal["pending"]
    fitness: float | None
    objectives: tuple[float, ...] | None = None
    scores: Mapping[str, Any] = field(default_factory=dict, hash=False)
    failure: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict, hash=False)
    estimates: Mapping[int, float] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, proposal: Proposal, outcome: Outcome) -> Candidate:
        """The record of a proposal's outcome."""
        return cls(
            number=proposal.number,
            generation=proposal.generation,
            genome=proposal.genome,
            recipe=proposal.recipe,
            phenotype=proposal.phenotype,
            parents=proposal.parents,
            operator=proposal.operator,
            state=outcome.state,
            fitness=outcome.fitness,
            objectives=outcome.objectives,
            scores=outcome.scores,
            failure=outcome.failure,
            seconds=outcome.seconds,
            estimates=outcome.estimates,
        )

    @property
    def items(self) -> int:
        """How many items it was scored on; 0 when that was not recorded."""
        return max(self.estimates, default=0)

    @property
    def failure_kind(self) -> str | None:
        """What comes before the first colon of `failure`."""
        return None if self.failure is None else self.failure.split(":", 1)[0]


number_of = attrgetter("number")


def find(history: Sequence[Candidate], number: int) -> Candidate | None:
    """The candidate of a number in a history that is sorted by number; None where there is none."""
    if 0 <= number < len(history) and history[number].number == number:  # where none is missing
        return history[number]
    place = bisect_left(history, number, key=number_of)
    return history[place] if place < len(history) and history[place].number == number else None


def fitness_order(candidate: Candidate) -> tuple[float, int]:
    """Sorts the fittest first; the earlier one first when equal."""
    return -(candidate.fitness or 0.0), candidate.number


def ranked(history: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that have a full score, best first; the earlier one first when equal."""
    return sorted((c for c in history if c.state == "done" and c.fitness is not None), key=fitness_order)


def teaches(candidate: Candidate) -> bool:
    """Whether there is something to learn from it: a pruned one has the estimate that it was stopped at."""
    return candidate.state != "failed" and candidate.fitness is not None


def promising(history: Iterable[Candidate], enough: int | None = None) -> list[Candidate]:
    """The candidates to learn from, best first.

    With several objectives: front by front, within a front those with the fewest neighbours first (NSGA-II), then those
    that have no objectives.

    Args:
        history: The candidates.
        enough: How many are wanted; with several objectives, the order beyond them is only roughly right then.
    """
    return by_objectives(sorted(filter(teaches, history), key=fitness_order), enough)


def by_objectives(fittest: Sequence[Candidate], enough: int | None = None) -> list[Candidate]:
    """As `promising`, of candidates to learn from that are in the order of their fitness."""
    several = [c for c in fittest if c.objectives is not None]
    if not several:
        return list(fittest[:enough])
    return [*_by_fronts(several, enough), *(c for c in fittest if c.objectives is None)][:enough]


def _by_fronts(candidates: list[Candidate], enough: int | None) -> list[Candidate]:
    values = objectives_of(candidates)
    fronts = pareto.ranks(values, enough)
    crowding = np.zeros(len(candidates))
    for front in np.unique(fronts):
        crowding[fronts == front] = pareto.crowding(values[fronts == front])
    return [candidates[k] for k in np.lexsort((-crowding, fronts))]  # stable: the fitter first when equal


def objectives_of(candidates: Sequence[Candidate]) -> pareto.Array:
    """Their objectives, all of which must be known, shape [candidates, objectives]."""
    return np.array([candidate.objectives for candidate in candidates], dtype=np.float64)


def pareto_front(history: Iterable[Candidate]) -> list[Candidate]:
    """The candidates with a full score that none dominates, by number; of equal ones the first."""
    done = sorted((c for c in history if c.state == "done" and c.objectives is not None), key=lambda c: c.number)
    if not done:
        return []
    values = objectives_of(done)
    _, first = np.unique(values, axis=0, return_index=True)
    best = pareto.ranks(values[first], 1) == 0
    return [done[k] for k in np.sort(first[best])]


def best(history: Iterable[Candidate]) -> Candidate | None:
    """The best candidate, with several objectives the knee of their front; None when nothing is done."""
    known = tuple(history)
    front = pareto_front(known)
    if front:
        return front[pareto.knee(objectives_of(front), np.array([c.fitness for c in front], dtype=np.float64))]
    return next(iter(ranked(known)), None)


def count_states(history: Iterable[Candidate]) -> dict[str, int]:
    """How many candidates are done, failed and pruned."""
    states = [candidate.state for candidate in history]
    return {state: states.count(state) for state in get_args(State)}


def sloped(candidate: Candidate) -> int | None:
    """The number of the candidate whose slopes were asked for to make this one; None where none were."""
    return candidate.parents[0] if SLOPES in candidate.operator and candidate.parents else None


class Spending:
    """Counts item evaluations, candidate by candidate; what was asked for their parents' slopes once a parent.

    Args:
        slope_items: Item evaluations that the slopes of one candidate are worth.

    Attributes:
        items: The count.
    """

    def __init__(self, slope_items: int) -> None:
        self.items = 0
        self._slope_items = slope_items
        self._asked: set[int] = set()

    def add(self, candidate: Candidate) -> int:
        """The count with one more candidate."""
        parent = sloped(candidate)
        if parent is not None and parent not in self._asked:
            self._asked.add(parent)
            self.items += self._slope_items
        self.items += candidate.items
        return self.items


def spent_items(history: Iterable[Candidate], slope_items: int) -> Iterator[int]:
    """Item evaluations after each of the candidates, as `Spending` counts them."""
    return map(Spending(slope_items).add, history)


def count_items(history: Iterable[Candidate]) -> dict[str, Any]:
    """Item evaluations of the search: how many, how many they would be without racing, the share saved; and slopes.

    What the slopes of a candidate cost is not among them (`spent_items` counts it in): ``gradients`` says of how many
    they were asked for.
    """
    known = list(history)
    seen = [candidate for candidate in known if candidate.items]
    evaluated = sum(candidate.items for candidate in seen)
    whole = len(seen) * max((candidate.items for candidate in seen), default=0)
    gradients = len({sloped(candidate) for candidate in known} - {None})
    saved = 1 - evaluated / whole if whole else 0.0
    return {"evaluated": evaluated, "without_racing": whole, "saved": saved, "gradients": gradients}
