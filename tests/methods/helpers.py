"""What the tests of the methods share: every method in every mode, tensors to merge, and merging in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from evomerge.methods.contract import Method
from evomerge.methods.registry import METHODS
from evomerge.testing.methods import declared, modes

FAR = {"nearswap": {"t": 1e38}, "ram": {"epsilon": 0.0}, "ramplus_tl": {"epsilon": 0.0}}
"""Lengths in the units of the weights: so long that nothing is further away, or so short that nothing is nearer."""


def mode_id(method: Method, mode: Mapping[str, Any]) -> str:
    """The name of a test: the method, its choices, and the switches that are on."""
    return "-".join([method.name, *(v if isinstance(v, str) else n for n, v in mode.items() if v is not False)])


def in_every_mode(methods: Sequence[Method]) -> pytest.MarkDecorator:
    """These methods in all their modes."""
    cases = [pytest.param(m, mode, id=mode_id(m, mode)) for m in methods for mode in modes(m)]
    return pytest.mark.parametrize(("method", "mode"), cases)


ALWAYS_DROPS = {"arcee_fusion"}  # no setting keeps every element, and what is kept depends on the size of the deltas
MERGING = [method for method in METHODS.values() if method.merge is not None]
every_method = pytest.mark.parametrize("method", [pytest.param(m, id=m.name) for m in MERGING])
every_mode = in_every_mode(MERGING)
every_keeping_mode = in_every_mode([method for method in MERGING if method.name not in ALWAYS_DROPS])


def having(name: str) -> pytest.MarkDecorator:
    """Every method with a parameter of that name."""
    return pytest.mark.parametrize("method", [pytest.param(m, id=m.name) for m in MERGING if m.parameter(name)])


def of_sources(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that every source of the method has its own of."""
    return {p.name: values[p.name] for p in method.parameters if p.per_source and p.name in values}


def of_all(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are one for all sources of the method."""
    return {p.name: values[p.name] for p in method.parameters if not p.per_source and p.name in values}


def neutral(method: Method) -> dict[str, Any]:
    """Nothing dropped, trimmed or rescaled, and normalised weights."""
    return declared(method, {"density": 1.0, "lambda": 1.0, "normalize": True}) | FAR.get(method.name, {})


def numbers(dtype: torch.dtype, size: int, largest: float = 1e30) -> st.SearchStrategy[Tensor]:
    """Tensors of any finite values of a floating dtype up to a magnitude: zeros, subnormals, far apart exponents, ties.

    Elements are random bits, but for a share of them, up to all, that are some value of a few.
    """
    bits = {torch.bfloat16: 16, torch.float32: 32}[dtype]
    whole = {16: np.int16, 32: np.int32}[bits]
    mantissa = {16: 7, 32: 23}[bits]
    sign, one = 1 << (bits - 1), 127 << mantissa
    few = [0, sign, 1, sign | 1, (1 << mantissa) - 1, 1 << mantissa, one, sign | one, one + 1, one - 1]

    def tensor(drawn: tuple[int, float]) -> Tensor:
        seed, share = drawn
        rng = np.random.default_rng(seed)
        patterns = rng.integers(0, 2**bits, size, dtype=f"u{bits // 8}")
        patterns = np.where(rng.random(size) < share, rng.choice([*few, *patterns[:2].tolist()], size), patterns)
        values = torch.from_numpy(patterns.astype(f"u{bits // 8}").view(whole)).view(dtype)
        usual = torch.linspace(-1.0, 1.0, size).to(dtype)
        return torch.where(values.float().abs() <= largest, values, usual)

    return st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 1.0])).map(tensor)
