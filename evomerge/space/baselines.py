"""Generation 0: what a person would try first. Each is an exact recipe, and the nearest genome to breed from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.methods.contract import Method
from evomerge.space.decode import decode, recipe_hash, stages_after
from evomerge.space.genes import CHOSEN, paper_value
from evomerge.space.genome import Genome, LayerGene, Scalar
from evomerge.space.space import SearchSpace

PARENT = "parent:"
"""How the names of the baselines begin that are a model itself."""
#: λ of the sum of the deltas: around the 0.3 to 0.4 of Ilharco et al., 2022 (https://arxiv.org/abs/2212.04089), and up.
LAMBDAS = (0.3, 0.6, 1.0)


@dataclass(frozen=True)
class Start:
    """A candidate of generation 0.

    Attributes:
        name: As the lineage and the report show it.
        recipe: What is merged, exactly.
        genome: The nearest genome of the space.
        raced: Whether it races against those before it: it is a guess, and no model that a result is compared with.
    """

    name: str
    recipe: Mapping[str, Any]
    genome: Genome
    raced: bool = False


def baselines(space: SearchSpace) -> tuple[Start, ...]:
    """Lists each parent (the base included), the uniform average, a λ grid, and each method at its paper's values.

    Baselines with the same recipe count once, under the first name; those that race come last.
    """
    starts = [_parent(space, name) for name in _parents(space)]
    if len(space.sources) > 1:
        starts.append(_uniform(space))
    arithmetic = space.registry.get("task_arithmetic")
    if arithmetic is not None and space.base is not None:
        starts += [_lambda(space, arithmetic, value) for value in LAMBDAS]
    starts += [_defaults(space, method) for method in space.methods]
    if all(method.copies_layers for method in space.methods):
        starts += _halves(space)
    unique: dict[str, Start] = {}
    for start in starts:
        unique.setdefault(recipe_hash(start.recipe), start)
    return raced_last(unique.values())


def raced_last(starts: Iterable[Start]) -> tuple[Start, ...]:
    """Sorts generation 0 by whether one races, for it does so against those before it."""
    return tuple(sorted(starts, key=lambda start: start.raced))


def _parents(space: SearchSpace) -> list[str]:
    return (["base"] if space.base is not None and "base" not in space.sources else []) + list(space.sources)


def _parent(space: SearchSpace, name: str) -> Start:
    recipe = _recipe(space, space.registry["linear"], {space.reference(name): {"weight": 1.0}}, {})
    weights = {source: 1.0 if source == name else 0.0 for source in space.sources}
    values = {"weight": weights, "lambda": 1.0, CHOSEN: weights}
    genome = _nearest(space, ("linear", "task_arithmetic"), values, name)
    return Start(f"{PARENT}{name}", recipe, genome)


def _uniform(space: SearchSpace) -> Start:
    sources = {reference: {"weight": 1.0} for reference in space.sources.values()}
    recipe = _recipe(space, space.registry["linear"], sources, {})
    share = 1.0 / len(space.sources)
    # Under linear only the ratio of the weights counts; 1/K gives the same merge under task_arithmetic as well.
    weights = dict.fromkeys(space.sources, share)
    return Start("uniform average", recipe, _nearest(space, ("linear", "task_arithmetic"), {"weight": weights}, None))


def _lambda(space: SearchSpace, method: Method, value: float) -> Start:
    sources = {reference: {"weight": 1.0} for reference in space.sources.values()}
    recipe = _recipe(space, method, sources, {"lambda": value})
    low, high = _allowed(space, "lambda")
    near = min(max(value, low), high)
    weights = dict.fromkeys(space.sources, value / near if near else 1.0)  # what λ may not be, the weights are
    genome = _nearest(space, ("task_arithmetic",), {"weight": weights, "lambda": near}, None)
    return Start(f"task_arithmetic λ={value:g}", recipe, genome, raced=True)


def _allowed(space: SearchSpace, parameter: str) -> tuple[float, float]:
    """The range that a parameter's genes have in common; any where it has none."""
    ranges = [(gene.low, gene.high) for gene in space.reals if gene.parameter == parameter]
    return max((low for low, _ in ranges), default=-math.inf), min((high for _, high in ranges), default=math.inf)


