"""The default search: a genetic algorithm over merge recipes.

The parents of a generation are the best of all candidates (elitism: a (μ + λ) truncation); one that a race stopped
counts with the estimate it was stopped at, which is below the cut-off. A child is a recombination of tournament
winners, then a mutation; or a step along the gradient from one of the best, where gradients are to be had
(`gradient_steps`); or where they are not, a draw from what the fitness may be near the best (`trust_region`). Scores on
a hundred items are noisy, so recombination that averages several good candidates is the most frequent. Variation
follows the structure of the genes: a whole model, a run of layer groups, or single genes. A pattern of layers is
assembled from what all candidates say of every depth, as often as it is bred. What succeeded is used more often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from evomerge.algorithms import operators
from evomerge.algorithms.ga import layer_operators, sharing
from evomerge.algorithms.ga.adaptive import Experience, pick
from evomerge.algorithms.ga.gradient_steps import GradientSteps
from evomerge.algorithms.ga.layer_operators import Layers
from evomerge.algorithms.ga.selection import Parent
from evomerge.algorithms.ga.trust_region import TrustRegion
from evomerge.algorithms.history_index import HistoryIndex
from evomerge.algorithms.proposals import Draw, distinct
from evomerge.space.baselines import PARENT
from evomerge.space.decode import active_reals, copies_layers
from evomerge.space.genes import OUTER
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import GRADIENT, Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.ranking import best_first
from evomerge.system.arrays import FloatArray, IntArray, Mask

OPTIONS = {"gradient_steps": True, "trust_region": True, "adaptive": True, "sharing": False}
"""The options and their defaults; bench/results/search.md says why these."""

GENERATION = 4
"""Candidates per generation where nothing else is asked for: a step along the gradient needs the last one's outcome."""
DRAWN = 0.75
"""The share of a generation that is drawn near the best where there are no slopes; the rest is bred."""
PARENTS = 16
"""Whom to breed from: so many of the best, or as many as a generation has."""
TOURNAMENT = 3
CENTROID_MOST = 8
METHOD_MUTATION = 0.1
MUTATION = 0.8
PATTERNS = 256
"""Patterns of layers that say what each depth is worth: those of so many of the best."""

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
MUTATIONS = {"whole model": 0.35, "layer group": 0.2, "smoothing": 0.1, "all genes": 0.15, "single genes": 0.2}
"""How often each operator is used before anything is known of it."""


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
        experience: What worked; None where every operator keeps its prior weight.
        attraction: How much each parent has to offer to each, shape [parents, parents]; None without sharing.
        gradient_steps: Gradient steps; None where there are no slopes.
        trust_region: Steps without slopes; None where there are none.
        patterns: Patterns of layers and their fitness, best first.
    """

    space: SearchSpace
    linkage: Linkage
    parents: Sequence[Parent]
    experience: Experience | None
    attraction: FloatArray | None
    gradient_steps: GradientSteps | None
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
    """Children of the best candidates so far; random genomes while there are none."""
    breeding = _breeding(space, history, settings, seed)
    drawn = math.floor(DRAWN * settings.population)

    def draw(rng: np.random.Generator) -> Draw:
        return _child(breeding, rng) if breeding.parents else (space.sample(rng), (), "random")

    def planned(number: int) -> Draw | None:
        place = number % settings.population
        if breeding.gradient_steps is not None and breeding.gradient_steps.possible:
            return breeding.gradient_steps.step(place)
        return breeding.trust_region.draw(number) if breeding.trust_region is not None and place < drawn else None

    return distinct(space, history, numbers, generation, seed, draw, planned)


def _breeding(space: SearchSpace, history: tuple[Candidate, ...], settings: AlgorithmSettings, seed: int) -> Breeding:
    options = {**OPTIONS, **settings.options}
    parents = max(settings.population, PARENTS)
    enough = max(2 * parents, PATTERNS if space.pattern is not None else 0)
    only_copied = all(method.copies_layers for method in space.methods)
    index = HistoryIndex.of(space, history)
    if only_copied:
        order = best_first((c for c in history if _says_what_it_is(space, c)), enough)
    else:
        order = index.best_first(enough)
    chosen, attraction = order[:parents], None
    if options["sharing"] and settings.item_scores is not None:
        chosen, attraction = _shared(order[: 2 * parents], parents, settings)
    experience = Experience.of(space, history) if options["adaptive"] else None
    gradient_steps = None
    if options["gradient_steps"] and settings.gradients is not None:
        favour = experience.favour(GRADIENT) if experience else 1.0
        gradient_steps = GradientSteps(space, index, order[: 2 * parents], settings, favour)
    draws = options["trust_region"] and not only_copied and not index.multi_objective
    return Breeding(
        space,
        Linkage(space),
        [Parent.of(space, c) for c in chosen],
        experience,
        attraction,
        gradient_steps,
        TrustRegion(space, index, seed) if draws else None,
        [
            (c.genome.layers, c.fitness or 0.0)
            for c in order
            if space.pattern is not None and copies_layers(space, c.genome)
        ],
    )


def _says_what_it_is(space: SearchSpace, candidate: Candidate) -> bool:
    """Whether a candidate's genome stands for its recipe: no pattern of layers does for an average of models."""
    if candidate.generation > 0:
        return True
    return candidate.operator.startswith(PARENT) or space.registry[candidate.recipe["merge_method"]].copies_layers


