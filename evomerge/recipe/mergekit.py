"""A recipe as a mergekit configuration, where mergekit can say the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.errors import is_number
from evomerge.recipe.model import Recipe, Slice, Source
from evomerge.recipe.settings import Conditional, Parameters, Setting, chain, plain
from evomerge.system.yaml import write_documents

_NAMES = {"frankenmerge": "passthrough", "dare": "dare_linear"}

# What mergekit's methods read. What else a recipe sets either has no effect on the method, or has to be what mergekit
# does without the parameter (`_IMPLIED`).
_KNOWN = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "task_arithmetic": ("weight", "lambda", "normalize"),
    "ties": ("weight", "density", "lambda", "normalize", "rescale"),
    "dare_linear": ("weight", "density", "lambda", "normalize", "rescale"),
    "dare_ties": ("weight", "density", "lambda", "normalize", "rescale"),
    "passthrough": ("scale",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "karcher": ("max_iter", "tol"),
    "nearswap": ("t",),
    "della": ("weight", "density", "epsilon", "lambda", "normalize", "rescale"),
    "della_linear": ("weight", "density", "epsilon", "lambda", "normalize", "rescale"),
    "breadcrumbs": ("weight", "density", "gamma", "lambda", "normalize", "rescale"),
    "breadcrumbs_ties": ("weight", "density", "gamma", "lambda", "normalize", "rescale"),
    "model_stock": ("filter_wise",),
    "sce": ("select_topk",),
    "arcee_fusion": (),
    "ram": ("epsilon",),
    "ramplus_tl": ("r", "alpha", "epsilon"),
}
_ANYWHERE = ("int8_mask", "embed_slerp")
_IMPLIED: Mapping[str, Mapping[str, Any]] = {
    "slerp": {"on": "weights", "scope": "tensor", "weight": None},
    "ties": {"consensus": "mass", "average": "agreeing", "scope": "tensor"},
    "dare_ties": {"consensus": "mass", "average": "agreeing"},
    "della": {"consensus": "mass", "average": "agreeing"},
    "breadcrumbs_ties": {"consensus": "mass", "average": "agreeing"},
    "passthrough": {"residual_scale": 1},
    "karcher": {"weight": 1},
    "nearswap": {"weight": 1},
    "ram": {"lambda": 1},
    "ramplus_tl": {"lambda": 1},
}
_BASE_AMONG_SOURCES = (
    "slerp",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "nuslerp",
    "multislerp",
    "nearswap",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "model_stock",
    "sce",
    "arcee_fusion",
    "ram",
    "ramplus_tl",
)
_SOURCES = {"slerp": 1, "nearswap": 1, "nuslerp": 2}  # that mergekit takes, beside the base
_COPIED = ("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template")
_OLD_SOURCE = "model:"  # older versions wanted this before a model's name, today's does not know it


def to_mergekit_yaml(recipe: Recipe) -> str | None:
    """Writes a recipe as mergekit would have it; None where mergekit cannot say the same.

    A frankenmerge given by a pattern is said in slices: pass it through `expand_frankenmerge` first.
    """
    documents = []
    for document in recipe.documents:
        mapping = mergekit_mapping(document)
        if mapping is None:
            return None
        name = {"name": document.name} if document is not recipe else {}  # unnamed is what mergekit-multi calls final
        documents.append(name | mapping)
    return write_documents(documents)


def mergekit_mapping(recipe: Recipe) -> dict[str, Any] | None:
    """Returns the configuration as plain values, or None.

    None for methods and parameters that mergekit lacks, a method or residual scale of a slice's own, a pattern, and
    models that only we can read. A seed is left out: mergekit draws without one.
    """
    if recipe.modules:
        said = [mergekit_mapping(module) for module in recipe.modules]
        modules = {name: body for one in said if one is not None for name, body in one["modules"].items()}
        return None if said[0] is None or None in said else said[0] | {"modules": modules}
    method = _NAMES.get(recipe.merge_method, recipe.merge_method)
    if method not in _KNOWN or not (_sayable_parts(recipe, method) and _sayable_settings(recipe, method)):
        return None
    mapping: dict[str, Any] = {"merge_method": method}
    if recipe.base_model is not None and method != "passthrough":
        mapping["base_model"] = recipe.base_model
    body: dict[str, Any] = {}
    if recipe.slices:
        body["slices"] = [_slice(recipe, part, method) for part in recipe.slices]
    else:
        body["models"] = [
            *(_source(recipe, source, method) for source in recipe.sources),
            *_silent_base(recipe, method),
        ]
    if recipe.module is not None:
        body = {"modules": {recipe.module: body | _block(recipe.module_parameters, method)}}
    mapping |= body | _block(recipe.parameters, method)
    if recipe.merge_method == "dare" and not any(name == "normalize" for name, _ in _all_settings(recipe)):
        mapping["parameters"] = mapping.get("parameters", {}) | {"normalize": True}
    whole = recipe.to_mapping()
    return mapping | {key: _todays(key, whole[key]) for key in _COPIED if key in whole}


def _todays(key: str, value: Any) -> Any:
    if key == "tokenizer":
        return value | {"source": value["source"].removeprefix(_OLD_SOURCE)}
    return value.removeprefix(_OLD_SOURCE) if key == "tokenizer_source" else value


def _sayable_parts(recipe: Recipe, method: str) -> bool:
    """Whether mergekit could have these slices and models, all of each."""
    if recipe.ignore or recipe.take_from or recipe.after or (recipe.tokenizer and recipe.tokenizer.models):
        return False
    if any(model.startswith("zoo:") or model.endswith(".safetensors") for model in recipe.models()):
        return False
    for part in recipe.parts:
        scales = part.residual_scale if isinstance(part.residual_scale, tuple) else (part.residual_scale,)
        if any(scale not in (None, 1) for scale in scales):
            return False
        if part.merge_method not in (None, recipe.merge_method):
            return False
        models = {source.model for source in part.sources}
        base = part.base_model or recipe.base_model
        if method in _SOURCES and len(models - {base}) != _SOURCES[method]:
            return False
        if len(models) != len(part.sources):  # mergekit gives every entry of the same model the first one's parameters
            return False
    return method != "passthrough" or bool(recipe.slices) or len(recipe.sources) == 1


def _sayable_settings(recipe: Recipe, method: str) -> bool:
    """Whether no setting asks for what mergekit does not do."""
    implied = _IMPLIED.get(method, {})
    settings = list(_all_settings(recipe))
    # Today's mergekit passes over embed_slerp: what it asks for is what SLERP does anyway, and no other method.
    if method != "slerp" and recipe.asks_for_tokenizer and any(n == "embed_slerp" and s for n, s in settings):
        return False
    if any(name in implied and setting != implied[name] for name, setting in settings):
        return False
    if method.startswith("della") and not _within_reach(settings):
        return False
    names = {name for name, _ in settings}
    return "t" in names if method == "slerp" else not {"density", "drop_rate"} <= names or not method.startswith("dare")


def _within_reach(settings: list[tuple[str, Setting]]) -> bool:
    """Whether every density stays clear of 0 and 1 by every epsilon, as mergekit wants; one that is 0 or 1 may be."""
    densities = [setting for name, setting in settings if name == "density"]
    epsilons = [value for name, setting in settings if name == "epsilon" for value in _numbers(setting)]
    furthest = max(epsilons or [0.15])
    return all(
        setting in (0, 1) or all(furthest < value < 1 - furthest for value in _numbers(setting))
        for setting in densities
    )


def _numbers(setting: Any) -> Iterator[float]:
    """Every number in a setting; an interpolated value lies between two of them."""
    if isinstance(setting, tuple):
        for entry in setting:
            yield from _numbers(entry)
    elif isinstance(setting, Conditional):
        yield from _numbers(setting.value)
    elif is_number(setting):
        yield float(setting)


def _all_settings(recipe: Recipe) -> Iterator[tuple[str, Setting]]:
    levels = [recipe.parameters, recipe.module_parameters, *(items for _, items in recipe.input_model_parameters)]
    for part in recipe.parts:
        levels += [part.parameters, *(source.parameters for source in part.sources)]
    for level in levels:
        yield from level.items()


def _slice(recipe: Recipe, part: Slice, method: str) -> dict[str, Any]:
    """A slice; mergekit wants the base among the sources wherever it is used."""
    sources = [_source(recipe, source, method, part.parameters) for source in part.sources]
    base = part.base_model or recipe.base_model
    if method in _BASE_AMONG_SOURCES and base is not None and all(source.model != base for source in part.sources):
        sources.append({"model": base, "layer_range": list(part.sources[0].layer_range or ())})
    mapping: dict[str, Any] = {"sources": sources}
    if part.base_model is not None and method != "passthrough":
        mapping["base_model"] = part.base_model
    if part.residual_weight is not None:
        mapping["residual_weight"] = part.residual_weight
    return mapping | _block(part.parameters, method)


def _source(recipe: Recipe, source: Source, method: str, of_slice: Parameters | None = None) -> dict[str, Any]:
    """A source, with what ``input_model_parameters`` says of it: today's mergekit has no such key."""
    parameters: Mapping[str, Setting] = source.parameters
    for model, items in recipe.input_model_parameters:
        if model == source.model:
            for name in items:
                wide = None if of_slice is None else of_slice.get(name)
                joined = chain(chain(parameters.get(name), wide), items[name])
                parameters = {**parameters, **({} if joined is None else {name: joined})}
    mapping: dict[str, Any] = {"model": source.model}
    if source.layer_range is not None:
        mapping["layer_range"] = list(source.layer_range)
    return mapping | _block(parameters, method)


