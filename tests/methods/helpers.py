"""What the tests of the methods share: every method in every mode, tensors to merge, and merging in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from evomerge.methods.contract import Method, Settings
from evomerge.methods.plain_statistics import PlainStatistics, merge_tensors
from evomerge.methods.registry import METHODS

FINGERPRINTS = ("f0", "f1", "f2", "f3", "f4")


SWITCHES = {"filter_wise", "nuslerp_flatten", "nuslerp_row_wise", "spectral"}  # bools by which a method becomes another

FAR = {"nearswap": {"t": 1e38}, "ram": {"epsilon": 0.0}, "ramplus_tl": {"epsilon": 0.0}}
"""Lengths in the units of the weights: so long that nothing is further away, or so short that nothing is nearer."""


def modes(method: Method) -> Iterator[dict[str, Any]]:
    """Every combination of the method's choices."""
    choices = [p for p in method.parameters if p.kind == "choice" or p.name in SWITCHES]
    for values in itertools.product(*(p.choices or (True, False) for p in choices)):
        yield dict(zip((p.name for p in choices), values, strict=True))


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


def fit(method: Method, items: Sequence[Any]) -> list[Any]:
    """As many of the items as the method takes sources: the last one again where it needs more."""
    return [*items, *[items[-1]] * (method.min_sources - len(items))][: method.max_sources]


def having(name: str) -> pytest.MarkDecorator:
    """Every method with a parameter of that name."""
    return pytest.mark.parametrize("method", [pytest.param(m, id=m.name) for m in MERGING if m.parameter(name)])


def declared(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that the method has a parameter for."""
    return {name: value for name, value in values.items() if method.parameter(name)}


def of_sources(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that every source of the method has its own of."""
    return {p.name: values[p.name] for p in method.parameters if p.per_source and p.name in values}


def of_all(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are one for all sources of the method."""
    return {p.name: values[p.name] for p in method.parameters if not p.per_source and p.name in values}


def neutral(method: Method) -> dict[str, Any]:
    """Nothing dropped, trimmed or rescaled, and normalised weights."""
    return declared(method, {"density": 1.0, "lambda": 1.0, "normalize": True}) | FAR.get(method.name, {})


def weighted(method: Method, weights: Sequence[float], shared: Mapping[str, Any]) -> Settings:
    """Settings from weights and shared values."""
    return method.settings([declared(method, {"weight": weight}) for weight in weights], shared)


def family(seed: int, count: int, shape: Sequence[int], spread: float = 0.1) -> tuple[Tensor, list[Tensor]]:
    """A random base and sources near it, float32."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tuple(shape), generator=generator)
    return base, [base + spread * torch.randn(tuple(shape), generator=generator) for _ in range(count)]


def run(
    method: Method,
    base: Tensor,
    sources: Sequence[Tensor],
    weights: Sequence[float],
    shared: Mapping[str, Any],
    **more: Any,
) -> Tensor:
    """Merges whole tensors with fixed fingerprints, as many as the method takes."""
    sources, weights = fit(method, sources), fit(method, weights)
    more.setdefault("fingerprints", FINGERPRINTS[: len(sources)])
    return merge_tensors(method, base, sources, weighted(method, weights, shared), **more)


def in_pieces(
    method: Method, base: Tensor, sources: Sequence[Tensor], settings: Settings, cuts: Sequence[int]
) -> Tensor:
    """Merges block by block, cut at these flat indices (rounded down to what the method has to see at once)."""
    from evomerge.methods.random_field import field_key

    assert method.merge is not None
    keys = [field_key(0, "tensor", print_) for print_ in FINGERPRINTS[: len(sources)]]
    statistics = PlainStatistics(base, sources, keys)
    granularity = method.granularity(settings)
    step = {"element": 1, "row": base.shape[-1] if base.dim() > 1 else base.numel(), "tensor": base.numel()}[
        granularity
    ]
    edges = sorted({0, base.numel(), *(cut // step * step for cut in cuts if cut < base.numel())})
    parts = []
    for start, end in itertools.pairwise(edges):
        block = statistics.block(granularity, start, end - start)
        parts.append(method.merge(block, settings).reshape(-1))
    return torch.cat(parts).reshape(base.shape)


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
