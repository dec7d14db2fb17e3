"""Facts of the store against the plain ones of `evomerge.methods.plain_statistics`, and against sorting."""

from __future__ import annotations

import dataclasses
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.engine.statistics.operation_statistics import OperationStatistics
from evomerge.engine.statistics.tensor_reader import CHUNK
from evomerge.methods.plain_statistics import PlainStatistics
from evomerge.methods.random_field import field_key
from evomerge.methods.topk import cutoff_mask
from evomerge.planning.operation import Input
from evomerge.testing.methods import family
from tests.engine.helpers import PRINTS, inputs, store_for, store_of
from tests.methods.helpers import numbers

DENSITIES = [0.0, 1e-9, 0.03, 0.2, 0.5, 0.77, 0.9999, 1.0]


def statistics_of(base: Tensor, sources: list[Tensor]) -> OperationStatistics:
    origin, others = inputs(len(sources))
    columns = math.prod(base.shape[1:])
    return OperationStatistics(store_for(base, sources), origin, others, columns, "tensor", 0, ((origin, others),))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A base and a source: any bits, few distinct deltas, equal everywhere, or mixed dtypes."""
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    kind = draw(st.sampled_from(["any", "ties", "equal", "near"]))
    size = draw(st.integers(1, 60))
    if kind == "any" and dtype != torch.float16:
        return draw(numbers(dtype, size)), draw(numbers(dtype, size))
    base, (source,) = family(draw(st.integers(0, 999)), 1, (size,))
    if kind == "ties":
        steps = draw(st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, 2.0]), min_size=size, max_size=size))
        base, source = torch.ones(size), 1.0 + torch.tensor(steps)
    source = base if kind == "equal" else source
    return base.to(dtype), source.to(draw(st.sampled_from([dtype, torch.float32])))


@settings(max_examples=100, deadline=None)  # four kinds of pairs in three dtypes, at eight densities and between them
@given(pair=pairs(), density=st.one_of(st.sampled_from(DENSITIES), st.floats(0.0, 1.0)))
def test_the_threshold_is_the_exact_one(pair: tuple[Tensor, Tensor], density: float) -> None:
    base, source = pair
    exact = PlainStatistics(base.float(), [source.float()]).trim(0, density)
    for scope in ("tensor", "model"):
        assert statistics_of(base, [source]).trim(0, density, scope) == exact  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_a_tensor_of_several_chunks(dtype: torch.dtype, density: float) -> None:
    base, sources = family(1, 2, (3 * CHUNK + 19,))
    base, sources = base.to(dtype), [source.to(dtype) for source in sources]
    exact, statistics = PlainStatistics(base.float(), [s.float() for s in sources]), statistics_of(base, sources)
    for source in (0, 1):
        assert statistics.trim(source, density) == exact.trim(source, density)
        assert statistics.variance(source).item() == pytest.approx(exact.variance(source).item(), rel=1e-10)
        for of in ("weights", "deltas"):
            assert statistics.dot(0, source, of) == pytest.approx(exact.dot(0, source, of), rel=1e-10)  # type: ignore[arg-type]
    assert statistics.dot(-1, 1, "weights") == pytest.approx(exact.dot(-1, 1, "weights"), rel=1e-10)


@given(
    seed=st.integers(0, 999),
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    density=st.floats(0.0, 1.0),
    coarse=st.booleans(),
    mixed=st.booleans(),
)
def test_the_scope_of_a_model_is_its_concatenation(
    seed: int, sizes: list[int], density: float, coarse: bool, mixed: bool
) -> None:
    names = [f"t{i}" for i in range(len(sizes))]
    models: dict[str, dict[str, Tensor]] = {"base": {}, "m0": {}}
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        base, (source,) = family(seed + number, 1, (size,))
        if coarse:  # few distinct magnitudes, many ties across tensors
            base, source = base.round(), base.round() + (source - base).mul(20.0).round()
        dtype = torch.float32 if mixed and number % 2 else torch.bfloat16
        models["base"][name], models["m0"][name] = base.to(dtype), source.to(dtype)
    store = store_of(models)
    members = tuple((Input("base", n, "b"), (Input("m0", n, "f"),)) for n in names)
    deltas = [models["m0"][n].float() - models["base"][n].float() for n in names]
    whole = torch.cat(deltas).abs()
    threshold, last = (
        PlainStatistics(torch.zeros(len(whole)), [whole]).trim(0, density) if len(whole) else (math.inf, -1)
    )
    masks = cutoff_mask(whole, threshold, last).split(sizes)
    for (base_input, sources), delta, mask in zip(members, deltas, masks, strict=True):
        statistics = OperationStatistics(store, base_input, sources, 1, "t", 0, members)
        assert torch.equal(cutoff_mask(delta.abs(), *statistics.trim(0, density, "model")), mask)


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 2, 6), (2, CHUNK + 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_variances_by_tensor_and_by_row(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, (source,) = family(4, 1, shape)
    base, source = base.to(dtype), source.to(dtype)
    exact, statistics = PlainStatistics(base.float(), [source.float()]), statistics_of(base, [source])
    torch.testing.assert_close(statistics.variance(0).reshape(-1), exact.variance(0).reshape(-1), rtol=1e-10, atol=0.0)
    if len(shape) > 1:
        block = exact.block("row", math.prod(shape[1:]) * (shape[0] - 1))
        expected = block.statistics.variance(0, "row")
        seen = statistics.at(block.start, tuple(expected.shape)).variance(0, "row")
        torch.testing.assert_close(seen, expected, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("shape", [(), (7,), (5, 4), (1, 6), (3, 2, 6), (2, CHUNK + 3)])
@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_vector_by_vector(shape: tuple[int, ...], along: str, dtype: torch.dtype) -> None:
    base, sources = family(4, 2, shape)
    base, sources = base.to(dtype), [source.to(dtype) for source in sources]
    exact = PlainStatistics(base.float(), [source.float() for source in sources])
    statistics = dataclasses.replace(
        statistics_of(base, sources), columns=math.prod(shape[1:] if len(shape) > 1 else shape)
    )
    statistics = dataclasses.replace(statistics, whole=shape)
    rows = shape[0] if len(shape) > 1 else 1
    start = (rows - 1) * statistics.columns  # the last row alone
    block = exact.block("row", start)
    for pair in ((0, 1), (1, 1)):
        for of in ("weights", "deltas"):
            expected = block.statistics.products(*pair, of, along)  # type: ignore[arg-type]
            seen = statistics.at(start, (1, statistics.columns)).products(*pair, of, along)  # type: ignore[arg-type]
            torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)
    assert expected.shape[0] == 1
    assert expected.numel() * rows in (math.prod(shape[:-1]), math.prod(shape[1:]) * rows, 1)


def test_what_is_remembered_is_computed_once_while_there_is_room() -> None:
    base, sources = family(2, 2, (4,))
    origin, others = inputs(2)
    store = store_of({"base": {"tensor": base}, "m0": {"tensor": sources[0]}, "m1": {"tensor": sources[1]}}, room=40)
    statistics = [OperationStatistics(store, origin, (other,), 4, "t", 0) for other in others]
    computed = []

    def ones(size: int) -> tuple[Tensor, ...]:
        computed.append(size)
        return (torch.ones(size), torch.zeros(size))

    for _ in range(2):  # 2 · 4 · 4 bytes fit into 40, another tensor's do not, and nothing is pushed out
        statistics[0].remember("k", lambda: ones(4))
        statistics[1].remember("k", lambda: ones(5))
    statistics[0].remember("another", lambda: ones(1))
    statistics[0].remember("another", lambda: ones(1))
    assert computed == [4, 5, 5, 1]


def test_a_merge_that_is_done_once_remembers_nothing() -> None:
    base, sources = family(2, 1, (4,))
    statistics = statistics_of(base, sources)
    computed = []
    for _ in range(2):
        statistics.remember("k", lambda: (computed.append(1) or torch.ones(1),))
    assert len(computed) == 2


def test_equal_models_have_no_variance_and_keep_the_first_elements() -> None:
    base = torch.linspace(-1.0, 1.0, 10)
    statistics = statistics_of(base, [base.clone()])
    assert statistics.variance(0).tolist() == [0.0]
    assert statistics.trim(0, 0.35) == (0.0, 2)  # floor(0.35 · 10) = 3 of ten zeros: indices 0, 1, 2
    assert statistics.trim(0, 0.0) == (math.inf, -1)


def test_the_mask_is_that_part_of_the_field() -> None:
    base, sources = family(2, 1, (100,))
    whole = PlainStatistics(base, sources, [field_key(0, "tensor", PRINTS[0])]).keep_mask(0, 0.4)
    part = statistics_of(base, sources).at(32, (20,)).keep_mask(0, 0.4)
    assert torch.equal(part, whole[32:52])
    assert 20 < int(whole.sum()) < 60


def test_threads_that_ask_for_the_same_fact_compute_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, sources = family(2, 1, (50_000,))
    statistics = statistics_of(base, sources)
    computed, compute = [], statistics.store._joint_cutoff

    def counted(*arguments: object) -> object:
        computed.append(1)
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(statistics.store, "_joint_cutoff", counted)
    cutoffs: list[tuple[float, int]] = []
    pair = (statistics.base, statistics.sources[0])
    threads = [threading.Thread(target=lambda: cutoffs.append(statistics.store.trim(pair, 0.3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1
    assert len(set(cutoffs)) == 1


def test_only_so_many_thresholds_are_remembered() -> None:
    base, sources = family(2, 1, (500,))
    origin, others = inputs(1)
    store = store_of({"base": {"tensor": base}, "m0": {"tensor": sources[0]}}, thresholds=6)
    for density in np.linspace(0.1, 0.9, 30):
        store.trim((origin, others[0]), float(density))
    assert len(store._thresholds) <= 6
