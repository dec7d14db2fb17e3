"""Random search (Bergstra and Bengio, 2012, https://jmlr.org/papers/v13/bergstra12a.html): every gene uniform."""

from __future__ import annotations

from evomerge.algorithms.proposals import distinct
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings


def random_search(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Proposes independent random genomes."""
    return distinct(space, history, numbers, generation, seed, lambda rng: (space.sample(rng), (), "random"))
