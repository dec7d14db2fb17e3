"""Weights that are no plain numbers: recognised by what they are, refused, or read as what they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.matching.compatible import check_compatible
from evomerge.checkpoints.quantised import from_float8, from_mxfp4
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder

MATRIX = "model.layers.0.mlp.up_proj.weight"
Pack = Callable[[str, Tensor], dict[str, Tensor]]


def float8(name: str, value: Tensor) -> dict[str, Tensor]:
    """One scale a row, as compressed-tensors has them, and what static activations leave behind."""
    scale = value.abs().amax(1, keepdim=True) / 448
    stored = {name: (value / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    return stored | {name.replace("weight", "input_scale"): torch.ones(1)}


def blocks(name: str, value: Tensor) -> dict[str, Tensor]:
    """One scale a block of 24x24, the last ones cut off, as DeepSeek has them."""
    scale = torch.nn.functional.max_pool2d(value.abs()[None, None], 24, ceil_mode=True)[0, 0] / 448
    wide = scale.repeat_interleave(24, 0).repeat_interleave(24, 1)[: value.shape[0], : value.shape[1]]
    return {name: (value / wide).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def cast(name: str, value: Tensor) -> dict[str, Tensor]:
    return {name: value.to(torch.float8_e5m2)}


def int8(name: str, value: Tensor) -> dict[str, Tensor]:
    return {name: value.mul(100).to(torch.int8), f"{name}_scale": torch.ones(value.shape[0], 1)}


def words(name: str, value: Tensor) -> dict[str, Tensor]:
    """MLX: eight numbers a word, scales and biases beside them."""
    packed, stem = torch.ones(value.shape[0], value.shape[1] // 8, dtype=torch.int32), name.removesuffix(".weight")
    column = torch.ones(value.shape[0], 1)
    return {name: packed.view(torch.uint32), f"{stem}.scales": column, f"{stem}.biases": column.clone()}


def bitsandbytes(name: str, value: Tensor) -> dict[str, Tensor]:
    packed = torch.ones(value.numel() // 2, 1, dtype=torch.uint8)
    return {name: packed, f"{name}.absmax": torch.ones(4), f"{name}.quant_map": torch.ones(16)}


def quantised(family: dict[str, Path], name: str, folder: Path, pack: Pack, **config: object) -> Path:
    shutil.copytree(family[name], folder)
    state = load_file(folder / "model.safetensors")
    new = {
        k: v for key, value in state.items() for k, v in (pack(key, value) if "proj" in key else {key: value}).items()
    }
    save_file(new, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


@pytest.mark.parametrize(
    ("pack", "readable"),
    [(float8, True), (blocks, True), (cast, True), (int8, False), (words, False), (bitsandbytes, False)],
)
def test_recognised_by_what_the_tensors_are(
    tiny_family: dict[str, Path], tmp_path: Path, pack: Pack, readable: bool
) -> None:
    model = open_checkpoint(str(quantised(tiny_family, "a", tmp_path / "q", pack)))
    (problem,) = check_compatible(None, {"q": model})
    assert problem.startswith("q: its weights are quantised (model.layers.0.mlp.down_proj.weight is stored as ")
    assert problem.endswith("--dequantize") == readable
    again = open_checkpoint(str(tmp_path / "q"), dequantize=True)
    assert (check_compatible(None, {"q": again}) == []) == readable


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("config.json", {"quantization": {"bits": 4}}, "quantization"),
        ("config.json", {"compression_config": {"format": "x"}}, "compression_config"),
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt: hf_quant_config.json"),
        ("quant_config.json", {"w_bit": 4}, "awq: quant_config.json"),
    ],
)
def test_recognised_by_every_file_that_says_so(
    tiny_family: dict[str, Path], tmp_path: Path, file: str, content: dict[str, object], named: str
) -> None:
    folder = Path(shutil.copytree(tiny_family["a"], tmp_path / "q"))
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(before | content))
    (problem,) = check_compatible(None, {"q": open_checkpoint(str(folder))})
    assert f"its weights are quantised ({named})" in problem


def test_plain_models_are_not_quantised(tmp_path: Path) -> None:
    """Indices, masks and scales that belong to a model as it is."""
    state = {
        "embeddings.position_ids": torch.arange(12).view(1, 12),
        "attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "layer_scale.weight": torch.ones(4),
        "logit_scale": torch.ones(()),
        "attn.weight": torch.ones(4, 4),
    }
    save_file(state, tmp_path / "m.safetensors")
    assert check_compatible(None, {"m": open_checkpoint(str(tmp_path / "m.safetensors"))}) == []


@pytest.mark.parametrize("pack", [float8, blocks])
def test_merged_by_value(tiny_family: dict[str, Path], tmp_path: Path, pack: Pack) -> None:
    """The mean of what the numbers stand for, as an ordinary model: no scales, and no word of it in config.json."""
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [24, 24]}}
    folders = [quantised(tiny_family, name, tmp_path / name, pack, **settings) for name in "ab"]
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    recipe = parse_recipe({"merge_method": "linear", "models": models})
    merge_to_folder(recipe, tmp_path / "out", dequantize=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    a, b = (load_file(tiny_family[name] / "model.safetensors") for name in "ab")
    assert merged.keys() == a.keys()
    assert merged[MATRIX].dtype == torch.bfloat16
    for name, value in merged.items():
        torch.testing.assert_close(value.float(), (a[name] + b[name]) / 2, rtol=0.07, atol=0.01)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_scales_of_stacked_experts() -> None:
    value = torch.ones(2, 4, 6).to(torch.float8_e4m3fn)
    each = torch.tensor([2.0, 3.0])
    assert from_float8(value, each.view(2, 1, 1))[:, 0, 0].tolist() == [2, 3]
    assert from_float8(value, each)[:, 3, 5].tolist() == [2, 3]
    rows = torch.arange(8.0).view(2, 4, 1)
    assert torch.equal(from_float8(value, rows), rows.bfloat16().expand(2, 4, 6))
    assert from_float8(value, torch.tensor(2.0)).unique().tolist() == [2]


def test_mxfp4_is_what_transformers_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(packed, exponents)
    assert torch.equal(from_mxfp4(packed, exponents), expected)
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    save_file(
        {f"{stem}_blocks": packed, f"{stem}_scales": exponents, f"{stem}_bias": torch.ones(2, 6)},
        tmp_path / "m.safetensors",
    )
    model = open_checkpoint(str(tmp_path / "m.safetensors"), dequantize=True)
    assert model.tensors.keys() == {stem, f"{stem}_bias"}
    assert model.tensors[stem].shape == (2, 96, 6)
    assert torch.equal(model.tensor(stem), expected)
    model.release(stem)
    assert model.fingerprint != open_checkpoint(str(tmp_path / "m.safetensors")).fingerprint
