"""The genes of a search space, derived from the methods' own declarations.

A gene is named ``parameter.group`` or, where every source has its own value, ``parameter.source.group``; with tensor
groups, ``.attention`` and so on is added. Groups are ``g0``, ``g1``, ... (runs of layers, or control points along the
depth) and ``outer`` (embeddings, final norm, head). Methods that know a parameter of the same name share its genes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import SpecError, suggest
from evomerge.methods.contract import Method, Parameter
from evomerge.space.genome import LayerGene

OUTER = "outer"
REST = "rest"
WIDER = {"ssm": "attention", "experts": "mlp", "router": "mlp", "shared_experts": "mlp", "norm": REST}
"""The group that has a finer one's tensors where that has no genes of its own."""
CHOSEN = "chosen"
"""How the genes are called by which a source is chosen: of a pool those with the highest values take part."""
CONTROL_POINTS = "control_points"

DEFAULT_GROUPS = 6
LayerGroups = int | Sequence[int] | str | Mapping[Any, int] | None


@dataclass(frozen=True)
class Real:
    """A real gene, within [low, high].

    Attributes:
        name: Unique in the space.
        parameter: The method parameter it sets.
        source: The source it belongs to; None when the parameter is one for all sources.
        group: ``g0`` ... or ``outer``.
        tensors: The tensor group; None when a layer's tensors share the value.
        default: The paper's value, moved into the range.
    """

    name: str
    low: float
    high: float
    parameter: str
    source: str | None
    group: str
    tensors: str | None
    default: float

    def clip(self, value: float) -> float:
        """Moves a value into the gene's range."""
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """A categorical gene: the method of the run (`group` None) or of one layer group."""

    name: str
    options: tuple[str, ...]
    group: int | None = None


@dataclass(frozen=True)
class Pattern:
    """The variable-length gene of a frankenmerge: the (model, layer, scale) of each output layer.

    Attributes:
        models: Models that layers may come from: the sources, and the base.
        layer_count: Layers of every model.
        min_layers: Fewest output layers.
        max_layers: Most output layers.
        scale: Range of each layer's ``residual_scale``; None when layers are copied unscaled.
    """

    models: tuple[str, ...]
    layer_count: int
    min_layers: int
    max_layers: int
    scale: tuple[float, float] | None

    def fit_length(self, layers: Sequence[LayerGene]) -> tuple[LayerGene, ...]:
        """Cuts layers, or repeats the last one, to the allowed length."""
        return tuple(layers[: self.max_layers]) + tuple(layers[-1:]) * (self.min_layers - len(layers))


def gene_name(parameter: str, source: str | None, group: str | None = None, tensors: str | None = None) -> str:
    """Names a gene: its parameter, source, group and tensor group, those that it has."""
    return ".".join(part for part in (parameter, source, group, tensors) if part is not None)


def enabled_parameters(methods: Sequence[Method], overrides: Mapping[str, Any]) -> frozenset[str]:
    """Names the parameters that only an override gives a range: no method declares one for them."""
    declared = {p.name for method in methods for p in method.parameters if p.gene is not None}
    return frozenset(key.split(".")[0] for key in overrides) - declared


def searched_parameters(method: Method, extra: frozenset[str], source_count: int) -> tuple[Parameter, ...]:
    """Lists the numeric parameters of a method that have genes: with a declared range, or of `enabled_parameters`.

    Of two that say the same only one has genes: the one that stands in the other's place where it declares a range (t
    of SLERP with one source), else the other (density, not drop_rate). One that needs another mode has none.
    """
    if method.copies_layers:
        return ()
    declared = {parameter.name: parameter for parameter in method.parameters}
    replaced = {
        parameter.instead_of
        for parameter in method.parameters
        if parameter.instead_of in declared and parameter.gene is not None and _few_enough(parameter, source_count)
    }
    return tuple(
        parameter
        for parameter in method.parameters
        if parameter.kind in ("float", "int")
        and (parameter.gene is not None or parameter.name in extra)
        and parameter.name not in replaced
        and (parameter.instead_of not in declared or parameter.instead_of in replaced)
        and _few_enough(parameter, source_count)
        and (parameter.when is None or paper_value(declared[parameter.when[0]]) == parameter.when[1])
    )


def _few_enough(parameter: Parameter, source_count: int) -> bool:
    return parameter.gene_sources is None or source_count <= parameter.gene_sources


def paper_value(parameter: Parameter) -> Any:
    """Returns the value of a parameter in a search that gives it no gene: the paper's, else the recipe default."""
    return parameter.default if parameter.paper is None else parameter.paper


