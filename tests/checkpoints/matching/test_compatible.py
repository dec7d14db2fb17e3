"""What makes checkpoints unfit for a merge, in one message each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from evomerge.checkpoints.matching.compatible import check_compatible
from tests.models import write_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("compatible") / "base")


def _open(path: Path) -> Checkpoint:
    return open_checkpoint(str(path))


def _variant(base: Path, folder: Path, changes: dict[str, torch.Tensor | None], **config: object) -> Checkpoint:
    """A copy of `base` with tensors replaced, added or (None) removed, and other config values."""
    tensors: dict[str, torch.Tensor | None] = {**load_file(base / "model.safetensors"), **changes}
    folder.mkdir()
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")
    settings = json.loads((base / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return _open(folder)


def test_a_family_fits(tiny_family: dict[str, Path]) -> None:
    models = {name: _open(path) for name, path in tiny_family.items()}
    base = models.pop("base")
    assert check_compatible(base, models) == []
    assert check_compatible(None, models) == []
    assert check_compatible(None, {}) == []
    assert check_compatible(base, {"base": base}) == []


def test_another_dtype_fits(base: Path, tmp_path: Path) -> None:
    half = {name: value.half() for name, value in load_file(base / "model.safetensors").items()}
    assert check_compatible(_open(base), {"half": _variant(base, tmp_path / "half", dict(half))}) == []


def test_missing_and_extra_tensors(base: Path, tmp_path: Path) -> None:
    changes = {f"model.layers.{i}.mlp.{kind}_proj.weight": None for i in range(4) for kind in ("up", "down")}
    extra = {f"score{i}.weight": torch.ones(2, 3) for i in range(6)}
    model = _variant(base, tmp_path / "m", {**changes, **extra})
    lacks, has = check_compatible(_open(base), {"math": model})
    assert lacks == (
        "math: lacks model.layers.0.mlp.down_proj.weight (32x64), model.layers.0.mlp.up_proj.weight (64x32), "
        "model.layers.1.mlp.down_proj.weight (32x64), model.layers.1.mlp.up_proj.weight (64x32), "
        "model.layers.2.mlp.down_proj.weight (32x64) and 3 more of base"
    )
    assert has.startswith("math: has score0.weight (2x3), ")
    assert has.endswith(" and 1 more, which base lacks")


def test_other_shapes(base: Path, tmp_path: Path) -> None:
    narrow = _open(write_tiny_llama(tmp_path / "narrow", hidden=16))
    (problem,) = check_compatible(_open(base), {"narrow": narrow})
    assert problem.startswith("narrow: other shapes than base: model.embed_tokens.weight (259x16 against 259x32), ")
    assert problem.endswith(" and 33 more")


def test_another_vocabulary(base: Path, tmp_path: Path) -> None:
    model = _variant(base, tmp_path / "m", {"model.embed_tokens.weight": torch.ones(300, 32)})
    assert check_compatible(_open(base), {"math": model}) == [
        "math: another vocabulary: base 259 rows, math 300 (model.embed_tokens.weight); tokenizer_source: union in a "
        "recipe, models.tokenizer: union in a search, matches rows by token"
    ]


def test_another_depth(base: Path, tmp_path: Path) -> None:
    deep = _open(write_tiny_llama(tmp_path / "deep", layers=6))
    for one, other, text in (
        (_open(base), deep, "6 layers in model.layers, base has 4"),
        (deep, _open(base), "4 layers"),
    ):
        (problem,) = check_compatible(one, {"m": other})
        assert problem.startswith(f"m: {text}")
        assert check_compatible(one, {"m": other}, layers_may_differ=True) == []


def test_another_family_of_models(base: Path, tmp_path: Path) -> None:
    save_file({"transformer.wte.weight": torch.ones(4, 4)}, tmp_path / "other.safetensors")
    assert check_compatible(_open(base), {"x": _open(tmp_path / "other.safetensors")}) == [
        "x: no tensor in common with base (no architecture given against LlamaForCausalLM): not a fine-tune of it"
    ]


def test_quantised(base: Path, tmp_path: Path) -> None:
    model = _variant(base, tmp_path / "m", {}, quantization_config={"quant_method": "gptq"})
    assert check_compatible(_open(base), {"q": model}) == [
        "q: its weights are quantised (gptq) and cannot be merged: dequantise it first"
    ]


def test_every_source_and_every_kind_at_once(base: Path, tmp_path: Path) -> None:
    one = _variant(base, tmp_path / "1", {"model.norm.weight": None, "model.embed_tokens.weight": torch.ones(9, 32)})
    two = _variant(base, tmp_path / "2", {"model.norm.weight": torch.ones(31)})
    problems = check_compatible(None, {"first": _open(base), "one": one, "two": two})
    assert [problem[: problem.index(":")] for problem in problems] == ["one", "one", "two"]
    assert problems[2] == (
        "two: other shapes than first: model.norm.weight (31 against 32); a recipe may say 'ignore: [model.norm]' or "
        "'take_from: {model.norm: first}'"
    )
