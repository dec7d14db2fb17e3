"""The rules that tie a recipe's parts together: sources against the method, ranges, patterns, impossible settings."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.errors import ErrorCollector, RecipeError, suggest
from evomerge.methods.contract import Method
from evomerge.methods.registry import STAGES
from evomerge.recipe.frankenmerge import pattern_problems
from evomerge.recipe.model import Recipe, Slice
from evomerge.recipe.parameters import EMBED_SLERP
from evomerge.recipe.resolve import SliceInputs, base_needed, resolve, slice_inputs
from evomerge.recipe.settings import Parameters, conditionals
from evomerge.recipe.validation import join

MAX_PATTERN_MODELS = 26


def check_recipe(errors: ErrorCollector, recipe: Recipe, methods: Mapping[str, Method]) -> None:
    """Adds to `errors` what is wrong with a recipe whose keys, types and ranges are right."""
    for one in recipe.modules or (recipe,):
        _check_parts(errors, one, methods)
    parts = [(one, index) for one in recipe.modules or (recipe,) for index in range(len(one.parts))]
    if recipe.after and all(slice_inputs(one, index, methods=methods).base is None for one, index in parts):
        text = f"what {recipe.merge_method} makes is no base and something added to it (base_model, a method of deltas)"
        errors.error("after", f"{', '.join(recipe.after)}: works on what was added to a base; {text}")
    asking = [name for name in recipe.after if STAGES[name].activations]
    if asking and recipe.activations is None:
        errors.error("activations", f"is missing: {', '.join(asking)} needs a file of the base's mean inputs")
    if recipe.activations is not None and not asking:
        errors.warn("activations", "has no effect: no stage under 'after:' asks for it")
    if recipe.parameters.get(EMBED_SLERP) and not recipe.asks_for_tokenizer:
        errors.warn(f"parameters.{EMBED_SLERP}", "has no effect without tokenizer_source")
    models = recipe.models()
    for model, _ in recipe.input_model_parameters:
        if model not in models:
            errors.error(f"input_model_parameters.{model}", f"is no model of this recipe{suggest(model, models)}")


def _check_parts(errors: ErrorCollector, recipe: Recipe, methods: Mapping[str, Method]) -> None:
    for index, part in enumerate(recipe.parts):
        path = _part_path(recipe, index)
        inputs = slice_inputs(recipe, index, methods=methods)
        before = len(errors.problems)
        _check_layers(errors, path, part, inputs)
        if inputs.method.copies_layers:
            _check_copies(errors, path, recipe, inputs)
            continue
        _check_sources(errors, path, recipe, index, inputs)
        _check_required(errors, path, recipe, part, inputs)
        if len(errors.problems) == before:
            _probe(errors, path, recipe, index, methods)


def _part_path(recipe: Recipe, index: int) -> str:
    top = f"modules.{recipe.module}" if recipe.module is not None else ""
    return join(top, f"slices[{index}]") if recipe.slices else top


def _list_path(recipe: Recipe, path: str) -> str:
    return join(path, "sources" if recipe.slices else "models")


def _check_layers(errors: ErrorCollector, path: str, part: Slice, inputs: SliceInputs) -> None:
    lengths = {source.layer_range[1] - source.layer_range[0] for source in part.sources if source.layer_range}
    if len(lengths) > 1:
        ranges = ", ".join(f"{source.model} {list(source.layer_range or ())}" for source in part.sources)
        errors.error(join(path, "sources"), f"every source needs the same number of layers, got {ranges}")
    elif isinstance(part.residual_scale, tuple) and len(part.residual_scale) != part.length:
        number = len(part.residual_scale)
        errors.error(join(path, "residual_scale"), f"has {number} values for {part.length} layers: give one for each")
    starts = {source.start for source in inputs.sources}
    if inputs.base is not None and inputs.base.source is None and len(starts) > 1:
        text = f"the layers of the base {inputs.base.model} are not clear from sources with different layer ranges"
        errors.error(join(path, "sources"), f"{text}: list it with its own layer_range")


def _check_copies(errors: ErrorCollector, path: str, recipe: Recipe, inputs: SliceInputs) -> None:
    number = len(inputs.sources)
    if recipe.slices:
        if number != 1:
            errors.error(join(path, "sources"), f"{inputs.method.name} copies layers from one source, got {number}")
        for name in ("pattern", "seed"):
            if name in recipe.parameters:
                errors.error(f"parameters.{name}", "is for 'models': slices say themselves where each layer comes from")
        return
    if number > MAX_PATTERN_MODELS:
        errors.error(_list_path(recipe, path), f"a pattern has letters for {MAX_PATTERN_MODELS} models, got {number}")
    pattern = recipe.parameters.get("pattern")
    if pattern is not None:
        for problem in pattern_problems(str(pattern), number):
            errors.error("parameters.pattern", problem)


def _check_sources(errors: ErrorCollector, path: str, recipe: Recipe, index: int, inputs: SliceInputs) -> None:
    method, number = inputs.method, len(inputs.sources)
    needs_base = base_needed(recipe, index, method)
    if needs_base and inputs.base is None:
        text = f"is missing: {method.name} needs the model that the others were tuned from"
        errors.error(join(path if recipe.slices else "", "base_model"), text)
        return
    beside = " besides the base" if needs_base else ""
    if number < method.min_sources:
        text = f"{method.name} needs at least {_models(method.min_sources)}{beside}, got {number}"
        errors.error(_list_path(recipe, path), text)
    if method.max_sources is not None and number > method.max_sources:
        text = f"{method.name} takes at most {_models(method.max_sources)}{beside}, got {number}"
        errors.error(_list_path(recipe, path), text)


def _models(number: int) -> str:
    return "1 model" if number == 1 else f"{number} models"


def _check_required(errors: ErrorCollector, path: str, recipe: Recipe, part: Slice, inputs: SliceInputs) -> None:
    """A required parameter that no level sets; one whose conditionals match nothing shows when it is resolved."""
    wide = [part.parameters, recipe.module_parameters, recipe.parameters]
    for parameter in inputs.method.parameters:
        if not parameter.required or any(parameter.name in level for level in wide):
            continue
        text = f"'{parameter.name}' is missing: {inputs.method.name} needs it"
        if not parameter.per_source:
            errors.error(join(path, "parameters"), text)
            continue
        for source in inputs.sources:
            own = [items for model, items in recipe.input_model_parameters if model == source.model]
            if source.source is not None:
                own.append(source.source.parameters)
            if not any(parameter.name in level for level in own):
                at = part.sources.index(source.source) if source.source is not None else ""
                errors.error(f"{_list_path(recipe, path)}[{at}].parameters", f"{text} for every source")


def _probe(errors: ErrorCollector, path: str, recipe: Recipe, index: int, methods: Mapping[str, Method]) -> None:
    """Resolves both ends of a slice whose settings hold for every tensor, so that the method can refuse them."""
    part = recipe.parts[index]
    levels = [part.parameters, recipe.module_parameters, recipe.parameters]
    levels += [source.parameters for source in part.sources]
    levels += [items for _, items in recipe.input_model_parameters]
    if any(_conditional(level) for level in levels):
        return
    at = join(path, "parameters")
    messages: list[str] = []
    for t in (0.0, 1.0):
        try:
            resolve(recipe, index, at, t, methods=methods)
        except RecipeError as problem:
            messages += [text.removeprefix(f"{at}: ") for text in problem.problems]
    for message in dict.fromkeys(messages):
        errors.error(at, message)


def _conditional(level: Parameters) -> bool:
    return any(conditionals(setting) is not None for setting in level.values())
