"""What a recipe says about one tensor: the method, its inputs and the value of every parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evomerge.errors import RecipeError
from evomerge.methods.contract import Method, Parameter, Settings
from evomerge.methods.registry import METHODS, with_stages
from evomerge.recipe.model import Recipe, Slice, Source
from evomerge.recipe.parameters import LAYOUT_NAMES, RESIDUAL_SCALE
from evomerge.recipe.settings import Parameters, Scalar, conditionals, evaluate, layer_t


@dataclass(frozen=True)
class LayerPlace:
    """Where an output layer comes from: its slice, its index within the slice, and that as t in [0, 1]."""

    slice_index: int
    offset: int
    t: float


@dataclass(frozen=True)
class Input:
    """A model that a slice reads: layer k of the slice is layer `start` + k of the model.

    Attributes:
        model: Its reference.
        start: The model's first layer in the slice.
        source: Its entry in the recipe; None for a base that is not listed among the sources.
    """

    model: str
    start: int
    source: Source | None


@dataclass(frozen=True)
class SliceInputs:
    """What a slice merges: its method, the base (None when the method uses none) and the sources in recipe order."""

    method: Method
    base: Input | None
    sources: tuple[Input, ...]


@dataclass(frozen=True)
class ResolvedTensor:
    """One output tensor of a recipe.

    Attributes:
        method: How it is merged.
        base: Reference of the base, or None.
        sources: References of the sources, in recipe order.
        settings: Every parameter's value.
        residual_scale: Factor for tensors that write to the residual stream.
    """

    method: Method
    base: str | None
    sources: tuple[str, ...]
    settings: Settings
    residual_scale: float


def layer_places(recipe: Recipe, layer_count: int) -> tuple[LayerPlace, ...]:
    """Returns the output's layers from first to last.

    Args:
        recipe: A frankenmerge by pattern has to be expanded first (`expand_frankenmerge`).
        layer_count: Layers of the models, for a recipe without slices.
    """
    places = []
    for index, part in enumerate(recipe.parts):
        length = layer_count if part.length is None else part.length
        places += [LayerPlace(index, offset, layer_t(offset, length)) for offset in range(length)]
    return tuple(places)


def method_of(recipe: Recipe, slice_index: int, methods: Mapping[str, Method] = METHODS) -> Method:
    """Returns the method of a slice."""
    return methods[recipe.parts[slice_index].merge_method or recipe.merge_method]


def slice_inputs(recipe: Recipe, slice_index: int, *, methods: Mapping[str, Method] = METHODS) -> SliceInputs:
    """Returns the base and the sources of a slice.

    A method that needs or takes a base does not count it among the sources, listed or not. Any other has a listed base
    as a source like the rest; of whole models, an unlisted one joins at the end when the recipe sets for all models
    what a source has no default for (mergekit adds it always, and then fails where that is missing). Where there is a
    base, the recipe's stages follow the method.
    """
    inputs = _method_inputs(recipe, slice_index, method_of(recipe, slice_index, methods))
    if inputs.base is None:
        return inputs
    return replace(inputs, method=with_stages(inputs.method, recipe.after))


def _method_inputs(recipe: Recipe, slice_index: int, method: Method) -> SliceInputs:
    part = recipe.parts[slice_index]
    reference = part.base_model or recipe.base_model
    listed = tuple(Input(s.model, s.layer_range[0] if s.layer_range else 0, s) for s in part.sources)
    if method.copies_layers or reference is None:
        return SliceInputs(method, None, listed)
    as_source = [entry for entry in listed if entry.model == reference]
    base = as_source[0] if as_source else Input(reference, listed[0].start if listed else 0, None)
    others = tuple(entry for entry in listed if entry.model != reference)
    if method.takes_base or base_needed(recipe, slice_index, method):
        return SliceInputs(method, base, others)
    if not as_source and recipe.sources and _joins(recipe, method, reference):
        return SliceInputs(method, None, (*listed, base))
    return SliceInputs(method, None, listed)


def _joins(recipe: Recipe, method: Method, reference: str) -> bool:
    own = dict(recipe.input_model_parameters).get(reference, Parameters())
    levels = (recipe.parameters, recipe.module_parameters, own)
    missing = [p.name for p in method.parameters if p.per_source and p.default is None]
    return all(any(name in level for level in levels) for name in missing)


def base_needed(recipe: Recipe, slice_index: int, method: Method) -> bool:
    """Tells whether a slice needs a base under a method.

    Where that depends on shared parameters, it is decided once for the slice, by the first value that each is given:
    what the sources are must not change from tensor to tensor.
    """
    if method.needs_base_when is None:
        return method.needs_base
    shared: dict[str, Any] = {}
    for parameter in method.parameters:
        if parameter.per_source:
            continue
        value: Any = None
        for level in _levels(recipe, recipe.parts[slice_index], None):
            if value is None and parameter.name in level:
                entries = conditionals(level[parameter.name])
                value = evaluate(entries[0].value if entries else level[parameter.name], "", 0.0)
        shared[parameter.name] = parameter.default if value is None else value
    return method.base_needed(shared)


def lookup(
    recipe: Recipe, slice_index: int, name: str, tensor_name: str, t: float, source: Input | None = None
) -> Scalar | None:
    """Returns a parameter's value with mergekit's precedence: source, slice, model, module, recipe.

    Args:
        recipe: The recipe.
        slice_index: Index into `Recipe.parts`.
        name: The parameter.
        tensor_name: What filters are matched against.
        t: Position within the slice.
        source: The source it is for; None for a parameter that is one for the tensor.

    Returns:
        The value; None when no level sets it for this tensor.
    """
    for level in _levels(recipe, recipe.parts[slice_index], source):
        if name in level:
            value = evaluate(level[name], tensor_name, t)
            if value is not None:
                return value
    return None


def _levels(recipe: Recipe, part: Slice, source: Input | None) -> list[Parameters]:
    levels = [part.parameters]
    if source is not None:
        if source.source is not None:
            levels.insert(0, source.source.parameters)
        levels += [items for model, items in recipe.input_model_parameters if model == source.model]
    return [*levels, recipe.module_parameters, recipe.parameters]


def resolve(
    recipe: Recipe,
    slice_index: int,
    tensor_name: str,
    t: float,
    source_tensor_names: Sequence[str] | None = None,
    *,
    methods: Mapping[str, Method] = METHODS,
) -> ResolvedTensor:
    """Tells what the recipe says about one output tensor.

    Args:
        recipe: The recipe; a frankenmerge by pattern has to be expanded first (`expand_frankenmerge`).
        slice_index: Index into `Recipe.parts`: the first for embeddings, the last for final norm and head.
        tensor_name: The output's name; filters of parameters that are one for the tensor are matched against it.
        t: Position within the slice (`LayerPlace.t`); 0 outside the layers.
        source_tensor_names: The tensor's name in each of `slice_inputs(...).sources`, for the filters of parameters
            that are per source; None where they are the output's.
        methods: The merge methods there are.

    Raises:
        RecipeError: A required parameter is missing for this tensor, or the method refuses the values.
    """
    inputs = slice_inputs(recipe, slice_index, methods=methods)
    method = inputs.method
    if method.copies_layers and len(inputs.sources) != 1:
        raise RecipeError(f"{method.name}: a tensor is copied from one model, got {len(inputs.sources)} of them")
    names = source_tensor_names or [tensor_name] * len(inputs.sources)
    problems: list[str] = []

    def value(parameter: Parameter, name: str, source: Input | None) -> Any:
        setting = lookup(recipe, slice_index, parameter.name, name, t, source)
        if setting is None and parameter.required:
            of = "" if source is None else f" of {source.model}"
            problems.append(f"{tensor_name}: {method.name} needs '{parameter.name}'{of}: give it a value")
        return _typed(parameter, parameter.default if setting is None else setting)

    of_tensor = [p for p in method.parameters if p.name not in LAYOUT_NAMES]
    shared = {p.name: value(p, tensor_name, None) for p in of_tensor if not p.per_source}
    own = [p for p in of_tensor if p.per_source]
    per_source = tuple(
        {p.name: value(p, name, source) for p in own} for name, source in zip(names, inputs.sources, strict=True)
    )
    residual = _residual_scale(recipe, slice_index, names[0] if names else tensor_name, t, inputs)
    for values in (shared, *per_source):
        if RESIDUAL_SCALE.name in values:
            values[RESIDUAL_SCALE.name] = residual
    settings = Settings(shared, per_source)
    if not problems:
        problems = [f"{tensor_name}: {message}" for message in method.check(settings)]
    if problems:
        raise RecipeError(problems)
    base = inputs.base.model if inputs.base else None
    return ResolvedTensor(method, base, tuple(source.model for source in inputs.sources), settings, residual)


def _typed(parameter: Parameter, value: Any) -> Any:
    return float(value) if parameter.kind == "float" and value is not None else value


def _residual_scale(recipe: Recipe, slice_index: int, tensor_name: str, t: float, inputs: SliceInputs) -> float:
    part = recipe.parts[slice_index]
    scale = part.residual_scale
    if isinstance(scale, tuple):
        return float(scale[round(t * (len(scale) - 1))])
    if scale is not None:
        return float(scale)
    if not inputs.method.copies_layers:
        return 1.0
    setting = lookup(recipe, slice_index, RESIDUAL_SCALE.name, tensor_name, t, inputs.sources[0])
    return 1.0 if setting is None else float(setting)
