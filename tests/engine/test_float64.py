"""float64: computed in it by every method, however it comes in, and exact to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.methods.contract import Method
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from tests.engine.recipes import EVERY, recipe_for

NAMES = ("base", "a", "b", "c")


@pytest.fixture(scope="module")
def doubles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Lone files whose numbers no float32 holds."""
    root, generator = tmp_path_factory.mktemp("doubles"), torch.Generator().manual_seed(0)
    base = {
        "m.weight": torch.randn(24, 16, generator=generator).double() * (1 + 1e-10),
        "v": torch.ones(8).double() / 3,
    }
    for name in NAMES:
        moved = {k: v + 0.05 * torch.randn(v.shape, generator=generator).double() / 3 for k, v in base.items()}
        save_file(base if name == "base" else moved, root / f"{name}.safetensors")
    return {name: root / f"{name}.safetensors" for name in NAMES}


def merged(out: Path, recipe: object) -> dict[str, Tensor]:
    assert isinstance(recipe, dict)
    return load_file(merge_to_folder(parse_recipe(recipe), out) / "model.safetensors")


@pytest.mark.parametrize("method", [m for m in EVERY if not m.copies_layers], ids=lambda m: m.name)
def test_every_method_computes_in_it(doubles: dict[str, Path], tmp_path: Path, method: Method) -> None:
    """The result is near float32's and no float32: nothing on the way is rounded to that."""
    exact = merged(tmp_path / "double", recipe_for(method, doubles))
    single = {name: tmp_path / f"{name}.safetensors" for name in NAMES}
    for name, path in single.items():
        save_file({k: v.float() for k, v in load_file(doubles[name]).items()}, path)
    rounded = merged(tmp_path / "single", recipe_for(method, single))
    for name, value in exact.items():
        assert value.dtype == torch.float64
        near = (value - rounded[name].double()).abs() <= 1e-5
        assert method.stochastic or near.double().mean() > 0.97, (
            name
        )  # a vote, or a place at a threshold, may fall the other way
        assert not torch.equal(value, value.float().double())


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_asked_for(tiny_family: dict[str, Path], tmp_path: Path, key: str) -> None:
    models = [{"model": str(tiny_family[name]), "parameters": {"weight": w}} for name, w in (("a", 0.3), ("b", 0.7))]
    result = merged(tmp_path / "out", {"merge_method": "linear", "models": models, key: "float64"})
    a, b = (load_file(tiny_family[name] / "model.safetensors") for name in "ab")
    for name, value in result.items():
        torch.testing.assert_close(value, 0.3 * a[name].double() + 0.7 * b[name].double(), rtol=1e-14, atol=1e-16)


def test_scaled_copies(doubles: dict[str, Path], tmp_path: Path) -> None:
    source = {"model": str(doubles["a"]), "parameters": {"scale": 0.1}}
    result = merged(tmp_path / "out", {"merge_method": "passthrough", "models": [source]})
    assert torch.equal(result["m.weight"], load_file(doubles["a"])["m.weight"] * 0.1)
