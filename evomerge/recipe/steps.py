"""Several merges in one recipe: which names which, in what order they are carried out, and which is the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evomerge.errors import RecipeError, suggest
from evomerge.recipe.model import Recipe
from evomerge.recipe.references import MODEL, NO_MODEL, ZOO, resolve_models, without_adapter
from evomerge.system.paths import resolve_path


def link(recipes: Sequence[Recipe], where: str, beside: Path | None) -> Recipe:
    """One recipe out of several documents: the final one, with the others as its steps in the order of the work.

    Args:
        recipes: The documents, their references as written.
        where: What the file is called in messages.
        beside: The file or folder that relative model paths are looked for beside; None leaves them as they are.

    Raises:
        RecipeError: A name is given twice, missing, unknown or never used, or merges wait for each other.
    """
    _refuse_names(recipes, where)
    final = next((recipe for recipe in recipes if recipe.name is None), recipes[-1])
    named = {recipe.name: recipe for recipe in recipes if recipe.name is not None}
    _refuse_unknown(recipes, named, where, beside)
    order = _order(final, named, where)
    unused = [recipe.name for recipe in recipes if not any(recipe is other for other in order)]
    if unused:
        text = ", ".join(f"'{name}'" for name in unused)
        raise RecipeError(f"{where}: no document uses the result of {text}: a recipe makes one model, remove the rest")
    if beside is not None:
        order = [resolve_models(recipe, beside, names=named) for recipe in order]
    warnings = tuple(text for recipe in order for text in recipe.warnings)
    return replace(order[-1], steps=tuple(order[:-1]), warnings=warnings)


def _refuse_names(recipes: Sequence[Recipe], where: str) -> None:
    problems = []
    unnamed = [number for number, recipe in enumerate(recipes, start=1) if recipe.name is None]
    if len(unnamed) > 1:
        text = " and ".join(str(number) for number in unnamed)
        problems.append(f"{where}: documents {text} have no name: only the final merge can do without one")
    counts = Counter(recipe.name for recipe in recipes if recipe.name is not None)
    for name, count in counts.items():
        if count > 1:
            problems.append(f"{where}: {count} documents are called '{name}': names tell merges apart, keep one")
        if "+" in name or name.startswith(ZOO):
            problems.append(f"{where}: '{name}' is no name for a merge: it reads as {_kind(name)}")
    if problems:
        raise RecipeError(problems)


def _kind(name: str) -> str:
    return "a model with an adapter" if "+" in name else "a shipped model"


def _refuse_unknown(recipes: Sequence[Recipe], named: Mapping[str, Recipe], where: str, beside: Path | None) -> None:
    """What is neither a document nor a model that is there, and looks like a document's name with a slip in it.

    Whatever else is not there is refused when the models are opened.
    """
    problems = []
    for number, recipe in enumerate(recipes, start=1):
        for reference in dict.fromkeys(map(without_adapter, references(recipe))):
            near = suggest(reference, named)
            plain = "/" not in reference and not reference.startswith(ZOO)
            if reference not in named and plain and near and resolve_path(reference, beside) is None:
                problems.append(f"{where}: document {number}: no document and no model is called '{reference}'{near}")
    if problems:
        raise RecipeError(problems)


def references(recipe: Recipe) -> Iterator[str]:
    """Every model that one document mentions: those whose weights are read, and those with the tokenizer to take."""
    yield from recipe.models()
    sources = [recipe.tokenizer_source, recipe.tokenizer.source if recipe.tokenizer else None]
    for source in sources:
        if source is not None and source not in NO_MODEL:
            yield source.removeprefix(MODEL)


def _order(final: Recipe, named: Mapping[str, Recipe], where: str) -> list[Recipe]:
    """What `final` needs, each after what it needs itself, `final` last.

    Raises:
        RecipeError: Merges wait for each other.
    """
    order: list[Recipe] = []

    def visit(recipe: Recipe, path: tuple[str, ...]) -> None:
        if any(recipe is done for done in order):
            return
        for name in dict.fromkeys(map(without_adapter, references(recipe))):
            if name in path:
                circle = " needs ".join(f"'{step}'" for step in (*path[path.index(name) :], name))
                raise RecipeError(f"{where}: merges wait for each other: {circle}")
            if name in named:
                visit(named[name], (*path, name))
        order.append(recipe)

    visit(final, () if final.name is None else (final.name,))
    return order
