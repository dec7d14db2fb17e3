"""The default search: a genetic algorithm over merge recipes.

The parents of a generation are the best `population` of all candidates (elitism: a (μ + λ) truncation); one that a race
stopped counts with the estimate it was stopped at, which is below the cut-off. A child is a recombination of tournament
winners, then a mutation. Scores on a hundred items are noisy, so recombination that averages several good candidates is
the most frequent, and steps come in all sizes. Mutation follows the structure of the genes: a whole model, a whole
layer group, or single genes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evomerge.search import operators, patterns
from evomerge.search.candidate import Candidate, Proposal, promising
from evomerge.search.decode import active, copies
from evomerge.search.genes import OUTER
from evomerge.search.operators import FloatArray, IntArray, Mask
from evomerge.search.patterns import Layers
from evomerge.search.propose import AlgorithmSettings, Draw, distinct
from evomerge.search.space import SearchSpace

TOURNAMENT = 3
CENTROID_MOST = 8
METHOD_MUTATION = 0.1
MUTATION = 0.8


@dataclass(frozen=True)
class Linkage:
    """Which genes belong together: integer labels, shape [reals]; -1 for none."""

    space: SearchSpace

    @cached_property
    def group(self) -> IntArray:
        """The layer group; ``outer`` counts as one more."""
        last = len(self.space.groups)
        return np.array([last if g.group == OUTER else int(g.group[1:]) for g in self.space.reals], dtype=np.int64)

    @cached_property
    def source(self) -> IntArray:
        """The source model."""
        names = list(self.space.sources)
        return np.array([-1 if g.source is None else names.index(g.source) for g in self.space.reals], dtype=np.int64)

    @cached_property
    def parameter(self) -> IntArray:
        """The parameter."""
        names = sorted({g.parameter for g in self.space.reals})
        return np.array([names.index(g.parameter) for g in self.space.reals], dtype=np.int64)

    @cached_property
    def owner(self) -> IntArray:
        """The parameter of one source (or of all): the genes that a whole-model change moves together."""
        return self.parameter * (len(self.space.sources) + 1) + self.source + 1


@dataclass(frozen=True)
class Parent:
    """A candidate to breed from, in the form that the operators work on."""

    number: int
    unit: FloatArray
    choices: Mapping[str, str]
    layers: Layers


def ga(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Children of the best candidates so far; random genomes while there are none."""
    names = [choice.name for choice in space.choices]
    parents = [
        Parent(c.number, space.unit(c.genome), {name: str(c.genome.values[name]) for name in names}, c.genome.layers)
        for c in promising(history)[: settings.population]
    ]
    linkage = Linkage(space)

    def draw(rng: np.random.Generator) -> Draw:
        if not parents:
            return space.sample(rng), (), "random"
        return _child(space, linkage, parents, rng)

    return distinct(space, history, numbers, generation, seed, draw)


def _child(space: SearchSpace, linkage: Linkage, parents: list[Parent], rng: np.random.Generator) -> Draw:
    first = parents[operators.tournament(len(parents), TOURNAMENT, rng)]
    unit, choices, layers = first.unit, dict(first.choices), first.layers
    used: list[Parent] = [first]
    words: list[str] = []
    if len(parents) > 1 and rng.random() < 0.8:
        unit, choices, layers, used, word = _recombine(space, linkage, parents, first, rng)
        words.append(word)
    if not words or rng.random() < MUTATION:
        unit, choices, layers, word = _mutate(space, linkage, unit, choices, layers, rng)
        words.append(word)
    return space.genome(unit, choices, layers), tuple(p.number for p in used), " + ".join(words)


def _partner(parents: list[Parent], first: Parent, rng: np.random.Generator) -> Parent:
    """Another parent, rather one of the same methods: its numbers mean the same."""
    others = [p for p in parents if p is not first]
    alike = [p for p in others if p.choices == first.choices]
    pool = alike if alike and rng.random() < 0.7 else others
    return pool[operators.tournament(len(pool), TOURNAMENT, rng)]


Recombined = tuple[FloatArray, dict[str, str], Layers, list[Parent], str]


