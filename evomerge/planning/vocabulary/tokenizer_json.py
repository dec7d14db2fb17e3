"""tokenizer.json with tokens added or taken out: pure functions on the parsed file.

Tokens keep their ids. The library gives an added token that its model lacks the next free id when it reads the file,
whatever the file says, so a token that has to have a certain id stands in the model's vocabulary too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from evomerge.errors import RecipeError

Document = Mapping[str, Any]

_UNIGRAM = "Unigram"
_CONTROL = 0.0  # the score that sentencepiece gives tokens that no text is cut into


def added_tokens(document: Document) -> dict[str, dict[str, Any]]:
    """Returns the entries of tokens that are found in a text before it is cut up, by their text."""
    return {entry["content"]: entry for entry in document["added_tokens"]}


def plain_entry(token: str) -> dict[str, Any]:
    """Returns the entry of a token that is added by its text alone."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"content": token, **flags}


def notation(document: Document) -> tuple[str, ...]:
    """Returns how the ordinary tokens are written: tokens of two notations cannot share a vocabulary."""
    model = document["model"]
    steps = [document.get(step) for step in ("normalizer", "pre_tokenizer", "decoder")]
    parts = json.dumps(steps, ensure_ascii=False)
    letters = "bytes as letters" if '"ByteLevel"' in parts else "spaces as ▁" if "▁" in parts else "plain text"
    marks = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    return (str(model["type"]), letters, *(str(mark) for mark in marks if mark))


def with_tokens(
    document: Document,
    ordinary: Mapping[str, int],
    added: Mapping[str, Mapping[str, Any]],
    ids: Mapping[str, int],
    donors: Iterable[Document],
) -> dict[str, Any]:
    """Adds tokens.

    Args:
        document: tokenizer.json.
        ordinary: New tokens that texts are cut into, with their ids.
        added: Entries of tokens to find before that, by their text; ids in them are not looked at.
        ids: The id of every token, new or not.
        donors: Where the ordinary tokens come from, in order: of BPE their merges are needed, of Unigram their scores.

    Raises:
        RecipeError: The kind of tokenizer takes no further tokens.
    """
    result: dict[str, Any] = copy.deepcopy(dict(document))
    entries = added_tokens(result) | {token: dict(entry) for token, entry in added.items()}
    entries = {token: entry | {"id": ids[token]} for token, entry in entries.items()}
    result["added_tokens"] = sorted(entries.values(), key=lambda entry: int(entry["id"]))
    model = result["model"]
    if not ordinary and _counted_right(model, result["added_tokens"]):
        return result
    donors = list(donors)
    tokens_before = set(_ids(model)) | set(entries)
    if model["type"] == "BPE":
        model["merges"] += _new_merges(model["merges"], donors, set(ordinary), tokens_before | set(ordinary))
    _pin(model, {token: ids[token] for token in entries} | dict(ordinary), _scores(donors))
    return result


def without_tokens(document: Document, dropped: Collection[str]) -> dict[str, Any]:
    """Takes out tokens, and the merges that make them or are made of them.

    Raises:
        RecipeError: Tokens would have to move to other ids.
    """
    result: dict[str, Any] = copy.deepcopy(dict(document))
    gone = set(dropped)
    result["added_tokens"] = [entry for entry in result["added_tokens"] if entry["content"] not in gone]
    model = result["model"]
    if model["type"] == _UNIGRAM:
        pieces = model["vocab"]
        keep = next((i for i, (piece, _) in enumerate(pieces) if piece in gone), len(pieces))
        if any(piece not in gone for piece, _ in pieces[keep:]):
            raise RecipeError("tokens inside a Unigram vocabulary cannot be taken out")
        model["vocab"] = pieces[:keep]
        return result
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in gone}
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not gone & {*merge, "".join(merge)}]
    return result


def _ids(model: Mapping[str, Any]) -> Mapping[str, int]:
    vocab = model["vocab"]
    return {piece: i for i, (piece, _) in enumerate(vocab)} if model["type"] == _UNIGRAM else vocab


def _counted_right(model: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the library comes to the ids of the added tokens by itself."""
    vocab, last = _ids(model), -1
    for entry in entries:
        given = vocab.get(entry["content"], max(last + 1, len(vocab)))
        if given != entry["id"]:
            return False
        last = max(last, given)
    return True


def _scores(donors: Iterable[Document]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for donor in donors:
        if donor["model"]["type"] == _UNIGRAM:
            scores = dict(donor["model"]["vocab"]) | scores
    return scores


def _new_merges(
    merges_before: list[Any], donors: Iterable[Document], new: set[str], tokens: set[str]
) -> list[list[str]]:
    """The merges that make new tokens, after all that are held: a text without new tokens is cut up as before."""
    merges: dict[tuple[str, str], None] = {}
    for donor in donors:
        for left, right in donor["model"]["merges"]:
            if left + right in new and left in tokens and right in tokens:
                merges[left, right] = None
    for left, right in merges_before:
        merges.pop((left, right), None)
    return [list(merge) for merge in merges]


def _pin(model: dict[str, Any], ids: Mapping[str, int], scores: Mapping[str, float]) -> None:
    """Puts tokens into the model's own vocabulary, each at its id."""
    if model["type"] != _UNIGRAM:
        model["vocab"] = dict(sorted((model["vocab"] | dict(ids)).items(), key=lambda item: int(item[1])))
        return
    pieces = {piece for piece, _ in model["vocab"]}
    for token, number in sorted(ids.items(), key=lambda item: item[1]):
        if token in pieces:
            continue
        if number != len(model["vocab"]):
            raise RecipeError(f"a Unigram vocabulary has no gaps: {token!r} would have to be token {number} of it")
        model["vocab"].append([token, scores.get(token, _CONTROL)])
