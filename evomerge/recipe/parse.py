"""From YAML to a recipe: every key, type and range is checked, and all problems are reported at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.checkpoints.reference import ZOO, resolve_part, resolve_reference, without_adapter
from evomerge.errors import ErrorCollector, RecipeError, describe, suggest
from evomerge.methods.contract import Method
from evomerge.methods.registry import METHODS
from evomerge.recipe.model import ModelToken, Recipe, Slice, Source, TokenizerBlock, TokenRule
from evomerge.recipe.reader import Reader
from evomerge.recipe.rules import check_recipe
from evomerge.system.files import read_text, resolve_path
from evomerge.system.yaml import MOST_YAML, read_documents

MODEL = "model:"
NO_MODEL = ("union", "base")
_OTHER_FILES = {
    "experts": ("mergekit-moe", "models are not put together as experts here; what mergekit-moe makes can be merged"),
    "genome": ("mergekit-evolve", "`evomerge init MODEL...` writes a search.yaml for the same models"),
}


def load_recipe(path: str | Path, *, methods: Mapping[str, Method] = METHODS) -> Recipe:
    """Reads a recipe file; relative model paths in it are looked for beside it, above it, and in the working directory.

    Raises:
        RecipeError: The file cannot be read, or all that is wrong with the recipe.
    """
    file = Path(path)
    text = read_text(file, RecipeError, limit=MOST_YAML)
    return parse_recipe(text, where=str(file), beside=file, methods=methods)


def single_model(reference: str) -> dict[str, Any]:
    """Gives the recipe, as plain values, of one model as it is."""
    return {"merge_method": "linear", "models": [{"model": reference, "parameters": {"weight": 1.0}}]}


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
        RecipeError: With every problem errors.
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
        raise RecipeError(f"{where}: expected a mapping with merge_method and models, got {describe(plain)}")
    for key, (what, instead) in _OTHER_FILES.items():
        if key in plain and "models" not in plain and "slices" not in plain and "modules" not in plain:
            raise RecipeError(f"{where}: is a configuration of {what} ('{key}'), not of a merge: {instead}")
    errors = ErrorCollector(where)
    recipe = Reader(errors, methods).recipe(plain)
    if not errors.problems:
        check_recipe(errors, recipe, methods)
    errors.raise_problems(RecipeError)  # what several modules share is said once
    return replace(recipe, warnings=tuple(errors.warnings))


def link(recipes: Sequence[Recipe], where: str, beside: Path | None) -> Recipe:
    """Makes one recipe of several documents: the final one, with the others as its steps in the order of the work.

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
    """Lists every model that one document mentions: for its weights, or for its tokenizer."""
    yield from recipe.opened()
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


def resolve_models(recipe: Recipe, beside: Path | None, *, names: Container[str] = ()) -> Recipe:
    """Returns the recipe with every local model reference in it made absolute.

    Args:
        recipe: The recipe.
        beside: The file or folder to look beside first; see `resolve_path`.
        names: Other merges' names, which mean those merges' results, whatever folder is called the same.
    """

    def resolved(reference: str) -> str:
        model, plus, adapter = reference.partition("+")
        if model.strip() in names:
            return f"{model.strip()}{plus}{resolve_part(adapter, beside) if plus else ''}"
        return resolve_reference(reference, beside)

    return _resolved(recipe, resolved)


def _resolved(recipe: Recipe, resolved: Callable[[str], str]) -> Recipe:
    inputs = [(resolved(model), parameters) for model, parameters in recipe.input_model_parameters]
    return replace(
        recipe,
        base_model=_optional(recipe.base_model, resolved),
        activations=_optional(recipe.activations, resolved),
        sources=tuple(_source(source, resolved) for source in recipe.sources),
        slices=tuple(_slice(part, resolved) for part in recipe.slices),
        modules=tuple(_resolved(module, resolved) for module in recipe.modules),
        input_model_parameters=tuple(sorted(inputs, key=lambda entry: entry[0])),
        take_from=tuple((pattern, resolved(model)) for pattern, model in recipe.take_from),
        tokenizer_source=_optional(recipe.tokenizer_source, lambda text: _tokenizer_model(text, resolved)),
        tokenizer=None if recipe.tokenizer is None else _tokenizer(recipe.tokenizer, resolved),
    )


def _optional(reference: str | None, resolved: Callable[[str], str]) -> str | None:
    return None if reference is None else resolved(reference)


def _source(source: Source, resolved: Callable[[str], str]) -> Source:
    return replace(source, model=resolved(source.model))


def _slice(part: Slice, resolved: Callable[[str], str]) -> Slice:
    sources = tuple(_source(source, resolved) for source in part.sources)
    return replace(part, sources=sources, base_model=_optional(part.base_model, resolved))


def _tokenizer_model(text: str, resolved: Callable[[str], str]) -> str:
    if text in NO_MODEL:
        return text
    if text.startswith(MODEL):
        return MODEL + resolved(text.removeprefix(MODEL))
    return resolved(text)


def _tokenizer(block: TokenizerBlock, resolved: Callable[[str], str]) -> TokenizerBlock:
    tokens = tuple((token, _rule(rule, resolved)) for token, rule in block.tokens)
    models = tuple(resolved(model) for model in block.models)
    return replace(block, source=_tokenizer_model(block.source, resolved), tokens=tokens, models=models)


def _rule(rule: TokenRule, resolved: Callable[[str], str]) -> TokenRule:
    if isinstance(rule.source, str):
        return replace(rule, source=resolved(rule.source))
    if isinstance(rule.source, ModelToken):
        return replace(rule, source=replace(rule.source, model=resolved(rule.source.model)))
    return rule
