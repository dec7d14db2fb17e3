"""The uniform random field that DARE draws from: a number for every element of every tensor of every source.

The field depends on the recipe's seed, the tensor's name and the content of the source, and on nothing else. Any part
of it can be computed alone, so the order of work, the number of threads and the size of blocks cannot matter. One
field serves every density, hence masks are nested: what is kept at one density is kept at any higher one.

The generator is frozen: Philox 4x64-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), keyed by 128
bits of BLAKE2b, read as little-endian 16-bit lanes. Changing any of it changes every DARE merge that anyone has
published.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from evomerge.system.hashing import digest_bytes

LANES = 16
"""16-bit numbers in one Philox block (four words of 64 bits)."""

STEPS = 1 << 16
"""Distinct values of the field; densities are rounded to multiples of its inverse."""


def field_key(seed: int, tensor: str, fingerprint: str) -> tuple[int, int]:
    """Returns the key of one tensor's field, for one source.

    Args:
        seed: The recipe's.
        tensor: Name of the output tensor.
        fingerprint: The source's content fingerprint.

    Returns:
        The two halves of a 128-bit Philox key.
    """
    text = json.dumps([seed, tensor, fingerprint], ensure_ascii=True, separators=(",", ":"))
    key = digest_bytes(text, person=b"evomerge.field.1")
    return int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")


def uniform16(key: tuple[int, int], start: int, count: int) -> NDArray[np.uint16]:
    """Returns elements start .. start + count of a field: uniform on 0 .. 65535, the same as that slice of the whole.

    Raises:
        ValueError: A negative start or count.
    """
    if start < 0 or count < 0:
        raise ValueError(
            f"a part of a random field starts at 0 or later and has 0 elements or more, got {start}, {count}"
        )
    first, skip = divmod(start, LANES)
    blocks = -(-(skip + count) // LANES)
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64))
    generator.advance(first)  # Philox advances by blocks of four words
    words = generator.random_raw(4 * blocks).astype("<u8", copy=False)
    return words.view("<u2")[skip : skip + count].astype(np.uint16, copy=False)


def keep_threshold(density: float) -> int:
    """Rounds density · 65536: an element is kept when its number in the field is below this."""
    return round(density * STEPS)


def kept_elements(key: tuple[int, int], start: int, count: int, density: float) -> NDArray[np.bool_]:
    """Returns which of these elements are kept at this density: bool [count]."""
    threshold = keep_threshold(density)
    if threshold >= STEPS:
        return np.ones(count, dtype=np.bool_)
    if threshold <= 0:
        return np.zeros(count, dtype=np.bool_)
    return uniform16(key, start, count) < np.uint16(threshold)
