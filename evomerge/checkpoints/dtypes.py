"""safetensors dtype names, torch dtypes, and the words a recipe uses for them."""

from __future__ import annotations

import torch

from evomerge.checkpoints.tensors import TORCH_DTYPES

__all__ = ["FLOATS", "TORCH_DTYPES", "config_word", "safetensors_name", "torch_dtype"]

_WORDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bf16": "BF16", "fp16": "F16"}
_WORDS |= {"fp32": "F32", "fp64": "F64"}


def safetensors_name(word: str) -> str:
    """ "bfloat16" -> "BF16".

    Raises:
        KeyError: For a word that is no floating-point dtype.
    """
    return _WORDS[word.removeprefix("torch.")]


def torch_dtype(word: str) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16."""
    return TORCH_DTYPES[safetensors_name(word)]


def config_word(name: str) -> str:
    """ "BF16" -> "bfloat16", as config.json spells it."""
    return str(TORCH_DTYPES[name]).removeprefix("torch.")


FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that can be merged; others (indices, masks) are copied."""
