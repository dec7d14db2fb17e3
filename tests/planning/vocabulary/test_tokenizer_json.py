"""tokenizer.json with tokens added or taken out, as the library reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from evomerge.errors import RecipeError
from evomerge.planning.vocabulary.tokenizer_json import notation, plain_entry, with_tokens, without_tokens
from tests.planning.vocabulary.tokenizers import bpe_tokenizer


def document(tokenizer: Any) -> dict[str, Any]:
    return json.loads(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())


def read(content: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(content))


def united(ours: Any, theirs: Any) -> tuple[Tokenizer, Tokenizer, Tokenizer]:
    """(both, the first, the second): the second's ordinary tokens added to the first."""
    first, second = read(document(ours)), read(document(theirs))
    ids = first.get_vocab()
    new = sorted(second.get_vocab().keys() - ids.keys(), key=lambda token: second.get_vocab()[token])
    free = max(ids.values()) + 1
    numbers = {token: free + i for i, token in enumerate(new)}
    result = with_tokens(document(ours), numbers, {}, ids | numbers, [document(theirs)])
    return read(result), first, second


BASE = bpe_tokenizer(added=("<|im_end|>",))
BOTH, FIRST, SECOND = united(BASE, bpe_tokenizer(words=("the", "cat")))


def test_bpe_takes_tokens_with_their_merges() -> None:
    """Base tokens keep their ids, the added one too although ordinary ones follow it."""
    ids = BOTH.get_vocab()
    assert ids == FIRST.get_vocab() | {token: ids[token] for token in ("Ġt", "Ġth", "Ġthe", "Ġc", "Ġca", "Ġcat")}
    assert ids["<|im_end|>"] == 259
    assert BOTH.encode(" the cat<|im_end|>").tokens == ["Ġthe", "Ġcat", "<|im_end|>"]
    assert BOTH.decode(BOTH.encode(" the cat").ids) == " the cat"


@given(st.text(max_size=30))
def test_a_text_without_new_tokens_is_cut_up_as_before(text: str) -> None:
    encoded = BOTH.encode(text)
    if not set(encoded.tokens) - FIRST.get_vocab().keys():
        assert encoded.ids == FIRST.encode(text).ids
    assert BOTH.decode(encoded.ids) == FIRST.decode(FIRST.encode(text).ids)


def test_added_tokens_follow_by_themselves() -> None:
    """Nothing but the list of added tokens changes where the library counts as we do."""
    before = document(BASE)
    after = with_tokens(before, {}, {"<tool>": plain_entry("<tool>")}, read(before).get_vocab() | {"<tool>": 260}, [])
    assert after["model"] == before["model"]
    assert read(after).get_vocab()["<tool>"] == 260
    assert read(after).encode("a<tool>").tokens == ["a", "<tool>"]


def test_added_tokens_behind_a_gap_keep_their_ids() -> None:
    """The library would number them from the count of the vocabulary."""
    before = document(bpe_tokenizer())
    before["model"]["vocab"]["far"] = 300
    ids = read(before).get_vocab() | {"<tool>": 301}
    assert read(with_tokens(before, {}, {"<tool>": plain_entry("<tool>")}, ids, [])).get_vocab() == ids


def test_an_ordinary_token_may_become_an_added_one() -> None:
    before = document(bpe_tokenizer(words=("the",)))
    ids = read(before).get_vocab()
    after = read(with_tokens(before, {}, {"Ġt": plain_entry("Ġt")}, ids, []))
    assert after.get_vocab() == ids
    assert "Ġt" in {token.content for token in after.get_added_tokens_decoder().values()}


def plain(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_words_and_pieces() -> None:
    both, *_ = united(
        plain(models.WordLevel({"?": 0, "a": 1}, unk_token="?")),
        plain(models.WordLevel({"?": 0, "b": 1}, unk_token="?")),
    )
    assert both.encode("a b c").ids == [1, 2, 0]
    both, *_ = united(
        plain(models.WordPiece({"?": 0, "a": 1}, unk_token="?")),
        plain(models.WordPiece({"?": 0, "a": 1, "##b": 2}, unk_token="?")),
    )
    assert both.encode("ab").tokens == ["a", "##b"]


def unigram(pieces: list[tuple[str, float]], added: tuple[str, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return tokenizer


def test_unigram_takes_pieces_with_their_scores() -> None:
    """ab at -1 is likelier than a and b at -2 each; the special token keeps its place in between."""
    ours = unigram([("?", 0.0), ("a", -2.0), ("b", -2.0)], ("<end>",))
    both, *_ = united(ours, unigram([("?", 0.0), ("a", -2.0), ("b", -2.0), ("ab", -1.0)]))
    assert both.get_vocab() == {"?": 0, "a": 1, "b": 2, "<end>": 3, "ab": 4}
    assert both.encode("ab<end>").tokens == ["ab", "<end>"]


def test_unigram_has_no_gaps() -> None:
    ours = document(unigram([("?", 0.0), ("a", -2.0)]))
    with pytest.raises(RecipeError, match="'b' would have to be token 7"):
        with_tokens(ours, {"b": 7}, {}, {"?": 0, "a": 1, "b": 7}, [ours])


def test_taking_tokens_out() -> None:
    """Merges that make them, or are made of them, go too."""
    before = document(bpe_tokenizer(words=("the",), added=("<x>",)))
    after = read(without_tokens(before, ["Ġthe", "<x>"]))
    assert after.get_vocab().keys() == read(before).get_vocab().keys() - {"Ġthe", "<x>"}
    assert after.encode(" the").tokens == ["Ġth", "e"]
    assert read(before).encode(" the").tokens == ["Ġthe"]


def test_taking_pieces_out() -> None:
    before = document(unigram([("?", 0.0), ("a", -2.0), ("b", -2.0)]))
    assert read(without_tokens(before, ["b"])).get_vocab() == {"?": 0, "a": 1}
    with pytest.raises(RecipeError, match="inside a Unigram vocabulary"):
        without_tokens(before, ["a"])


def test_notations() -> None:
    assert notation(document(bpe_tokenizer())) == ("BPE", "bytes as letters")
    assert notation(document(unigram([("?", 0.0)]))) == ("Unigram", "spaces as ▁")
    pieces = plain(models.WordPiece({"?": 0}, unk_token="?"))
    assert notation(document(pieces)) == ("WordPiece", "plain text", "##")
