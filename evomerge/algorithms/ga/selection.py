"""Selection: who breeds, with whom, and by which operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.algorithms import operators
from evomerge.algorithms.ga.layer_operators import Layers
from evomerge.space.baselines import PARENT
from evomerge.space.decode import copies_layers
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate
from evomerge.system.arrays import FloatArray

PARENTS = 16
"""Whom to breed from: so many of the best, or as many as a generation has."""
TOURNAMENT_SIZE = 3
SAME_METHODS_RATE = 0.7
"""How often a partner is sought among those of the same methods."""

ASSEMBLY = "assembly"
RECOMBINATIONS = {
    "none": 0.2,
    "centroid": 0.32,
    "line": 0.16,
    "blend": 0.08,
    "crossover by layers": 0.1,
    "split-point crossover": 0.04,
    "crossover by model": 0.08,
    "uniform crossover": 0.02,
    ASSEMBLY: 1.0,
}
"""How often each operator is used, relative to the others."""
MUTATIONS = {"whole model": 0.35, "layer group": 0.2, "smoothing": 0.1, "all genes": 0.15, "single genes": 0.2}


@dataclass(frozen=True)
class Parent:
    """A candidate to breed from, in the form that operators work on.

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
        """Makes a parent of a candidate of the space."""
        genome = candidate.genome
        choices = {choice.name: str(genome.values[choice.name]) for choice in space.choices}
        return cls(candidate.number, space.unit(genome), choices, genome.layers)

    def copies_layers(self, space: SearchSpace) -> bool:
        """Tells whether any part of its recipe is a copy of layers."""
        return copies_layers(space, space.genome(self.unit, self.choices, self.layers))


def genome_is_exact(space: SearchSpace, candidate: Candidate) -> bool:
    """Tells whether a candidate of copied layers is what its genome says: no pattern stands for an average."""
    if candidate.generation > 0:
        return True
    return candidate.operator.startswith(PARENT) or space.registry[candidate.recipe["merge_method"]].copies_layers


def possible_recombinations(space: SearchSpace, first: Parent, parents: int) -> dict[str, float]:
    """Weighs the recombinations that have a sense here."""
    if parents < 2:
        return {"none": 1.0}
    senseless: set[str] = set()
    if len(space.groups) < 2:
        senseless |= {"crossover by layers", "split-point crossover"}
    if len(space.sources) < 2:
        senseless.add("crossover by model")
    if space.pattern is None or not first.copies_layers(space):
        senseless.add(ASSEMBLY)
    return {name: weight for name, weight in RECOMBINATIONS.items() if name not in senseless}


def choose(weights: Mapping[str, float], rng: np.random.Generator) -> str:
    """Draws a name by its weight."""
    values = np.array(list(weights.values()))
    index = np.searchsorted(np.cumsum(values) / values.sum(), rng.random(), side="right")
    return list(weights)[min(int(index), len(weights) - 1)]


def choose_first(parents: Sequence[Parent], rng: np.random.Generator) -> Parent:
    """Draws a parent by a tournament; they are given best first."""
    return parents[operators.tournament(len(parents), TOURNAMENT_SIZE, rng)]


def choose_partner(parents: Sequence[Parent], first: Parent, rng: np.random.Generator) -> Parent:
    """Draws another parent, rather one of the same methods: its numbers mean the same."""
    others = [p for p in parents if p is not first]
    alike = [p for p in others if p.choices == first.choices]
    pool = alike if alike and rng.random() < SAME_METHODS_RATE else others
    return pool[operators.tournament(len(pool), TOURNAMENT_SIZE, rng)]
