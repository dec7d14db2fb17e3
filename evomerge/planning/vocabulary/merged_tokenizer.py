"""The tokenizer's files and the special token ids, as they go beside the merged weights."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.tokenizer import Tokenizer, read_tokenizer, tokenizer_contents
from evomerge.errors import CheckpointError
from evomerge.planning.vocabulary.merged_vocabulary import Vocabulary
from evomerge.system.hashing import digest

_TOKEN_ID = re.compile(r"(?P<role>\w+?)_token_(id|ids|index)")


@dataclass(frozen=True)
class WrittenTokenizer:
    """What is written beside the weights instead of the reference model's own files.

    Attributes:
        files: The tokenizer's files with its chat template, by name.
        generation_config: generation_config.json with ids that fit; {} without one.
    """

    files: Mapping[str, bytes]
    generation_config: Mapping[str, Any]

    def digest(self) -> str:
        """Hashes the content."""
        parts: list[str | bytes] = [json.dumps(self.generation_config, sort_keys=True)]
        for name, content in sorted(self.files.items()):
            parts += [f"{name} {len(content)}\n", content]
        return digest(*parts)


def files_of(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Returns the tokenizer's files: as they lie beside the model where nothing has changed.

    Raises:
        CheckpointError: What was changed does not come back from the files with the same ids.
    """
    if vocabulary.document is None:
        return tokenizer_contents(vocabulary.start.folder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary.start.loaded.save_pretrained(folder)
        content = json.dumps(vocabulary.document, ensure_ascii=False, indent=2)
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        _edit(folder / "tokenizer_config.json", lambda config: _keep_special(config, vocabulary.tokens))
        _refuse_moved(vocabulary, folder)
        return tokenizer_contents(folder)


def with_chat_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """Returns the files with one chat template, in the one place where transformers looks first."""
    result = {name: content for name, content in files.items() if name != "chat_template.json"}
    config = json.loads(result.get("tokenizer_config.json", b"{}"))
    config.pop("chat_template", None)
    result["tokenizer_config.json"] = _json(config)
    result["chat_template.jinja"] = template.encode()
    return result


def fitting_ids(
    config: Mapping[str, Any], given: Mapping[str, Any], vocabulary: Vocabulary, reference: Tokenizer | None
) -> tuple[dict[str, Any], list[str]]:
    """Returns a config whose special token ids are those of the merged vocabulary.

    Args:
        config: The reference model's config.json or generation_config.json.
        given: The same file of the model whose tokenizer is taken; {} without one.
        vocabulary: The merged vocabulary.
        reference: The reference model's own tokenizer; None when its ids are the merged vocabulary's.

    Returns:
        The config, and a warning for every id that is left without a token.
    """
    result: dict[str, Any] = dict(config)
    warnings: list[str] = []
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        given_inner = given.get("text_config")
        given_inner = given_inner if isinstance(given_inner, Mapping) else given
        result["text_config"], warnings = fitting_ids(inner, given_inner, vocabulary, reference)
    for key, value in config.items():
        match = _TOKEN_ID.fullmatch(key)
        if match is None or value is None:
            continue
        if reference is not None:
            value = _moved(value, given.get(key), vocabulary, reference, match["role"])
        ids = value if isinstance(value, list) else [value]
        kept = [number for number in ids if not _gone(number, vocabulary)]
        result[key] = value if len(kept) == len(ids) else (kept or None) if isinstance(value, list) else None
        if len(kept) < len(ids):
            warnings.append(f"{key}: {config[key]} is no token of the merged vocabulary, so it is left out")
    return result, warnings


def _gone(number: Any, vocabulary: Vocabulary) -> bool:
    """Whether there was a token with this id, and is none any more. Ids that never had one (-1) stay as they are."""
    if number is None:
        return True
    if not isinstance(number, int) or number < 0:
        return False
    start, here = vocabulary.start.tokens, set(vocabulary.tokens.values())
    return number >= vocabulary.rows or (number not in here and number in set(start.values()))


def _moved(value: Any, given: Any, vocabulary: Vocabulary, reference: Tokenizer, role: str) -> Any:
    """What an id becomes under another tokenizer: what its model says, its role's token, or the token's own id."""
    if given is not None:
        return given
    number = vocabulary.start.role(role)
    if number is not None:
        return number
    texts = {number: token for token, number in reference.tokens.items()}
    ids = [vocabulary.tokens.get(texts.get(number, "")) for number in (value if isinstance(value, list) else [value])]
    return ids if isinstance(value, list) else ids[0]


def _refuse_moved(vocabulary: Vocabulary, folder: Path) -> None:
    """Reads the tokenizer back. Some classes build it anew from its tokens; then the plain class takes their place."""
    if read_tokenizer(vocabulary.start.model, folder).tokens == vocabulary.tokens:
        return
    _edit(
        folder / "tokenizer_config.json",
        lambda config: config.__setitem__("tokenizer_class", "PreTrainedTokenizerFast"),
    )
    again = read_tokenizer(vocabulary.start.model, folder).tokens
    if again != vocabulary.tokens:
        moved = [t for t in {**again, **vocabulary.tokens} if again.get(t) != vocabulary.tokens.get(t)]
        raise CheckpointError(
            f"{vocabulary.start.model}: its tokenizer cannot take the changes: read back, {len(moved)} tokens have "
            f"other ids, such as {moved[0]!r} ({vocabulary.tokens.get(moved[0])} became {again.get(moved[0])})"
        )


def _keep_special(config: dict[str, Any], tokens: Mapping[str, int]) -> None:
    """Takes out of tokenizer_config.json the special tokens that there are no more: they would get an id again."""
    config.pop("added_tokens_decoder", None)
    for key, value in list(config.items()):
        if isinstance(value, list) and key.endswith("special_tokens"):
            config[key] = [token for token in value if _content(token) in tokens]
        elif key.endswith("_token") and isinstance(_content(value), str) and _content(value) not in tokens:
            del config[key]


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _edit(path: Path, change: Any) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_bytes(_json(config))


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()
