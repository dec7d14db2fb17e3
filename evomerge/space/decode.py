"""What a genome means: its active genes, and its recipe in mergekit's form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.methods.contract import Method, Parameter
from evomerge.space.canonical import Column, Values, absent, column, gene_name, idle, keys, only_ratios, spelled
from evomerge.space.genes import OUTER, searched
from evomerge.space.genome import Genome, LayerGene

if TYPE_CHECKING:
    from evomerge.space.space import SearchSpace

#: Less than this under a normaliser makes weights explode: such genomes are not tried.
SMALLEST_WEIGHT_SUM = 1e-2

Value = Any  # a scalar, a gradient, or mergekit's list of {filter, value}


def copies(space: SearchSpace, genome: Genome) -> bool:
    """Whether any part of the genome's recipe is a copy of layers."""
    return any(space.method(genome, index).copies_layers for index in range(len(space.groups)))


def active(space: SearchSpace, genome: Genome) -> frozenset[str]:
    """The names of the scalar genes that the recipe depends on, as the others are."""
    names = {choice.name for choice in space.choices}
    methods = [space.method(genome, index) for index in range(len(space.groups))]
    places = [(method, points, tensors) for method, points in _inner(space, methods) for tensors in _tensors(space)]
    if space.outer:
        places += [(method, (OUTER,), None) for method in dict.fromkeys((methods[0], methods[-1]))]
    for method, points, tensors in places:
        own = {gene_name(p.name, source, point, tensors) for p, source in keys(space, method) for point in points}
        names |= own - idle(space, method, genome, points, tensors)
    return frozenset(names)


def _inner(space: SearchSpace, methods: Sequence[Method]) -> list[tuple[Method, tuple[str, ...]]]:
    """The runs of layers that are decided on their own: their method, and the points of depth with their values."""
    points = tuple(f"g{index}" for index in range(len(methods)))
    return [(methods[0], points)] if space.smooth else [(m, (p,)) for m, p in zip(methods, points, strict=True)]


def _tensors(space: SearchSpace) -> tuple[str | None, ...]:
    return space.tensor_groups or (None,)


def problem(space: SearchSpace, genome: Genome) -> str | None:
    """Weights that sum to (nearly) zero somewhere, where the method divides by the sum; None when all is well."""
    methods = [space.method(genome, index) for index in range(len(space.groups))]
    places = [(method, points, tensors) for method, points in _inner(space, methods) for tensors in _tensors(space)]
    if space.outer:
        places += [(methods[0], (OUTER,), None), (methods[-1], (OUTER,), None)]
    for method, points, tensors in places:
        for parameter in space.searched[method.name]:
            if not only_ratios(space, method, parameter):
                continue
            sums = [
                sum(float(genome.values[gene_name(parameter.name, s, point, tensors)]) for s in space.sources)
                for point in points
            ]
            for point, total in zip(points, sums, strict=True):
                # Between two points whose sums have different signs one is zero.
                if abs(total) < SMALLEST_WEIGHT_SUM or total * sums[0] < 0:
                    return f"the weights of {point}{'.' + tensors if tensors else ''} sum to {total:g}"
    return None


def recipe(space: SearchSpace, genome: Genome, *, literal: bool = False) -> dict[str, Any]:
    """The recipe of a genome: the same one for genomes that differ only in genes that change nothing.

    Args:
        space: The space.
        genome: Its genome.
        literal: Every gene's own value instead, and every source, for who wants to see what a gene does.
    """
    methods = [space.method(genome, index) for index in range(len(space.groups))]
    names = list(dict.fromkeys(method.name for method in methods))
    if len(names) == 1 and methods[0].copies_layers:
        slices = copied_slices(space, genome.layers)
    else:
        slices = _slices(space, genome, methods, mixed=len(names) > 1, literal=literal)
    return assemble(space, methods, slices)


def assemble(space: SearchSpace, methods: Sequence[Method], slices: list[dict[str, Any]]) -> dict[str, Any]:
    """The recipe around its slices: the method (per slice where they differ), base, constants, dtype, seed."""
    data: dict[str, Any] = {"merge_method": methods[0].name}
    if space.base is not None and any(space.needs_base(method) for method in methods):
        data["base_model"] = space.base
    data["slices"] = slices
    constants = space.constants[methods[0].name] if len({method.name for method in methods}) == 1 else {}
    if constants:
        data["parameters"] = dict(constants)
    if space.dtype is not None:
        data["dtype"] = space.dtype
    if any(method.stochastic for method in methods):
        data["seed"] = space.seed
    return data


