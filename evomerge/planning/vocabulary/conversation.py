"""What a merged model keeps of its sources' conversations: the chat template, and the tokens that end a turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.header import name_some
from evomerge.planning.vocabulary.merged_tokenizer import WrittenTokenizer

AddedTokens = Callable[[str], Mapping[int, str]]
"""A model's added tokens by their ids: those that end a turn are among them."""


def lost_template(
    reference: str, models: Mapping[str, Checkpoint], written: WrittenTokenizer | None, source: str | None
) -> list[str]:
    """Says whose chat templates the merged model does not take over, where it has none.

    Args:
        reference: The model whose files the merged model takes.
        models: The models by reference.
        written: The tokenizer that is written instead of the reference's.
        source: The recipe's tokenizer source.
    """
    has_one = models[reference].has_chat_template if written is None else _has_template(written.files)
    others = [model for model, checkpoint in models.items() if checkpoint.has_chat_template]
    if has_one or not others:
        return []
    takes = f"tokenizer_source {source}" if source else f"the tokenizer of {reference}, which is taken,"
    return [
        f"{takes} has no chat template, and that of {name_some(others)} is not taken: write 'chat_template: auto' to "
        f"have it, or 'tokenizer_source: {others[0]}' for its tokens and stop tokens too"
    ]


def lost_stops(models: Mapping[str, Checkpoint], kept: set[str], added_tokens: AddedTokens) -> dict[str, set[str]]:
    """Finds the tokens at which sources stop and the merged model does not, by source.

    Args:
        models: The models by reference.
        kept: The text of the tokens at which the merged model stops.
        added_tokens: Reads a model's added tokens.
    """
    lost = {}
    for model, checkpoint in models.items():
        if checkpoint.stop_tokens and checkpoint.tokenizer_files:
            texts = added_tokens(model)
            missing = {texts[number] for number in checkpoint.stop_tokens if number in texts} - kept
            if missing:
                lost[model] = missing
    return lost


def lost_stops_text(lost: Mapping[str, set[str]], reference: str) -> list[str]:
    """Says what `lost_stops` found, with what to write to keep it."""
    return [
        f"{model} stops at {_listed(missing)}, the merged model does not: it takes generation_config.json of "
        f"{reference}; 'tokenizer_source: {model}' keeps its stop tokens"
        for model, missing in lost.items()
    ]


def with_stops(generation: Mapping[str, Any], stops: set[int]) -> dict[str, Any]:
    """Returns a generation_config.json that also stops at some tokens."""
    given = generation.get("eos_token_id")
    before = given if isinstance(given, list) else [] if given is None else [given]
    ids = [*before, *sorted(stops - set(before))]
    return {**generation, "eos_token_id": ids[0] if len(ids) == 1 else ids}


def _listed(tokens: set[str]) -> str:
    return name_some(repr(token) for token in sorted(tokens))


def _has_template(files: Mapping[str, bytes]) -> bool:
    if any(name.startswith("chat_template.") for name in files):
        return True
    return bool(json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template"))
