"""The torch path gives what the compiled kernels give, for every method in every mode and every stage.

To the bit, but for methods whose coefficients are sums over whole tensors (`LOOSE`), which are added up in another
order, and for those that factor matrices. On the processor, and on a device that refuses to be mixed with memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.engine.device.sources import Room
from evomerge.engine.device.statistics import DeviceStatistics
from evomerge.engine.execute import materialise
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.methods.contract import Method, Settings
from evomerge.methods.registry import METHODS, STAGES
from evomerge.planning.activations import Activations
from evomerge.planning.operation import COPY, Operation, inputs_of
from evomerge.testing.methods import family, fit
from tests.engine.device.pretend import pretending
from tests.engine.helpers import checkpoints_of, inputs, models_of, operation_for
from tests.engine.test_execute import LOOSE, WHOLE_MODEL, cases
from tests.methods.helpers import every_mode, of_all, of_sources

CPU = torch.device("cpu")
SHAPES = [(6, 5), (7,), (), (3, 4, 5)]


def tolerance(operation: Operation) -> float:
    """Relative to the largest element."""
    return 1e-6 if operation.method in LOOSE or operation.after or not exact(operation) else 0.0


def exact(operation: Operation) -> bool:
    shared = operation.settings.shared
    return not shared.get("spectral", False) and not shared.get("rescale", False)


def assert_same(operation: Operation, base: Tensor, sources: list[Tensor], dtype: torch.dtype) -> None:
    """The torch path, whatever its blocks, gives what the compiled path gives; on a device too, kept there or not."""
    models = checkpoints_of(models_of(base, sources))
    whole = ((operation.base, operation.sources),)
    expected = materialise(operation, StatisticsStore(models), dtype, whole)
    far = tolerance(operation)
    close = {"rtol": far, "atol": far, "equal_nan": True}
    results = [materialise(operation, DeviceStatistics(models, CPU, block=n), dtype, whole) for n in (None, 32)]
    with pretending() as device:
        for room in (Room(), Room(kept=1 << 20), Room(kept=100, ahead=1 << 20)):
            store = DeviceStatistics(models, device, room, block=32)
            for _ in store.tensors.in_turn([(*operation.sources, *whole[0][:1])]):
                results.append(materialise(operation, store, dtype, whole).cpu())
    for result in results:
        torch.testing.assert_close(result, expected, **close)


@every_mode
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_method(method: Method, mode: dict[str, Any], shape: tuple[int, ...]) -> None:
    base, sources = family(len(shape), 3, shape)
    base, sources = base.to(torch.bfloat16), [source.to(torch.bfloat16) for source in fit(method, sources)]
    some = {"density": 0.6, "select_topk": 0.3}
    own = [of_sources(method, some | {"weight": 0.3 + 0.2 * i}) for i in range(len(sources))]
    chosen = method.settings(own, mode | of_all(method, some), paper=True)
    operation = operation_for(method.name, chosen, shape, seed=5)
    assert_same(operation, base, sources, torch.float32)


@every_mode
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_tensors_and_settings(method: Method, mode: dict[str, Any], data: st.DataObject) -> None:
    """NaN, infinities, ties and zeros among them."""
    base, sources, chosen, dtype = data.draw(cases(method, mode))
    operation = operation_for(method.name, chosen, base.shape, seed=5)
    models, whole = checkpoints_of(models_of(base, sources)), ((operation.base, operation.sources),)
    expected = materialise(operation, StatisticsStore(models), dtype, whole)
    merged = materialise(operation, DeviceStatistics(models, CPU, block=32), dtype, whole)
    far = 0.0 if tolerance(operation) == 0.0 else 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(merged, expected, rtol=far, atol=far, equal_nan=True)


STAGED = {"svc_alpha": 0.5, "svc_strength": 0.75, "aim_omega": 0.3}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "slerp"])
def test_every_stage(name: str, method: str) -> None:
    base, sources = family(3, 3, (8, 6))
    mode = {"on": "deltas"} if method == "slerp" else {}
    chosen = METHODS[method].settings([{"weight": 0.3 + 0.2 * i} for i in range(3)], mode)
    chosen = replace(chosen, shared={**chosen.shared, **STAGED})
    seen = Activations("seen", np.linspace(0.1, 1.0, 6, dtype=np.float32))
    operation = operation_for(method, chosen, base.shape, after=(name,), activations=seen)
    assert_same(operation, base, sources, torch.float32)


@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_a_copied_layer(scale: float) -> None:
    base, (source,) = family(3, 1, (30, 5))
    operation = replace(operation_for(COPY, Settings({}, ({},)), base.shape, scale=scale), base=None)
    models = checkpoints_of(models_of(base, [source.to(torch.bfloat16)]))
    expected = materialise(operation, StatisticsStore(models), torch.bfloat16)
    with pretending() as device:
        merged = materialise(operation, DeviceStatistics(models, device, block=32), torch.bfloat16).cpu()
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("method", ["linear", "ties", "tsv_merge"])
def test_float64(method: str) -> None:
    base, sources = family(3, 3, (8, 6))
    doubles = [source.double() for source in sources]
    chosen = METHODS[method].settings([{"weight": 0.3 + 0.2 * i} for i in range(3)])
    operation = replace(operation_for(method, chosen, base.shape), dtype="F64")
    models = checkpoints_of(models_of(base.double(), doubles))
    expected = materialise(operation, StatisticsStore(models), torch.float64)
    with pretending() as device:
        merged = materialise(operation, DeviceStatistics(models, device), torch.float64).cpu()
    torch.testing.assert_close(merged, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("line", ["base + sources[0].cpu()", "base * torch.ones(5)", "base.numpy()"])
def test_the_device_is_none_that_can_be_mixed_with_memory(line: str) -> None:
    with pretending() as device:
        tensors = {"base": torch.zeros(5, device=device), "sources": [torch.ones(5).to(device)]}
        with pytest.raises(RuntimeError, match=r"two devices|numpy"):
            eval(line, {"torch": torch}, tensors)


@pytest.mark.parametrize(("name", "shared"), WHOLE_MODEL)
def test_scope_model(name: str, shared: dict[str, Any]) -> None:
    """Thresholds and angles of a model of three tensors, of which each is merged in its turn."""
    shapes = [(5, 7), (11,), (2, 3, 4)]
    drawn = [family(k, 3, shape, spread=0.3 * (k + 1)) for k, shape in enumerate(shapes)]
    tensors: dict[str, dict[str, Tensor]] = {"base": {f"t{k}": base.bfloat16() for k, (base, _) in enumerate(drawn)}}
    for i in range(3):
        tensors[f"m{i}"] = {f"t{k}": sources[i].bfloat16() for k, (_, sources) in enumerate(drawn)}
    method = METHODS[name]
    own = [of_sources(method, {"weight": 0.3 + 0.2 * i, "density": 0.4}) for i in range(3)]
    chosen = method.settings(own, shared | {"scope": "model"})
    members = tuple(inputs(3, f"t{k}") for k in range(3))
    work = [Operation(f"t{k}", shapes[k], "F32", name, *members[k], chosen) for k in range(3)]
    models = checkpoints_of(tensors)
    expected = [materialise(operation, StatisticsStore(models), torch.float32, members) for operation in work]
    with pretending() as device:
        store = DeviceStatistics(models, device, Room(kept=400, ahead=1 << 20), block=32)
        turns = store.tensors.in_turn([inputs_of(operation) for operation in work])
        merged = [materialise(op, store, torch.float32, members).cpu() for op, _ in zip(work, turns, strict=True)]
    for one, other in zip(merged, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
