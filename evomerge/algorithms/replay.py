"""Evolution strategies rebuilt from the record: their asks and tells are done again, from the first to the last.

A strategy's state is its start and what it was told. It is told its own candidates only, in groups of its population,
as ranks: the numbers that an ask drew are not in the record, but an ask with the candidate's own seed draws them again,
and is recognised by its genome. So a repaired, folded or rounded genome may be scored while the strategy is told the
point itself. What a state was replayed to is kept for the next generation; that saves time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from evomerge.algorithms.proposals import REDRAWS, Draw, distinct, generator
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.ranking import fitness_key

#: What an ask gives: the point in the strategy's own coordinates.
P = TypeVar("P")
#: Fewer candidates than this give an evolution strategy no direction.
MIN_POPULATION = 4


class Optimizer(Protocol[P]):
    """The classes of the `cmaes` package."""

    def reseed_rng(self, seed: int) -> None:
        """Starts the random numbers anew."""

    def ask(self) -> P:
        """Draws a point."""
        ...

    def tell(self, solutions: list[tuple[P, float]]) -> None:
        """Learns from points and their values, lower is better."""

    def should_stop(self) -> bool:
        """Tells whether the distribution has collapsed or run away."""
        ...


@dataclass(frozen=True)
class Strategy(Generic[P]):
    """An evolution strategy on a search space.

    Attributes:
        name: The operator of its candidates, as the lineage shows it.
        key: Everything that its states depend on beside what they are told.
        population: Candidates per tell.
        start: A new optimizer; restarts are counted from 0.
        genome: The genome of a point.
        point: A point of a genome, for one that another machine's arithmetic made a hair differently.
        finished: Whether an optimizer that was just told these points should start anew.
    """

    name: str
    key: tuple[Any, ...]
    population: int
    start: Callable[[int], Optimizer[P]]
    genome: Callable[[P], Genome]
    point: Callable[[Genome], P]
    finished: Callable[[Optimizer[P], Sequence[P]], bool]


@dataclass
class _State(Generic[P]):
    """A replayed optimizer, the candidates that it was told, and how often it started anew."""

    optimizer: Optimizer[P]
    candidates: list[Candidate]
    restarts: int = 0

    def tell(self, strategy: Strategy[P], group: list[Candidate], seed: int) -> None:
        """Tells one generation, best first; those that failed are last, and a generation of failures says nothing."""
        self.candidates.extend(group)
        if all(candidate.fitness is None for candidate in group):
            return
        order = sorted(group, key=lambda c: (c.fitness is None, *fitness_key(c)))
        points = [_point(strategy, self.optimizer, candidate, seed) for candidate in order]
        self.optimizer.tell([(point, float(rank)) for rank, point in enumerate(points)])
        if strategy.finished(self.optimizer, points):
            self.restarts += 1
            self.optimizer = strategy.start(self.restarts)


#: The last state of the process by "last": taken out while it is used, so that two threads do not share it.
_KEPT: dict[str, tuple[tuple[Any, ...], _State[Any]]] = {}


def propose(
    strategy: Strategy[P], space: SearchSpace, history: Sequence[Candidate], numbers: range, generation: int, seed: int
) -> list[Proposal]:
    """Points of the strategy's present distribution, each a new recipe."""
    key = (strategy.name, *strategy.key, strategy.population, seed)
    state = _replayed(strategy, key, history, seed)

    def draw(rng: np.random.Generator) -> Draw:
        return strategy.genome(_ask(state.optimizer, rng)), (), strategy.name

    proposals = distinct(space, history, numbers, generation, seed, draw)
    _KEPT["last"] = (key, state)
    return proposals


def _ask(optimizer: Optimizer[P], rng: np.random.Generator) -> P:
    optimizer.reseed_rng(int(rng.integers(2**32)))
    return optimizer.ask()


def _replayed(strategy: Strategy[P], key: tuple[Any, ...], history: Sequence[Candidate], seed: int) -> _State[P]:
    """The state after everything that the history has for it."""
    own = [candidate for candidate in history if candidate.operator == strategy.name]
    whole = own[: len(own) - len(own) % strategy.population]
    kept_key, state = _KEPT.pop("last", ((), None))
    if state is None or kept_key != key or state.candidates != whole[: len(state.candidates)]:
        state = _State(strategy.start(0), [])
    for first in range(len(state.candidates), len(whole), strategy.population):
        state.tell(strategy, whole[first : first + strategy.population], seed)
    return state


def _point(strategy: Strategy[P], optimizer: Optimizer[P], candidate: Candidate, seed: int) -> P:
    """The point that a candidate was made of."""
    for attempt in range(REDRAWS):
        point = _ask(optimizer, generator(seed, candidate.number, attempt))
        if strategy.genome(point) == candidate.genome:
            return point
    return strategy.point(candidate.genome)
