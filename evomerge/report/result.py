"""What a run found: the types behind result.json, and behind `evomerge status` while it is under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from evomerge.errors import RunError
from evomerge.evaluation.scores import Score, ScoreTable
from evomerge.objective.comparison import Difference
from evomerge.study.candidate import ConstraintValue
from evomerge.study.ranking import Growth

_PLAIN = {
    "missing": "is missing",
    "unexpected_keyword_argument": "is no key that this version knows",
}


Members = Annotated[Mapping[str, Mapping[str, ScoreTable]], Field(exclude_if=lambda members: not members)]
"""Split to group to the scores of the tasks in it; left out of JSON where there is none."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, None where none can be given."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Ending:
    """Why a search ended.

    Attributes:
        reason: In a word.
        message: In a sentence.
        extended_from: How many candidates there were when the run was extended after it had ended early, else 0.
    """

    reason: str
    message: str
    extended_from: int


@dataclass(frozen=True)
class CandidateCounts:
    """How many candidates were scored, failed and were stopped early, of how many that were asked for."""

    done: int
    failed: int
    pruned: int
    budget: int

    @property
    def recorded(self) -> int:
        """All candidates that the record has."""
        return self.done + self.failed + self.pruned


@dataclass(frozen=True)
class ItemCounts:
    """Item evaluations of a search, as `study.candidate.count_items` counts them."""

    evaluated: int
    without_racing: int
    saved: float
    jacobians: int


@dataclass(frozen=True)
class GoalResult:
    """One task's part in the fitness.

    Attributes:
        task: The task.
        metric: The metric that is reported.
        weight: Its weight in the mean.
        reference: The best source's value; None on the raw scale.
        steered_by: The metric that the search maximised in its place; often the same.
    """

    task: str
    metric: str
    weight: float
    reference: float | None
    steered_by: str


@dataclass(frozen=True)
class ResultRow:
    """A model and what it scored, by split.

    Attributes:
        candidate: Its number; None for one that is not of this search.
        recipe: What was merged.
        fitness: Split to fitness; the guard tasks have none.
        scores: Split to the scores of every task and metric.
        members: The same of the tasks of each group that is one task.
    """

    candidate: int | None
    recipe: Mapping[str, Any]
    fitness: Mapping[str, Score]
    scores: Mapping[str, ScoreTable]
    members: Members = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class WinnerRow(ResultRow):
    """The winner, and where it came from."""

    candidate: int
    generation: int
    operator: str
    parents: tuple[int, ...]


@dataclass(frozen=True)
class BaselineRow(ResultRow):
    """What the winner has to beat, and how far it does on the test items."""

    winner_less_this: Difference


@dataclass(frozen=True)
class Finalist:
    """A candidate that was scored on the select items.

    Attributes:
        candidate: Its number.
        pooled: Its fitness over search and select items, which chose the winner.
        winner_less_this: The winner's less its own, paired.
        fitness: Split to fitness.
    """

    candidate: int
    pooled: float
    winner_less_this: Estimate
    fitness: Mapping[str, Score]


@dataclass(frozen=True)
class FrontEntry:
    """A finalist that no other dominates.

    Attributes:
        candidate: Its number.
        objectives: Split, or "pooled" for search and select items together, to the objectives by name.
        sizes: Its layers and parameters; the tokens written a test item, where they are minimized.
        fitness: Split to fitness.
        scores: Split to the scores of every task and metric.
        members: As in `ResultRow`.
    """

    candidate: int
    objectives: Mapping[str, Mapping[str, float]]
    sizes: Mapping[str, int | float]
    fitness: Mapping[str, Score]
    scores: Mapping[str, ScoreTable]
    members: Members = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class ConstraintResult:
    """Whether the winner keeps within a limit.

    Attributes:
        name: The constraint.
        verdict: "held", "broken" or "not to be told", at this number of test items.
        values: Split to what was measured there.
        interval: The 95% interval of the value less the limit, on the test items; None where its noise is unknown.
    """

    name: str
    verdict: str
    values: Mapping[str, ConstraintValue]
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Hypervolume:
    """How the front grew, above a reference point."""

    reference: Mapping[str, float]
    generations: tuple[Growth, ...]


@dataclass(frozen=True)
class Stratum:
    """Items that tell candidates apart about equally well, and how many of them steered."""

    items: int
    drawn: int


@dataclass(frozen=True)
class DrawnItems:
    """The items of a task that steered.

    Attributes:
        items: How many.
        of: Of how many search items.
        effective: How many they are worth if all counted alike.
        strata: Where they were drawn from.
    """

    items: int
    of: int
    effective: float
    strata: tuple[Stratum, ...]


