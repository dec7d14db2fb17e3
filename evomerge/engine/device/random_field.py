"""The random field of `evomerge.methods.random_field` in torch's integers: the same bits on any device.

torch has signed integers of 64 bits only. Their sums and products keep the lower 64 bits, which are those of unsigned
ones; a shift to the right has to be freed of the sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evomerge.methods.random_field import LANES

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def uniform16(key: tuple[int, int], start: int, count: int, device: torch.device | None) -> Tensor:
    """Returns elements start .. start + count of a field: int32 [count], as `evomerge.methods.random_field.uniform16`.

    Args:
        key: The field's.
        start, count: Which part of it.
        device: Where to compute it.
    """
    first, skip = divmod(start, LANES)
    blocks = -(-(skip + count) // LANES)
    counters = torch.arange(first + 1, first + 1 + blocks, dtype=torch.int64, device=device)
    words = torch.stack(philox(key, counters), 1)
    return words.view(torch.int16).view(-1)[skip : skip + count].to(torch.int32).bitwise_and_(0xFFFF)


def philox(key: tuple[int, int], counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x64-10 of counters below 2^63: the four words of each, as int64."""
    zero = torch.zeros_like(counters)
    c0, c1, c2, c3 = counters, zero, zero, zero
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1.bitwise_xor_(c1).bitwise_xor_(_signed(k0)), low1, high0 ^ c3 ^ _signed(k1), low0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1, c2, c3


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """(upper, lower) 64 bits of the product of unsigned 64-bit numbers."""
    low, high = word & _LOW, _upper(word)
    crossed, other = high * (factor & _LOW), low * (factor >> 32)
    carried = _upper(low * (factor & _LOW)).add_(crossed & _LOW).add_(other & _LOW)
    upper = high.mul_(factor >> 32).add_(_upper(crossed)).add_(_upper(other)).add_(carried.bitwise_right_shift_(32))
    return upper, word * _signed(factor)


def _upper(word: Tensor) -> Tensor:
    """The upper 32 bits."""
    return (word >> 32).bitwise_and_(_LOW)


def _signed(word: int) -> int:
    """The signed number of a word's lower 64 bits."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
