"""From YAML to a recipe: every key, type and range is checked, and all problems are reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.errors import RecipeError
from evomerge.methods.contract import Method
from evomerge.methods.registry import METHODS
from evomerge.recipe.model import Recipe
from evomerge.recipe.reader import Reader
from evomerge.recipe.references import resolve_models
from evomerge.recipe.rules import check_recipe
from evomerge.recipe.steps import link
from evomerge.recipe.validation import Findings, kind_of
from evomerge.system.yaml import read_documents


def load_recipe(path: str | Path, *, methods: Mapping[str, Method] = METHODS) -> Recipe:
    """Reads a recipe file; relative model paths in it are looked for beside it, above it, and in the working directory.

    Raises:
        RecipeError: The file cannot be read, or all that is wrong with the recipe.
    """
    file = Path(path)
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise RecipeError(f"{file}: cannot be read: {problem.strerror or problem}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{file}: is not a text file (UTF-8)") from None
    return parse_recipe(text, where=str(file), beside=file, methods=methods)


def parse_recipe(
    data: Mapping[str, Any] | Sequence[Any] | str,
    *,
    where: str = "recipe",
    beside: Path | None = None,
    methods: Mapping[str, Method] = METHODS,
) -> Recipe:
    """Reads a recipe.

    Args:
        data: YAML text, or what it says as plain values. Several documents, or a list, are several merges of which
            one may name another's result; the one without a name is the recipe's own, or else the last.
        where: What the recipe is called in messages.
        beside: The file or folder that relative model paths are looked for beside; None leaves them as they are.
        methods: The merge methods there are.

    Raises:
        RecipeError: With every problem found.
    """
    documents = _documents(data, where)
    if len(documents) == 1:
        recipe = _parse_document(documents[0], where, methods)
        return recipe if beside is None else resolve_models(recipe, beside)
    recipes: list[Recipe] = []
    problems: list[str] = []
    for number, document in enumerate(documents, start=1):
        try:
            recipes.append(_parse_document(document, f"{where}: document {number}", methods))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return link(recipes, where, beside)


def _documents(data: Mapping[str, Any] | Sequence[Any] | str, where: str) -> Sequence[Any]:
    """At least one document, each as plain values."""
    plain: Any = data
    if isinstance(data, str):
        read = read_documents(data, where, RecipeError)
        if not read:
            raise RecipeError(f"{where}: is empty: a recipe needs at least merge_method and models")
        plain = read if len(read) > 1 else read[0]
    if isinstance(plain, list | tuple):
        if not plain:
            raise RecipeError(f"{where}: is an empty list: a recipe needs at least merge_method and models")
        return plain
    return [plain]


def _parse_document(plain: Any, where: str, methods: Mapping[str, Method]) -> Recipe:
    """One merge, its references as written."""
    if not isinstance(plain, Mapping):
        raise RecipeError(f"{where}: expected a mapping with merge_method and models, got {kind_of(plain)}")
    found = Findings(where)
    recipe = Reader(found, methods).recipe(plain)
    if not found.problems:
        check_recipe(found, recipe, methods)
    if found.problems:
        raise RecipeError(dict.fromkeys(found.problems))  # what several modules share is said once
    return replace(recipe, warnings=tuple(found.warnings))