def _shared(
    order: Sequence[Candidate], parents: int, settings: AlgorithmSettings
) -> tuple[list[Candidate], FloatArray | None]:
    """The parents by their share of the items, and what each has to offer to each."""
    values = [None if settings.item_scores is None else settings.item_scores(c) for c in order]
    seen = [(c, v) for c, v in zip(order, values, strict=True) if v is not None]
    if len(seen) < 2:
        return list(order[:parents]), None
    table = np.stack([v for _, v in seen])
    best_first = np.argsort(-sharing.shared_fitness(table), kind="stable")[:parents]
    kept = table[best_first]
    return [seen[k][0] for k in best_first], np.stack([sharing.attraction(kept, k) for k in range(len(kept))])


def _child(breeding: Breeding, rng: np.random.Generator) -> Draw:
    space, parents = breeding.space, breeding.parents
    first = parents[operators.tournament(len(parents), TOURNAMENT, rng)]
    child, used, words = first, [first], []
    kind = pick(rng, _recombinations(space, first, len(parents)), breeding.experience)
    if kind == ASSEMBLY and space.pattern is not None:  # its draws differ enough: a mutation would take them apart
        scales = {gene.layer: gene.scale for gene in first.layers}
        layers = layer_operators.assemble(breeding.patterns, space.pattern, scales, rng)
        return space.genome(first.unit, first.choices, layers), (first.number,), kind
    if kind != "none":
        child, used, word = _recombine(breeding, kind, first, rng)
        words.append(word)
    if not words or rng.random() < MUTATION:
        child, word = _mutate(breeding, child, rng)
        words.append(word)
    genome = space.genome(child.unit, child.choices, child.layers)
    return genome, tuple(p.number for p in used), " + ".join(words)


def _recombinations(space: SearchSpace, first: Parent, parents: int) -> dict[str, float]:
    """The recombinations that have a sense here."""
    if parents < 2:
        return {"none": 1.0}
    senseless: set[str] = set()
    if len(space.groups) < 2:
        senseless |= {"crossover by layers", "split-point crossover"}
    if len(space.sources) < 2:
        senseless.add("crossover by model")
    if space.pattern is None or not _copies_layers(space, first):
        senseless.add(ASSEMBLY)
    return {name: weight for name, weight in RECOMBINATIONS.items() if name not in senseless}


def _partner(breeding: Breeding, first: Parent, rng: np.random.Generator) -> Parent:
    """Another parent, rather one of the same methods: its numbers mean the same; with sharing, one that has more."""
    others = [p for p in breeding.parents if p is not first]
    if breeding.attraction is not None:
        row = breeding.attraction[[p is first for p in breeding.parents].index(True)]
        places = {p.number: k for k, p in enumerate(breeding.parents)}
        others.sort(key=lambda p: -float(row[places[p.number]]))
    alike = [p for p in others if p.choices == first.choices]
    pool = alike if alike and rng.random() < 0.7 else others
    return pool[operators.tournament(len(pool), TOURNAMENT, rng)]


