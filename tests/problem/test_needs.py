"""What a search needs, planned from headers: models whose files are as long as they have to be, and empty."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evomerge.checkpoints.checkpoint import open_checkpoints
from evomerge.errors import SpecError
from evomerge.problem.needs import Machine, Needs, search_needs
from evomerge.spec.load import parse_spec
from tests.frame import invoke, search_spec

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
QWEN_32B = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QWEN_30B_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
MODELS = {"7B": LLAMA_7B, "32B": QWEN_32B, "30B-MoE": QWEN_30B_MOE}


def write_hollow(folder: Path, config: dict[str, Any]) -> Path:
    """Writes a checkpoint of bfloat16 as a header and a hole: the shapes come from a model on the `meta` device."""
    settings = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    written = json.dumps(header).encode()
    folder.mkdir(parents=True)
    settings.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(written)) + written)
    os.truncate(folder / "model.safetensors", 8 + len(written) + end)
    return folder


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Three sources and no base of a size, in a search of the tiny family's form."""
    root = tmp_path_factory.mktemp("hollow")

    def make(size: str, device: str = "cuda", **changes: Any) -> dict[str, Any]:
        family = {name: root / size / name for name in ("base", "a", "b", "c")}
        for folder in [] if family["a"].exists() else family.values():
            write_hollow(folder, MODELS[size])
        own = {"models__base": ..., "space__methods": ["linear"], "evaluation__device": device}
        dtype = {"cuda": "bfloat16", "cpu": "float32"}[device]
        return search_spec(family, **{**own, "evaluation__dtype": dtype, **changes})

    return make


def needs(given: dict[str, Any], host: float, device: float | None = None) -> Needs:
    spec = parse_spec(given)
    checkpoints = open_checkpoints(spec.models.sources.values())
    machine = Machine(int(host * 1e9), None if device is None else int(device * 1e9))
    return search_needs(spec, checkpoints, next(iter(checkpoints.values())), machine)


def test_7b_with_three_sources_fits_a_device_of_24_gb_and_64_gb(spec_of: Callable[..., Any]) -> None:
    planned = needs(spec_of("7B"), 64, 24)
    planned.check()
    assert planned.device["a candidate's weights"] == pytest.approx(13.48e9, rel=0.01)  # 6.74e9 parameters
    assert sum(planned.device.values()) <= 24e9
    assert sum(planned.sources.values()) == pytest.approx(3 * 13.48e9, rel=0.01)
    assert planned.sources["device"] > 3e9  # what is left of 24 GB
    assert planned.sources["pinned"] == pytest.approx(32e9)  # half of the host
    assert planned.sources["read"] == 0
    assert 3 < planned.seconds < 6  # 32 GB over a bus of 10 GB/s


def test_more_memory_keeps_sources_nearer(spec_of: Callable[..., Any]) -> None:
    large, small = needs(spec_of("7B"), 64, 80), needs(spec_of("7B"), 16, 24)
    assert large.sources["pinned"] == large.sources["mapped"] == 0
    assert large.seconds < 0.1
    assert small.sources["read"] > 0
    assert small.seconds > 10


@pytest.mark.parametrize(("size", "weights"), [("32B", 65.5), ("30B-MoE", 61.1)])
def test_a_candidate_larger_than_the_device_is_refused_with_the_numbers(
    spec_of: Callable[..., Any], size: str, weights: float
) -> None:
    planned = needs(spec_of(size), 64, 24)
    with pytest.raises(SpecError, match=rf"GB of device memory are needed, 24.0 GB there: .*weights {weights} GB"):
        planned.check()
    needs(spec_of(size), 256, 80).check()


def test_on_a_processor_weights_count_and_mapped_files_do_not(spec_of: Callable[..., Any]) -> None:
    given = spec_of("7B", "cpu")  # float32: 27 GB
    needs(given, 32).check()
    with pytest.raises(SpecError, match=r"GB of host memory are needed, 24.0 GB there: .*weights 27.0 GB"):
        needs(given, 24).check()
    needs(spec_of("7B", "cpu", evaluation__dtype="bfloat16"), 24).check()
    with pytest.raises(SpecError, match=r"weights 53.9 GB"):
        needs(spec_of("7B", "cpu", run__workers=2), 32).check()


def test_check_plans_from_headers_alone(
    spec_of: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(json.dumps(spec_of("7B", evaluation__tasks=["no_such_task"])))
    ended = invoke(capsys, "check", path, "--device-memory", "24", "--host-memory", "64")
    assert ended.code == 0, ended.err
    assert "device memory: 24.0 GB of 24.0 GB: a candidate's weights 13.5 GB" in ended.out
    assert "32.0 GB in pinned host memory" in ended.out
    assert "to materialise a candidate: about" in ended.out
    ended = invoke(capsys, "check", path, "--device-memory", "12")
    assert ended.code == 2
    assert "of device memory are needed, 12.0 GB there" in ended.err
