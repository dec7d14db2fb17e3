"""Model references inside recipes: reading them, and finding the folders they mean."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.recipe.model import Recipe, Slice, Source
from evomerge.recipe.tokenizer import ModelToken, TokenizerBlock, TokenRule
from evomerge.recipe.validation import Findings, join, kind_of, mapping_at, text_at
from evomerge.system.paths import resolve_path

ZOO = "zoo:"
MODEL = "model:"
NO_MODEL = ("union", "base")


def reference_at(found: Findings, path: str, value: Any) -> str | None:
    """A model reference: text, or mergekit's long form with ``model``, ``lora``, ``path`` and ``revision``."""
    if isinstance(value, str):
        return text_at(found, path, value)
    if not isinstance(value, Mapping):
        found.error(path, f"expected a model as text (folder, Hub id, base+adapter, zoo:NAME), got {kind_of(value)}")
        return None
    if "path" in value:
        return _path_at(found, path, value)
    fields = mapping_at(found, path, value, ("model", "lora", "override_architecture"))
    if "override_architecture" in fields:
        found.error(join(path, "override_architecture"), "is not supported: layers are found by tensor names")
    if "model" not in fields:
        found.error(join(path, "model"), "is missing")
        return None
    model = _path_at(found, join(path, "model"), fields["model"])
    if "lora" not in fields or model is None:
        return model
    adapter = _path_at(found, join(path, "lora"), fields["lora"])
    return None if adapter is None else f"{model}+{adapter}"


def _path_at(found: Findings, path: str, value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return text_at(found, path, value)
    fields = mapping_at(found, path, value, ("path", "revision"))
    if "path" not in fields:
        found.error(join(path, "path"), "is missing")
        return None
    name = text_at(found, join(path, "path"), fields["path"])
    revision = text_at(found, join(path, "revision"), fields["revision"]) if "revision" in fields else None
    return name if name is None or revision is None else f"{name}@{revision}"


def resolve_reference(reference: str, beside: Path | None) -> str:
    """The reference with local paths made absolute; Hub ids and ``zoo:`` names stay as they are.

    Args:
        reference: As written in a recipe.
        beside: The file or folder to look beside first; see `resolve_path`.
    """
    if reference.startswith(ZOO):
        return reference
    whole = resolve_path(reference, beside)
    if whole is not None:
        return str(whole)
    return "+".join(_resolve_part(part, beside) for part in reference.split("+"))


def _resolve_part(part: str, beside: Path | None) -> str:
    found = None if part.startswith(ZOO) else resolve_path(part, beside)
    return part if found is None else str(found)


def without_adapter(reference: str) -> str:
    """What stands before the first plus sign: the model itself, where no name has a plus sign in it."""
    return reference.partition("+")[0].strip()


def resolve_models(recipe: Recipe, beside: Path | None, *, names: Container[str] = ()) -> Recipe:
    """The recipe with every local model reference in it made absolute.

    Args:
        recipe: The recipe.
        beside: The file or folder to look beside first; see `resolve_path`.
        names: Other merges' names, which mean those merges' results, whatever folder is called the same.
    """

    def resolved(reference: str) -> str:
        model, plus, adapter = reference.partition("+")
        if model.strip() in names:
            return f"{model.strip()}{plus}{_resolve_part(adapter, beside) if plus else ''}"
        return resolve_reference(reference, beside)

    return _resolved(recipe, resolved)


def _resolved(recipe: Recipe, resolved: Callable[[str], str]) -> Recipe:
    inputs = [(resolved(model), parameters) for model, parameters in recipe.input_model_parameters]
    return replace(
        recipe,
        base_model=_optional(recipe.base_model, resolved),
        sources=tuple(_source(source, resolved) for source in recipe.sources),
        slices=tuple(_slice(part, resolved) for part in recipe.slices),
        modules=tuple(_resolved(module, resolved) for module in recipe.modules),
        input_model_parameters=tuple(sorted(inputs, key=lambda entry: entry[0])),
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
    return replace(block, source=_tokenizer_model(block.source, resolved), tokens=tokens)


def _rule(rule: TokenRule, resolved: Callable[[str], str]) -> TokenRule:
    if isinstance(rule.source, str):
        return replace(rule, source=resolved(rule.source))
    if isinstance(rule.source, ModelToken):
        return replace(rule, source=replace(rule.source, model=resolved(rule.source.model)))
    return rule
