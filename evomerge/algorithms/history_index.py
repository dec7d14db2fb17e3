"""What algorithms read off a whole history, brought up to date by the candidates that are new.

A search asks once a generation, and its history only grows: reading all of it each time would cost the square of the
candidates. A reading is nothing but its history's; where another history is asked about, it is read from its start.
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
from evomerge.study.candidate import DRAW, Candidate, gradient_parent
from evomerge.study.ranking import fitness_key, front_by_front, has_fitness
from evomerge.system.arrays import FloatArray, Mask

T = TypeVar("T")

FEW = 64
"""So many new candidates are put in their places one by one."""


class Reading:
    """One history, read.

    Attributes:
        history: What was read.
        tried: Recipe hashes that need no second look; a baseline counts by its own recipe and by its genome's.
        unlike: Numbers of the baselines whose recipe is not what their genome says.
        steps: Number of a candidate -> how many were made with its slopes.
        several: Whether there are candidates with several objectives.
        draws: Generation with draws -> whether one of them was the best candidate so far.
    """

    def __init__(self, space: SearchSpace, before: Reading | None = None) -> None:
        self.history: tuple[Candidate, ...] = ()
        self.tried: set[str] = set()
        self.unlike: set[int] = set()
        self.steps: Counter[int] = Counter()
        self.several = False
        self.draws: dict[int, bool] = {}
        self._space = space
        self._best = -math.inf
        self._fittest: list[Candidate] = []
        # What genomes say, by number of candidate; it holds for the very genome only.
        self._units: dict[int, tuple[Genome, FloatArray]] = before._units if before else {}
        self._recipe_hashes: dict[int, tuple[Genome, str]] = before._recipe_hashes if before else {}

    @classmethod
    def of(cls, space: SearchSpace, history: Sequence[Candidate]) -> Reading:
        """Indexes a history, from where the last index of the space ends if it goes on from there."""
        latest = next((index for index in reversed(_LATEST) if index._space is space), None)
        index = latest if latest is not None and latest._begins(history) else cls(space, latest)
        index._go_on(tuple(history))
        if index is not latest:
            _LATEST.append(index)
        return index

    def best_first(self, enough: int | None = None) -> list[Candidate]:
        """As `best_first` of the history."""
        return front_by_front(self._fittest if self.several else self._fittest[:enough], enough)

    def unit(self, candidate: Candidate) -> FloatArray:
        """A candidate's real genes in [0, 1], shape [reals]."""
        return _said(self._units, candidate, self._space.unit)

    def units(self, candidates: Sequence[Candidate], mask: Mask) -> FloatArray:
        """Some of their real genes, shape [candidates, genes]."""
        return np.stack([self.unit(candidate)[mask] for candidate in candidates])

    def nearest(self, here: Candidate, mask: Mask, candidates: Sequence[Candidate], enough: int) -> list[Candidate]:
        """Of some candidates with a fitness those that differ from one in real genes only, by how far they are in some.

        Args:
            here: The one, itself the first.
            mask: The real genes that count, shape [reals].
            candidates: Those to choose from.
            enough: How many at most.
        """
        alike = [c for c in candidates if c.fitness is not None and (c.number == here.number or self._is_like(c, here))]
        apart = np.linalg.norm(self.units(alike, mask) - self.unit(here)[mask], axis=1)
        order = np.lexsort(([c.number for c in alike], apart, [c.number != here.number for c in alike]))
        return [alike[k] for k in order[:enough]]

    def _is_like(self, candidate: Candidate, here: Candidate) -> bool:
        """Whether a candidate's genome says what it is, and has the methods and layers of another one's."""
        mine, its = candidate.genome, here.genome
        if candidate.number in self.unlike or mine.layers != its.layers:
            return False
        return all(mine.values[choice.name] == its.values[choice.name] for choice in self._space.choices)

    def _begins(self, history: Sequence[Candidate]) -> bool:
        """Whether a history begins with these very candidates."""
        return len(self.history) <= len(history) and all(map(operator.is_, self.history, history))

    def _go_on(self, history: tuple[Candidate, ...]) -> None:
        new = history[len(self.history) :]
        for candidate in new:
            self.tried.add(candidate.recipe_hash)
            if candidate.generation == 0:
                said = _said(self._recipe_hashes, candidate, partial(genome_hash, self._space))
                self.tried.add(said)
                if said != candidate.recipe_hash:
                    self.unlike.add(candidate.number)
            if (number := gradient_parent(candidate)) is not None:
                self.steps[number] += 1
            fitness = -math.inf if candidate.state != "done" or candidate.fitness is None else candidate.fitness
            won, self._best = fitness > self._best, max(fitness, self._best)
            if candidate.operator == DRAW and candidate.state != "pending":
                self.draws[candidate.generation] = self.draws.get(candidate.generation, False) or won
            self.several = self.several or candidate.objectives is not None
        if len(new) > FEW:
            self._fittest = sorted([*self._fittest, *filter(has_fitness, new)], key=fitness_key)
        else:
            for candidate in filter(has_fitness, new):
                insort(self._fittest, candidate, key=fitness_key)
        self.history = history


def _said(known: dict[int, tuple[Genome, T]], candidate: Candidate, say: Callable[[Genome], T]) -> T:
    """What a genome says, worked out once for the candidate."""
    kept = known.get(candidate.number)
    if kept is None or kept[0] is not candidate.genome:
        kept = known[candidate.number] = candidate.genome, say(candidate.genome)
    return kept[1]


#: The latest indexes: a search asks for its own again every generation.
_LATEST: deque[Reading] = deque(maxlen=4)