def fixed_parameters(method: Method, searched: Sequence[Parameter], has_base: bool) -> dict[str, Any]:
    """Parameters without genes whose value in a search is the paper's and not the recipe default.

    Among them is SLERP's ``on: deltas``: fine-tunes of one base are nearly parallel, so on weights it is linear.
    Without a base it stays on weights.

    Args:
        method: The method.
        searched: Its parameters that have genes.
        has_base: Whether the space has a base model.
    """
    genes = [parameter.name for parameter in searched]
    replaced = [parameter.instead_of for parameter in searched]
    fixed = {
        parameter.name: parameter.paper
        for parameter in method.parameters
        if parameter.name not in genes
        and parameter.paper is not None
        and parameter.paper != parameter.default
        and parameter.instead_of is None
        and parameter.name not in replaced
    }
    return {} if not has_base and method.base_needed(fixed) and not method.base_needed({}) else fixed


@dataclass(frozen=True)
class Family:
    """All that the methods of a space say about one parameter: the range that its genes have, and where they start."""

    parameter: str
    per_source: bool
    low: float
    high: float
    allowed: tuple[float, float]
    default: float


def families(methods: Sequence[Method], overrides: Mapping[str, Any], source_count: int) -> list[Family]:
    """Makes one family per searched parameter (and kind of owner), in order of name.

    Raises:
        SpecError: An override that is unknown, has no sense, or leaves the parameter's allowed range.
    """
    groups: dict[tuple[str, bool], list[tuple[Method, Parameter]]] = {}
    extra = enabled_parameters(methods, overrides)
    for method in methods:
        for parameter in searched_parameters(method, extra, source_count):
            groups.setdefault((parameter.name, parameter.per_source), []).append((method, parameter))
    result = [_family(name, per_source, groups[name, per_source]) for name, per_source in sorted(groups)]
    problems = _override_problems(result, overrides, methods)
    if problems:
        raise SpecError(problems)
    return result


def _family(name: str, per_source: bool, declared: Sequence[tuple[Method, Parameter]]) -> Family:
    allowed_low = max((p.low for _, p in declared if p.low is not None), default=-float("inf"))
    allowed_high = min((p.high for _, p in declared if p.high is not None), default=float("inf"))
    ranges = [p.gene for _, p in declared if p.gene is not None] or [(allowed_low, allowed_high)]
    low = max(allowed_low, min(r[0] for r in ranges))
    high = min(allowed_high, max(r[1] for r in ranges))
    papers = [paper_value(p) for _, p in declared]
    default = next((float(value) for value in papers if isinstance(value, int | float)), (low + high) / 2)
    return Family(name, per_source, low, high, (allowed_low, allowed_high), default)


def _override_problems(
    families: Sequence[Family], overrides: Mapping[str, Any], methods: Sequence[Method]
) -> list[str]:
    problems: list[str] = []
    by_name: dict[str, list[Family]] = {}
    for family in families:
        by_name.setdefault(family.parameter, []).append(family)
    for key, override in overrides.items():
        name = key.split(".")[0]
        for family in by_name.get(name, ()):
            problems += _range_problems(key, override, family)
        if name not in by_name:
            twins = {p.instead_of for method in methods for p in method.parameters if p.name == name} - {None}
            hint = f" (give the range of '{twins.pop()}')" if twins else suggest(name, by_name)
            names = ", ".join(by_name) or "none"
            problems.append(f"space.genes.{key}: the space has no gene '{name}'{hint}; it has: {names}")
    return problems


def _range_problems(key: str, override: Any, family: Family) -> list[str]:
    where = f"space.genes.{key}"
    if not isinstance(override, Mapping) or not set(override) <= {"low", "high"}:
        return [f"{where}: give a range {{low, high}}; got {override!r}"]
    low, high = _bound(override, "low", family.low), _bound(override, "high", family.high)
    for word, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return [f"{where}.{word}: give a finite number; got {value!r}"]
    problems = []
    if low > high:
        problems.append(f"{where}: low must not exceed high; got low {low}, high {high}")
    if low < family.allowed[0] or high > family.allowed[1]:
        problems.append(
            f"{where}: '{family.parameter}' lies within [{family.allowed[0]}, {family.allowed[1]}]; "
            f"got low {low}, high {high}"
        )
    return problems


def _bound(override: Mapping[str, Any], key: str, otherwise: float) -> Any:
    """An end of a range; the declared one where the override leaves it out, or says null."""
    value = override.get(key)
    return otherwise if value is None else value


