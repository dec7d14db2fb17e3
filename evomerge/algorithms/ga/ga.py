"""The default search: a genetic algorithm over merge recipes.

The parents of a generation are the best of all candidates (elitism: a (μ + λ) truncation); one that a race stopped
counts with the estimate it was stopped at, which is below the cut-off. A child is a recombination of tournament
winners, then a mutation; or a step from the best by how the log-likelihoods of all items move with its genes, while
that promises a gain (`jacobian_steps`); or else a draw from what the fitness may be near the best (`trust_region`).
Scores on a hundred items are noisy, so recombination that averages several good candidates is the most frequent.
Variation follows the structure of the genes: a whole model, a run of layer groups, or single genes. A pattern of layers
is assembled from what all candidates say of every depth, as often as it is bred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from evomerge.algorithms import operators
from evomerge.algorithms.ga import layer_operators
from evomerge.algorithms.ga.jacobian_steps import JacobianSteps
from evomerge.algorithms.ga.layer_assembly import assemble
from evomerge.algorithms.ga.layer_operators import Layers
from evomerge.algorithms.ga.selection import (
    ASSEMBLY,
    MUTATIONS,
    PARENTS,
    Parent,
    choose,
    choose_first,
    choose_partner,
    genome_is_exact,
    possible_recombinations,
)
from evomerge.algorithms.ga.trust_region import TrustRegion
from evomerge.algorithms.history_index import HistoryIndex
from evomerge.algorithms.proposals import Draw, distinct
from evomerge.space.decode import active_reals, copies_layers
from evomerge.space.genes import OUTER
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.ranking import best_first, penalised
from evomerge.system.arrays import FloatArray, IntArray, Mask

OPTIONS = {"jacobian_steps": True, "trust_region": True}
"""The options and their defaults; bench/results/search.md says why these."""

POPULATION = 4
"""Candidates per generation where nothing else is asked for: a step needs the last one's outcome."""
TRUST_REGION_SHARE = 0.75
"""The share of a generation that is drawn near the best where there are no steps; the rest is bred."""
MAX_CENTROID_PARENTS = 8
METHOD_MUTATION_RATE = 0.1
MUTATION_RATE = 0.8
MAX_PATTERNS = 256
"""Patterns of layers that say what each depth is worth: those of so many of the best."""


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
class Breeding:
    """What the children of a generation are made of.

    Attributes:
        space: The space.
        linkage: Which of its genes belong together.
        parents: Whom to breed from, best first.
        steps: None where there are none.
        trust_region: Draws near the best; None where there are none.
        patterns: Patterns of layers and their fitness, best first.
    """

    space: SearchSpace
    linkage: Linkage
    parents: Sequence[Parent]
    steps: JacobianSteps | None
    trust_region: TrustRegion | None
    patterns: Sequence[tuple[Layers, float]]


