"""A candidate in the form that operators work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.algorithms.ga.layer_operators import Layers
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate
from evomerge.system.arrays import FloatArray


@dataclass(frozen=True)
class Parent:
    """A candidate to breed from.

    Attributes:
        number: Its number.
        unit: Its real genes in [0, 1], shape [reals].
        choices: Its methods, by gene.
        layers: Its layer pattern.
    """

    number: int
    unit: FloatArray
    choices: Mapping[str, str]
    layers: Layers

    @classmethod
    def of(cls, space: SearchSpace, candidate: Candidate) -> Parent:
        """A candidate of the space."""
        genome = candidate.genome
        choices = {choice.name: str(genome.values[choice.name]) for choice in space.choices}
        return cls(candidate.number, space.unit(genome), choices, genome.layers)
