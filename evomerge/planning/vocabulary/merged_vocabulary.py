"""The merged model's vocabulary: whose tokenizer it starts from, and what is added to that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.tokenizer import Tokenizer
from evomerge.errors import CheckpointError, RecipeError
from evomerge.planning.vocabulary.tokenizer_json import added_tokens, notation, plain_entry, with_tokens, without_tokens
from evomerge.recipe.model import TokenizerBlock


@dataclass(frozen=True)
class Vocabulary:
    """The merged model's tokens.

    Attributes:
        tokens: Token -> its row.
        rows: Number of rows, padding and gaps included.
        start: The tokenizer that it starts from.
        document: What tokenizer.json has to say; None where that tokenizer's files serve as they are.
        warnings: What was odd but possible.
    """

    tokens: Mapping[str, int]
    rows: int
    start: Tokenizer
    document: Mapping[str, Any] | None
    warnings: tuple[str, ...] = ()


def output_vocabulary(
    block: TokenizerBlock, start: Tokenizer, others: Iterable[Tokenizer], rows: Mapping[str, int]
) -> Vocabulary:
    """Builds the vocabulary that a recipe asks for.

    Tokens keep the ids that they have in the tokenizer it starts from. Under ``union`` the others' ordinary tokens
    follow, model by model, then their added ones; the tokens that the recipe names come last.

    Args:
        block: The recipe's ``tokenizer:``.
        start: The tokenizer that it starts from: the base's, or the one the recipe names.
        others: The other models' tokenizers, in the order of the recipe; only ``union`` looks at them.
        rows: Rows of the models' embeddings. A token of the base or, under ``union``, of another model beyond its rows
            has no weights, and is left out.

    Raises:
        RecipeError: The tokens cannot share one tokenizer.
        CheckpointError: Tokens would have to be added to a tokenizer that is not in tokenizer.json.
    """
    document = start.document
    tokens = dict(start.tokens)
    changed = False
    without_row: list[str] = []
    if block.source in ("base", "union"):
        tokens, document, changed = _stripped(start, rows[start.model])
        without_row = _special_without_row(start, tokens)
    union = list(others) if block.source == "union" else []
    ordinary, added, warnings = _united(tokens, document, union, rows)
    named = [token for token, _ in block.tokens if token not in tokens and token not in ordinary]
    added |= {token: plain_entry(token) for token in named if token not in added}
    free = max(tokens.values(), default=-1) + 1
    new = [token for token in (*ordinary, *added) if token not in tokens]
    tokens |= {token: free + i for i, token in enumerate(new)}
    if new or added:
        document = _extended(start, document, ordinary, added, tokens, union)
        changed = True
    size = max(tokens.values()) + 1
    multiple = block.pad_to_multiple_of or 1
    padded = -(-size // multiple) * multiple
    return Vocabulary(tokens, padded, start, document if changed else None, (*without_row, *warnings))


def shortened(start: Tokenizer, rows: int) -> Vocabulary:
    """Cuts a model's own vocabulary to its first `rows` rows."""
    tokens, document, changed = _stripped(start, rows)
    warnings = _special_without_row(start, tokens)
    return Vocabulary(tokens, rows, start, document if changed else None, tuple(warnings))


def _special_without_row(start: Tokenizer, tokens: Mapping[str, int]) -> list[str]:
    """Says which special tokens of a tokenizer are left out, because the embedding has no row for them."""
    special = start.loaded.special_tokens_map.items()
    return [
        f"{start.model}: its {role.replace('_', ' ')} {token!r} has no row in the embedding, so it is left out"
        for role, token in special
        if isinstance(token, str) and token in start.tokens and token not in tokens
    ]


def _stripped(start: Tokenizer, rows: int) -> tuple[dict[str, int], Mapping[str, Any] | None, bool]:
    """Leaves out the tokens that have no row."""
    dropped = [token for token, number in start.tokens.items() if number >= rows]
    if not dropped:
        return dict(start.tokens), start.document, False
    document = _needed(start, start.document, "take tokens without weights out of")
    kept = {token: number for token, number in start.tokens.items() if number < rows}
    return kept, without_tokens(document, dropped), True


def _united(
    tokens: Mapping[str, int],
    document: Mapping[str, Any] | None,
    others: Iterable[Tokenizer],
    rows: Mapping[str, int],
) -> tuple[dict[str, None], dict[str, Mapping[str, Any]], list[str]]:
    """(new ordinary tokens in order, entries of added tokens that are new or new in that role, warnings)."""
    ordinary: dict[str, None] = {}
    present = added_tokens(document) if document is not None else {}
    added: dict[str, Mapping[str, Any]] = {}
    warnings: list[str] = []
    for other in others:
        other_added = added_tokens(_needed(other, other.document, "unite"))
        new = False
        for token, number in other.tokens.items():
            if number >= rows[other.model]:
                continue
            if token in other_added:
                first = present.get(token, added.get(token))
                if first is None:
                    added[token] = other_added[token]
                elif _flags(first) != _flags(other_added[token]):
                    warnings.append(f"{other.model}: adds {token!r} with other settings than before: the first count")
            elif token not in tokens:
                ordinary[token] = None
                new = True
        if new and document is not None:
            _refuse_other_notation(document, other)
    return {token: None for token in ordinary if token not in added}, added, warnings


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "id"}


def _refuse_other_notation(document: Mapping[str, Any], other: Tokenizer) -> None:
    base_notation, other_notation = notation(document), notation(other.document or {})
    if base_notation != other_notation:
        raise RecipeError(
            f"tokenizer source union: {other.model} writes its tokens as {', '.join(other_notation)}, the base as "
            f"{', '.join(base_notation)}: they cannot share one tokenizer; use tokenizer_source: base"
        )


def _needed(tokenizer: Tokenizer, document: Mapping[str, Any] | None, what: str) -> Mapping[str, Any]:
    if document is None:
        raise CheckpointError(
            f"{tokenizer.model}: its tokenizer is {type(tokenizer.loaded).__name__}, which has no tokenizer.json, so "
            f"that one cannot {what} it"
        )
    return document


def _extended(
    start: Tokenizer,
    document: Mapping[str, Any] | None,
    ordinary: Iterable[str],
    added: Mapping[str, Mapping[str, Any]],
    tokens: Mapping[str, int],
    union: Iterable[Tokenizer],
) -> Mapping[str, Any]:
    document = _needed(start, document, "add tokens to")
    donors = [other.document for other in union if other.document is not None]
    new = {token: tokens[token] for token in ordinary}
    try:
        return with_tokens(document, new, added, tokens, donors)
    except RecipeError as error:
        raise RecipeError([f"{start.model}: {problem}" for problem in error.problems]) from None
