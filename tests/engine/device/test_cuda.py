"""What only a GPU can show: streams, pinned memory, its own arithmetic. Skipped where torch finds none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from evomerge.engine.device.random_field import uniform16
from evomerge.engine.device.sources import Room
from evomerge.engine.device.statistics import DeviceStatistics
from evomerge.engine.execute import materialise
from evomerge.engine.resident import Resident
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.methods import random_field
from evomerge.methods.contract import Method
from evomerge.methods.registry import METHODS
from evomerge.planning.operation import Operation, inputs_of
from evomerge.testing.methods import family
from tests.engine.helpers import checkpoints_of, inputs
from tests.engine.recipes import EVERY, opened, plan_of, recipe_for
from tests.methods.helpers import of_sources

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

LARGE = 1 << 20  # elements: copies take longer than what starts them
ROOMS = {
    "kept": Room(kept=1 << 30),
    "pinned": Room(ahead=1 << 30, pinned=1 << 30),
    "mapped": Room(ahead=1 << 30),
    "in blocks": Room(),
    "mixed": Room(kept=5 * 2 * LARGE, ahead=1 << 30, pinned=1 << 28),
}


def test_the_field_has_the_same_bits() -> None:
    key = (2**63 + 5, 17)
    drawn = uniform16(key, 12_345, 100_000, torch.device("cuda")).cpu().numpy()
    assert (drawn == random_field.uniform16(key, 12_345, 100_000)).all()


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", ["ties", "dare_ties", "slerp"])
def test_streams_bring_what_was_asked_for(name: str, room: str) -> None:
    """Many tensors one after another, each another one, twice: whoever reads too early reads another's values."""
    method, count = METHODS[name], 6
    drawn = [family(k, 3, (LARGE // 1024, 1024)) for k in range(count)]
    tensors: dict[str, dict[str, Tensor]] = {"base": {f"t{k}": base.bfloat16() for k, (base, _) in enumerate(drawn)}}
    for i in range(3):
        tensors[f"m{i}"] = {f"t{k}": sources[i].bfloat16() for k, (_, sources) in enumerate(drawn)}
    own = [of_sources(method, {"weight": 0.3 + 0.2 * i, "density": 0.4}) for i in range(3)]
    chosen = method.settings(own, {})
    work = [Operation(f"t{k}", (LARGE // 1024, 1024), "BF16", name, *inputs(3, f"t{k}"), chosen) for k in range(count)]
    models = checkpoints_of(tensors)
    expected = [materialise(operation, StatisticsStore(models), torch.bfloat16) for operation in work]
    store = DeviceStatistics(models, torch.device("cuda"), ROOMS[room], block=1 << 18)
    for _ in range(2):
        turns = store.tensors.in_turn([inputs_of(operation) for operation in work])
        merged = [materialise(operation, store, torch.bfloat16) for operation, _ in zip(work, turns, strict=True)]
        for one, other in zip(merged, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-2, atol=1e-6)
            assert (one.cpu() == other).float().mean() > 0.999  # a bfloat16 that rounds the other way now and then


@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)
def test_the_model_is_the_processors(tiny_family: dict[str, Path], method: Method) -> None:
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    plan = plan_of(recipe_for(method, tiny_family), checkpoints)
    expected = Resident(checkpoints).write(plan)[0].state_dict()
    for memory in (None, 40_000, 0):
        model, _ = Resident(checkpoints, device="cuda", device_memory=memory).write(plan)
        for name, value in model.state_dict().items():
            assert value.device.type == "cuda"
            torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
