"""The random field of `evomerge.methods.random_field`."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from evomerge.engine.kernels.jit import Array, kernel


def _typed_high_word(_context: Any, a: Any, b: Any) -> Any:
    """The upper 64 bits of a product of two 64-bit numbers: (signature, code generator)."""

    def generate(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(value, wide) for value in arguments))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


_high_word: Any = intrinsic(_typed_high_word)


@kernel
def philox(key0: int, key1: int, first: int, words: Array) -> None:
    """Philox 4x64-10 as numpy's `random_raw` gives it, from block `first` on, into `words`: uint64, a multiple of 4."""
    m0, m1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    w0, w1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
    for block in range(words.size // 4):
        c0, c1, c2, c3 = np.uint64(first) + np.uint64(block) + np.uint64(1), np.uint64(0), np.uint64(0), np.uint64(0)
        k0, k1 = np.uint64(key0), np.uint64(key1)
        for _ in range(10):
            high0, low0 = _high_word(m0, c0), m0 * c0
            high1, low1 = _high_word(m1, c2), m1 * c2
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = k0 + w0, k1 + w1
        words[4 * block] = c0
        words[4 * block + 1] = c1
        words[4 * block + 2] = c2
        words[4 * block + 3] = c3
