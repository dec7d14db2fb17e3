"""Mean inputs of a model's matrices: beside a pass by hand, and on to a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import evomerge
from evomerge.errors import BadInput

TEXTS = ("two and two are four", "the cat", "")


def test_means_are_over_all_tokens(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_family["base"]
    means = load_file(evomerge.mean_inputs(str(base), TEXTS, tmp_path / "means.safetensors"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).float(), AutoTokenizer.from_pretrained(base)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    with torch.inference_mode():  # what the first layer's norm gives is what its projections read
        states = [model(torch.tensor([one]), output_hidden_states=True).hidden_states[0] for one in ids if one]
        first = torch.cat([model.model.layers[0].input_layernorm(state)[0] for state in states]).abs().mean(0)
    torch.testing.assert_close(means["model.layers.0.self_attn.q_proj.weight"], first, rtol=1e-5, atol=1e-6)
    assert torch.equal(means["model.layers.0.self_attn.k_proj.weight"], means["model.layers.0.self_attn.q_proj.weight"])
    assert {name for name, value in model.state_dict().items() if value.dim() == 2} >= set(means)
    assert not any("embed" in name or "norm" in name for name in means)


def test_a_merge_reads_them(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    file = evomerge.mean_inputs(str(tiny_family["base"]), TEXTS, tmp_path / "means.safetensors")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tiny_family["base"]),
        "models": [{"model": str(tiny_family[name]), "parameters": {"weight": 0.5}} for name in "ab"],
    }
    plain = load_file(evomerge.merge(recipe, tmp_path / "plain") / "model.safetensors")
    aim = evomerge.merge(recipe | {"after": ["aim"], "activations": str(file)}, tmp_path / "aim")
    changed = {name for name, value in load_file(aim / "model.safetensors").items() if not value.equal(plain[name])}
    assert changed == set(load_file(file)) & set(plain)


def test_no_text_is_refused(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="texts: give at least one that has a token"):
        evomerge.mean_inputs(str(tiny_family["base"]), [""], tmp_path / "means.safetensors")
