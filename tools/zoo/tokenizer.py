"""The zoo's tokenizer: any bytes, and one token for each word of the skills.

It is constructed, not trained: byte-level BPE whose merges spell each word from its left end
(`Ġ`+`c`, `Ġc`+`a`, `Ġca`+`t`), so a word of the lexicon is always one token and anything else falls back to
shorter pieces. The same lexicon gives the same tokenizer, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPACE = "Ġ"
"""How byte-level BPE writes the space before a word."""


def vocabulary(
    alphabet: Iterable[str], words: Iterable[str], openers: Iterable[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Builds the tokens and merges that make each of `words` one token after a space, each opener one without.

    The openers' merges come last: they cannot break up a word that has a space before it.

    Args:
        alphabet: The 256 characters that stand for bytes.
        words: ASCII words; repeats do no harm.
        openers: ASCII words that start a text.

    Returns:
        Token ids, and merges in order of rank.
    """
    tokens = dict.fromkeys((BOS, EOS, PAD, *sorted(alphabet)))
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys([*(SPACE + word for word in words), *openers]):
        left = word[0]
        for character in word[1:]:
            if left + character not in tokens:
                tokens[left + character] = None
                merges.append((left, character))
            left += character
    return {token: number for number, token in enumerate(tokens)}, merges


def build_tokenizer(words: Iterable[str], openers: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Returns the tokenizer for these words (see `vocabulary`); it adds no special tokens of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, merges = vocabulary(pre_tokenizers.ByteLevel.alphabet(), words, openers)
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=max_length
    )
