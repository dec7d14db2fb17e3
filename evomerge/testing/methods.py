"""What every merge method promises, as functions to call from tests: of ours, and of packages that add their own.

from evomerge.testing.methods import check_method

def test_contract():
    check_method(my_method)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.methods.contract import Method, Settings
from evomerge.methods.plain_statistics import PlainStatistics, merge_tensors
from evomerge.methods.random_field import field_key

FINGERPRINTS = ("f0", "f1", "f2", "f3", "f4")
"""Of the sources' contents, which a stochastic method draws by."""

SWITCHES = {"filter_wise", "nuslerp_flatten", "nuslerp_row_wise", "spectral"}  # bools by which a method becomes another


def modes(method: Method) -> Iterator[dict[str, Any]]:
    """Yields every combination of the method's choices."""
    choices = [p for p in method.parameters if p.kind == "choice" or p.name in SWITCHES]
    for values in itertools.product(*(p.choices or (True, False) for p in choices)):
        yield dict(zip((p.name for p in choices), values, strict=True))


def fit(method: Method, items: Sequence[Any]) -> list[Any]:
    """Takes as many of the items as the method takes sources: the last one again where it needs more."""
    return [*items, *[items[-1]] * (method.min_sources - len(items))][: method.max_sources]


def declared(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Picks those of the values that the method has a parameter for."""
    return {name: value for name, value in values.items() if method.parameter(name)}


def weighted(method: Method, weights: Sequence[float], shared: Mapping[str, Any]) -> Settings:
    """Makes settings from weights and shared values."""
    return method.settings([declared(method, {"weight": weight}) for weight in weights], shared)


def family(seed: int, count: int, shape: Sequence[int], spread: float = 0.1) -> tuple[Tensor, list[Tensor]]:
    """Draws a base and sources near it, float32."""
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
    if method.merge is None:
        raise ValueError(f"{method.name} copies layers")
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


# ---------------------------------------------------------------- what is promised


def check_declaration(method: Method) -> None:
    """Checks that the declaration contradicts itself nowhere and says what it should."""
    _require(re.fullmatch(r"[a-z][a-z0-9_]*", method.name), f"{method.name!r} is no name for a recipe")
    _require(method.summary.endswith("."), f"{method.name}: its summary is no sentence: {method.summary!r}")
    _require(method.copies_layers == (method.merge is None), f"{method.name}: copies layers, or merges")
    names = [p.name for p in method.parameters]
    _require(len(set(names)) == len(names), f"{method.name}: a parameter is declared twice: {names}")
    for p in method.parameters:
        where = f"{method.name}.{p.name}"
        _require(p.help.endswith("."), f"{where}: its help is no sentence: {p.help!r}")
        _require((p.kind == "choice") == bool(p.choices), f"{where}: a choice has choices, and nothing else does")
        _require(p.instead_of is None or p.instead_of in names, f"{where}: stands for no parameter: {p.instead_of}")
        if p.when is not None:
            other = method.parameter(p.when[0])
            _require(other is not None and p.when[1] in other.choices, f"{where}: counts under no choice: {p.when}")
        low = float("-inf") if p.low is None else p.low
        high = float("inf") if p.high is None else p.high
        for value in (p.default, p.paper):
            if p.kind == "choice":
                _require(value is None or value in p.choices, f"{where}: {value!r} is none of {p.choices}")
            elif isinstance(value, int | float):
                _require(low <= value <= high, f"{where}: {value} is not within its bounds")
        if p.gene is not None:
            _require(low <= p.gene[0] < p.gene[1] <= high, f"{where}: the gene's range {p.gene} is not within bounds")


def check_blocks(
    method: Method,
    mode: Mapping[str, Any],
    *,
    seed: int = 0,
    shape: tuple[int, int] = (7, 13),
    cuts: Sequence[int] = (5, 40, 41),
    paper: bool = False,
    shared: Mapping[str, Any] = {},
) -> None:
    """Checks that a tensor merged in any blocks has the same bits as one merged whole."""
    base, sources = family(seed, 3, shape)
    weights = [0.31, 1.27, 0.5]
    weight = method.parameter("weight")
    if weight is not None and weight.low is None:
        weights[2] = -0.5
    density = method.parameter("density")
    densities = [{"density": 0.5}, {}, {"density": 0.13}] if density is not None and density.per_source else [{}] * 3
    own = [declared(method, {"weight": w}) | more for w, more in zip(weights, densities, strict=True)]
    sources, chosen = fit(method, sources), method.settings(fit(method, own), {**mode, **shared}, paper=paper)
    whole = in_pieces(method, base, sources, chosen, [])
    _require(torch.equal(in_pieces(method, base, sources, chosen, cuts), whole), f"{method.name}: blocks change it")


def check_inputs(method: Method, mode: Mapping[str, Any]) -> None:
    """Checks that the inputs are left as they are, and that the result shares no memory with them."""
    base, sources = family(1, 2, (5, 4))
    before = [base.clone(), *(s.clone() for s in sources)]
    for weights in ([1.0, 1.0], [1.0, 0.0]):
        for paper in (False, True):
            own = [declared(method, {"weight": w}) for w in fit(method, weights)]
            chosen = method.settings(own, mode, paper=paper)
            merge_tensors(method, base, fit(method, sources), chosen).fill_(7.0)
    same = all(torch.equal(a, b) for a, b in zip(before, [base, *sources], strict=True))
    _require(same, f"{method.name}: writes into what it is given")


def check_shapes(method: Method, mode: Mapping[str, Any], shared: Mapping[str, Any] = {}) -> None:
    """Checks that vectors, numbers and tensors of any rank give finite float32 of the same shape."""
    for shape in ((5,), (1,), (2, 3, 2), ()):
        base, sources = family(2, 2, shape)
        merged = run(method, base, sources, [1.0, 1.0], {**shared, **mode})
        same = merged.shape == base.shape and merged.dtype == torch.float32
        _require(same, f"{method.name}: makes {merged.dtype} {tuple(merged.shape)} of float32 {shape}")
        _require(bool(torch.isfinite(merged).all()), f"{method.name}: what it makes of {shape} is not finite")


def check_weight_zero(method: Method, mode: Mapping[str, Any]) -> None:
    """Checks that a source at weight 0 takes no part, wherever it stands."""
    weight = method.parameter("weight")
    if weight is None or not weight.takes_part:
        return
    base, sources = family(3, 3, (6, 7))
    for where in range(4):
        more, weights, prints = [*sources], [0.4, 1.0, 0.7], [*"abc"]
        expected = merge_tensors(method, base, sources, weighted(method, weights, mode), fingerprints="abc")
        more.insert(where, base + 100.0)
        weights.insert(where, 0.0)
        prints.insert(where, "z")
        merged = merge_tensors(method, base, more, weighted(method, weights, mode), fingerprints=prints)
        _require(torch.equal(merged, expected), f"{method.name}: a source at weight 0 takes part")


def check_order(
    method: Method,
    mode: Mapping[str, Any],
    *,
    seed: int = 0,
    order: Sequence[int] = (2, 0, 1),
    shared: Mapping[str, Any] = {},
) -> None:
    """Checks that the order of the sources does not matter, but where it is declared to."""
    if method.order_matters or method.max_sources == 1:
        return
    base, sources = family(seed, 3, (8, 9))
    weights, prints, values = [0.4, 1.1, 0.7], ["a", "b", "c"], {**mode, **shared}
    expected = run(method, base, sources, weights, values, fingerprints=prints)
    merged = run(
        method,
        base,
        [sources[i] for i in order],
        [weights[i] for i in order],
        values,
        fingerprints=[prints[i] for i in order],
    )
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def check_base(method: Method, mode: Mapping[str, Any]) -> None:
    """Checks that a missing base is refused exactly where one is needed."""
    _, sources = family(0, 2, (3, 3))
    sources, chosen = fit(method, sources), weighted(method, fit(method, [1.0, 1.0]), mode)
    if not method.base_needed(chosen.shared):
        merged = merge_tensors(method, None, sources, chosen)
        _require(bool(torch.isfinite(merged).all()), f"{method.name}: what it makes without a base is not finite")
        return
    try:
        merge_tensors(method, None, sources, chosen)
    except RecipeError as error:
        _require(f"{method.name}: needs a base" in str(error), f"{method.name}: {error}")
    else:
        raise AssertionError(f"{method.name}: merges without the base that it needs")


METHOD_CHECKS: tuple[Callable[[Method, Mapping[str, Any]], None], ...] = (
    check_blocks,
    check_inputs,
    check_shapes,
    check_weight_zero,
    check_order,
    check_base,
)
"""Of a method in one of its modes."""


def check_method(method: Method) -> None:
    """Checks everything that a method promises, in each of its modes.

    Raises:
        AssertionError: It breaks a promise; the message says which.
    """
    check_declaration(method)
    if method.merge is not None:
        for mode in modes(method):
            for check in METHOD_CHECKS:
                check(method, mode)


def _require(holds: object, text: str) -> None:
    if not holds:
        raise AssertionError(text)
