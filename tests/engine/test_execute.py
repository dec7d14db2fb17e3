"""Carrying out operations: the same bits as the method's own function on whole tensors, however they are cut."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.engine import execute as engine
from evomerge.engine import kernel_dispatch
from evomerge.engine.execute import Piece, execute_all, materialise, pieces
from evomerge.engine.statistics import exact_topk, tensor_reader
from evomerge.engine.statistics.operation_statistics import OperationStatistics
from evomerge.methods.contract import Method, Settings
from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.registry import METHODS
from evomerge.planning.operation import COPY, Input, Operation
from evomerge.system import threads
from evomerge.testing.methods import declared, family, fit
from tests.engine.helpers import PRINTS, inputs, operation_for, store_for, store_of
from tests.methods.helpers import every_mode, numbers, of_all, of_sources

DTYPES = [torch.bfloat16, torch.float32]
SEED = 5


def got(method: Method, base: Tensor, sources: list[Tensor], chosen: Settings, dtype: torch.dtype) -> Tensor:
    operation = operation_for(method.name, chosen, base.shape, seed=SEED)
    return materialise(operation, store_for(base, sources), dtype, ((operation.base, operation.sources),))


def settings_of(draw: st.DrawFn, method: Method, mode: dict[str, Any], count: int) -> Settings:
    """Any settings of a method that its own check accepts."""
    shared = dict(mode)
    for parameter in method.parameters:
        if parameter.kind == "bool" and parameter.name not in mode:
            shared[parameter.name] = draw(st.booleans())
    shared |= declared(method, {"lambda": draw(st.sampled_from([1.0, 0.5, 1.7, 0.0]))})
    if method.name == "slerp" and count == 2 and mode["on"] == "deltas" and draw(st.booleans()):
        shared["t"] = draw(st.floats(0.0, 1.0))
    weighted = method.parameter("weight")
    signs = [] if weighted is None or weighted.low is not None else [-0.4]
    weight = st.sampled_from([0.0, 0.3, 1.0, 0.9, 0.55, *signs])
    own = [declared(method, {"weight": draw(weight) if i else 1.1}) for i in range(count)]
    share = st.sampled_from([0.0, 0.0001, 0.3, 0.5, 0.9, 1.0])
    shared |= declared(method, {"select_topk": draw(share)})
    epsilon = st.sampled_from([0.0, 0.15, 0.5])
    shared |= of_all(method, {"epsilon": draw(epsilon), "r": draw(st.sampled_from([0.1, 0.7]))})
    for source in own:
        source |= of_sources(method, {"epsilon": draw(epsilon)})
        if method.name.startswith("breadcrumbs"):
            source["gamma"] = draw(st.sampled_from([0.0, 0.02, 0.4]))
    if method.parameter("density") is not None:
        for source in own if method.parameter("density").per_source else []:  # type: ignore[union-attr]
            source["density"] = draw(share)
            if method.parameter("drop_rate") is not None and draw(st.integers(0, 2)) == 0:
                source["drop_rate"] = draw(share)
    chosen = method.settings(own, shared)
    return chosen if not method.check(chosen) else method.settings([{"weight": 1.0}] * count, mode)


def sources_of(method: Method, count: int) -> int:
    """The nearest number of sources that the method takes."""
    return len(fit(method, [None] * count))


@st.composite
def cases(draw: st.DrawFn, method: Method, mode: dict[str, Any]) -> tuple[Tensor, list[Tensor], Settings, torch.dtype]:
    """Tensors of every kind, settings of every kind."""
    count = sources_of(method, draw(st.integers(1, 4)))
    stored = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    if draw(st.booleans()):
        base, *sources = (draw(numbers(stored, 40)) for _ in range(count + 1))
    else:
        base, sources = family(draw(st.integers(0, 999)), count, (draw(st.integers(1, 5)), draw(st.integers(1, 300))))
        base, sources = base.to(stored), [source.to(stored) for source in sources]
    if draw(st.integers(0, 4)) == 0:
        sources[-1] = base.clone()
    if draw(st.integers(0, 4)) == 0:
        sources[0] = sources[0].to(torch.float32)
    out = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    return base, sources, settings_of(draw, method, mode, count), out


@every_mode
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_kernels_give_the_bits_of_the_method(method: Method, mode: dict[str, Any], data: st.DataObject) -> None:
    base, sources, chosen, dtype = data.draw(cases(method, mode))
    merged = got(method, base, sources, chosen, dtype)
    with mock.patch.dict(kernel_dispatch.KERNELS, clear=True):
        called = got(method, base, sources, chosen, dtype)
    torch.testing.assert_close(merged, called, rtol=0.0, atol=0.0, equal_nan=True)


LOOSE = {
    "dfs",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "sce",
    "model_stock",
}  # their inner products and variances are added up in another order


@every_mode
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 4), paper=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_the_same_as_merging_whole_tensors(
    method: Method, mode: dict[str, Any], seed: int, count: int, paper: bool, dtype: torch.dtype
) -> None:
    count = sources_of(method, count)
    base, sources = family(seed, count, (7, 23))
    base, sources = base.to(dtype), [source.to(dtype) for source in sources]
    own = [declared(method, {"weight": 0.3 + 0.2 * i}) for i in range(count)]
    chosen = method.settings(own, mode, paper=paper)
    whole = merge_tensors(method, base, sources, chosen, seed=SEED, fingerprints=PRINTS[:count])
    tolerance = 1e-6 if method.name in LOOSE else 0.0
    merged = got(method, base, sources, chosen, torch.float32)
    torch.testing.assert_close(merged, whole, rtol=tolerance, atol=tolerance)


@every_mode
@pytest.mark.parametrize("trimmed", [False, True])
def test_pieces_and_chunks_change_nothing(
    method: Method, mode: dict[str, Any], trimmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources = family(8, 3, (40, 25))
    own: list[dict[str, Any]] = [declared(method, {"weight": weight}) for weight in (0.4, 0.8, 0.5)]
    sources, own = fit(method, sources), fit(method, own)
    shared = dict(mode)
    if trimmed:
        own = [source | declared(method, {"drop_rate": 0.4}) for source in own]
        density = method.parameter("density")
        if density is not None and density.per_source:
            own = [source | {"density": 0.55} for source in own]
        elif density is not None:
            shared["density"] = 0.55
    chosen = method.settings(own, shared, paper=not trimmed)
    whole = got(method, base, sources, chosen, torch.bfloat16)
    for module in (engine, tensor_reader, kernel_dispatch):
        monkeypatch.setattr(module, "CHUNK", 96)
    monkeypatch.setattr(tensor_reader.TensorReader, "block", 96)
    monkeypatch.setattr(tensor_reader.chunks, "__defaults__", (96,))
    monkeypatch.setattr(engine, "_PIECE", 320)
    monkeypatch.setattr(exact_topk, "_IN_MEMORY", 0)
    monkeypatch.setattr(exact_topk, "_PART", 50)
    assert torch.equal(got(method, base, sources, chosen, torch.bfloat16), whole)


WHOLE_MODEL = [
    ("slerp", {"on": "weights"}),
    ("slerp", {"on": "deltas"}),
    ("ties", {"consensus": "mass"}),
    ("ties", {"consensus": "count"}),
]


@pytest.mark.parametrize(("name", "shared"), WHOLE_MODEL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scope_model_is_the_merge_of_the_flattened_model(name: str, shared: dict[str, Any], dtype: torch.dtype) -> None:
    method = METHODS[name]
    shapes = [(5, 7), (11,), (2, 3, 4)]
    parts = [family(k, 3, shape, spread=0.3 * (k + 1)) for k, shape in enumerate(shapes)]
    parts = [(base.to(dtype), [source.to(dtype) for source in sources]) for base, sources in parts]
    own = [{"weight": 0.3 + 0.2 * i} | declared(method, {"density": 0.4}) for i in range(3)]
    chosen = method.settings(own, shared | {"scope": "model"})
    base = torch.cat([part[0].reshape(-1) for part in parts])
    sources = [torch.cat([part[1][i].reshape(-1) for part in parts]) for i in range(3)]
    flattened = merge_tensors(method, base, sources, chosen).split([part[0].numel() for part in parts])
    by_tensor = merge_tensors(method, *parts[0], method.settings(own, shared)).reshape(-1)
    assert not torch.allclose(flattened[0], by_tensor)  # the scope makes a difference here
    models = {"base": {f"t{k}": part[0] for k, part in enumerate(parts)}}
    models |= {f"m{i}": {f"t{k}": part[1][i] for k, part in enumerate(parts)} for i in range(3)}
    store = store_of(models)
    members = tuple(inputs(3, f"t{k}") for k in range(len(parts)))
    for k, (origin, others) in enumerate(members):
        operation = Operation(f"t{k}", shapes[k], "F32", name, origin, others, chosen, SEED)
        merged = materialise(operation, store, torch.float32, members)
        torch.testing.assert_close(merged.reshape(-1), flattened[k], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (9,), (6, 5), (3, 4, 5)])
@pytest.mark.parametrize("mode", [{}, {"nuslerp_row_wise": True}])
@pytest.mark.parametrize("based", [True, False])
def test_vectors_of_any_shape_and_without_a_base(shape: tuple[int, ...], mode: dict[str, Any], based: bool) -> None:
    method = METHODS["nuslerp"]
    base, sources = family(1, 3, shape)
    chosen = method.settings([{"weight": w} for w in (0.5, 0.8, 0.4)], {"nuslerp_flatten": False, **mode})
    whole = merge_tensors(method, base if based else None, sources, chosen)
    operation = operation_for("nuslerp", chosen, shape)
    operation = operation if based else replace(operation, base=None)
    for kernels in (kernel_dispatch.KERNELS, {}):
        with mock.patch.dict(kernel_dispatch.KERNELS, kernels, clear=True):
            merged = materialise(operation, store_for(base, sources), torch.float32)
        torch.testing.assert_close(merged, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(9,), ()])
def test_a_vector_is_one_row(shape: tuple[int, ...]) -> None:
    method = METHODS["dfs"]
    base, (quiet, loud) = family(1, 2, shape)
    sources = [quiet, base + 9.0 * (loud - base)]
    chosen = method.settings([{}, {}], {"scope": "row"})
    merged = materialise(operation_for("dfs", chosen, shape), store_for(base, sources), torch.float32)
    torch.testing.assert_close(merged, merge_tensors(method, base, sources, chosen), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher"])
def test_without_a_base_the_weights_themselves_are_merged(name: str) -> None:
    method = METHODS[name]
    base, sources = family(1, 2, (6, 5))
    chosen = method.settings([{"weight": 0.5}, {"weight": 0.8}])
    operation = replace(operation_for(name, chosen, base.shape), base=None)
    store = store_for(base, sources)
    assert (
        kernel_dispatch.find_kernel(name, chosen, OperationStatistics(store, None, operation.sources, 5, "t", 0))
        is not None
    )
    merged = materialise(operation, store, torch.float32)
    torch.testing.assert_close(merged, merge_tensors(method, None, sources, chosen), rtol=1e-6, atol=1e-6)


def test_the_next_candidate_needs_no_singular_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    base, sources = family(1, 3, (12, 9))
    method = METHODS["tsv_merge"]
    models = {"base": {"tensor": base}} | {f"m{i}": {"tensor": source} for i, source in enumerate(sources)}
    store = store_of(models, room=1 << 20)
    first = method.settings([{"weight": 1.0}] * 3)
    materialise(operation_for("tsv_merge", first, base.shape), store, torch.float32)
    monkeypatch.setattr(torch.linalg, "eigh", mock.Mock(side_effect=AssertionError("computed again")))
    second = method.settings([{"weight": 0.3}, {"weight": 1.2}, {"weight": 0.9}], {"lambda": 0.7})
    merged = materialise(operation_for("tsv_merge", second, base.shape), store, torch.float32)
    monkeypatch.undo()
    torch.testing.assert_close(merged, merge_tensors(method, base, sources, second), rtol=1e-6, atol=1e-6)


def copy_of(tensor: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    operation = Operation("out", tuple(tensor.shape), "F32", COPY, None, (Input("m", "t", "f"),), Settings(), 0, scale)
    return materialise(operation, store_of({"m": {"t": tensor}}), dtype)


def test_a_copied_layer_is_scaled_in_float32_and_rounded_once() -> None:
    tensor = torch.linspace(-3.0, 3.0, 1000).to(torch.bfloat16).view(10, 100)
    assert torch.equal(copy_of(tensor, torch.bfloat16, 1.0), tensor)
    assert torch.equal(copy_of(tensor, torch.bfloat16, 0.3), (tensor.float() * 0.3).to(torch.bfloat16))
    assert torch.equal(copy_of(tensor, torch.float32, 1.0), tensor.float())


def test_integers_are_copied_as_they_are() -> None:
    assert torch.equal(copy_of(torch.arange(5), torch.int64, 1.0), torch.arange(5))


def test_threads_fill_every_tensor_and_large_ones_start_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_PIECE", 64)
    order: list[tuple[str, bool]] = []
    work = [
        Piece(partial(order.append, (name, first == 0)), size, first == 0)
        for name, size in (("small", 10), ("large", 64))
        for first in (range(0, 128, 64) if name == "large" else [0])
    ]
    execute_all(work, 1)
    assert order == [("large", True), ("small", True), ("large", False)]


def test_several_threads_give_the_same_as_one() -> None:
    method = METHODS["dare_ties"]
    chosen = method.settings([{"weight": 0.4, "density": 0.5}] * 3, {"normalize": True})
    stored = {f"t{i}": family(i, 3, (30, 11 + i)) for i in range(6)}
    models = {"base": {name: base for name, (base, _) in stored.items()}}
    models |= {f"m{i}": {name: sources[i] for name, (_, sources) in stored.items()} for i in range(3)}
    store = store_of(models)
    outs = {name: torch.empty(base.shape) for name, (base, _) in stored.items()}
    work = []
    for name, (base, _) in stored.items():
        origin, others = inputs(3, name)
        operation = Operation(name, tuple(base.shape), "F32", "dare_ties", origin, others, chosen, SEED)
        work += list(pieces(operation, store, outs[name]))
    execute_all(work, 3)
    for name, (base, sources) in stored.items():
        whole = merge_tensors(method, base, sources, chosen, seed=SEED, name=name, fingerprints=PRINTS[:3])
        assert torch.equal(outs[name], whole)


def test_an_error_in_a_thread_is_raised_after_the_others_ended() -> None:
    ended = threading.Event()

    def fail() -> None:
        raise ValueError("a broken tensor")

    with pytest.raises(ValueError, match="a broken tensor"):
        execute_all([fail, ended.set], 2)
    assert ended.is_set()


def test_threads_compute_alone_and_leave_the_number_of_threads_as_it_was() -> None:
    before, seen = torch.get_num_threads(), []
    elsewhere: list[int] = []
    threads._workers.cache_clear()
    torch.set_num_threads(2)
    try:
        execute_all([lambda: seen.append(torch.get_num_threads()) for _ in range(8)], 3)
        later = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 8
    assert elsewhere == [2]


def test_a_method_that_copies_layers_is_no_operation() -> None:
    chosen = Settings({}, ({},))
    with pytest.raises(ValueError, match="copies layers"):
        list(pieces(operation_for("frankenmerge", chosen, (3,)), store_of({}), torch.empty(3)))
