"""Parts of models that are not merged: what a recipe leaves out (`ignore`), or takes from one model (`take_from`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.header import name_some
from evomerge.checkpoints.matching.reconcile import selected
from evomerge.errors import RecipeError
from evomerge.recipe import Recipe

# What config.json says of a model's class and of its heads.
_OF_THE_CLASS = re.compile(r"architectures|num_labels|id2label|label2id|problem_type|classifier_\w+|\w*projection_dim")


def is_meant(pattern: str, name: str) -> bool:
    """Tells whether a tensor is meant: by parts of its name ("score", "model.visual"), or by a glob of all of it."""
    return f".{pattern.strip('.')}." in f".{name}." or fnmatchcase(name, pattern)


def separate(recipe: Recipe, models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Takes out of models what the recipe does not merge.

    Args:
        recipe: The recipe.
        models: Its models by reference, with one naming.

    Returns:
        The models: without what is left out, and what is taken from one of them in that one alone. Where that is not
        the first, and that one lacks it, the first one's config says the class of the other.

    Raises:
        RecipeError: No tensor is meant, or the model is none of those that are merged.
    """
    _refuse_unknown(recipe, models)
    if not (recipe.ignore or recipe.take_from):
        return dict(models)
    reference = recipe.models()[0]
    separated = {}
    for model, checkpoint in models.items():
        gone = [*recipe.ignore, *(pattern for pattern, owner in recipe.take_from if owner != model)]
        separated[model] = selected(checkpoint, lambda name, gone=gone: not any(is_meant(p, name) for p in gone))  # type: ignore[misc]
    own = models[reference].tensors
    for pattern, owner in recipe.take_from:
        if any(is_meant(pattern, name) and name not in own for name in models[owner].tensors):
            given = {key: value for key, value in models[owner].config.items() if _OF_THE_CLASS.fullmatch(key)}
            separated[reference] = separated[reference].changed(config=separated[reference].config | given)
    return separated


def taken(recipe: Recipe, models: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Finds the tensors that come from one model alone, as they are: tensor -> model.

    They are what the recipe takes from one, and the first model's layers for further tokens where another lacks them.
    """
    reference = recipe.models()[0]
    further = models[reference].layout.further
    alone = {n: reference for n in further if any(n not in models[m].tensors for m in recipe.models())}
    for pattern, owner in recipe.take_from:
        alone |= {name: owner for name in models[owner].tensors if is_meant(pattern, name)}
    return alone


def _refuse_unknown(recipe: Recipe, models: Mapping[str, Checkpoint]) -> None:
    every = {name for model in models.values() for name in model.tensors}
    problems = [
        f"ignore: no model has a tensor '{pattern}'"
        for pattern in recipe.ignore
        if not any(is_meant(pattern, name) for name in every)
    ]
    for pattern, owner in recipe.take_from:
        if owner not in models:
            problems.append(f"take_from.{pattern}: {owner} is not among the merged models: {name_some(models)}")
        elif not any(is_meant(pattern, name) for name in models[owner].tensors):
            problems.append(f"take_from.{pattern}: {owner} has no such tensor")
    if problems:
        raise RecipeError(problems)
