"""One table of dtypes: what safetensors, torch and recipes call them. Importing it loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The format also knows types below one byte (F4, F6); torch has no arithmetic for them.
_TABLE = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
}
DTYPE_BYTES: Mapping[str, int] = {name: size for name, (_, size) in _TABLE.items()}
"""Bytes of an element, by safetensors' name of the dtype."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that can be merged; others (indices, masks) are copied."""

_WIDTH = {"F64": 3, "F32": 2, "F16": 1, "BF16": 1}


def widest(dtypes: Iterable[str]) -> str:
    """Gives the narrowest float that holds all of some, as torch does: of F16 and BF16 neither holds the other.

    Args:
        dtypes: At least one of `FLOATS`.
    """
    distinct = set(dtypes)
    width = max(_WIDTH[name] for name in distinct)
    top = [name for name in distinct if _WIDTH[name] == width]
    return top[0] if len(top) == 1 else "F32"


def main_dtype(dtypes: Iterable[str]) -> str | None:
    """Gives the float that occurs most often; None where none does."""
    stored = [name for name in dtypes if name in FLOATS]
    return max(sorted(set(stored)), key=stored.count, default=None)


_WORDS = {_TABLE[name][0]: name for name in FLOATS} | {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp64": "F64"}


def parse_dtype(word: str) -> str:
    """Gives safetensors' name of a float that a recipe or a config names: "bfloat16" -> "BF16".

    Raises:
        KeyError: For a word that is no dtype of `FLOATS`.
    """
    return _WORDS[word.removeprefix("torch.")]


def config_word(name: str) -> str:
    """Spells a dtype as config.json does: "BF16" -> "bfloat16"."""
    return _TABLE[name][0]


@cache
def torch_dtype(name: str) -> torch.dtype:
    """Gives torch's dtype of safetensors' name: "BF16" -> torch.bfloat16.

    Raises:
        KeyError: This torch has none; an older one lacks some of the 8-bit types.
    """
    import torch

    dtype: torch.dtype | None = getattr(torch, _TABLE[name][0], None)
    if dtype is None:
        raise KeyError(name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Gives safetensors' name of a torch dtype, torch's own where it has none: torch.bfloat16 -> "BF16"."""
    word = str(dtype).removeprefix("torch.")
    return _NAMES.get(word, word)


_NAMES = {word: name for name, (word, _) in _TABLE.items()}
