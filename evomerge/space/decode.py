"""Decoding: from a genome to its recipe in mergekit's form, and which genes set which number in it.

The way is genome -> blocks of genes (`evomerge.space.canonical`) -> slices -> recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from evomerge.methods.contract import Method, ParameterKey
from evomerge.recipe.settings import Conditional, Scalar, Setting, conditionals, evaluate, plain
from evomerge.space.canonical import (
    Block,
    Key,
    Values,
    absent_sources,
    all_blocks,
    canonical_values,
    counting_genes,
    layer_blocks,
    literal_values,
    methods_of,
    only_ratios,
)
from evomerge.space.genes import CHOSEN, OUTER
from evomerge.space.genome import Genome, LayerGene
from evomerge.space.space import SearchSpace
from evomerge.system.arrays import Mask
from evomerge.system.hashing import digest

#: Less than this under a normaliser makes weights explode: such genomes are not tried.
SMALLEST_WEIGHT_SUM = 1e-2

#: A recipe as in YAML.
RecipeMapping = dict[str, Any]


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Identifies a recipe: 128 bits of a hash of its canonical JSON, in hexadecimal."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return digest(text)


def genome_hash(space: SearchSpace, genome: Genome) -> str:
    """Hashes a genome's recipe: two genomes with the same hash are one candidate."""
    return recipe_hash(decode(space, genome))


def decode(space: SearchSpace, genome: Genome) -> RecipeMapping:
    """Makes the recipe of a genome: the same one for genomes that differ only in genes that change nothing."""
    return _recipe(space, methods_of(space, genome), _slices(space, genome))


@dataclass(frozen=True)
class LiteralRecipe:
    """The recipe of a genome's literal values: every gene's own, and every source.

    Attributes:
        recipe: As in YAML.
        genes: Slice by slice the numbers that genes set: as in the recipe, but with a gene's name for its value.
    """

    recipe: RecipeMapping
    genes: tuple[Mapping[ParameterKey, Setting], ...]

    def gene_gradient(self, slice_index: int, key: ParameterKey, tensor: str, t: float) -> dict[str, float]:
        """Differentiates a number that the recipe gives for one tensor with respect to the genes.

        Args:
            slice_index: Index of the tensor's slice.
            key: The number.
            tensor: The name that filters are matched against.
            t: Position within the slice.

        Returns:
            Gene to derivative, without zeros; empty where no gene sets the number.
        """
        setting = self.genes[slice_index].get(key)
        if setting is None:
            return {}
        conditions = conditionals(setting) or (Conditional(cast("Scalar | tuple[Scalar, ...]", setting)),)
        value = next(condition.value for condition in conditions if condition.matches(tensor))
        points = value if isinstance(value, tuple) else (value,)
        # Interpolation is linear: the derivative with respect to a point is the value where that point alone is 1.
        factors = {str(gene): evaluate(tuple(float(gene == other) for other in points), tensor, t) for gene in points}
        return {gene: float(factor) for gene, factor in factors.items() if factor}


def decode_literally(space: SearchSpace, genome: Genome) -> LiteralRecipe:
    """Makes the recipe of a genome's literal values, for gradients with respect to genes."""
    slices = _slices(space, genome, literal=True)
    recipe = _recipe(space, methods_of(space, genome), slices)
    return LiteralRecipe(recipe, tuple(piece.genes for piece in slices))


def copies_layers(space: SearchSpace, genome: Genome) -> bool:
    """Tells whether any part of the genome's recipe is a copy of layers."""
    return any(method.copies_layers for method in methods_of(space, genome))


def active_genes(space: SearchSpace, genome: Genome) -> frozenset[str]:
    """Names the scalar genes that the recipe depends on, as the others are."""
    names = {choice.name for choice in space.choices} | {g.name for g in space.reals if g.parameter == CHOSEN}
    for block in all_blocks(space, genome):
        names |= counting_genes(space, block, genome)
    return frozenset(names)


def active_reals(space: SearchSpace, genome: Genome) -> Mask:
    """Tells which real genes the genome's recipe depends on, shape [reals]."""
    names = active_genes(space, genome)
    return np.array([gene.name in names for gene in space.reals], dtype=np.bool_)