def _silent_base(recipe: Recipe, method: str) -> list[dict[str, Any]]:
    """A base that linear does not merge: mergekit would add it as a source, so it is listed with a weight of 0."""
    base = recipe.base_model
    if method != "linear" or base is None or any(source.model == base for source in recipe.sources):
        return []
    own = dict(recipe.input_model_parameters).get(base, Parameters())
    if "weight" in own:
        return [{"model": base} | _block(own, method)]
    joins = "weight" in recipe.parameters or "weight" in recipe.module_parameters
    return [] if joins else [{"model": base, "parameters": {"weight": 0}}]


def _block(parameters: Mapping[str, Setting], method: str) -> dict[str, Any]:
    names = (*_KNOWN[method], *_ANYWHERE)
    items = {name: plain(setting) for name, setting in parameters.items() if name in names}
    if method.startswith("dare") and "drop_rate" in parameters:
        items["density"] = plain(_complement(parameters["drop_rate"]))
    return {"parameters": items} if items else {}


def _complement(setting: Any) -> Any:
    """1 minus a drop rate, rounded to what a person would have written."""
    if isinstance(setting, tuple):
        return tuple(_complement(entry) for entry in setting)
    if isinstance(setting, Conditional):
        return Conditional(_complement(setting.value), setting.filter)
    return round(1 - setting, 12) if is_number(setting) else setting
