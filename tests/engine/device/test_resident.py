"""A model that is merged by torch, wherever it lives, is the one that compiled kernels make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.engine import resident
from evomerge.engine.device.memory import activation_bytes, free_memory, room_for
from evomerge.engine.device.sources import Room
from evomerge.engine.resident import Resident, empty_model
from evomerge.methods.registry import METHODS, get_method
from evomerge.planning.plan import Plan
from tests.engine.device.pretend import DEVICE, pretending
from tests.engine.recipes import opened, plan_of, recipe_for


def there(
    checkpoints: Mapping[str, Checkpoint], plan: Plan, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Resident]:
    """Makes residents on a device from their memory for sources.

    transformers builds its models on the meta device, too: this one before that pretends to be another.
    """
    model = empty_model(plan.config, torch.device("cpu"))
    monkeypatch.setattr(resident, "empty_model", lambda config, device: model)
    return lambda memory: Resident(checkpoints, device=str(device), device_memory=memory)


def assert_close(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name].cpu(), value, rtol=2e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["passthrough", "slerp", "dare_ties", "tsv_merge"])
def test_in_memory(tiny_family: dict[str, Path], name: str) -> None:
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    plan = plan_of(recipe_for(get_method(name), tiny_family), checkpoints)
    expected = Resident(checkpoints).write(plan)[0].state_dict()
    assert_close(Resident(checkpoints, compiled=False).write(plan)[0].state_dict(), expected)


@pytest.mark.parametrize("memory", [200_000, 40_000, 0])
def test_on_a_device(tiny_family: dict[str, Path], memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has room for some of the sources, for one operation's, or for none."""
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    plan = plan_of(recipe_for(METHODS["ties"], tiny_family), checkpoints)
    expected = Resident(checkpoints).write(plan)[0].state_dict()
    make = there(checkpoints, plan, DEVICE, monkeypatch)
    with pretending() as device:
        model, written = make(memory).write(plan)
        assert {value.device for value in model.state_dict().values()} == {device}
        assert written.computed == len(plan.operations)
        assert_close(model.state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_once_before_the_model_has_it_in_its_own_dtype(
    tiny_family: dict[str, Path], dtype: torch.dtype
) -> None:
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    plan = plan_of(recipe_for(METHODS["ties"], tiny_family, out_dtype="bfloat16"), checkpoints)
    expected = Resident(checkpoints, dtype).write(plan)[0].state_dict()
    merged = Resident(checkpoints, dtype, compiled=False).write(plan)[0].state_dict()
    assert all(value.dtype == dtype for value in merged.values())
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


def test_the_next_candidate_finds_the_sources_on_the_device(
    tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    first, second = (
        plan_of(recipe_for(METHODS["ties"], tiny_family, names=names), checkpoints) for names in ("ab", "ba")
    )
    expected = Resident(checkpoints).write(second)[0].state_dict()
    make = there(checkpoints, first, DEVICE, monkeypatch)
    with pretending():
        live = make(1 << 24)
        live.write(first)
        monkeypatch.setattr(Checkpoint, "tensor", None)
        merged = {name: value.cpu() for name, value in live.write(second)[0].state_dict().items()}
    assert_close(merged, expected)


def test_a_budget_is_divided() -> None:
    most = 1 << 30
    assert Room.within(100 * most, 50 * most, 7) == Room(50 * most, 0, 0, most)
    room = Room.within(20 * most, 50 * most, 7)
    assert room == Room(17 * most, most, 7, most)
    assert Room.within(0, 50 * most, 7) == Room(0, 0, 7, 0)
    small = Room.within(most, 50 * most, 7)
    assert small.kept + 2 * small.ahead + small.remembered == most


def test_what_is_left_is_found_out(tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from evomerge.engine.device import memory

    checkpoints = opened(str(folder) for folder in tiny_family.values())
    stored = sum(info.nbytes for checkpoint in checkpoints.values() for info in checkpoint.tensors.values())
    model = max(sum(info.nbytes for info in checkpoint.tensors.values()) for checkpoint in checkpoints.values())
    device = torch.device("cpu")
    assert free_memory(device) == 0
    assert room_for(checkpoints.values(), device, None).kept == 0
    monkeypatch.setattr(memory, "free_memory", lambda device: 24 << 30)
    assert room_for(checkpoints.values(), device, None).kept == stored
    left = 1000
    taken = (24 << 30) - int(0.1 * (24 << 30)) - model - left
    room = room_for(checkpoints.values(), device, None, activations=taken)
    assert room.kept + 2 * room.ahead + room.remembered == left
    wide = room_for(checkpoints.values(), device, torch.float64, activations=taken)
    assert wide == Room(pinned=wide.pinned)


def test_activations_grow_with_the_batch_and_the_vocabulary() -> None:
    config = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    assert activation_bytes(config, 4096) == activation_bytes({"text_config": config}, 4096)
    assert 2e9 < activation_bytes(config, 4096) < 8e9
    assert activation_bytes(config, 1) < activation_bytes(config | {"vocab_size": 128_000}, 1)
    assert activation_bytes({}, 4096) == 0
