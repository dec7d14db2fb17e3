"""config.json of a merge: depth, lists with an entry a layer, and dtype agree with the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from evomerge.engine.resident import Resident
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from tests.engine.recipes import layers, opened, plan_of, single


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models whose config says layer by layer which attention is used."""
    import torch

    root = tmp_path_factory.mktemp("windowed")
    kinds = {"a": ["full_attention", "sliding_attention"] * 2, "b": ["full_attention"] * 4}
    for seed, (name, types) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=0,
            layer_types=types,
        )
        Qwen3ForCausalLM(config).save_pretrained(root / name)
    return {name: root / name for name in kinds}


def test_lists_follow_the_layers(windowed: dict[str, Path], tmp_path: Path) -> None:
    """Each layer keeps the attention that it was trained with, from the model that it comes from."""
    import torch

    recipe = layers((windowed["a"], 1, 4), (windowed["b"], 1, 2), (windowed["a"], 1, 2))
    plan = plan_of(recipe)
    full, window = "full_attention", "sliding_attention"
    assert plan.config["layer_types"] == [window, full, window, full, window]
    assert plan.config["num_hidden_layers"] == 5
    model, _ = Resident(opened(str(folder) for folder in windowed.values())).write(plan)
    kinds = [layer.self_attn.sliding_window for layer in model.model.layers]  # type: ignore[union-attr]
    assert kinds == [4, None, 4, None, 4]
    loaded = AutoModelForCausalLM.from_pretrained(merge_to_folder(parse_recipe(recipe), tmp_path / "out"))
    tokens = torch.arange(20).view(1, 20)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, loaded(tokens).logits)
        stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["layer_types"] == plan.config["layer_types"]


def test_the_reference_is_not_touched(windowed: dict[str, Path]) -> None:
    checkpoints = opened([str(windowed["a"])])
    before = json.dumps(checkpoints[str(windowed["a"])].config)
    plan_of(layers((windowed["a"], 0, 1)), checkpoints)
    assert json.dumps(checkpoints[str(windowed["a"])].config) == before


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({}, {"dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32", "num_hidden_layers": 4}},
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "num_hidden_layers": 4}},
        ),
    ],
)
def test_dtype_is_the_weights(tiny_family: dict[str, Path], written: dict[str, Any], expected: dict[str, Any]) -> None:
    checkpoints = opened([str(tiny_family["a"])])
    checkpoint = checkpoints[str(tiny_family["a"])]
    checkpoint.config = {"model_type": "llama", "_name_or_path": "/home/me", "quantization_config": {}} | written
    plan = plan_of(single(tiny_family["a"], out_dtype="bfloat16"), checkpoints)
    assert plan.config == {"model_type": "llama"} | expected
