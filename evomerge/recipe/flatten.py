"""A recipe over the results of others: with these as its steps, or as one sum over the first models where it is one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evomerge.recipe.model import Recipe, Slice, Source
from evomerge.recipe.parse import parse_recipe
from evomerge.recipe.resolve import layer_places, resolve
from evomerge.recipe.settings import Conditional, Parameters, Setting, conditionals

_SUMS = ("linear", "task_arithmetic")
_ROUNDING = 1e-9
"""Coefficients that differ by less do so by the order of additions."""

_Coefficients = dict[str, float]


def with_steps(recipe: Mapping[str, Any], steps: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """Joins a recipe with those of the models that it and its steps call by a name.

    Args:
        recipe: The recipe, as in YAML.
        steps: Name of a model that it rests on -> that model's recipe.
    """
    named = [{"name": name, **step} for name, step in steps.items()]
    return parse_recipe([*named, recipe] if named else recipe, where="candidate")


def flattened(recipe: Recipe, tensors: Sequence[tuple[str, int]], layer_count: int) -> Recipe:
    """Writes a merge of merges as one over the first models, where every step is a sum of whole models.

    That is so of linear and task arithmetic, where coefficients add up to one. The tensors are the same, but that the
    results of steps are not rounded to their dtype in between. Any other recipe comes back as it is.

    Args:
        recipe: The recipe and its steps, of models with one stack of layers.
        tensors: Every tensor of a model with its layer: -1 before the layers, `layer_count` after them.
        layer_count: Layers of the models.
    """
    if not recipe.steps or not all(_is_sum(document, layer_count) for document in recipe.documents):
        return recipe
    base = next((d.base_model for d in reversed(recipe.documents) if d.merge_method == "task_arithmetic"), None)
    outside = [name for name, layer in tensors if not 0 <= layer < layer_count]
    filters = list(dict.fromkeys([*outside, *(text for document in recipe.documents for text in _filters(document))]))
    slices: list[Slice] = []
    for layer in range(layer_count):
        own = [(name, at) for name, at in tensors if min(max(at, 0), layer_count - 1) == layer]
        values = _by_filter(recipe, own, layer_count, filters)
        if values is None:
            return recipe
        sources = _sources(recipe, base, values, layer)
        last = slices[-1] if slices else None
        if last is not None and [s.parameters for s in last.sources] == [s.parameters for s in sources]:
            longer = [replace(s, layer_range=(s.layer_range[0], layer + 1)) for s in last.sources if s.layer_range]
            slices[-1] = replace(last, sources=tuple(longer))
        else:
            slices.append(Slice(sources))
    method = "linear" if base is None else "task_arithmetic"
    return Recipe(method, base_model=base, slices=tuple(slices), dtype=recipe.dtype, out_dtype=recipe.out_dtype)


def _is_sum(document: Recipe, layer_count: int) -> bool:
    """Whether it adds up models, layer k of the output from layer k of each, and nothing else happens."""
    methods = {document.merge_method, *(part.merge_method for part in document.slices)} - {None}
    other = (document.modules, document.module, document.after, document.ignore, document.take_from)
    if not methods <= set(_SUMS) or any(other) or document.asks_for_tokenizer:
        return False
    starts = list(itertools.accumulate((part.length or layer_count for part in document.parts), initial=0))
    in_place = all(
        part.residual_scale is None and all((s.layer_range or (start, 0))[0] == start for s in part.sources)
        for part, start in zip(document.parts, starts, strict=False)
    )
    return in_place and starts[-1] == layer_count


def _filters(document: Recipe) -> list[str]:
    """The substrings that tell its tensors apart."""
    levels = [document.parameters, *(parameters for _, parameters in document.input_model_parameters)]
    for part in document.parts:
        levels += [part.parameters, *(source.parameters for source in part.sources)]
    entries = [entry for level in levels for setting in level.values() for entry in conditionals(setting) or ()]
    return [entry.filter for entry in entries if entry.filter not in (None, "*")]


def _by_filter(
    recipe: Recipe, tensors: Sequence[tuple[str, int]], layer_count: int, filters: Sequence[str]
) -> dict[str | None, _Coefficients] | None:
    """The coefficients of some tensors by the first filter that matches; None where they cannot be told so."""
    values: dict[str | None, _Coefficients] = {}
    order = {text: k for k, text in enumerate(filters)}
    for name, layer in tensors:
        text = next((text for text in filters if text in name), None)
        own = _coefficients(recipe, recipe, name, layer, layer_count)
        first = values.setdefault(text, own)
        alike = all(abs(first.get(m, 0.0) - own.get(m, 0.0)) <= _ROUNDING for m in {*first, *own})
        if not alike or abs(math.fsum(own.values()) - 1.0) > _ROUNDING:
            return None
    return dict(sorted(values.items(), key=lambda entry: order.get(str(entry[0]), len(order))))


def _coefficients(whole: Recipe, document: Recipe, name: str, layer: int, layer_count: int) -> _Coefficients:
    """What each of the first models is multiplied with in one tensor of a document's result."""
    places = layer_places(document, layer_count)
    at = places[min(max(layer, 0), layer_count - 1)]
    resolved = resolve(document, at.slice_index, name, at.t if 0 <= layer < layer_count else 0.0)
    shared = resolved.settings.shared
    weights = [float(settings["weight"]) for settings in resolved.settings.sources]
    if shared["normalize"]:
        weights = [weight / math.fsum(weights) for weight in weights]
    weights = [weight * float(shared.get("lambda", 1.0)) for weight in weights]
    terms = list(zip(resolved.sources, weights, strict=True))
    if resolved.base is not None:
        terms.append((resolved.base, 1.0 - math.fsum(weights)))
    steps = {step.name: step for step in whole.steps}
    coefficients: _Coefficients = {}
    for model, factor in terms:
        inner = _coefficients(whole, steps[model], name, layer, layer_count) if model in steps else {model: 1.0}
        for first, value in inner.items() if factor else ():
            coefficients[first] = coefficients.get(first, 0.0) + factor * value
    return coefficients


def _sources(
    recipe: Recipe, base: str | None, values: Mapping[str | None, _Coefficients], layer: int
) -> tuple[Source, ...]:
    """The entries of one layer, with a weight of each model by filter."""
    models = [model for model in recipe.external_models() if model != base]
    span = (layer, layer + 1)
    entries = [] if base is None else [Source(base, span)]
    for model in models:
        weights = {text: own.get(model, 0.0) for text, own in values.items()}
        entries.append(Source(model, span, Parameters({"weight": _setting(weights)})))
    return tuple(entries)


def _setting(weights: Mapping[str | None, float]) -> Setting:
    """One number, or conditions of which the first that matches counts."""
    conditions = [Conditional(value, text) for text, value in weights.items() if text is not None]
    rest = weights.get(None, 0.0)
    while conditions and conditions[-1].value == rest:
        conditions.pop()
    return (*conditions, Conditional(rest)) if conditions else rest
