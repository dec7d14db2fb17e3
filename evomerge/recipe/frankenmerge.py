"""Frankenmerge by pattern: which model each output layer is copied from, written out as slices."""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping
from dataclasses import replace

from evomerge.errors import RecipeError
from evomerge.methods.contract import Method
from evomerge.methods.registry import METHODS
from evomerge.recipe.model import Recipe, Slice, Source
from evomerge.recipe.parameters import LAYOUT_NAMES
from evomerge.recipe.settings import Parameters, Setting, chain, restrict
from evomerge.system.hashing import digest_bytes


def expand_frankenmerge(recipe: Recipe, layer_count: int, *, methods: Mapping[str, Method] = METHODS) -> Recipe:
    """Writes a frankenmerge of whole models out as slices; any other recipe, and one of modules, comes back as it is.

    Output layer k is layer k of the model that the pattern's letter k names (A is the first listed); a short pattern
    starts over, and without one every layer draws its model from the recipe's seed. Gradients run over the whole stack.

    Args:
        recipe: The recipe.
        layer_count: Layers of the models, and of the output.
        methods: The merge methods there are.

    Raises:
        RecipeError: The pattern is longer than the models, or has letters that no model answers to.
    """
    method = methods[recipe.merge_method]
    if recipe.slices or recipe.modules or not method.copies_layers:
        return recipe
    pattern, seed = recipe.parameters.get("pattern"), recipe.parameters.get("seed", recipe.seed)
    count = len(recipe.sources)
    if pattern is None:
        order = random_pattern(int(seed) if isinstance(seed, int) else 0, count, layer_count)
    else:
        problems = pattern_problems(str(pattern), count, layer_count)
        if problems:
            raise RecipeError(problems)
        order = tuple(itertools.islice(itertools.cycle(_indices(str(pattern))), layer_count))
    names = tuple(p.name for p in method.parameters if p.name not in LAYOUT_NAMES)
    slices = []
    for index, run in itertools.groupby(range(layer_count), key=order.__getitem__):
        layers = list(run)
        span = (layers[0], layers[-1] + 1)
        settings = _settings(recipe, recipe.sources[index], names, span, layer_count)
        slices.append(Slice((Source(recipe.sources[index].model, span),), parameters=settings))
    kept = Parameters({name: s for name, s in recipe.parameters.items() if name == "embed_slerp"})
    return replace(
        recipe,
        sources=(),
        slices=tuple(slices),
        parameters=kept,
        input_model_parameters=(),
        module_parameters=Parameters(),
        seed=0,
    )


def random_pattern(seed: int, models: int, layer_count: int) -> tuple[int, ...]:
    """Returns a model's index for each layer, uniform and the same for ever.

    Layer k depends on (seed, k) alone, through BLAKE2b: on no library's generator, nor on how many layers there are.
    """
    digests = (digest_bytes(f"frankenmerge {seed} {k}", size=8) for k in range(layer_count))
    return tuple(int.from_bytes(number, "little") % models for number in digests)


def pattern_problems(pattern: str, models: int, layer_count: int | None = None) -> list[str]:
    """Tells what is wrong with a pattern; empty when nothing is. `layer_count` None leaves its length unchecked."""
    letters = string.ascii_uppercase[:models]
    unknown = sorted({letter for letter in pattern.upper() if letter not in letters})
    problems = []
    if unknown:
        names = f"{models} models are {letters[0]} to {letters[-1]}" if models > 1 else "the one model is A"
        problems.append(f"pattern '{pattern}' has {', '.join(map(repr, unknown))}, but {names}")
    if layer_count is not None and len(pattern) > layer_count:
        problems.append(
            f"pattern '{pattern}' has {len(pattern)} letters for {layer_count} layers: shorten it, or use slices"
        )
    return problems


def _indices(pattern: str) -> tuple[int, ...]:
    return tuple(string.ascii_uppercase.index(letter) for letter in pattern.upper())


def _settings(
    recipe: Recipe, source: Source, names: tuple[str, ...], span: tuple[int, int], layer_count: int
) -> Parameters:
    """What all levels together say about a run of layers of one source."""
    model = dict(recipe.input_model_parameters).get(source.model, Parameters())
    settings: dict[str, Setting] = {}
    for name in names:
        gathered: Setting | None = None
        for level in (source.parameters, model, recipe.module_parameters, recipe.parameters):
            gathered = chain(gathered, level.get(name))
        if gathered is not None:
            settings[name] = restrict(gathered, *span, layer_count)
    return Parameters(settings)