def _defaults(space: SearchSpace, method: Method) -> Start:
    name = f"{method.name} (defaults)"
    if method.copies_layers:
        genome = _nearest(space, (method.name,), {}, None, _alternating(space))
        return Start(name, decode(space, genome), genome, raced=True)
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for parameter in space.searched[method.name]:
        value = paper_value(parameter)
        if value is None and parameter.gene is not None:
            value = sum(parameter.gene) / 2
        if value is not None:
            (own if parameter.per_source else shared)[parameter.name] = value
    for key, value in space.fixed_parameters(method).items():
        declared = method.parameter(key)
        (own if declared is not None and declared.per_source else shared)[key] = value
    sources = list(space.sources.values())[: method.max_sources]  # of a pool, as many as the method takes
    recipe = _recipe(space, method, {reference: dict(own) for reference in sources}, shared)
    return Start(name, recipe, _nearest(space, (method.name,), {**own, **shared}, None), raced=True)


def _recipe(
    space: SearchSpace, method: Method, sources: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """A recipe of whole models, without slices; parameters at their recipe default are left out."""
    data: dict[str, Any] = {"merge_method": method.name}
    if space.base is not None and (space.tokenizer or space.needs_base(method)):
        data["base_model"] = space.base
    data |= space.tokenizer
    data |= stages_after(space, [method])
    data["models"] = [
        {"model": reference, "parameters": dict(own)} if own else {"model": reference}
        for reference, own in sources.items()
    ]
    declared = {parameter.name: parameter.default for parameter in method.parameters}
    kept = {key: value for key, value in shared.items() if declared.get(key) != value}
    if kept:
        data["parameters"] = kept
    if space.dtype is not None:
        data["dtype"] = space.dtype
    if method.stochastic:
        data["seed"] = space.seed
    return data


def _alternating(space: SearchSpace) -> tuple[LayerGene, ...]:
    """Each layer group from the next source in turn, cut or repeated at the end to the allowed length."""
    names = list(space.sources)
    layers = [
        LayerGene(names[index % len(names)], layer)
        for index, (start, stop) in enumerate(_parts(space))
        for layer in range(start, stop)
    ]
    return tuple(layers) if space.pattern is None else space.pattern.fit_length(layers)


def _halves(space: SearchSpace) -> list[Start]:
    """For each model, its lower half under the next one's upper half: together they say which halves are good."""
    names = _parents(space)
    middle = space.layer_count // 2
    starts = []
    for index, name in enumerate(names if len(names) > 1 else ()):
        other = names[(index + 1) % len(names)]
        layers = (*space.own_layers(name)[:middle], *space.own_layers(other)[middle:])
        genome = _nearest(space, (), {}, None, layers)
        starts.append(Start(f"halves:{name}+{other}", decode(space, genome), genome))
    return starts


def _parts(space: SearchSpace) -> tuple[tuple[int, int], ...]:
    """The layer groups, or as many equal parts as there are sources when there are fewer groups than that."""
    count = min(len(space.sources), space.layer_count)
    if len(space.groups) >= count:
        return space.groups
    edges = [round(index * space.layer_count / count) for index in range(count + 1)]
    return tuple(itertools.pairwise(edges))


def _nearest(
    space: SearchSpace,
    methods: tuple[str, ...],
    values: Mapping[str, Any],
    parent: str | None,
    layers: tuple[LayerGene, ...] = (),
) -> Genome:
    """The default genome with the given method (the first that the space has) and values, moved into their ranges.

    Args:
        space: The space.
        methods: Methods, best first.
        values: Parameter -> value, or {source: value}.
        parent: The model whose own layers the pattern copies.
        layers: The pattern, when it is known.
    """
    start = space.default()
    scalars: dict[str, Scalar] = dict(start.scalars)
    for choice in space.choices:
        method = next((name for name in methods if name in choice.options), None)
        if method is not None:
            scalars[choice.name] = method
    for gene in space.reals:
        value = values.get(gene.parameter)
        if isinstance(value, Mapping):
            value = value.get(gene.source)
        if value is not None:
            scalars[gene.name] = gene.clip(float(value))
    if space.pattern is not None and not layers:
        layers = space.own_layers(parent) if parent in space.pattern.models and parent else start.layers
    return Genome.of(scalars, layers)
