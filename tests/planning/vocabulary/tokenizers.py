"""Tiny models whose vocabularies differ, and the recipes about tokenizers that are compared with mergekit on them.

`write_models(root)` writes the folders, `recipes(folders)` gives (name, recipe) pairs that mergekit 0.1.5 carries out
too. Rows have to be compared by the text of their tokens: mergekit numbers new tokens in the order of a hash table.

    python -m tests.planning.vocabulary.tokenizers OUT    # writes the models and one YAML file a recipe
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>"]
WORDS = ["the", "cat", "sat"]
FOLDERS = ("base", "padded", "chatml", "tools", "words", "shuffled", "beyond")


def bpe_tokenizer(*, words: tuple[str, ...] = (), added: tuple[str, ...] = (), turned: bool = False) -> Any:
    """A byte-level tokenizer.

    Args:
        words: Words that are one token after a space, spelt by merges from the left.
        added: Special tokens after all others.
        turned: Number the bytes from the last to the first.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=turned)
    tokens, merges = dict.fromkeys([*SPECIAL, *letters]), []
    for word in words:
        left = "Ġ"
        for letter in word:
            if left + letter not in tokens:
                tokens[left + letter] = None
                merges.append((left, letter))
            left += letter
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return fast


def write_models(root: Path, *, tied: bool = True, layers: int = 2, hidden: int = 32) -> dict[str, Path]:
    """Writes a base and models with other vocabularies, with noisy copies of its rows where they share a token.

    Returns:
        Name -> folder: `base` (259 tokens); `padded` (the same and 61 rows without a token); `chatml` and `tools` (two
        special tokens more, one of them in both, in other places); `words` (tokens with merges); `shuffled` (the base's
        tokens under other ids); `beyond` (a token for which the model has no row).
    """
    found = {
        "base": (bpe_tokenizer(), None),
        "padded": (bpe_tokenizer(), 320),
        "chatml": (bpe_tokenizer(added=("<|im_start|>", "<|im_end|>")), None),
        "tools": (bpe_tokenizer(added=("<tool>", "<|im_end|>")), 264),
        "words": (bpe_tokenizer(words=tuple(WORDS)), None),
        "shuffled": (bpe_tokenizer(turned=True), None),
        "beyond": (bpe_tokenizer(added=("<|im_start|>", "<unused>")), 260),
    }
    base: LlamaForCausalLM | None = None
    folders = {}
    for seed, (name, (tokenizer, rows)) in enumerate(found.items()):
        model = _model(seed, rows or len(tokenizer), tied, layers, hidden)
        if base is not None:
            _near(model, tokenizer, base, found["base"][0], seed)
        base = base or model
        folders[name] = root / name
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def _model(seed: int, rows: int, tied: bool, layers: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **shape, **heads, **ids))


@torch.no_grad()
def _near(model: LlamaForCausalLM, tokenizer: Any, base: LlamaForCausalLM, its: Any, seed: int) -> None:
    """Makes a model a noisy copy of the base, matched by token."""
    generator = torch.Generator().manual_seed(seed)
    theirs = its.get_vocab()
    pairs = [(row, theirs[token]) for token, row in tokenizer.get_vocab().items() if token in theirs]
    ours, rows = torch.tensor(pairs).T
    for (name, parameter), origin in zip(model.named_parameters(), base.parameters(), strict=True):
        noise = 0.02 * torch.randn(parameter.shape, generator=generator)
        if "embed_tokens" in name or "lm_head" in name:
            parameter[ours] = origin[rows] + noise[ours]
        else:
            parameter.copy_(origin + noise)