def real_genes(
    methods: Sequence[Method],
    overrides: Mapping[str, Any],
    sources: Sequence[str],
    group_count: int,
    tensor_groups: Sequence[str],
    has_outer: bool,
    choose: int | None = None,
) -> tuple[Real, ...]:
    """Makes every real gene, sorted by name; the most specific override of a name's prefixes gives its range.

    Args:
        methods, overrides, sources: As for `evomerge.space.build.build_space`.
        group_count: The number of layer groups.
        tensor_groups: Their tensor groups.
        has_outer: Whether tensors outside the layers have genes.
        choose: How many of the sources are merged; None for all.

    Raises:
        SpecError: An override of a gene that does not exist, or one that has no sense.
    """
    genes: list[Real] = []
    places: list[tuple[str, str | None]] = [
        (f"g{index}", tensors) for index in range(group_count) for tensors in (tensor_groups or (None,))
    ]
    if has_outer:
        places.append((OUTER, None))
    used: set[str] = set()
    for family in families(methods, overrides, choose or len(sources)):
        for source in sources if family.per_source else (None,):
            for group, tensors in places:
                genes.append(_real(family, source, group, tensors, overrides, used))
    unused = [key for key in overrides if key not in used]
    if unused:
        names = {prefix for gene in genes for prefix in _prefixes(gene.name)}
        raise SpecError([f"space.genes.{key}: there is no such gene{suggest(key, names)}" for key in unused])
    if choose is not None:
        genes += [Real(gene_name(CHOSEN, name), 0.0, 1.0, CHOSEN, name, OUTER, None, 0.5) for name in sources]
    return tuple(sorted(genes, key=lambda gene: gene.name))


def _prefixes(name: str) -> list[str]:
    """The name and every shorter name it falls under, most specific first: a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _real(
    family: Family,
    source: str | None,
    group: str,
    tensors: str | None,
    overrides: Mapping[str, Any],
    used: set[str],
) -> Real:
    name = gene_name(family.parameter, source, group, tensors)
    low, high = family.low, family.high
    matches = [key for key in _prefixes(name) if key in overrides]
    used.update(matches)
    if matches:
        low, high = _bound(overrides[matches[0]], "low", low), _bound(overrides[matches[0]], "high", high)
    default = min(max(family.default, low), high)
    return Real(name, float(low), float(high), family.parameter, source, group, tensors, float(default))


def layer_groups(groups: LayerGroups, layer_count: int) -> tuple[tuple[int, int], ...]:
    """Runs of layers [start, stop) that share genes; of control points the layers nearest to each.

    Args:
        groups: A number of equal groups, the boundaries between groups, ``per_layer``, {control_points: number}, or
            None for six groups, fewer where there are fewer layers.
        layer_count: Layers of the models.

    Raises:
        SpecError: Groups that the layers do not allow.
    """
    where = "space.layer_groups"
    if groups is None:
        groups = max(1, min(DEFAULT_GROUPS, layer_count))
    if groups == "per_layer":
        return tuple((layer, layer + 1) for layer in range(layer_count))
    if isinstance(groups, int) and not isinstance(groups, bool):
        if not 1 <= groups <= layer_count:
            raise SpecError(f"{where}: a number from 1 to {layer_count} (the models' layers); got {groups}")
        edges = [round(index * layer_count / groups) for index in range(groups + 1)]
    elif isinstance(groups, Mapping):
        count = groups.get(CONTROL_POINTS)
        if set(groups) != {CONTROL_POINTS} or isinstance(count, bool) or not isinstance(count, int):
            raise SpecError(f"{where}: {{{CONTROL_POINTS}: number}} is what a mapping says; got {dict(groups)}")
        if not 2 <= count <= layer_count:
            text = f"a number from 2 to {layer_count} (the models' layers)"
            raise SpecError(f"{where}.{CONTROL_POINTS}: {text}; got {count}")
        # Point k lies at layer k (L - 1) / (K - 1); half way between two the nearest changes.
        step = (layer_count - 1) / (count - 1)
        edges = [0, *(math.floor((index + 0.5) * step) + 1 for index in range(count - 1)), layer_count]
    elif isinstance(groups, Sequence) and not isinstance(groups, str):
        edges = [0, *groups, layer_count]
        edges = edges[1:] if len(edges) > 2 and edges[1] == 0 else edges
        edges = edges[:-1] if len(edges) > 2 and edges[-2] == layer_count else edges
        if not all(isinstance(edge, int) for edge in edges) or any(a >= b for a, b in itertools.pairwise(edges)):
            raise SpecError(f"{where}: boundaries rise within 0 and {layer_count} (the models' layers); got {groups}")
    else:
        kinds = f"a number, a list of boundaries, per_layer, or {{{CONTROL_POINTS}: number}}"
        raise SpecError(f"{where}: {kinds}; got {groups!r}")
    return tuple(itertools.pairwise(edges))
