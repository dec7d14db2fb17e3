"""Computing elsewhere than in the processor's compiled kernels: the torch path, on a named device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evomerge.checkpoints.dtypes import torch_dtype
from evomerge.engine.execute import find_device, materialise, statistics_store
from evomerge.errors import BadInput
from evomerge.methods.contract import Method
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from tests.engine.recipes import EVERY, opened, plan_of, recipe_for, single

COMPUTING = [method for method in EVERY if method.merge is not None]


@pytest.mark.parametrize("method", COMPUTING, ids=lambda m: m.name)
def test_the_torch_path_gives_the_same(tiny_family: dict[str, Path], method: Method) -> None:
    """Within a rounding of float32, for tensors as models have them."""
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    plan = plan_of(recipe_for(method, tiny_family), checkpoints)
    compiled, in_torch = (statistics_store(checkpoints, device) for device in (None, torch.device("cpu")))
    for operation in plan.operations[::5]:
        dtype = torch_dtype(operation.dtype)
        here, there = (materialise(operation, store, dtype, plan.family) for store in (compiled, in_torch))
        torch.testing.assert_close(there, here, rtol=2e-6, atol=1e-7, msg=operation.output)


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
