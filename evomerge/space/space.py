"""The search space: which genes exist, their ranges, and genomes as arrays."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from evomerge.methods.contract import Method, Parameter
from evomerge.space import genes
from evomerge.space.genes import Choice, Pattern, Real
from evomerge.space.genome import Genome, LayerGene, Scalar
from evomerge.system.arrays import FloatArray

MethodScope = Literal["run", "layer_group"]


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """Genes and what they may be; equal to itself only. Made by `build_space`.

    Attributes:
        base: Reference of the base model, None without one.
        sources: Name -> reference of every source, in the order of the search.yaml.
        groups: Layer groups, [start, stop); under `smooth` the layers nearest to each control point.
        outer: Names of the tensors outside the layer stack.
        filters: Tensor group -> substrings that pick its tensors; ``rest`` has none: it is what is left.
        tensor_groups: Groups of a layer's tensors with genes of their own; empty for one group.
        methods: The methods to choose from, in the order given.
        method_scope: One method for the run, or one per layer group.
        reals: Real genes, sorted by name.
        choices: Categorical genes.
        pattern: The layer pattern, when a method of the space copies layers.
        seed: Recipe seed of the stochastic methods.
        dtype: Output dtype of the recipes.
        registry: All known methods, for the baselines.
        extra: Parameters that are searched only because the search.yaml gives them a range.
        smooth: The genes of ``g0``, ``g1``, ... are values at control points, evenly spaced from the first layer to the
            last, between which every layer's value is interpolated.
        tokenizer: What every recipe says of its tokenizer; {} where the models have one vocabulary.
        choose: How many of the sources a candidate merges; None for all.
        activations: File of the base's mean inputs, for the stages that ask for them.
    """

    base: str | None
    sources: Mapping[str, str]
    groups: tuple[tuple[int, int], ...]
    outer: tuple[str, ...]
    filters: Mapping[str, tuple[str, ...]]
    tensor_groups: tuple[str, ...]
    methods: tuple[Method, ...]
    method_scope: MethodScope
    reals: tuple[Real, ...]
    choices: tuple[Choice, ...]
    pattern: Pattern | None
    seed: int
    dtype: str | None
    registry: Mapping[str, Method] = field(repr=False)
    extra: frozenset[str] = frozenset()
    smooth: bool = False
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    choose: int | None = None
    activations: str | None = None

    @property
    def layer_count(self) -> int:
        """Layers of every model."""
        return self.groups[-1][1]

    @property
    def size(self) -> int:
        """The number of genes; a layer pattern counts one for each output layer it can have."""
        return len(self.reals) + len(self.choices) + (self.pattern.max_layers if self.pattern else 0)

    @property
    def merged_count(self) -> int:
        """How many sources a candidate merges."""
        return self.choose or len(self.sources)

    @cached_property
    def low(self) -> FloatArray:
        """Lower bounds of the real genes, shape [reals]."""
        return np.array([gene.low for gene in self.reals], dtype=np.float64)

    @cached_property
    def high(self) -> FloatArray:
        """Upper bounds of the real genes, shape [reals]."""
        return np.array([gene.high for gene in self.reals], dtype=np.float64)

    @cached_property
    def searched(self) -> Mapping[str, tuple[Parameter, ...]]:
        """The parameters with genes, by name of method."""
        return {
            method.name: genes.searched_parameters(method, self.extra, self.merged_count) for method in self.methods
        }

    @cached_property
    def searched_by_owner(self) -> Mapping[str, tuple[tuple[Parameter, str | None], ...]]:
        """The same, each with every owner: a source, or None for all of them."""
        return {
            method: tuple((p, source) for p in parameters for source in (self.sources if p.per_source else (None,)))
            for method, parameters in self.searched.items()
        }

    @cached_property
    def constants(self) -> Mapping[str, Mapping[str, Any]]:
        """`fixed_parameters` by name of method."""
        return {method.name: self.fixed_parameters(method) for method in self.methods}

    @cached_property
    def _by_name(self) -> Mapping[str, Method]:
        return {method.name: method for method in self.methods}

    # -- genomes ---------------------------------------------------------------------------------------------------

    def unit(self, genome: Genome) -> FloatArray:
        """Scales a genome's real genes to [0, 1], shape [reals]; a gene without width is 0."""
        values = np.array([genome.values[gene.name] for gene in self.reals], dtype=np.float64)
        width = self.high - self.low
        return np.divide(values - self.low, width, out=np.zeros_like(values), where=width > 0)

    def genome(
        self, unit: FloatArray, choices: Mapping[str, str] | None = None, layers: Sequence[LayerGene] = ()
    ) -> Genome:
        """Makes a genome of real genes in [0, 1], shape [reals], clipped; a choice left out is its first option."""
        values: dict[str, Scalar] = {choice.name: choice.options[0] for choice in self.choices}
        values.update(choices or {})
        real = self.low + np.clip(unit, 0.0, 1.0) * (self.high - self.low)
        real = np.clip(np.round(real, 4), self.low, self.high)
        values.update({gene.name: float(value) for gene, value in zip(self.reals, real, strict=True)})
        return Genome.of(values, layers)

    def default(self) -> Genome:
        """Makes the genome with every gene at its paper's value, the first method, and the first model's own layers."""
        values: dict[str, Scalar] = {choice.name: choice.options[0] for choice in self.choices}
        values.update({gene.name: gene.default for gene in self.reals})
        return Genome.of(values, self.own_layers(self.pattern.models[0]) if self.pattern else ())

    def own_layers(self, model: str) -> tuple[LayerGene, ...]:
        """Returns a model's own layers in order, cut or repeated at the end to fit the pattern's length."""
        if self.pattern is None:
            return ()
        return self.pattern.fit_length([LayerGene(model, layer) for layer in range(self.pattern.layer_count)])

    def sample(self, rng: np.random.Generator) -> Genome:
        """Draws a random genome: each gene uniform in its range, the layers in a few runs of random models."""
        unit = rng.random(len(self.reals))
        choices = {choice.name: choice.options[int(rng.integers(len(choice.options)))] for choice in self.choices}
        return self.genome(unit, choices, sample_layers(self.pattern, rng) if self.pattern else ())

    def contains(self, genome: Genome) -> bool:
        """Tells whether the genome has exactly this space's genes, each within its range."""
        names = {gene.name for gene in self.reals} | {choice.name for choice in self.choices}
        if set(genome.values) != names or bool(genome.layers) != bool(self.pattern):
            return False
        reals = all(gene.low <= float(genome.values[gene.name]) <= gene.high for gene in self.reals)
        chosen = all(genome.values[choice.name] in choice.options for choice in self.choices)
        return reals and chosen and self._contains_layers(genome.layers)

    def _contains_layers(self, layers: Sequence[LayerGene]) -> bool:
        if self.pattern is None:
            return True
        low, high = self.pattern.scale or (1.0, 1.0)
        return self.pattern.min_layers <= len(layers) <= self.pattern.max_layers and all(
            gene.source in self.pattern.models
            and 0 <= gene.layer < self.pattern.layer_count
            and (gene.scale == 1.0 or low <= gene.scale <= high)
            for gene in layers
        )

    def members(self, genome: Genome) -> tuple[str, ...]:
        """Names the sources that a genome merges, in their order: of a pool the ones with the highest genes."""
        if self.choose is None:
            return tuple(self.sources)
        values = genome.values
        ranked = sorted(self.sources, key=lambda name: -float(values[genes.gene_name(genes.CHOSEN, name)]))
        chosen = set(ranked[: self.choose])
        return tuple(name for name in self.sources if name in chosen)

    # -- models and methods ----------------------------------------------------------------------------------------

    def method(self, genome: Genome, group: int) -> Method:
        """Returns the method that a genome gives to a layer group."""
        for name in ("method", f"method.g{group}"):
            if name in genome.values:
                return self._by_name[str(genome.values[name])]
        return self.methods[0]

    def fixed_parameters(self, method: Method) -> dict[str, Any]:
        """Parameters without genes whose value in a search is the paper's and not the recipe default."""
        parameters = genes.searched_parameters(method, self.extra, self.merged_count)
        return genes.fixed_parameters(method, parameters, has_base=self.base is not None)

    def needs_base(self, method: Method) -> bool:
        """Tells whether the space's recipes of a method have the base; where they do, it is no source."""
        if method.copies_layers:
            return False
        return (method.takes_base and self.base is not None) or method.base_needed(self.fixed_parameters(method))

    def reference(self, model: str) -> str:
        """Returns the reference of a model by its name in genes; ``base`` is the base unless a source is called so."""
        if model in self.sources:
            return self.sources[model]
        if model != "base" or self.base is None:
            raise KeyError(model)
        return self.base


