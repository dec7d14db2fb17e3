"""Layers that move keep what they do, or the move is refused by name: numbers decide more than any config says."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoints
from evomerge.engine.described_model import refuse_moved_layers
from evomerge.errors import RecipeError
from evomerge.planning.plan import align_and_plan
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOW = {"head_dim": 8, "sliding_window": 4}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
DEEPSEEK = MOE | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
LLAMA4 = {
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "interleave_moe_layer_step": 2,
    "head_dim": 8,
    "attention_chunk_size": 8,
    "no_rope_layers": [1, 0, 1, 0],
}
GEMMA3N = {
    "intermediate_size": [48] * 4,
    "vocab_size_per_layer_input": 60,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LISTS = ("layer_types", "no_rope_layers", "moe_layers")
# What the Hub's files leave out is taken out of config.json: the third entry.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], bool]] = {
    "llama": ("Llama", {}, (), True),
    "gemma2": ("Gemma2", WINDOW, ("layer_types",), True),
    "cohere2": ("Cohere2", {"sliding_window": 4}, ("layer_types",), True),
    "qwen2": ("Qwen2", WINDOW | {"use_sliding_window": True, "max_window_layers": 2}, ("layer_types",), True),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}, LISTS, True),
    "qwen3_moe": ("Qwen3Moe", MOE | {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [1]}, (), True),
    "llama4": ("Llama4Text", LLAMA4, ("moe_layers",), True),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK, (), False),
    "gemma3n": ("Gemma3nText", GEMMA3N, (), False),
}


def write(name: str, folder: Path) -> Any:
    kind, more, left_out, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(T, f"{kind}Config")(**{**SMALL, **more})
    model = T.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k not in left_out}))
    return T.AutoModelForCausalLM.from_pretrained(folder).eval()


def stack(folder: Path, *spans: tuple[int, int]) -> Any:
    rows = [{"sources": [{"model": str(folder), "layer_range": list(span)}]} for span in spans]
    return parse_recipe({"merge_method": "passthrough", "slices": rows})


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 23).view(1, -1)
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return result


@pytest.mark.parametrize("name", MODELS)
def test_layers_keep_what_they_do_or_are_refused(name: str, tmp_path: Path) -> None:
    model = write(name, tmp_path / "m")
    same = merge_to_folder(stack(tmp_path / "m", (0, 2), (2, 4)), tmp_path / "same")
    before, after = load_file(tmp_path / "m" / "model.safetensors"), load_file(same / "model.safetensors")
    assert {k: v.tolist() for k, v in before.items()} == {k: v.tolist() for k, v in after.items()}
    moved = stack(tmp_path / "m", (0, 2), (0, 2), (2, 4))
    if not MODELS[name][3]:
        with pytest.raises(RecipeError, match=r"layer \d of the output is layer \d|with its layers moved, the model"):
            merge_to_folder(moved, tmp_path / "out")
        return
    out = merge_to_folder(moved, tmp_path / "out")
    merged, report = T.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    order = [0, 1, 0, 1, 2, 3]
    by_hand = copy.deepcopy(merged)
    by_hand.model.layers = torch.nn.ModuleList(copy.deepcopy(model.model.layers[i]) for i in order)
    by_hand.config.layer_types = [model.config.layer_types[i] for i in order] if "layer_types" in model.config else None
    for number, layer in enumerate(by_hand.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    if name in ("llama4", "qwen3_moe"):  # 16 experts' sums in another order
        torch.testing.assert_close(logits(merged), logits(by_hand), atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(logits(merged), logits(by_hand))


def test_decays_that_no_file_has_are_not_computed_from_another_number(
    family_of: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    folder = shutil.copytree(family_of("minimax")["a"], tmp_path / "m")
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.endswith(("decay", "slope_rate"))}, file)
    assert merge_to_folder(stack(folder, (0, 2)), tmp_path / "same")
    with pytest.raises(RecipeError, match=r"slope_rate.* follow from the number of their layer, and no file has them"):
        merge_to_folder(stack(folder, (0, 2), (0, 2)), tmp_path / "out")


def test_what_transformers_does_not_know_is_not_judged(tmp_path: Path) -> None:
    write("llama", tmp_path / "m")
    recipe = stack(tmp_path / "m", (0, 2), (1, 4))
    (model,) = open_checkpoints(recipe.models()).values()
    model.config |= {"model_type": "nobody's", "architectures": ["NobodysModel"]}
    plan, aligned, _ = align_and_plan(recipe, {model.reference: model}, identify=False)
    refuse_moved_layers(plan, aligned)


def test_index_lists_and_words_follow_the_layers(tmp_path: Path) -> None:
    """Layers listed by their numbers, one letter a layer, and how many come first."""
    write("llama", tmp_path / "m")
    recipe = stack(tmp_path / "m", (0, 2), (1, 4))  # 0 1 1 2 3
    (opened,) = open_checkpoints(recipe.models()).values()
    content = {"attn_layer_indices": [1, 3], "hybrid_override_pattern": "M-*E", "mlp_only_layers": [], "num_layers": 4}
    content |= {"eos_token_id": [1, 2, 3, 0], "time_step_limit": [0, 1, 2, 3], "first_k_dense_replace": 2}
    model = Checkpoint(opened.reference, opened.folder, content, opened.weights)
    plan, _, _ = align_and_plan(recipe, {model.reference: model}, identify=False)
    assert {key: plan.config[key] for key in content} == content | {
        "attn_layer_indices": [1, 2, 4],
        "hybrid_override_pattern": "M--*E",
        "first_k_dense_replace": 3,
        "num_layers": 5,
    }
