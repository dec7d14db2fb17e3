"""What every algorithm shares: the randomness of a candidate number, and proposals that are all different."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from evomerge.algorithms.history_index import HistoryIndex
from evomerge.space.decode import decode, recipe_hash, why_invalid
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal

REDRAWS = 16
IMMIGRANTS = 48
PLANNED_ATTEMPT = REDRAWS + IMMIGRANTS
"""The attempt whose random numbers are left to what is planned."""

#: A draw: (genome, numbers of its parents, operator).
Draw = tuple[Genome, tuple[int, ...], str]


def generator(seed: int, number: int, attempt: int = 0) -> np.random.Generator:
    """Makes the generator of one attempt at one candidate."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number, attempt])))


def distinct(
    space: SearchSpace,
    history: Sequence[Candidate],
    numbers: range,
    generation: int,
    seed: int,
    draw: Callable[[np.random.Generator], Draw],
    planned: Callable[[int], Draw | None] | None = None,
) -> list[Proposal]:
    """Draws a proposal for each number until its recipe is a new one.

    A number gets what is planned for it, if that is new; else a bounded number of redraws, then of random genomes. The
    first number that stays without a new recipe ends the list.
    """
    seen = set(HistoryIndex.of(space, history).tried)
    proposals: list[Proposal] = []
    for number in numbers:
        first = planned(number) if planned is not None else None
        proposal = _new(space, seen, number, generation, seed, draw, first)
        if proposal is None:
            break
        seen.add(proposal.recipe_hash)
        proposals.append(proposal)
    return proposals


def _new(
    space: SearchSpace,
    seen: set[str],
    number: int,
    generation: int,
    seed: int,
    draw: Callable[[np.random.Generator], Draw],
    planned: Draw | None,
) -> Proposal | None:
    for attempt in range(-1 if planned is not None else 0, REDRAWS + IMMIGRANTS):
        if attempt < 0 and planned is not None:
            genome, parents, operator = planned
        else:
            rng = generator(seed, number, attempt)
            genome, parents, operator = draw(rng) if attempt < REDRAWS else (space.sample(rng), (), "immigrant")
        if why_invalid(space, genome) is not None:
            continue
        recipe = decode(space, genome)
        identity = recipe_hash(recipe)
        if identity not in seen:
            return Proposal(number, generation, genome, recipe, identity, parents, operator)
    return None