@dataclass(frozen=True)
class EstimatedFitness:
    """A finalist's fitness as the items that steered had it, beside that on all search items."""

    candidate: int
    estimate: float | None
    all_search_items: float


@dataclass(frozen=True)
class InformativeItems:
    """Which items steered where that was a part of the search items, and how far they led from all of them."""

    tasks: Mapping[str, DrawnItems]
    finalists: tuple[EstimatedFitness, ...]


@dataclass(frozen=True)
class RunResult:
    """What a finished run found.

    Attributes:
        run: The run's name.
        state: "finished".
        ended: Why the search ended.
        candidates: How many there were.
        items: How many items were evaluated.
        scale: "relative" or "raw".
        goals: What the fitness is made of.
        winner: The winner.
        selection_bias: What its fitness lost from the items that steered to those that chose nothing.
        baselines: What it had to beat, by name.
        finalists: Those it was chosen from, best on the search items first.
        objectives: Names of the objectives; empty where there is one.
        front: The finalists that none dominates, the winner first; empty with one objective.
        constraints: Whether the winner keeps within each limit.
        hypervolume: How the front grew; None with one objective.
        informative: The items that steered; None where all search items did.
        within_noise_of: The baselines that the winner is not surely better than.
        verdict: Whether it is better than what a person would have tried first, in a sentence.
    """

    run: str
    state: str
    ended: Ending
    candidates: CandidateCounts
    items: ItemCounts
    scale: str
    goals: tuple[GoalResult, ...]
    winner: WinnerRow
    selection_bias: Estimate
    baselines: Mapping[str, BaselineRow]
    finalists: tuple[Finalist, ...]
    objectives: tuple[str, ...]
    front: tuple[FrontEntry, ...]
    constraints: tuple[ConstraintResult, ...]
    hypervolume: Hypervolume | None
    informative: InformativeItems | None
    within_noise_of: tuple[str, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Returns the content of result.json."""
        content: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return content

    @classmethod
    def from_json(cls, content: Any, where: str = "result.json") -> RunResult:
        """Reads what `to_json` gave.

        Args:
            content: The content of result.json.
            where: What an error calls it.

        Raises:
            RunError: With every key that is missing, unknown or of the wrong type.
        """
        try:
            return _adapter().validate_python(content, extra="forbid")
        except ValidationError as error:
            problems = [
                f"{where}: {'.'.join(map(str, problem['loc'])) or 'its content'}: "
                f"{_PLAIN.get(problem['type'], problem['msg'])}"
                for problem in error.errors(include_url=False)
            ]
        raise RunError([*problems, f"{where}: not the result of this version; without it, `evomerge resume` writes it"])


@dataclass(frozen=True)
class BestCandidate:
    """The best candidate so far, or the winner.

    Attributes:
        candidate: Its number.
        fitness: What the search compares by; of a finished run's winner its overall score on the search items.
        scores: Split to the scores of every task and metric.
        overall: Of a finished run's winner, split to its overall score.
    """

    candidate: int
    fitness: float
    scores: Mapping[str, ScoreTable]
    overall: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class FrontMember:
    """A candidate that no other dominates on the items that steer, and its objectives by name."""

    candidate: int
    fitness: float
    objectives: Mapping[str, float]


@dataclass(frozen=True)
class FrontSoFar:
    """The front of a search: its size, its hypervolume (None before generation 0 is scored), the fittest first."""

    size: int
    hypervolume: float | None
    candidates: tuple[FrontMember, ...]


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Attributes:
        run: The run's name.
        state: "running", "stopped" or "finished".
        candidates: How many there are.
        items: How many items were evaluated.
        best: The best candidate so far, or the winner of a finished run; None while nothing is scored.
        front: The front so far; None with one objective.
        baselines: The scores of generation 0 by name and split, and of the finished run's baselines.
        candidates_per_hour: The rate so far; None while nothing is scored.
        seconds_left: At that rate.
        verdict: As in `RunResult`; None of a run that has no result yet.
        metrics: Task to the metric that is reported, where the specification or the result names it.
    """

    run: str
    state: str
    candidates: CandidateCounts
    items: ItemCounts
    best: BestCandidate | None
    front: FrontSoFar | None
    baselines: Mapping[str, Mapping[str, ScoreTable]]
    candidates_per_hour: float | None
    seconds_left: float | None
    verdict: str | None
    metrics: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns what `evomerge status --json` prints."""
        content: dict[str, Any] = TypeAdapter(RunStatus).dump_python(self, mode="json")
        return content


@cache
def _adapter() -> TypeAdapter[RunResult]:
    return TypeAdapter(RunResult)
