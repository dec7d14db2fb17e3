"""What algorithms read off a whole history, brought up to date by the candidates that are new.

A search asks once a generation, and its history only grows: reading all of it each time would cost the square of the
candidates. A reading is nothing but its history's; where another history is asked about, it is read from its start.
"""

from __future__ import annotations

import math
import operator
from bisect import insort
from collections import Counter
from collections.abc import Sequence

from evomerge.search.candidate import DRAW, Candidate, by_objectives, fitness_order, sloped, teaches
from evomerge.search.operators import FloatArray
from evomerge.search.space import SearchSpace


class Reading:
    """One history, read.

    Attributes:
        history: What was read.
        tried: Phenotypes that need no second look; a baseline counts by its own recipe and by its genome's.
        unlike: Numbers of the baselines whose recipe is not what their genome says.
        steps: Number of a candidate -> how many were made with its slopes.
        several: Whether there are candidates with several objectives.
        draws: Generation with draws -> whether one of them was the best candidate so far.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.history: Sequence[Candidate] = ()
        self.tried: set[str] = set()
        self.unlike: set[int] = set()
        self.steps: Counter[int] = Counter()
        self.draws: dict[int, bool] = {}
        self._space = space
        self._units: dict[int, FloatArray] = {}
        self._best = -math.inf
        self._fittest: list[Candidate] = []
        self.several = False

    @classmethod
    def of(cls, space: SearchSpace, history: Sequence[Candidate]) -> Reading:
        """The reading of a history, which the space keeps for the next time."""
        kept = space.notes.get(cls)
        reading = kept if isinstance(kept, cls) and kept._begins(history) else cls(space)
        reading._go_on(history)
        space.notes[cls] = reading
        return reading

    def promising(self, enough: int | None = None) -> list[Candidate]:
        """As `promising` of the history."""
        return by_objectives(self._fittest if self.several else self._fittest[:enough], enough)

    def unit(self, candidate: Candidate) -> FloatArray:
        """A candidate's real genes in [0, 1], shape [reals]."""
        if candidate.number not in self._units:
            self._units[candidate.number] = self._space.unit(candidate.genome)
        return self._units[candidate.number]

    def _begins(self, history: Sequence[Candidate]) -> bool:
        """Whether a history begins with these very candidates."""
        return len(self.history) <= len(history) and all(map(operator.is_, self.history, history))

    def _go_on(self, history: Sequence[Candidate]) -> None:
        for candidate in history[len(self.history) :]:
            self.tried.add(candidate.phenotype)
            if candidate.generation == 0:
                said = self._space.phenotype(candidate.genome)
                self.tried.add(said)
                if said != candidate.phenotype:
                    self.unlike.add(candidate.number)
            if (number := sloped(candidate)) is not None:
                self.steps[number] += 1
            won = candidate.state == "done" and candidate.fitness is not None and candidate.fitness > self._best
            if won and candidate.fitness is not None:
                self._best = candidate.fitness
            if candidate.operator == DRAW and candidate.state != "pending":
                self.draws[candidate.generation] = self.draws.get(candidate.generation, False) or won
            if teaches(candidate):
                insort(self._fittest, candidate, key=fitness_order)
                self.several = self.several or candidate.objectives is not None
        self.history = history
