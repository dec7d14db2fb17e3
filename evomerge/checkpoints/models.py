"""The models of a search: opened together, with their tokenizer and config."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoints
from evomerge.checkpoints.compatible import check_compatible, not_finite
from evomerge.errors import CheckpointError
from evomerge.spec.schema import SearchSpec
from evomerge.system.hashing import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def single_model(reference: str) -> dict[str, Any]:
    """The recipe of one model as it is."""
    return {"merge_method": "linear", "models": [{"model": reference, "parameters": {"weight": 1.0}}]}


def open_models(spec: SearchSpec) -> dict[str, Checkpoint]:
    """Opens the base and the sources and checks that they can be merged at all.

    Raises:
        CheckpointError: With every problem of every model.
    """
    references = [spec.models.base] if spec.models.base else []
    opened = open_checkpoints([*references, *spec.models.sources.values()])
    problems: list[str] = []
    for checkpoint in opened.values():
        problems += not_finite(checkpoint)
    base = opened[spec.models.base] if spec.models.base else None
    sources = {name: opened[reference] for name, reference in spec.models.sources.items()}
    problems += check_compatible(base, sources)
    if problems:
        raise CheckpointError(problems)
    return opened


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint.

    Raises:
        CheckpointError: When there is none.
    """
    from transformers import AutoTokenizer

    if checkpoint.folder is None:
        raise CheckpointError(f"{checkpoint.reference}: a single file has no tokenizer; a search needs a model folder")
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.reference}: no tokenizer could be read: {error}") from error


def load_config(checkpoint: Checkpoint) -> Any:
    """A checkpoint's config, as transformers reads it.

    Raises:
        CheckpointError: When config.json names no architecture that transformers knows.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**checkpoint.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.reference}: config.json describes no model we can run: {error}") from error


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of how a tokenizer turns text into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    content = json.dumps([rules, type(tokenizer).__name__, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return digest(content)