def _recombine(
    space: SearchSpace, linkage: Linkage, parents: list[Parent], first: Parent, rng: np.random.Generator
) -> Recombined:
    kind = rng.random()
    if kind < 0.4:
        return _centroid(parents, first, rng)
    second = _partner(parents, first, rng)
    choices, layers = dict(first.choices), first.layers
    if space.pattern is not None and _copies_layers(space, first):
        layers = patterns.crossover(first.layers, second.layers, space.pattern, rng)
    if kind < 0.6:
        return operators.line(first.unit, second.unit, rng), choices, layers, [first, second], "line"
    if kind < 0.7:
        return operators.blend(first.unit, second.unit, rng), choices, layers, [first, second], "blend"
    if kind < 0.87 and len(space.groups) > 1:
        taken = operators.contiguous_block(len(space.groups) + 1, rng)
        unit = operators.by_label(first.unit, second.unit, linkage.group, taken)
        for choice in space.choices:
            if choice.group in taken:
                choices[choice.name] = second.choices[choice.name]
        return unit, choices, layers, [first, second], "crossover by layers"
    if kind < 0.97 and len(space.sources) > 1:
        count = len(space.sources)
        taken = [int(i) for i in rng.permutation(count)[: int(rng.integers(1, count))]]
        unit = operators.by_label(first.unit, second.unit, linkage.source, taken)
        return unit, choices, layers, [first, second], "crossover by model"
    return operators.uniform(first.unit, second.unit, rng), choices, layers, [first, second], "uniform crossover"


def _centroid(parents: list[Parent], first: Parent, rng: np.random.Generator) -> Recombined:
    alike = [p for p in parents if p.choices == first.choices]
    pool = alike if len(alike) > 1 else parents
    count = int(rng.integers(2, min(CENTROID_MOST, len(pool)) + 1))
    chosen = [pool[int(i)] for i in np.sort(rng.permutation(min(len(pool), 2 * count))[:count])]
    unit = operators.centroid([p.unit for p in chosen])
    best = chosen[0]
    return unit, dict(first.choices), best.layers, chosen, f"centroid of {count}"


def _copies_layers(space: SearchSpace, parent: Parent) -> bool:
    return copies(space, space.genome(parent.unit, parent.choices, parent.layers))


Mutated = tuple[FloatArray, dict[str, str], Layers, str]


def _mutate(
    space: SearchSpace,
    linkage: Linkage,
    unit: FloatArray,
    choices: dict[str, str],
    layers: Layers,
    rng: np.random.Generator,
) -> Mutated:
    words: list[str] = []
    if space.choices and rng.random() < METHOD_MUTATION:
        choice = space.choices[int(rng.integers(len(space.choices)))]
        others = [name for name in choice.options if name != choices[choice.name]]
        choices = {**choices, choice.name: others[int(rng.integers(len(others)))]}
        words.append("method")
    genome = space.genome(unit, choices, layers)
    if space.pattern is not None and copies(space, genome):
        for _ in range(int(rng.integers(1, 3))):
            name = list(patterns.MOVES)[int(rng.integers(len(patterns.MOVES)))]
            layers = patterns.MOVES[name](layers, space.pattern, rng)
            words.append(name)
    names = active(space, genome)
    mask = np.array([gene.name in names for gene in space.reals], dtype=np.bool_)
    if mask.any() and (not words or rng.random() < 0.5):
        unit, word = _mutate_reals(linkage, unit, mask, rng)
        words.append(word)
    return unit, choices, layers, "mutation: " + ", ".join(words or ["none"])


def _pick(labels: IntArray, mask: Mask, rng: np.random.Generator) -> Mask:
    """The active genes of one random label."""
    present = np.unique(labels[mask])
    chosen: Mask = mask & (labels == present[int(rng.integers(len(present)))])
    return chosen


def _mutate_reals(linkage: Linkage, unit: FloatArray, mask: Mask, rng: np.random.Generator) -> tuple[FloatArray, str]:
    sigma = operators.step_size(rng)
    kind = rng.random()
    if kind < 0.35:
        for _ in range(int(rng.integers(1, 3))):
            unit = operators.shift(unit, _pick(linkage.owner, mask, rng), sigma, rng)
        return unit, "whole model"
    if kind < 0.55:
        chosen = _pick(linkage.group, mask, rng)
        return operators.gaussian(unit, chosen, sigma, rng), "layer group"
    if kind < 0.65:
        return operators.pull(unit, _pick(linkage.owner, mask, rng), float(rng.uniform(0.3, 1.0))), "smoothing"
    if kind < 0.8:
        return operators.gaussian(unit, mask, sigma / 3.0, rng), "all genes"
    share = mask & (rng.random(unit.shape) < max(2.0 / mask.sum(), 0.1))
    share = share if share.any() else _pick(np.arange(len(unit), dtype=np.int64), mask, rng)
    return operators.gaussian(unit, share, sigma, rng), "single genes"
