"""From a search.yaml and the models' layout to a search space, with every problem reported at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from evomerge.errors import SpecError, suggest
from evomerge.methods.contract import Method
from evomerge.methods.registry import METHODS, STAGES, with_stages
from evomerge.space import genes
from evomerge.space.genes import CONTROL_POINTS, REST, Choice, LayerGroups, Pattern, Real
from evomerge.space.space import MethodScope, SearchSpace

T = TypeVar("T")

_MOST_TIMES = 16  # as many layers as the models have


def build_space(
    *,
    base: str | None,
    sources: Mapping[str, str],
    layer_count: int,
    outer: Sequence[str] = (),
    tensor_group_filters: Mapping[str, Sequence[str]] | None = None,
    methods: Sequence[str],
    after: Sequence[str] = (),
    activations: str | None = None,
    method_scope: MethodScope = "run",
    layer_groups: LayerGroups = 1,
    tensor_groups: Sequence[str] | None = None,
    gene_overrides: Mapping[str, Any] | None = None,
    frankenmerge: Mapping[str, Any] | None = None,
    choose: int | None = None,
    recipe_seed: int = 0,
    dtype: str | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    registry: Mapping[str, Method] = METHODS,
) -> SearchSpace:
    """Builds the search space of a search.yaml and its models' layout.

    Args:
        base: Reference of the base model.
        sources: Name -> reference, in order.
        layer_count: Layers of every model.
        outer: Names of the tensors outside the layer stack.
        tensor_group_filters: Tensor group -> substrings of names that pick its tensors; needed for every listed group
            but ``rest``.
        methods: Names of the methods to choose from.
        after: Names of the stages that follow those that add something to the base.
        activations: File of the base's mean inputs, for the stages that ask for them.
        method_scope: ``run`` or ``layer_group``.
        layer_groups: A number of equal groups, a list of boundaries, ``per_layer``, or {control_points: number}.
        tensor_groups: Groups of a layer's tensors with genes of their own; what they leave over is ``rest``.
        gene_overrides: Parameter (or gene, or anything between) -> {low, high}.
        frankenmerge: {min_layers, max_layers, scale}.
        choose: How many of the sources a candidate merges; None for all.
        recipe_seed: Seed of the stochastic methods.
        dtype: Output dtype of the recipes.
        tokenizer: What every recipe says of its tokenizer.
        registry: Known methods.

    Raises:
        SpecError: Everything that is wrong, at once.
    """
    problems: list[str] = []
    chosen = _chosen_methods(methods, registry, base, choose or len(sources), problems)
    if choose is not None and choose > len(sources):
        problems.append(f"space.choose: at most the {len(sources)} of models.sources; got {choose}")
    if choose is not None and all(method.copies_layers for method in chosen):
        problems.append("space.choose: says how many models are merged, and none of space.methods merges")
    chosen = _with_stages(chosen, after, base, problems)
    if activations is None:
        asking = [name for name in after if name in STAGES and STAGES[name].activations]
        problems += [f"models.activations: is missing: '{name}' of space.after asks for it" for name in asking]
    whole: tuple[tuple[int, int], ...] = ((0, layer_count),)
    groups = _collect(problems, lambda: genes.layer_groups(layer_groups, layer_count), whole)
    parts, filters = _tensor_groups(tensor_groups, tensor_group_filters or {}, problems)
    pattern = _collect(problems, lambda: _pattern(chosen, base, sources, layer_count, frankenmerge or {}), None)
    overrides = dict(gene_overrides or {})
    no_reals: tuple[Real, ...] = ()

    def real_genes() -> tuple[Real, ...]:
        return genes.real_genes(chosen, overrides, tuple(sources), len(groups), parts, bool(outer), choose)

    reals = _collect(problems, real_genes, no_reals)
    smooth = isinstance(layer_groups, Mapping)
    problems += _scope_problems(method_scope, smooth, reals, chosen)
    if problems:
        raise SpecError(problems)
    return SearchSpace(
        base=base,
        sources=dict(sources),
        groups=groups,
        outer=tuple(outer),
        filters=filters,
        tensor_groups=parts,
        methods=chosen,
        method_scope=method_scope,
        reals=reals,
        choices=_choices(chosen, method_scope, len(groups)),
        pattern=pattern,
        seed=recipe_seed,
        dtype=dtype,
        registry=registry,
        extra=genes.enabled_parameters(chosen, overrides),
        smooth=smooth,
        tokenizer=dict(tokenizer or {}),
        choose=choose,
        activations=activations,
    )


def _scope_problems(scope: MethodScope, smooth: bool, reals: Sequence[Real], methods: Sequence[Method]) -> list[str]:
    """What is wrong with where a method is chosen, and what cannot be interpolated between control points."""
    problems = []
    if scope not in ("run", "layer_group"):
        problems.append(f"space.method_scope: run or layer_group; got {scope!r}")
    if not smooth:
        return problems
    if scope == "layer_group":
        text = "values between control points are interpolated, and methods cannot be: give method_scope run"
        problems.append(f"space.method_scope: {text}, or layer_groups without {CONTROL_POINTS}; got layer_group")
    whole = {p.name for method in methods for p in method.parameters if p.kind == "int"}
    for name in sorted({gene.parameter for gene in reals} & whole):
        text = f"'{name}' is a whole number, which has no values between {CONTROL_POINTS}"
        problems.append(f"space.genes.{name}: {text}: leave it out, or give layer_groups another way")
    return problems


def _collect(problems: list[str], make: Callable[[], T], otherwise: T) -> T:
    """What `make` returns; where it raises, its problems are kept and `otherwise` stands in."""
    try:
        return make()
    except SpecError as error:
        problems.extend(error.problems)
        return otherwise


def _chosen_methods(
    names: Sequence[str], registry: Mapping[str, Method], base: str | None, source_count: int, problems: list[str]
) -> tuple[Method, ...]:
    aliases = {alias: method for method in registry.values() for alias in method.aliases}
    by_name = {**aliases, **registry}
    chosen: dict[str, Method] = {}
    for name in names:
        method = by_name.get(name)
        if method is None:
            problems.append(f"space.methods: no method is called '{name}'{suggest(name, by_name)}")
            continue
        chosen[method.name] = method
        given = {
            p.name: p.gene for p in genes.searched_parameters(method, frozenset(), source_count) if not p.per_source
        }
        if base is None and not method.copies_layers and method.base_needed(given):
            problems.append(f"space.methods: '{name}' needs models.base, which is missing")
        if source_count < method.min_sources and not method.copies_layers:
            problems.append(f"space.methods: '{name}' needs at least {method.min_sources} sources; got {source_count}")
        if method.max_sources is not None and source_count > method.max_sources and not method.copies_layers:
            problems.append(f"space.methods: '{name}' takes at most {method.max_sources} sources; got {source_count}")
    if not names:
        problems.append("space.methods: give at least one method")
    return tuple(chosen.values())


def _with_stages(
    methods: Sequence[Method], after: Sequence[str], base: str | None, problems: list[str]
) -> tuple[Method, ...]:
    """The methods, those of deltas with stages after them."""
    problems += [f"space.after: no stage is called '{n}'{suggest(n, STAGES)}" for n in after if n not in STAGES]
    names = tuple(dict.fromkeys(name for name in after if name in STAGES))
    based = [method for method in methods if base is not None and _has_base(method)]
    if names and not based:
        problems.append("space.after: works on what a method adds to models.base, and none of space.methods does")
    return tuple(with_stages(method, names) if method in based else method for method in methods)


def _has_base(method: Method) -> bool:
    fixed = genes.fixed_parameters(method, (), has_base=True)
    return not method.copies_layers and (method.takes_base or method.base_needed(fixed))


def _tensor_groups(
    names: Sequence[str] | None, filters: Mapping[str, Sequence[str]], problems: list[str]
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The groups with ``rest`` last, and the substrings of all but ``rest``."""
    if not names:
        return (), {}
    picked = [name for name in dict.fromkeys(names) if name != REST]
    for name in picked:
        if not filters.get(name):
            hint = suggest(name, [*filters, REST])
            problems.append(f"space.tensor_groups: the models have no tensors of a group '{name}'{hint}")
    return (*picked, REST), {name: tuple(filters.get(name, ())) for name in picked}


