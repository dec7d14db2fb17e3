"""Computing elsewhere than in the processor's compiled kernels: the torch path, block by block on a named device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evomerge.checkpoints.dtypes import torch_dtype
from evomerge.engine import execute as engine
from evomerge.engine.execute import execute, find_device, materialise
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.errors import BadInput
from evomerge.methods.contract import Method
from evomerge.methods.registry import METHODS
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from tests.engine.recipes import EVERY, opened, plan_of, recipe_for, single

COMPUTING = [method for method in EVERY if method.merge is not None]


@pytest.mark.parametrize("block", [1 << 24, 500], ids=["whole", "small"])
@pytest.mark.parametrize("method", COMPUTING, ids=lambda m: m.name)
def test_the_torch_path_gives_the_same(
    tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch, method: Method, block: int
) -> None:
    """Within a rounding of float32, whatever the size of the blocks that are sent."""
    monkeypatch.setattr(engine, "_SENT", block)
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    plan = plan_of(recipe_for(method, tiny_family), checkpoints)
    store = StatisticsStore(checkpoints)
    for operation in plan.operations[:: 5 if block > 500 else 20]:
        dtype = torch_dtype(operation.dtype)
        here = materialise(operation, store, dtype, plan.family)
        there = materialise(operation, store, dtype, plan.family, torch.device("cpu"))
        torch.testing.assert_close(there, here, rtol=2e-6, atol=1e-7, msg=operation.output)


ON_META = [method.name for method in COMPUTING if method.parameter("spectral") is None]  # ranks depend on values


@pytest.mark.parametrize("name", ON_META)
def test_every_tensor_goes_to_the_device(tiny_family: dict[str, Path], name: str) -> None:
    """The meta device computes nothing, and refuses to be mixed with tensors that lie elsewhere."""
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    plan = plan_of(recipe_for(METHODS[name], tiny_family), checkpoints)
    store = StatisticsStore(checkpoints)
    for operation in plan.operations[::6]:
        out = torch.empty(operation.shape, dtype=torch.float32, device="meta")
        execute(operation, store, out, plan.family, torch.device("meta"))
        with pytest.raises((RuntimeError, NotImplementedError)):  # the values are nowhere
            materialise(operation, store, torch.float32, plan.family, torch.device("meta"))


def test_names_of_devices() -> None:
    assert find_device("cpu") is None
    for name, message in (("gpu", "no device of torch's"), ("cuda:x", "no device"), ("meta", "holds no values")):
        with pytest.raises(BadInput, match=message):
            find_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device: 'cuda' cannot be used here"):
            find_device("cuda")


def test_a_device_that_is_not_there_is_found_before_anything_is_written(
    tiny_family: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="--device"):
        merge_to_folder(parse_recipe(single(tiny_family["a"])), tmp_path / "out", device="no such thing")
    assert list(tmp_path.iterdir()) == []
