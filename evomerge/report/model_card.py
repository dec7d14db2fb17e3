"""Model cards: Hub metadata, and what was merged how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.recipe import Recipe

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def licences(checkpoints: Mapping[str, Checkpoint]) -> dict[str, str | None]:
    """The licence that each model's own card states, by reference; None where none is stated."""
    found: dict[str, str | None] = {}
    for reference, checkpoint in checkpoints.items():
        found[reference] = None
        card = checkpoint.folder / "README.md" if checkpoint.folder else None
        if card is not None and card.is_file():
            metadata = _metadata(card.read_text(encoding="utf-8", errors="replace"))
            if metadata.get("license"):
                found[reference] = str(metadata["license"])
    return found


def _metadata(card: str) -> dict[str, Any]:
    """A card's front matter; {} where there is none that can be read, which is not ours to complain about."""
    match = _FRONT_MATTER.match(card)
    try:
        content = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def licence_verdict(stated: Mapping[str, str | None]) -> tuple[str | None, str | None]:
    """(the licence all models agree on or None, a warning or None)."""
    known = set(stated.values())
    if len(known) == 1 and None not in known:
        return known.pop(), None
    lines = ", ".join(f"{_public_name(model)}: {licence or 'not stated'}" for model, licence in stated.items())
    return None, f"the models' licences do not agree ({lines}); check what the merged model may be used for"


def front_matter(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], tags: tuple[str, ...] = ()) -> str:
    """The YAML block that the Hub reads: base models, the relation `merge`, the licence when all agree."""
    licence, _ = licence_verdict(licences(_external(recipe, checkpoints)))
    metadata: dict[str, Any] = {
        "base_model": [_public_name(model) for model in recipe.external_models()],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["evomerge", "merge", recipe.merge_method, *tags],
    }
    if licence:
        metadata["license"] = licence
    return "---\n" + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + "---\n"


def merge_card(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], body: str = "", *, identify: bool = True) -> str:
    """A model card.

    Args:
        recipe: What was merged.
        checkpoints: The models, for licences and fingerprints.
        body: Markdown between the heading and the recipe: scores, lineage, samples.
        identify: Name the models' contents by their hashes, for which each is read whole the first time ever.
    """
    _, warning = licence_verdict(licences(_external(recipe, checkpoints)))
    sources = [
        f"- `{_public_name(model)}`"
        + (f", content `{checkpoints[model].fingerprint[:16]}`" if identify else "")
        + (" (base)" if any(model == document.base_model for document in recipe.documents) else "")
        for model in recipe.external_models()
    ]
    parts = [
        front_matter(recipe, checkpoints),
        f"# Merged with EvoMerge: {recipe.merge_method}\n",
        f"> **Licence:** {warning}\n" if warning else "",
        body,
        "## Sources\n\n" + "\n".join(sources) + "\n",
        f"## Recipe\n\n```yaml\n{recipe.to_yaml().strip()}\n```\n",
    ]
    return "\n".join(part for part in parts if part)


def _external(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models that were there before; what a step made of them has no licence of its own."""
    return {model: checkpoints[model] for model in recipe.external_models()}


def _public_name(reference: str) -> str:
    """A Hub id as it is; of a local path only the last folder, which is all that means something elsewhere."""
    if reference.startswith(("/", ".", "~")) or "\\" in reference:
        return reference.rstrip("/").rsplit("/", 1)[-1]
    return reference