def _choices(methods: Sequence[Method], scope: MethodScope, group_count: int) -> tuple[Choice, ...]:
    options = tuple(method.name for method in methods)
    if len(options) < 2:
        return ()
    if scope == "run" or group_count == 1:
        return (Choice("method", options),)
    return tuple(Choice(f"method.g{index}", options, index) for index in range(group_count))


def _pattern(
    methods: Sequence[Method],
    base: str | None,
    sources: Mapping[str, str],
    layer_count: int,
    settings: Mapping[str, Any],
) -> Pattern | None:
    copying = next((method for method in methods if method.copies_layers), None)
    if copying is None:
        return None
    where = "space.frankenmerge"
    keys = ("min_layers", "max_layers", "scale")
    problems = [f"{where}.{key}: unknown key{suggest(key, keys)}" for key in settings if key not in keys]
    low, high = settings.get("min_layers", layer_count), settings.get("max_layers", layer_count)
    if not (isinstance(low, int) and isinstance(high, int) and 1 <= low <= high):
        problems.append(f"{where}: 1 <= min_layers <= max_layers; got {low} and {high}")
    elif high > _MOST_TIMES * layer_count:
        most = _MOST_TIMES * layer_count
        problems.append(
            f"{where}.max_layers: at most {_MOST_TIMES} times the models' {layer_count}: {most}; got {high}"
        )
    if problems:
        raise SpecError(problems)
    models = tuple(sources) if base is None or "base" in sources else ("base", *sources)
    declared = copying.parameter("residual_scale")
    scale = (declared.gene if declared else None) or (1.0, 1.0)
    return Pattern(models, layer_count, low, high, scale if settings.get("scale", False) else None)