def _recombine(
    breeding: Breeding, kind: str, first: Parent, rng: np.random.Generator
) -> tuple[Parent, list[Parent], str]:
    """A child of several parents, the parents, and what was done."""
    if kind == "centroid":
        return _centroid(breeding.parents, first, rng)
    space, linkage = breeding.space, breeding.linkage
    second = _partner(breeding, first, rng)
    choices, layers = dict(first.choices), first.layers
    if space.pattern is not None and _copies_layers(space, first):
        layers = layer_operators.crossover(first.layers, second.layers, space.pattern, rng)
    if kind in ("crossover by layers", "split-point crossover"):
        places = len(space.groups) + 1
        block = operators.contiguous_block if kind == "crossover by layers" else operators.tail_block
        taken = block(places, rng)
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
    count = int(rng.integers(2, min(CENTROID_MOST, len(pool)) + 1))
    chosen = [pool[int(i)] for i in np.sort(rng.permutation(min(len(pool), 2 * count))[:count])]
    unit = operators.centroid([p.unit for p in chosen])
    return Parent(-1, unit, first.choices, chosen[0].layers), chosen, f"centroid of {count}"


def _copies_layers(space: SearchSpace, parent: Parent) -> bool:
    return copies_layers(space, space.genome(parent.unit, parent.choices, parent.layers))


def _mutate(breeding: Breeding, parent: Parent, rng: np.random.Generator) -> tuple[Parent, str]:
    space, experience = breeding.space, breeding.experience
    words: list[str] = []
    if space.choices and rng.random() < METHOD_MUTATION:  # every gene that the new method knows too is kept
        choice = space.choices[int(rng.integers(len(space.choices)))]
        others = [name for name in choice.options if name != parent.choices[choice.name]]
        chosen = {**parent.choices, choice.name: others[int(rng.integers(len(others)))]}
        parent = replace(parent, choices=chosen)
        words.append("method")
    genome = space.genome(parent.unit, parent.choices, parent.layers)
    if space.pattern is not None and copies_layers(space, genome):
        layers = parent.layers
        moves = [name for name in layer_operators.MOVES if name != "scale" or space.pattern.scale is not None]
        for _ in range(int(rng.integers(1, 3))):
            name = pick(rng, dict.fromkeys(moves, 1.0), experience)
            layers = layer_operators.MOVES[name](layers, space.pattern, rng)
            words.append(name)
        parent = replace(parent, layers=layers)
    mask = active_reals(space, genome)
    if mask.any() and (not words or rng.random() < 0.5):
        unit, word = _mutate_reals(breeding, parent.unit, mask, rng)
        parent = replace(parent, unit=unit)
        words.append(word)
    return parent, "mutation: " + ", ".join(words or ["none"])


def _pick(labels: IntArray, mask: Mask, rng: np.random.Generator) -> Mask:
    """The active genes of one random label."""
    present = np.unique(labels[mask])
    chosen: Mask = mask & (labels == present[int(rng.integers(len(present)))])
    return chosen


def _mutate_reals(breeding: Breeding, unit: FloatArray, mask: Mask, rng: np.random.Generator) -> tuple[FloatArray, str]:
    linkage, experience = breeding.linkage, breeding.experience
    sigma = operators.step_size(rng, experience.steps if experience else ())
    kind = pick(rng, MUTATIONS, experience)
    if kind == "whole model":
        for _ in range(int(rng.integers(1, 3))):
            unit = operators.shift(unit, _pick(linkage.owner, mask, rng), sigma, rng)
    elif kind == "layer group":
        unit = operators.gaussian(unit, _pick(linkage.group, mask, rng), sigma, rng)
    elif kind == "smoothing":
        unit = operators.toward_mean(unit, _pick(linkage.owner, mask, rng), float(rng.uniform(0.3, 1.0)))
    elif kind == "all genes":
        unit = operators.gaussian(unit, mask, sigma / 3.0, rng)
    else:
        share = mask & (rng.random(unit.shape) < max(2.0 / mask.sum(), 0.1))
        share = share if share.any() else _pick(np.arange(len(unit), dtype=np.int64), mask, rng)
        unit = operators.gaussian(unit, share, sigma, rng)
    return unit, kind
