"""What algorithms look up in a whole history, brought up to date by the candidates that are new.

A search asks once a generation, and its history only grows: reading all of it each time would cost the square of the
candidates. An index depends on its history only; another history has another index.
"""

from __future__ import annotations

import math
import operator
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from evomerge.space.decode import genome_hash
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import DRAW, Candidate, step_parent
from evomerge.study.ranking import fitness_key, front_by_front, has_fitness
from evomerge.system.arrays import FloatArray, Mask

T = TypeVar("T")

MAX_INSERTIONS = 64
"""So many new candidates are inserted one by one; more are sorted."""


class HistoryIndex:
    """One history, indexed.

    Attributes:
        history: The candidates.
        tried: Recipe hashes that need no second evaluation; a baseline counts by its own recipe and by its genome's.
        approximated: Numbers of the baselines whose recipe is not what their genome says.
        steps: Number of a candidate -> how many steps were tried from it.
        multi_objective: Whether there are candidates with several objectives.
        draws: Generation with draws in the trust region -> whether one of them was the best candidate so far.
    """

    def __init__(self, space: SearchSpace, before: HistoryIndex | None = None) -> None:
        self.history: tuple[Candidate, ...] = ()
        self.tried: set[str] = set()
        self.approximated: set[int] = set()
        self.steps: Counter[int] = Counter()
        self.multi_objective = False
        self.draws: dict[int, bool] = {}
        self._space = space
        self._best = math.inf, math.inf  # violation, and fitness turned round
        self._fittest: list[Candidate] = []
        # What genomes mean, by number of candidate; it holds for the very genome only.
        self._units: dict[int, tuple[Genome, FloatArray]] = before._units if before else {}
        self._hashes: dict[int, tuple[Genome, str]] = before._hashes if before else {}

    @classmethod
    def of(cls, space: SearchSpace, history: Sequence[Candidate]) -> HistoryIndex:
        """Indexes a history, from where the last index of the space ends if the history goes on from there."""
        latest = next((index for index in reversed(_LATEST) if index._space is space), None)
        index = latest if latest is not None and latest._is_prefix_of(history) else cls(space, latest)
        index._extend(tuple(history))
        if index is not latest:
            _LATEST.append(index)
        return index

    def best_first(self, limit: int | None = None) -> list[Candidate]:
        """Returns what `best_first` does of the history."""
        return front_by_front(self._fittest if self.multi_objective else self._fittest[:limit], limit)

    def unit(self, candidate: Candidate) -> FloatArray:
        """Returns a candidate's real genes in [0, 1], shape [reals]."""
        return _remembered(self._units, candidate, self._space.unit)

    def units(self, candidates: Sequence[Candidate], mask: Mask) -> FloatArray:
        """Returns some of their real genes, shape [candidates, genes]."""
        return np.stack([self.unit(candidate)[mask] for candidate in candidates])

    def nearest(self, center: Candidate, mask: Mask, candidates: Sequence[Candidate], limit: int) -> list[Candidate]:
        """Finds the candidates with a fitness that differ from one in real genes only, nearest first.

        Args:
            center: The one, itself the first.
            mask: The real genes that count, shape [reals].
            candidates: Those to choose from.
            limit: How many at most.
        """
        alike = [
            c for c in candidates if c.fitness is not None and (c.number == center.number or self._is_like(c, center))
        ]
        distances = np.linalg.norm(self.units(alike, mask) - self.unit(center)[mask], axis=1)
        order = np.lexsort(([c.number for c in alike], distances, [c.number != center.number for c in alike]))
        return [alike[k] for k in order[:limit]]

    def _is_like(self, candidate: Candidate, center: Candidate) -> bool:
        """Whether a candidate's genome says what it is, and has the methods and layers of another one's."""
        first, second = candidate.genome, center.genome
        if candidate.number in self.approximated or first.layers != second.layers:
            return False
        return all(first.values[choice.name] == second.values[choice.name] for choice in self._space.choices)

    def _is_prefix_of(self, history: Sequence[Candidate]) -> bool:
        """Whether a history begins with these very candidates."""
        return len(self.history) <= len(history) and all(map(operator.is_, self.history, history))

    def _extend(self, history: tuple[Candidate, ...]) -> None:
        new = history[len(self.history) :]
        for candidate in new:
            self.tried.add(candidate.recipe_hash)
            if candidate.generation == 0:
                by_genome = _remembered(self._hashes, candidate, partial(genome_hash, self._space))
                self.tried.add(by_genome)
                if by_genome != candidate.recipe_hash:
                    self.approximated.add(candidate.number)
            if (number := step_parent(candidate)) is not None:
                self.steps[number] += 1
            improved = candidate.state == "done" and has_fitness(candidate) and fitness_key(candidate)[:2] < self._best
            self._best = fitness_key(candidate)[:2] if improved else self._best
            if candidate.operator == DRAW and candidate.state != "pending":
                self.draws[candidate.generation] = self.draws.get(candidate.generation, False) or improved
            self.multi_objective = self.multi_objective or candidate.objectives is not None
        if len(new) > MAX_INSERTIONS:
            self._fittest = sorted([*self._fittest, *filter(has_fitness, new)], key=fitness_key)
        else:
            for candidate in filter(has_fitness, new):
                insort(self._fittest, candidate, key=fitness_key)
        self.history = history


def _remembered(memo: dict[int, tuple[Genome, T]], candidate: Candidate, function: Callable[[Genome], T]) -> T:
    """A function of a candidate's genome, worked out once."""
    entry = memo.get(candidate.number)
    if entry is None or entry[0] is not candidate.genome:
        entry = memo[candidate.number] = candidate.genome, function(candidate.genome)
    return entry[1]


#: The latest indexes: a search asks for its own again every generation.
_LATEST: deque[HistoryIndex] = deque(maxlen=4)