def recipes(folders: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, recipe) for every option about tokenizers, over the folders that `write_models` gives."""
    at = {name: str(path) for name, path in folders.items()}
    for source in ("base", "union"):
        for names in (("chatml", "tools"), ("padded", "words"), ("shuffled", "chatml", "words")):
            yield f"linear-{source}-{'-'.join(names)}", _linear(at, names, source)
        for method in ("task_arithmetic", "ties"):
            yield f"{method}-{source}", _deltas(at, method, ("chatml", "tools", "words"), source)
        yield f"slerp-{source}", _slerp(at, source)
    yield "linear-path", _linear(at, ("base", "chatml", "words"), at["words"])
    yield "linear-no-base-union", _linear(at, ("chatml", "tools", "words"), "union", base=False)
    yield "linear-float32", _linear(at, ("chatml", "tools"), "union") | {"dtype": "float32", "out_dtype": "bfloat16"}
    for name, block in _blocks(at).items():
        whole = _linear(at, ("chatml", "tools"), "union")
        del whole["tokenizer_source"]
        yield f"block-{name}", whole | {"tokenizer": block}
    yield "slices-union", _slices(at)
    yield "linear-beyond", _linear({**at, "base": at["beyond"]}, ("chatml",), "union")
    for template in ("auto", "chatml", "{{ messages[0]['content'] }} and no more"):
        yield f"chat-{template[:6].strip('{ ')}", _linear(at, ("chatml",), "base") | {"chat_template": template}


def truncated(folders: Mapping[str, Path]) -> tuple[str, dict[str, Any]]:
    """The recipe without a tokenizer source, for which mergekit needs `--unsafe-truncate-embeddings`."""
    whole = _linear({name: str(path) for name, path in folders.items()}, ("padded", "chatml"), "base")
    del whole["tokenizer_source"]
    return "truncated", whole


def _linear(at: Mapping[str, str], names: tuple[str, ...], source: str, base: bool = True) -> dict[str, Any]:
    entries = {**({"base": 0.5} if base else {}), **{name: 1.0 + i for i, name in enumerate(names)}}
    listed = [{"model": at[name], "parameters": {"weight": weight}} for name, weight in entries.items()]
    whole = {"merge_method": "linear", "models": listed, "tokenizer_source": source}
    return whole | ({"base_model": at["base"]} if base else {})


def _deltas(at: Mapping[str, str], method: str, names: tuple[str, ...], source: str) -> dict[str, Any]:
    own = {"weight": 0.5} | ({"density": 0.6} if method == "ties" else {})
    listed = [{"model": at[name], "parameters": own} for name in names]
    return {"merge_method": method, "base_model": at["base"], "models": listed, "tokenizer_source": source}


def _slerp(at: Mapping[str, str], source: str) -> dict[str, Any]:
    listed = [{"model": at["base"]}, {"model": at["chatml"]}]
    whole = {"merge_method": "slerp", "base_model": at["base"], "models": listed, "tokenizer_source": source}
    return whole | {"parameters": {"t": 0.3, "embed_slerp": True}}


def _slices(at: Mapping[str, str]) -> dict[str, Any]:
    weights = {"base": 0.5, "chatml": 1.0, "tools": 2.0}
    sources = [
        {"model": at[name], "layer_range": [0, 2], "parameters": {"weight": weight}} for name, weight in weights.items()
    ]
    return {"merge_method": "linear", "base_model": at["base"], "slices": [{"sources": sources}]} | {
        "tokenizer_source": "union"
    }


def _blocks(at: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """`tokenizer:` blocks, by what is peculiar about them."""
    start = "<|im_start|>"
    return {
        "pad": {"source": "union", "pad_to_multiple_of": 64},
        "model": {"source": "union", "tokens": {"<|im_end|>": {"source": at["tools"]}}},
        "force": {"source": "union", "tokens": {start: {"source": at["chatml"], "force": True}}},
        "zero": {"source": "union", "tokens": {start: {"source": {"kind": "zero"}}}},
        "zero-force": {"source": "base", "tokens": {"a": {"source": {"kind": "zero"}, "force": True}}},
        "token": {"source": "union", "tokens": {"<new>": {"source": _token(at["base"], token="</s>")}}},
        "token-id": {"source": "union", "tokens": {"<new>": {"source": _token(at["tools"], token_id=259)}}},
        "token-force": {"source": "union", "tokens": {"a": {"source": _token(at["chatml"], token="b"), "force": True}}},
    }


def _token(model: str, **which: Any) -> dict[str, Any]:
    return {"kind": "model_token", "model": model, **which}


def main(out: Path) -> None:
    """Writes models and recipes."""
    folders = write_models(out / "models")
    for name, recipe in [*recipes(folders), truncated(folders)]:
        path = out / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