def why_invalid(space: SearchSpace, genome: Genome) -> str | None:
    """Explains why no recipe can be made of a genome; None when one can.

    Where a method divides by the sum of the weights, they must not sum to (nearly) zero.
    """
    members = space.members(genome)
    for block in all_blocks(space, genome):
        for parameter in space.searched[block.method.name]:
            if not only_ratios(space, block.method, parameter):
                continue
            names = zip(*(block.gene_names(parameter.name, source) for source in members), strict=True)
            sums = [sum(float(genome.values[name]) for name in of_sources) for of_sources in names]
            for point, total in zip(block.points, sums, strict=True):
                # Between two points whose sums have different signs one is zero.
                if abs(total) < SMALLEST_WEIGHT_SUM or total * sums[0] < 0:
                    return f"the weights of {point}{'.' + block.tensors if block.tensors else ''} sum to {total:g}"
    return None


@dataclass(frozen=True)
class _Slice:
    """A slice as in YAML, and which gene sets which number in it, where that is asked for."""

    mapping: dict[str, Any]
    genes: Mapping[ParameterKey, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """What a slice says about some of its tensors: substrings that pick them (none: all that are left), and values."""

    filters: tuple[str, ...]
    block: Block
    values: Mapping[Key, Values]


def _recipe(space: SearchSpace, methods: Sequence[Method], slices: Sequence[_Slice]) -> RecipeMapping:
    """The recipe around its slices: the method (per slice where they differ), base, constants, dtype, seed."""
    recipe: RecipeMapping = {"merge_method": methods[0].name}
    if space.base is not None and (space.tokenizer or any(space.needs_base(method) for method in methods)):
        recipe["base_model"] = space.base
    recipe |= space.tokenizer
    recipe |= stages_after(space, methods)
    recipe["slices"] = [piece.mapping for piece in slices]
    constants = space.constants[methods[0].name] if _same(methods) else {}
    if constants:
        recipe["parameters"] = dict(constants)
    if space.dtype is not None:
        recipe["dtype"] = space.dtype
    if any(method.stochastic for method in methods):
        recipe["seed"] = space.seed
    return recipe


def stages_after(space: SearchSpace, methods: Sequence[Method]) -> dict[str, Any]:
    """What a recipe says of the stages that follow these methods; nothing where there are none."""
    stages = {stage.name: stage for method in methods for stage in method.after}
    said: dict[str, Any] = {"after": list(stages)} if stages else {}
    if any(stage.activations for stage in stages.values()):
        said["activations"] = space.activations
    return said


def _same(methods: Sequence[Method]) -> bool:
    return len({method.name for method in methods}) == 1


def _slices(space: SearchSpace, genome: Genome, *, literal: bool = False) -> list[_Slice]:
    """One slice per run of layer groups with the same method and values; one for all under control points.

    Literally, one for each layer group: values that are equal come from different genes.
    """
    methods = methods_of(space, genome)
    if _same(methods) and methods[0].copies_layers:
        return _copied_slices(space, genome.layers)
    members = space.members(genome)
    regions = [[_part(space, genome, block, literal) for block in blocks] for blocks in layer_blocks(space, genome)]
    slices: list[_Slice] = []
    for first, last in [(k, k) for k in range(len(regions))] if literal else _equal_runs(methods, regions):
        method = methods[first]
        start, stop = (0, space.layer_count) if space.smooth else (space.groups[first][0], space.groups[last][1])
        if method.copies_layers:
            made = _copied_slices(space, _layers_within(space, genome, start, stop))
        else:
            parts = regions[first]
            if space.outer and (start == 0 or stop == space.layer_count):
                parts = [_part(space, genome, Block(method, (OUTER,)), literal), *parts]
            layers = (start, stop)
            made = [_merged_slice(space, method, parts, layers, members, literal, constants=not _same(methods))]
        if not _same(methods):
            made = [_Slice({"merge_method": method.name, **piece.mapping}, piece.genes) for piece in made]
        slices += made
    return slices


def _equal_runs(methods: Sequence[Method], regions: Sequence[list[_Part]]) -> list[tuple[int, int]]:
    """First and last layer group of each run that is merged alike."""
    contents = [[(part.filters, part.values) for part in parts] for parts in regions]
    runs: list[tuple[int, int]] = []
    for k, (method, own) in enumerate(zip(methods, contents, strict=False)):
        last = runs[-1][1] if runs else k
        if runs and method is methods[last] and not method.copies_layers and own == contents[last]:
            runs[-1] = (runs[-1][0], k)
        else:
            runs.append((k, k))
    return runs


def _part(space: SearchSpace, genome: Genome, block: Block, literal: bool) -> _Part:
    values = (literal_values if literal else canonical_values)(space, block, genome)
    filters = space.outer if block.points == (OUTER,) else space.filters.get(str(block.tensors), ())
    return _Part(filters, block, values)


def _merged_slice(
    space: SearchSpace,
    method: Method,
    parts: Sequence[_Part],
    layers: tuple[int, int],
    members: Sequence[str],
    literal: bool,
    *,
    constants: bool,
) -> _Slice:
    sources: list[dict[str, Any]] = []
    if space.needs_base(method):
        sources.append({"model": space.base, "layer_range": list(layers)})
    shared: dict[str, Any] = dict(space.constants[method.name]) if constants else {}
    own: dict[str | None, dict[str, Any]] = {source: {} for source in space.sources} | {None: shared}
    genes: dict[ParameterKey, Setting] = {}
    position = {source: k for k, source in enumerate(members)}
    for parameter, source in space.searched_by_owner[method.name]:
        key, whole = (parameter.name, source), parameter.kind == "int"
        values = [(part.filters, [int(v) if whole else v for v in part.values[key]]) for part in parts]
        own[source][parameter.name] = plain(_setting(values))
        if literal and (source is None or source in position):
            names = [(part.filters, part.block.gene_names(*key)) for part in parts]
            genes[parameter.name, None if source is None else position[source]] = _setting(names)
    left_out = set() if literal else absent_sources(space, method, [part.values for part in parts], members)
    for source in members:
        if source in left_out:
            continue
        entry: dict[str, Any] = {"model": space.sources[source], "layer_range": list(layers)}
        if own[source]:
            entry["parameters"] = own[source]
        sources.append(entry)
    mapping: dict[str, Any] = {"sources": sources}
    if shared:
        mapping["parameters"] = shared
    return _Slice(mapping, genes)


def _setting(parts: Sequence[tuple[tuple[str, ...], Sequence[Scalar]]]) -> Setting:
    """The setting of one parameter: a value for all tensors, or mergekit's conditions (the first match wins).

    Values are gradients where they differ along the depth. The last part is of the tensors that no filter picks.
    """
    values = [points[0] if points.count(points[0]) == len(points) else tuple(points) for _, points in parts]
    *filtered, rest = values
    conditions = [
        Conditional(value, text) for (filters, _), value in zip(parts, filtered, strict=False) for text in filters
    ]
    while conditions and conditions[-1].value == rest:
        conditions.pop()
    return (*conditions, Conditional(rest)) if conditions else rest


def _layers_within(space: SearchSpace, genome: Genome, start: int, stop: int) -> Sequence[LayerGene]:
    """The pattern's layers that fall into a layer group; the first model's own where the pattern has none there."""
    layers = [gene for gene in genome.layers if start <= gene.layer < stop]
    return layers or [LayerGene(genome.layers[0].source, layer) for layer in range(start, stop)]


def _copied_slices(space: SearchSpace, layers: Sequence[LayerGene]) -> list[_Slice]:
    """Passthrough slices: neighbours that follow one another in one model at one scale are one slice."""
    runs: list[list[LayerGene]] = []
    for gene in layers:
        last = runs[-1][-1] if runs else None
        if last and (gene.source, gene.layer, gene.scale) == (last.source, last.layer + 1, last.scale):
            runs[-1].append(gene)
        else:
            runs.append([gene])
    slices = []
    for run in runs:
        span = [run[0].layer, run[-1].layer + 1]
        mapping: dict[str, Any] = {"sources": [{"model": space.reference(run[0].source), "layer_range": span}]}
        if run[0].scale != 1.0:
            mapping["residual_scale"] = run[0].scale
        slices.append(_Slice(mapping))
    return slices
