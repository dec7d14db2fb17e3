"""The records of a search: what is proposed, what came of it. Frozen; the history is a tuple of candidates."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, get_args

from evomerge.space.baselines import Start
from evomerge.space.decode import recipe_hash
from evomerge.space.genome import Genome

JACOBIAN_STEP = "Jacobian step"
"""How the operators are called that go by how the log-likelihoods at the first parent move with its genes."""
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
        recipe_hash: The recipe's identity.
        parents: Numbers of the candidates it was made from.
        operator: What made it, such as ``crossover by layers``, or a baseline's name.
    """

    number: int
    generation: int
    genome: Genome
    recipe: Mapping[str, Any] = field(hash=False)
    recipe_hash: str
    parents: tuple[int, ...]
    operator: str


def score_values(scores: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Yields split, task and metric of every score of a candidate, and its value."""
    for split, tasks in scores.items():
        if not isinstance(tasks, Mapping):  # a plug-in's own note
            continue
        for task, metrics in tasks.items():
            for metric, score in metrics.items():
                if isinstance(score, Mapping) and "value" in score:
                    yield split, task, metric, score["value"]


def first_generation(starts: Sequence[Start], budget: int) -> list[Proposal]:
    """Proposes generation 0, as much of it as the budget allows."""
    return [
        Proposal(number, 0, start.genome, start.recipe, recipe_hash(start.recipe), (), start.name)
        for number, start in enumerate(starts[:budget])
    ]


@dataclass(frozen=True)
class ConstraintValue:
    """What a candidate has of something that is limited.

    Attributes:
        value: What was measured on the items that steer; of one that a race stopped, on those that it saw.
        limit: What it may not fall below, or exceed.
        violation: How far it is beyond the limit, as a share of the limit; negative where there is room.
    """

    value: float
    limit: float
    violation: float


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
        constraints: Name of a constraint -> how it is met.
    """

    fitness: float | None
    scores: Mapping[str, Any] = field(default_factory=dict, hash=False)
    state: State | Literal["pending"] = "done"
    failure: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict, hash=False)
    objectives: tuple[float, ...] | None = None
    estimates: Mapping[int, float] = field(default_factory=dict, hash=False)
    constraints: Mapping[str, ConstraintValue] = field(default_factory=dict, hash=False)


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
    constraints: Mapping[str, ConstraintValue] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, proposal: Proposal, outcome: Outcome) -> Candidate:
        """Returns the record of a proposal's outcome."""
        return cls(
            number=proposal.number,
            generation=proposal.generation,
            genome=proposal.genome,
            recipe=proposal.recipe,
            recipe_hash=proposal.recipe_hash,
            parents=proposal.parents,
            operator=proposal.operator,
            state=outcome.state,
            fitness=outcome.fitness,
            objectives=outcome.objectives,
            scores=outcome.scores,
            failure=outcome.failure,
            seconds=outcome.seconds,
            estimates=outcome.estimates,
            constraints=outcome.constraints,
        )

    @property
    def violation(self) -> float:
        """How far it is beyond all limits together; 0 where it is feasible."""
        return sum(max(0.0, constraint.violation) for constraint in self.constraints.values())

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
    """Returns the candidate of a number in a history that is sorted by number; None where there is none."""
    if 0 <= number < len(history) and history[number].number == number:  # where none is missing
        return history[number]
    index = bisect_left(history, number, key=number_of)
    return history[index] if index < len(history) and history[index].number == number else None


def count_states(history: Iterable[Candidate]) -> dict[str, int]:
    """Counts the candidates that are done, failed and pruned."""
    states = [candidate.state for candidate in history]
    return {state: states.count(state) for state in get_args(State)}


def step_parent(candidate: Candidate) -> int | None:
    """Returns the number of the candidate whose Jacobian made this one; None where none did."""
    return candidate.parents[0] if JACOBIAN_STEP in candidate.operator and candidate.parents else None
