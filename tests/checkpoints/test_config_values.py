"""Values of config.json that no model has are told by their key; those of real models pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.config_values import transformers_config
from evomerge.checkpoints.module_names import head_name
from evomerge.errors import CheckpointError

WRONG = [
    *(("hidden_size", value) for value in (-1, 0, "64", 1.5, True, 2**40, [-1])),
    *(("num_attention_heads", 0), ("num_hidden_layers", 10**9), ("num_hidden_layers", -1), ("vocab_size", "many")),
    *(("model_type", ["llama"]), ("model_type", 3), ("architectures", "Llama"), ("architectures", [3])),
    *(("dtype", "os.system"), ("torch_dtype", 32), ("dtype", ["float32"])),
    ("text_config", {"hidden_size": -1}),
]


def altered(folder: Path, target: Path, **values: Any) -> Path:
    new = Path(shutil.copytree(folder, target))
    config = json.loads((new / "config.json").read_text()) | values
    (new / "config.json").write_text(json.dumps(config))
    return new


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_a_wrong_value_is_told_by_its_key(tiny_family: dict[str, Path], tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {key}(\.hidden_size)?: expected "):
        open_checkpoint(str(altered(tiny_family["a"], tmp_path / "m", **{key: value})))


@pytest.mark.parametrize("value", [None, [2, 2], [None, 2], {"a": 1}])
def test_what_architectures_leave_open_passes(tiny_family: dict[str, Path], tmp_path: Path, value: Any) -> None:
    open_checkpoint(str(altered(tiny_family["a"], tmp_path / "m", num_key_value_heads=value, dtype=None)))


def test_the_usual_configs_pass(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    for k, kind in enumerate(("LlamaConfig", "GPT2Config", "MambaConfig", "T5Config", "Qwen2VLConfig", "Gemma3Config")):
        values = getattr(transformers, kind)().to_dict()
        open_checkpoint(str(altered(tiny_family["a"], tmp_path / f"m{k}", **values)))


def test_more_layers_than_the_weights_have(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    model = open_checkpoint(str(altered(tiny_family["a"], tmp_path / "m", num_hidden_layers=99)))
    with pytest.raises(
        CheckpointError, match=r"config\.json: num_hidden_layers: is 99, and the weights have \d layers"
    ):
        model.load_config()


def test_weights_that_a_damaged_header_calls_whole_numbers(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    folder = altered(tiny_family["a"], tmp_path / "m", dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("norm.weight"))
    save_file({**tensors, name: tensors[name].float().view(torch.int32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is I32, and config.json says float32"):
        open_checkpoint(str(folder))


def test_no_config_names_code_that_computes_attention(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    wanted = {"attn_implementation": "stranger/kernel", "_attn_implementation": "stranger/kernel", "use_kernels": True}
    model = open_checkpoint(str(altered(tiny_family["a"], tmp_path / "m", **wanted)))
    resolved = transformers_config(model.config)
    assert "stranger" not in str(vars(resolved))


def test_a_model_is_built_for_its_names_without_code_that_its_config_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    make = transformers.AutoConfig.for_model

    def spy(*args: Any, **settings: Any) -> Any:
        asked.append(set(settings))
        return make(*args, **settings)

    monkeypatch.setattr(transformers.AutoConfig, "for_model", spy)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 33}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 16, **sizes}
    assert head_name({**config, "attn_implementation": "somebody/kernel"}) == "lm_head.weight"
    assert any("hidden_size" in settings for settings in asked)
    assert not any("attn_implementation" in settings for settings in asked)