def fixed_parameters(space: SearchSpace, method: Method) -> dict[str, Any]:
    """Parameters without genes whose value in a search is the paper's and not the recipe default.

    Among them is SLERP's ``on: deltas``: fine-tunes of one base are nearly parallel, so on weights it is linear.
    Without a base it stays on weights.
    """
    found = searched(method, space.extra, len(space.sources))
    genes = [parameter.name for parameter in found]
    replaced = [parameter.instead_of for parameter in found]
    fixed = {
        parameter.name: parameter.paper
        for parameter in method.parameters
        if parameter.name not in genes
        and parameter.paper is not None
        and parameter.paper != parameter.default
        and parameter.instead_of is None
        and parameter.name not in replaced
    }
    return {} if space.base is None and method.base_needed(fixed) and not method.base_needed({}) else fixed


@dataclass(frozen=True)
class Part:
    """What a slice says about some of its tensors: substrings that pick them (none: all that are left), and values."""

    filters: tuple[str, ...]
    values: Column


def _slices(
    space: SearchSpace, genome: Genome, methods: Sequence[Method], *, mixed: bool, literal: bool
) -> list[dict[str, Any]]:
    """One slice per run of layer groups with the same method and values; one for all under control points."""
    seen = spelled if literal else column
    bodies = [_body(space, genome, method, points, seen) for method, points in _inner(space, methods)]
    runs: list[tuple[int, int]] = []  # first and last layer group
    for index, body in enumerate(bodies):
        last = runs[-1][1] if runs else index
        if runs and methods[index] is methods[last] and not methods[index].copies_layers and body == bodies[last]:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    slices: list[dict[str, Any]] = []
    for first, last in runs:
        method = methods[first]
        start, stop = (0, space.layer_count) if space.smooth else (space.groups[first][0], space.groups[last][1])
        if method.copies_layers:
            made = copied_slices(space, _layers_within(space, genome, start, stop))
        else:
            parts = bodies[first]
            if space.outer and (start == 0 or stop == space.layer_count):
                parts = [Part(space.outer, seen(space, method, genome, (OUTER,), None)), *parts]
            made = [_merged_slice(space, method, parts, (start, stop), constants=mixed, literal=literal)]
        slices += [{"merge_method": method.name, **piece} if mixed else piece for piece in made]
    return slices


def _body(
    space: SearchSpace, genome: Genome, method: Method, points: Sequence[str], seen: Callable[..., Column]
) -> list[Part]:
    """What a genome says about the tensors of a run of layers, what is left over last."""
    return [
        Part(space.filters.get(str(tensors), ()), seen(space, method, genome, points, tensors))
        for tensors in _tensors(space)
    ]


def _merged_slice(
    space: SearchSpace,
    method: Method,
    parts: Sequence[Part],
    layers: tuple[int, int],
    *,
    constants: bool,
    literal: bool,
) -> dict[str, Any]:
    sources: list[dict[str, Any]] = []
    if space.needs_base(method):
        sources.append({"model": space.base, "layer_range": list(layers)})
    shared: dict[str, Any] = dict(space.constants[method.name]) if constants else {}
    own: dict[str, dict[str, Any]] = {source: {} for source in space.sources}
    for parameter, owner in keys(space, method):
        place = shared if owner is None else own[owner]
        settings = [(part.filters, _setting(parameter, part.values[parameter.name, owner])) for part in parts]
        place[parameter.name] = _conditional(settings)
    left_out = set() if literal else absent(space, method, [part.values for part in parts])
    for source, reference in space.sources.items():
        if source in left_out:
            continue
        entry: dict[str, Any] = {"model": reference, "layer_range": list(layers)}
        if own[source]:
            entry["parameters"] = own[source]
        sources.append(entry)
    piece: dict[str, Any] = {"sources": sources}
    if shared:
        piece["parameters"] = shared
    return piece


def _setting(parameter: Parameter, values: Values) -> Value:
    """A scalar, or a gradient where the values differ along the depth."""
    written = [int(value) if parameter.kind == "int" else value for value in values]
    return written[0] if all(value == written[0] for value in written) else written


def _conditional(settings: Sequence[tuple[tuple[str, ...], Value]]) -> Value:
    """One value, or mergekit's list of conditions (the first match wins) where tensors of the slice differ."""
    conditions = [(name, value) for filters, value in settings[:-1] for name in filters]
    rest = settings[-1][1]
    while conditions and conditions[-1][1] == rest:
        conditions.pop()
    if not conditions:
        return rest
    return [{"filter": name, "value": value} for name, value in conditions] + [{"value": rest}]


def _layers_within(space: SearchSpace, genome: Genome, start: int, stop: int) -> Sequence[LayerGene]:
    """The pattern's layers that fall into a layer group; the first model's own where the pattern has none there."""
    found = [gene for gene in genome.layers if start <= gene.layer < stop]
    return found or [LayerGene(genome.layers[0].source, layer) for layer in range(start, stop)]


def copied_slices(space: SearchSpace, layers: Sequence[LayerGene]) -> list[dict[str, Any]]:
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
        piece: dict[str, Any] = {"sources": [{"model": space.reference(run[0].source), "layer_range": span}]}
        if run[0].scale != 1.0:
            piece["residual_scale"] = run[0].scale
        slices.append(piece)
    return slices
