"""A search in rounds: the candidates of all rounds as one history, and the names of the winners that become sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evomerge.space.baselines import PARENT
from evomerge.study.candidate import Candidate, find

WINNERS = 3
"""Sources that a round adds."""
_WINNER = "candidate-"


def winner_name(number: int) -> str:
    """Names a candidate as a source of later rounds."""
    return f"{_WINNER}{number}"


def winner_number(model: str) -> int | None:
    """Returns the number of the candidate that a model's name stands for; None where it stands for none."""
    digits = model.removeprefix(_WINNER)
    return int(digits) if digits != model and digits.isdecimal() else None


@dataclass(frozen=True)
class RoundStart:
    """What a round's own numbers count from.

    Attributes:
        candidate: Number of its first candidate among those of all rounds.
        generation: Its first generation.
    """

    candidate: int = 0
    generation: int = 0

    @classmethod
    def after(cls, history: Sequence[Candidate], number: int | None = None) -> RoundStart:
        """Returns the start of the round that follows some candidates, with this number or the next."""
        last = max((candidate.number for candidate in history), default=-1)
        generation = max((candidate.generation for candidate in history), default=-1)
        return cls(last + 1 if number is None else number, generation + 1)

    def in_all(self, candidate: Candidate) -> Candidate:
        """Returns a candidate of the round as one of all; without parents it descends from the winners it merges."""
        parents = tuple(self.candidate + parent for parent in candidate.parents)
        return replace(
            candidate,
            number=self.candidate + candidate.number,
            generation=self.generation + candidate.generation,
            parents=parents or tuple(winners_in(candidate.recipe)),
        )


def joined(rounds: Mapping[int, Sequence[Candidate]]) -> tuple[Candidate, ...]:
    """Joins the candidates of all rounds, each under the number of its first, to one history."""
    history: tuple[Candidate, ...] = ()
    for first, candidates in sorted(rounds.items()):
        start = RoundStart.after(history, first)
        history += tuple(map(start.in_all, candidates)) if first else tuple(candidates)
    return history


def winners_in(recipe: Mapping[str, Any]) -> list[int]:
    """Lists the candidates of earlier rounds that a recipe merges."""
    numbers = (winner_number(model) for model in _models(recipe))
    return list(dict.fromkeys(number for number in numbers if number is not None))


def _models(recipe: Mapping[str, Any]) -> Iterator[str]:
    for part in (recipe, *recipe.get("slices", ())):
        for entry in (*part.get("models", ()), *part.get("sources", ())):
            yield str(entry["model"])


def is_copy(candidate: Candidate) -> bool:
    """Tells whether a candidate is but an earlier one again, as a source."""
    name = candidate.operator.removeprefix(PARENT)
    return name != candidate.operator and winner_number(name) is not None


def merged_winners(history: Sequence[Candidate], recipe: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Collects the recipes of all winners that a recipe rests on, by their names."""
    steps: dict[str, Mapping[str, Any]] = {}
    waiting = winners_in(recipe)
    while waiting:
        number = waiting.pop()
        candidate = find(history, number)
        if candidate is not None and winner_name(number) not in steps:
            steps[winner_name(number)] = candidate.recipe
            waiting += winners_in(candidate.recipe)
    return steps
