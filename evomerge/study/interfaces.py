"""The three ports of a search: what proposes candidates, what scores them, and what is told of the progress.

The loop calls them without knowing which it got: `evomerge.algorithms`, `evomerge.executors` and `evomerge.trackers`
implement them and do not know each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.system.arrays import FloatArray, IntArray

log = logging.getLogger(__name__)

Level = Literal["info", "warning"]


class LocalModel(Protocol):
    """The fitness around one candidate, predicted from how the log-likelihoods of all items move with the genes."""

    def resolution(self, labels: Sequence[IntArray], radius: float) -> tuple[int, float, float]:
        """Chooses which genes to move together, by cross-validation over the items.

        Args:
            labels: For each way a label of every gene, [reals]: genes of one label move alike, those of -1 stay.
            radius: Nats a token of the answers that a step may change, as a root mean square.

        Returns:
            Index of the way, what the mean square of a step should cost, and the mean gain over items that a step was
            not made for.
        """
        ...

    def step(self, labels: IntArray, ridge: float, radius: float) -> tuple[FloatArray, float]:
        """Finds the best point within a radius: the move in units of the genes' ranges, [reals], and its gain."""
        ...


@dataclass(frozen=True)
class AlgorithmSettings:
    """Settings of an algorithm, and what it may ask about a candidate beyond its record.

    The question must have the same answer in every session of a run, or a resumed run would differ.

    Attributes:
        population: Candidates per generation.
        options: Settings that only one algorithm knows; those that are left out have the registry's defaults.
        local_model: A model of the fitness around a candidate; None where there is none. Costs several evaluations
            when asked first.
    """

    population: int = 16
    options: Mapping[str, Any] = field(default_factory=dict)
    local_model: Callable[[Candidate], LocalModel | None] | None = None


class Algorithm(Protocol):
    """Proposes the candidates of a generation: a pure function.

    The proposals depend on the space, the history, the seed and the numbers, and nothing else, so that a resumed run is
    the same as one never stopped. Those of the first numbers do not depend on how many more are asked for. Fewer than
    asked for means that the space is exhausted.
    """

    def __call__(
        self,
        space: SearchSpace,
        history: tuple[Candidate, ...],
        numbers: range,
        generation: int,
        seed: int,
        settings: AlgorithmSettings,
    ) -> list[Proposal]:
        """Proposals for `numbers`.

        `history` holds the candidates of earlier generations, by number. In an asynchronous search it holds all that
        have finished, of whatever numbers, and those that are being scored as "pending"; one number is asked for.
        """
        ...


class Executor(Protocol):
    """Scores proposals, here or elsewhere, as many at once as it has slots. The loop asks, tells and records."""

    @property
    def slots(self) -> int:
        """How many proposals it takes at once; may change while it works, and is at least 1."""
        ...

    def begin_generation(self, history: tuple[Candidate, ...]) -> None:
        """Takes the candidates that what is submitted from now on may be compared with: these, and no others."""
        ...

    def submit(self, proposal: Proposal) -> None:
        """Takes a proposal; there are fewer under way than slots."""
        ...

    def next_finished(self) -> tuple[Proposal, Outcome]:
        """Waits for any of the proposals that were submitted.

        Whatever is wrong with a candidate is its outcome, and so is the loss of who scored it.

        Raises:
            OutputError, BadInput: The run's trouble, not the candidate's.
            EvoMergeError: Nobody is left to score.
        """
        ...

    def close(self) -> None:
        """Ends all work at once; what was submitted and has not been given back is lost."""
        ...


@dataclass(frozen=True)
class SearchInfo:
    """What a tracker is told of a search before its first candidate.

    Attributes:
        folder: Where the run is.
        algorithm: Name of the algorithm.
        budget: Candidates to evaluate, those that are recorded already included.
        genes: Number of genes of the space.
        objectives: Names of the objectives, where there are several.
        recorded: The candidates of earlier sessions.
    """

    folder: str
    algorithm: str
    budget: int
    genes: int
    objectives: tuple[str, ...] = ()
    recorded: tuple[Candidate, ...] = ()


class Tracker(Protocol):
    """Is told of a run's progress. Called in this order, but that `report` may come at any time in between."""

    def begin(self, name: str) -> None:
        """Takes the name of the run."""
        ...

    def report(self, text: str, level: Level = "info") -> None:
        """Takes one line of what is going on."""
        ...

    def started(self, search: SearchInfo) -> None:
        """Takes what the search is, and what of it is done already."""
        ...

    def candidate(self, candidate: Candidate) -> None:
        """Takes one more candidate, which is recorded."""
        ...

    def close(self) -> None:
        """Ends what is shown or sent, whether the run went well or not."""
        ...


class NullTracker:
    """Shows nothing; what is reported is in the log at level DEBUG."""

    def begin(self, name: str) -> None:
        """Passes over the name."""

    def report(self, text: str, level: Level = "info") -> None:
        """Logs the line."""
        log.debug(text)

    def started(self, search: SearchInfo) -> None:
        """Passes over the search."""

    def candidate(self, candidate: Candidate) -> None:
        """Passes over the candidate."""

    def close(self) -> None:
        """Ends nothing."""


class LogTracker(NullTracker):
    """Shows nothing; what is reported is in the log at its own level."""

    def report(self, text: str, level: Level = "info") -> None:
        """Logs the line."""
        log.log(logging.WARNING if level == "warning" else logging.INFO, text)

    def candidate(self, candidate: Candidate) -> None:
        """Logs the candidate."""
        value = candidate.failure if candidate.fitness is None else f"{candidate.fitness:.4f} ({candidate.state})"
        self.report(f"candidate {candidate.number}, {candidate.operator}: {value}")