def ga(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Proposes children of the best candidates so far; random genomes while there are none."""
    breeding = _breeding(space, history, settings, seed)
    drawn = math.floor(TRUST_REGION_SHARE * settings.population)

    def draw(rng: np.random.Generator) -> Draw:
        return _child(breeding, rng) if breeding.parents else (space.sample(rng), (), "random")

    def planned(number: int) -> Draw | None:
        rank = number % settings.population
        if breeding.steps is not None and (step := breeding.steps.step(rank)) is not None:
            return step
        return breeding.trust_region.draw(number) if breeding.trust_region is not None and rank < drawn else None

    return distinct(space, history, numbers, generation, seed, draw, planned)


def _breeding(space: SearchSpace, history: tuple[Candidate, ...], settings: AlgorithmSettings, seed: int) -> Breeding:
    options = {**OPTIONS, **settings.options}
    parents = max(settings.population, PARENTS)
    limit = max(2 * parents, MAX_PATTERNS if space.pattern is not None else 0)
    only_copied = all(method.copies_layers for method in space.methods)
    index = HistoryIndex.of(space, history)
    if only_copied:
        order = best_first((c for c in history if genome_is_exact(space, c)), limit)
    else:
        order = index.best_first(limit)
    steps = options["jacobian_steps"] and settings.local_model is not None
    draws = options["trust_region"] and not only_copied and not index.multi_objective
    with_pattern = [c for c in order if space.pattern is not None and copies_layers(space, c.genome)]
    return Breeding(
        space,
        Linkage(space),
        [Parent.of(space, c) for c in order[:parents]],
        JacobianSteps(space, index, order, settings) if steps else None,
        TrustRegion(space, index, seed) if draws else None,
        [(c.genome.layers, float(value)) for c, value in zip(with_pattern, penalised(with_pattern), strict=True)],
    )


def _child(breeding: Breeding, rng: np.random.Generator) -> Draw:
    space, parents = breeding.space, breeding.parents
    first = choose_first(parents, rng)
    child, used, applied = first, [first], []
    kind = choose(possible_recombinations(space, first, len(parents)), rng)
    if kind == ASSEMBLY and space.pattern is not None:  # its draws differ enough: a mutation would take them apart
        scales = {gene.layer: gene.scale for gene in first.layers}
        layers = assemble(breeding.patterns, space.pattern, scales, rng)
        return space.genome(first.unit, first.choices, layers), (first.number,), kind
    if kind != "none":
        child, used, operator = _recombine(breeding, kind, first, rng)
        applied.append(operator)
    if not applied or rng.random() < MUTATION_RATE:
        child, operator = _mutate(breeding, child, rng)
        applied.append(operator)
    genome = space.genome(child.unit, child.choices, child.layers)
    return genome, tuple(p.number for p in used), " + ".join(applied)


def _recombine(
    breeding: Breeding, kind: str, first: Parent, rng: np.random.Generator
) -> tuple[Parent, list[Parent], str]:
    """Makes a child of several parents; returns it, the parents, and what was done."""
    if kind == "centroid":
        return _centroid(breeding.parents, first, rng)
    space, linkage = breeding.space, breeding.linkage
    second = choose_partner(breeding.parents, first, rng)
    choices, layers = dict(first.choices), first.layers
    if space.pattern is not None and first.copies_layers(space):
        layers = layer_operators.crossover(first.layers, second.layers, space.pattern, rng)
    if kind in ("crossover by layers", "split-point crossover"):
        block = operators.contiguous_block if kind == "crossover by layers" else operators.tail_block
        taken = block(len(space.groups) + 1, rng)
        unit = operators.by_label(first.unit, second.unit, linkage.group, taken)
        choices |= {c.name: second.choices[c.name] for c in space.choices if c.group in taken}
    elif kind == "crossover by model":
        count = len(space.sources)
        taken = [int(i) for i in rng.permutation(count)[: int(rng.integers(1, count))]]
        unit = operators.by_label(first.unit, second.unit, linkage.source, taken)
    else:
        simple = {"line": operators.line, "blend": operators.blend, "uniform crossover": operators.uniform}
        unit = simple[kind](first.unit, second.unit, rng)
    return Parent(-1, unit, choices, layers), [first, second], kind


def _centroid(parents: Sequence[Parent], first: Parent, rng: np.random.Generator) -> tuple[Parent, list[Parent], str]:
    alike = [p for p in parents if p.choices == first.choices]
    pool = alike if len(alike) > 1 else parents
    count = int(rng.integers(2, min(MAX_CENTROID_PARENTS, len(pool)) + 1))
    chosen = [pool[int(i)] for i in np.sort(rng.permutation(min(len(pool), 2 * count))[:count])]
    unit = operators.centroid([p.unit for p in chosen])
    return Parent(-1, unit, first.choices, chosen[0].layers), chosen, f"centroid of {count}"


def _mutate(breeding: Breeding, parent: Parent, rng: np.random.Generator) -> tuple[Parent, str]:
    """Mutates methods, layers and real genes; returns the child and what was done."""
    space = breeding.space
    applied: list[str] = []
    if space.choices and rng.random() < METHOD_MUTATION_RATE:  # every gene that the new method knows too is kept
        choice = space.choices[int(rng.integers(len(space.choices)))]
        others = [name for name in choice.options if name != parent.choices[choice.name]]
        chosen = {**parent.choices, choice.name: others[int(rng.integers(len(others)))]}
        parent = replace(parent, choices=chosen)
        applied.append("method")
    genome = space.genome(parent.unit, parent.choices, parent.layers)
    if space.pattern is not None and copies_layers(space, genome):
        layers = parent.layers
        moves = [name for name in layer_operators.MOVES if name != "scale" or space.pattern.scale is not None]
        for _ in range(int(rng.integers(1, 3))):
            name = choose(dict.fromkeys(moves, 1.0), rng)
            layers = layer_operators.MOVES[name](layers, space.pattern, rng)
            applied.append(name)
        parent = replace(parent, layers=layers)
    mask = active_reals(space, genome)
    if mask.any() and (not applied or rng.random() < 0.5):
        unit, kind = _mutate_reals(breeding.linkage, parent.unit, mask, rng)
        parent = replace(parent, unit=unit)
        applied.append(kind)
    return parent, "mutation: " + ", ".join(applied or ["none"])


def _mutate_reals(linkage: Linkage, unit: FloatArray, mask: Mask, rng: np.random.Generator) -> tuple[FloatArray, str]:
    sigma = operators.step_size(rng)
    kind = choose(MUTATIONS, rng)
    if kind == "whole model":
        for _ in range(int(rng.integers(1, 3))):
            unit = operators.shift(unit, _one_label(linkage.owner, mask, rng), sigma, rng)
    elif kind == "layer group":
        unit = operators.gaussian(unit, _one_label(linkage.group, mask, rng), sigma, rng)
    elif kind == "smoothing":
        unit = operators.toward_mean(unit, _one_label(linkage.owner, mask, rng), float(rng.uniform(0.3, 1.0)))
    elif kind == "all genes":
        unit = operators.gaussian(unit, mask, sigma / 3.0, rng)
    else:
        some = mask & (rng.random(unit.shape) < max(2.0 / mask.sum(), 0.1))
        some = some if some.any() else _one_label(np.arange(len(unit), dtype=np.int64), mask, rng)
        unit = operators.gaussian(unit, some, sigma, rng)
    return unit, kind


def _one_label(labels: IntArray, mask: Mask, rng: np.random.Generator) -> Mask:
    """The active genes of one random label."""
    present = np.unique(labels[mask])
    chosen: Mask = mask & (labels == present[int(rng.integers(len(present)))])
    return chosen
