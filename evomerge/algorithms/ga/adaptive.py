"""What worked so far: how often each operator gave a better child, and with what steps.

Adaptive operator selection by probability matching with a floor (Goldberg, 1990; Thierens, 2005,
https://doi.org/10.1145/1068009.1068251), and step sizes from the steps of successful children, as success-history
adaptation does it (Tanabe and Fukunaga, 2013, https://doi.org/10.1109/CEC.2013.6557555). Both are read off the record,
so that a resumed search knows what an uninterrupted one does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.space.space import SearchSpace
from evomerge.study.candidate import GRADIENT, Candidate, find

RECENT = 256
"""Candidates that count: what worked long ago need not work now."""
CAUTION = 8.0
"""Uses by which an operator is taken to be as good as all are, beside its own."""
BOUNDS = (0.3, 4.0)
"""How far an operator's record may change how often it is used."""
STEPS = 12
"""Successful steps that are remembered."""


@dataclass(frozen=True)
class Experience:
    """What the record says about the operators.

    Attributes:
        uses: Operator -> (better than all its parents, used).
        steps: The root mean square steps of the last successful mutations, per gene that changed, in units of the
            genes' ranges.
    """

    uses: Mapping[str, tuple[int, int]]
    steps: tuple[float, ...] = ()

    @classmethod
    def of(cls, space: SearchSpace, history: Sequence[Candidate]) -> Experience:
        """The experience of a history, in order of number."""
        uses: dict[str, tuple[int, int]] = {}
        steps: list[float] = []
        for child in history[-RECENT:]:
            parents = [parent for number in child.parents if (parent := find(history, number)) is not None]
            if not parents or child.generation == 0 or child.state == "pending":
                continue
            better = child.state == "done" and all((child.fitness or 0.0) > (p.fitness or 0.0) for p in parents)
            for name in operators_of(child.operator):
                won, used = uses.get(name, (0, 0))
                uses[name] = (won + better, used + 1)
            if better and child.operator.startswith("mutation"):
                steps += _step(space, parents[0], child)
        return cls(uses, tuple(steps[-STEPS:]))

    def favour(self, name: str) -> float:
        """How much more often than by default to use an operator, within `BOUNDS`."""
        total = sum(used for _, used in self.uses.values())
        rate = (sum(won for won, _ in self.uses.values()) + 1.0) / (total + CAUTION)
        won, used = self.uses.get(name, (0, 0))
        low, high = BOUNDS
        return min(max((won + CAUTION * rate) / (used + CAUTION) / rate, low), high)


def operators_of(text: str) -> Iterator[str]:
    """The operators that a candidate's `operator` names: ``centroid of 4 + mutation: whole model`` has two."""
    for part in text.split(" + "):
        for name in part.removeprefix("mutation: ").split(", "):
            yield GRADIENT if GRADIENT in name else re.sub(r" of \d+$", "", name)


def pick(rng: np.random.Generator, priors: Mapping[str, float], experience: Experience | None) -> str:
    """An operator by its prior weight, and by what it was worth so far."""
    weights = np.array([w * (experience.favour(name) if experience else 1.0) for name, w in priors.items()])
    place = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(), side="right")
    return list(priors)[min(int(place), len(priors) - 1)]


def _step(space: SearchSpace, parent: Candidate, child: Candidate) -> list[float]:
    moved = space.unit(child.genome) - space.unit(parent.genome)
    changed = moved[moved != 0]
    return [math.sqrt(float(np.mean(changed**2)))] if len(changed) else []
