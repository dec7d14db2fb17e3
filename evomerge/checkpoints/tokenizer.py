"""A model's tokenizer, read through transformers: what its users get is what counts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.weight_files import read_json_object
from evomerge.errors import CheckpointError
from evomerge.system.hashing import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# What no class of transformers reads in the same way, and what goes with a tokenizer all the same.
_FURTHER = re.compile(
    r"tekken\.json|.*\.tiktoken|tiktoken\.model|.*\.spm|.*\.bpe|normalizer\.json|bpe\.codes|tokenization_.*\.py"
    r"|additional_chat_templates/[^/]*\.jinja"
)
_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.

    Attributes:
        model: The reference of the model it belongs to, for messages.
        folder: Where its files are.
        loaded: As transformers has it.
    """

    model: str
    folder: Path
    loaded: PreTrainedTokenizerBase

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Token -> id, in the order of the ids."""
        return dict(sorted(self.loaded.get_vocab().items(), key=lambda item: item[1]))

    @cached_property
    def added(self) -> dict[int, str]:
        """Id -> token, of the tokens that are found in a text before it is cut up: the special ones among them."""
        return {number: str(token) for number, token in self.loaded.added_tokens_decoder.items()}

    @cached_property
    def document(self) -> Mapping[str, Any] | None:
        """What tokenizer.json says; None for a tokenizer that is Python code."""
        backend = getattr(self.loaded, "backend_tokenizer", None)
        return None if backend is None else json.loads(backend.to_str())

    @property
    def chat_template(self) -> str | None:
        """The template, the default one of several; None without."""
        template: Any = self.loaded.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        return template.strip() or None if isinstance(template, str) else None

    def role(self, name: str) -> int | None:
        """Gives the id of the token with a role ("bos", "eos", "pad", ...); None without one."""
        token = getattr(self.loaded, f"{name}_token", None) if name in _ROLES else None
        return None if token is None else self.tokens.get(str(token))


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Lists the files of a folder that a tokenizer is read from, chat template included."""
    return tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())


def is_tokenizer_file(name: str) -> bool:
    """Tells by its name within a model's folder whether a file belongs to the tokenizer."""
    return name in _TOKENIZER_FILES or bool(_FURTHER.fullmatch(name))


def write_contents(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files below a folder, by their names from there."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def tokenizer_contents(folder: Path) -> dict[str, bytes]:
    """Reads every file that belongs to the tokenizer of a folder, by its name from there."""
    paths = [path for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")) if path.is_file()]
    names = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    return {name: path.read_bytes() for name, path in names if is_tokenizer_file(name)}


def is_python_code(folder: Path) -> bool:
    """Tells whether a folder's tokenizer is Python code that lies there or on the Hub, which is not run."""
    given = read_json_object(folder / "tokenizer_config.json").get("auto_map")
    return isinstance(given, Mapping) and bool(given.get("AutoTokenizer"))


def read_tokenizer(model: str, folder: Path) -> Tokenizer:
    """Reads the tokenizer of a folder; no remote code is run.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the compiled tokenizers raise plain Exception for a file that they cannot read
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{model}: no tokenizer could be read from {folder}: {reason}") from error
    return Tokenizer(model, folder, loaded)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hashes how a tokenizer turns text into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    content = json.dumps([rules, type(tokenizer).__name__, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return digest(content)
