"""Warm starts: what another search found, or a recipe says, as a genome of this space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from evomerge.recipe import Recipe, expand_frankenmerge, layer_places, resolve, slice_inputs
from evomerge.space.genes import CHOSEN, OUTER, REST, WIDER, Real, gene_name
from evomerge.space.genome import Genome, LayerGene, Scalar
from evomerge.space.space import SearchSpace

#: A tensor's name and its layer; None outside the stack of layers.
TensorLayer = tuple[str, int | None]


@dataclass(frozen=True)
class SpaceLayout:
    """How another space lays its genes over the depth, as far as their names do not say it.

    Attributes:
        groups: As in `SearchSpace`, for models of as many layers.
        smooth: As in `SearchSpace`.
        tensor_groups: As in `SearchSpace`.
        method: The method where no gene says it.
    """

    groups: tuple[tuple[int, int], ...]
    smooth: bool
    tensor_groups: tuple[str, ...]
    method: str

    def method_at(self, genome: Genome, layer: int) -> str:
        """Returns the method that a genome gives to a layer."""
        group = next(k for k, (start, stop) in enumerate(self.groups) if start <= layer < stop)
        values = genome.values
        return str(values.get("method", values.get(f"method.g{group}", self.method)))

    def value(self, genome: Genome, stem: str, tensors: str | None, layer: int) -> float | None:
        """Returns a parameter (``density.math``) of some tensors of a layer; None where there is no such gene."""
        if tensors is None and self.tensor_groups:
            by_group = [self.value(genome, stem, each, layer) for each in self.tensor_groups]
            values = [value for value in by_group if value is not None]
            return sum(values) / len(values) if values else None
        wider = WIDER.get(str(tensors))
        here = next((group for group in (tensors, wider) if group in self.tensor_groups), REST)
        end = f".{here}" if self.tensor_groups else ""
        shares = depth_shares(self.groups, self.smooth, layer)
        named = [(genome.values.get(f"{stem}.g{point}{end}"), share) for point, share in shares.items()]
        return None if any(value is None for value, _ in named) else sum(float(v or 0.0) * s for v, s in named)


def depth_shares(groups: Sequence[tuple[int, int]], smooth: bool, layer: int) -> dict[int, float]:
    """Returns the groups (or control points) that give a layer its value, each with its share."""
    if not smooth:
        return {next(k for k, (start, stop) in enumerate(groups) if start <= layer < stop): 1.0}
    position = layer * (len(groups) - 1) / max(groups[-1][1] - 1, 1)
    low = min(int(position), len(groups) - 2)
    return {low: low + 1 - position, low + 1: position - low}


def layer_shares(space: SearchSpace, group: int) -> dict[int, float]:
    """Returns the layers whose mean is the nearest value of a group, or of a control point, each with its share."""
    if not space.smooth:
        start, stop = space.groups[group]
        return dict.fromkeys(range(start, stop), 1.0 / (stop - start))
    position = group * (space.layer_count - 1) / (len(space.groups) - 1)
    low = min(int(position), space.layer_count - 2)
    return {low: low + 1 - position, low + 1: position - low}


def transfer_genome(space: SearchSpace, genome: Genome, shape: SpaceLayout, names: Mapping[str, str]) -> Genome | None:
    """Moves another search's genome into this space.

    Genes go by the names of parameter and model, over the depth by layer. A source that the other search does not have
    takes no part; what else it lacks keeps its default. Values are moved into their ranges. A pattern whose models are
    not all here is left out.

    Args:
        space: The space.
        genome: The other space's genome.
        shape: How that space lays its genes.
        names: The other search's names of models -> the names here, of those that both have.

    Returns:
        The genome; None where nothing of the other would be left: copied layers, which this space does not have.
    """
    original_names = {name: original for original, name in names.items()}
    same = (shape.groups, shape.smooth, shape.tensor_groups) == (space.groups, space.smooth, space.tensor_groups)
    layers = _layers(space, genome.layers, names)
    methods = [shape.method_at(genome, layer) for layer in range(space.layer_count)]
    copying = {method.name for method in space.registry.values() if method.copies_layers}
    if not layers and copying >= set(methods):
        return None

    def value_of(gene: Real) -> float | None:
        if gene.parameter == CHOSEN:
            original = original_names.get(str(gene.source))
            return 0.0 if original is None else float(genome.values.get(gene_name(CHOSEN, original), 1.0))
        if gene.source is not None and gene.source not in original_names:
            return 0.0 if _takes_part(space, gene.parameter) else None
        stem = gene.parameter if gene.source is None else f"{gene.parameter}.{original_names[gene.source]}"
        if gene.group == OUTER or same:
            end = "" if gene.tensors is None else f".{gene.tensors}"
            value = genome.values.get(f"{stem}.{gene.group}{end}")
            return None if value is None else float(value)
        mean = 0.0
        for layer, share in layer_shares(space, int(gene.group[1:])).items():
            at = shape.value(genome, stem, gene.tensors, layer)
            if at is None:
                return None
            mean += share * at
        return mean

    return _genome(space, value_of, methods, layers)


def nearest_genome(space: SearchSpace, recipe: Recipe, tensors: Sequence[TensorLayer]) -> Genome:
    """Finds the genome nearest to a recipe: its method if the space has it, parameters averaged over a gene's tensors.

    Args:
        space: The space.
        recipe: A merge of the space's models, which can be carried out.
        tensors: The tensors of the models.
    """
    recipe = expand_frankenmerge(recipe, space.layer_count, methods=space.registry)
    places = layer_places(recipe, space.layer_count)
    names = {reference: name for name, reference in space.sources.items()}
    if space.base is not None:
        names.setdefault(space.base, "base")
    values_by_key: dict[tuple[str, str | None], dict[str, float]] = {}
    copied: list[LayerGene] = []
    methods: list[str] = []
    for layer_place in places:
        inputs = slice_inputs(recipe, layer_place.slice_index, methods=space.registry)
        methods.append(inputs.method.name)
        if inputs.method.copies_layers:
            at = resolve(recipe, layer_place.slice_index, "", layer_place.t, methods=space.registry)
            source = inputs.sources[0]
            copied.append(LayerGene(names[source.model], source.start + layer_place.offset, at.residual_scale))
    for name, layer in tensors:
        if layer is not None and layer >= len(places):
            continue
        layer_place = places[layer or 0]
        t = layer_place.t if layer is not None else 0.0
        for key, value in _numbers_of(space, recipe, layer_place.slice_index, name, t, names).items():
            values_by_key.setdefault(key, {})[name] = value

    merged = {names.get(model) for model in recipe.models()}

    def value_of(gene: Real) -> float | None:
        if gene.parameter == CHOSEN:
            return float(gene.source in merged)
        values = values_by_key.get((gene.parameter, gene.source), {})
        if gene.group == OUTER:
            own = [values[name] for name, layer in tensors if layer is None and name in values]
            return sum(own) / len(own) if own else None
        mean = weight = 0.0
        for layer, share in layer_shares(space, int(gene.group[1:])).items():
            own = [values[n] for n, at in tensors if at == layer and n in values and _governs(space, gene.tensors, n)]
            if own:
                mean, weight = mean + share * sum(own) / len(own), weight + share
        return mean / weight if weight else None

    here = {name: name for name in names.values()}
    return _genome(space, value_of, methods, _layers(space, copied, here) if len(copied) == len(places) else ())


def _numbers_of(
    space: SearchSpace, recipe: Recipe, part: int, name: str, t: float, names: Mapping[str, str]
) -> dict[tuple[str, str | None], float]:
    """The numbers that a recipe gives for one tensor; weights of which only the ratios count as shares."""
    inputs = slice_inputs(recipe, part, methods=space.registry)
    if inputs.method.copies_layers:
        return {("weight", source): float(names[inputs.sources[0].model] == source) for source in space.sources}
    resolved = resolve(recipe, part, name, t, methods=space.registry)
    numbers_by_key: dict[tuple[str, str | None], float] = {}
    numbers_by_key.update(
        {(key, None): float(value) for key, value in resolved.settings.shared.items() if _is_number(value)}
    )
    own = dict(zip((names.get(model) for model in resolved.sources), resolved.settings.sources, strict=True))
    for parameter in resolved.method.parameters:
        if not parameter.per_source:
            continue
        values = {source: own[source].get(parameter.name) if source in own else None for source in space.sources}
        numbers = {source: float(value) for source, value in values.items() if _is_number(value)}
        rule = parameter.only_ratios
        total = sum(map(abs, numbers.values()))
        if total and (rule if isinstance(rule, bool) else resolved.settings.shared.get(rule)):
            numbers = {source: value / total for source, value in numbers.items()}
        if parameter.takes_part and numbers:
            numbers = {source: numbers.get(source, 0.0) for source in space.sources}
        numbers_by_key.update({(parameter.name, source): value for source, value in numbers.items()})
    return numbers_by_key


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _governs(space: SearchSpace, tensors: str | None, name: str) -> bool:
    """Whether a gene of a tensor group is about a tensor."""
    if tensors is None:
        return True
    picked = next((group for group, filters in space.filters.items() if any(text in name for text in filters)), REST)
    return picked == tensors


def _takes_part(space: SearchSpace, parameter: str) -> bool:
    declared = [method.parameter(parameter) for method in space.methods]
    return any(own is not None and own.takes_part for own in declared)


def _genome(
    space: SearchSpace, value_of: Callable[[Real], float | None], methods: Sequence[str], layers: tuple[LayerGene, ...]
) -> Genome:
    """The default genome with the values that there are, moved into the ranges; the method that most layers have."""
    start = space.default()
    scalars: dict[str, Scalar] = dict(start.scalars)
    for gene in space.reals:
        value = value_of(gene)
        if value is not None:
            scalars[gene.name] = gene.clip(value)
    for choice in space.choices:
        first, stop = (0, len(methods)) if choice.group is None else space.groups[choice.group]
        options = [name for name in methods[first:stop] if name in choice.options]
        if options:
            scalars[choice.name] = Counter(options).most_common(1)[0][0]
    return Genome.of(scalars, layers or start.layers)


def _layers(space: SearchSpace, layers: Sequence[LayerGene], names: Mapping[str, str]) -> tuple[LayerGene, ...]:
    """A pattern in this space, cut or repeated at the end to the allowed length; none where its models are not here."""
    pattern = space.pattern
    if pattern is None or not layers:
        return ()
    here = {"base": "base", **names}
    low, high = pattern.scale or (1.0, 1.0)
    scales = [gene.scale if gene.scale == 1.0 else min(max(gene.scale, low), high) for gene in layers]
    moved = [LayerGene(here.get(gene.source, ""), gene.layer, s) for gene, s in zip(layers, scales, strict=True)]
    if any(gene.source not in pattern.models or gene.layer >= pattern.layer_count for gene in moved):
        return ()
    return pattern.fit_length(moved)