def sample_layers(pattern: Pattern, rng: np.random.Generator) -> tuple[LayerGene, ...]:
    """Draws a random pattern: the stack in a few runs of consecutive layers, each of one model.

    Half of the patterns are one whole stack, as far as the bounds allow; in the other half the length is random, and
    runs overlap or leave gaps. Half of the runs have a scale other than 1, rather near 1 than far from it.
    """
    whole = rng.random() < 0.5
    length = int(rng.integers(pattern.min_layers, pattern.max_layers + 1))
    if whole:
        length = min(max(pattern.layer_count, pattern.min_layers), pattern.max_layers)
    cuts = sorted(int(cut) for cut in rng.integers(1, max(length, 2), size=int(rng.integers(1, 6))))
    edges = sorted({0, *(cut for cut in cuts if cut < length), length})
    layers: list[LayerGene] = []
    for start, stop in itertools.pairwise(edges):
        model = pattern.models[int(rng.integers(len(pattern.models)))]
        # The run keeps its relative depth, give or take, so that early layers stay early.
        first = round(start * pattern.layer_count / length) + (0 if whole else int(rng.integers(-1, 2)))
        scale = 1.0
        if pattern.scale is not None and rng.random() < 0.5:
            scale += float(rng.random() * (rng.uniform(*pattern.scale) - 1.0))
            scale = min(max(scale, pattern.scale[0]), pattern.scale[1])
        for offset in range(stop - start):
            layer = min(max(first + offset, 0), pattern.layer_count - 1)
            layers.append(LayerGene(model, layer, scale))
    return tuple(layers)
