"""LoRA references against PEFT's own merge and the fine-tunes they came from, and the adapters that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from evomerge.errors import CheckpointError
from tests.architectures import ARCHITECTURES
from tests.models import byte_tokenizer, write_tiny_llama

ROOT = Path(__file__).resolve().parent.parent.parent
REAL = ROOT / "models"
REAL_ADAPTERS = REAL / "adapters"  # of examples/real/build_models.py --adapters


def _train(base: Path, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Saves an adapter with random weights on `base`; returns the tensors that PEFT makes of the two."""
    torch.manual_seed(7)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    merged: dict[str, torch.Tensor] = loaded.merge_and_unload().state_dict()
    return merged


def _compare(model: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    for name in model.tensors:
        torch.testing.assert_close(model.tensor(name), expected[name], rtol=1e-6, atol=1e-7)
        assert tuple(model.tensor(name).shape) == model.tensors[name].shape


LINEAR = ["q_proj", "v_proj", "o_proj", "down_proj"]


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12, "target_modules": LINEAR},
        {"r": 4, "lora_alpha": 12, "target_modules": LINEAR, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 12,
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3},
            "alpha_pattern": {"model.layers.0.mlp.down_proj": 5, "o_proj": 6},
        },
        {"r": 2, "target_modules": "all-linear", "modules_to_save": ["norm", "input_layernorm"]},
        {"r": 3, "lora_alpha": 12, "target_modules": LINEAR, "use_dora": True},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save", "dora"],
)
def test_as_peft_merges(tiny_family: dict[str, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = _train(tiny_family["base"], tmp_path / "adapter", **settings)
    base = open_checkpoint(str(tiny_family["base"]))
    model = open_checkpoint(f"{tiny_family['base']}+{tmp_path / 'adapter'}")
    _compare(model, expected)
    assert list(model.tensors) == list(base.tensors)
    assert not torch.equal(model.tensor("model.layers.0.self_attn.q_proj.weight"), base.tensor(model.layout.names[-5]))
    assert model.layout.tied_head
    assert model.config == base.config


TABLES = ["embed_tokens", "lm_head"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT: the embedding is saved with the adapter; the head is tied
@pytest.mark.parametrize(
    ("settings", "added", "tied"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, 0, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, 0, False),
        ({"target_modules": ["q_proj", "lm_head"]}, 0, False),
        ({"target_modules": ["q_proj", *TABLES]}, 0, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, 0, False),
        ({"target_modules": ["q_proj"], "modules_to_save": TABLES}, 0, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, 0, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 5, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, 0, True),
        ({"target_modules": ["q_proj"], "modules_to_save": TABLES}, 5, False),
        ({"target_modules": ["q_proj", *TABLES]}, 5, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, 5, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, 5, False),
    ],
)
def test_tables_of_tokens_as_the_live_model_has_them(
    tiny_family: dict[str, Path], tmp_path: Path, settings: dict[str, Any], added: int, tied: bool
) -> None:
    """The head of a tied base goes on using the base's matrix, unless PEFT ties the two; rows may be added."""
    base = AutoModelForCausalLM.from_pretrained(tiny_family["base"])
    rows = base.config.vocab_size + added
    if added:
        base.resize_token_embeddings(rows)
    live: Any = get_peft_model(base, LoraConfig(r=2, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    live.save_pretrained(tmp_path / "adapter")
    model = open_checkpoint(f"{tiny_family['base']}+{tmp_path / 'adapter'}")
    assert (model.layout.tied_head, model.config["tie_word_embeddings"]) == (tied, tied)
    assert (model.config["vocab_size"], model.tensors["model.embed_tokens.weight"].shape[0]) == (rows, rows)
    state = {name: model.tensor(name) for name in model.tensors}
    model.load_config().save_pretrained(tmp_path / "out")
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "out" / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(again(ids).logits, live.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_base_that_stores_a_copy_of_its_head(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    tensors = _tensors(tiny_family["base"])
    table = tensors["model.embed_tokens.weight"]
    (tmp_path / "base").mkdir()
    save_file(tensors | {"lm_head.weight": table.clone()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text((tiny_family["base"] / "config.json").read_text())
    _write(tmp_path / "a", {"base_model.model.model.embed_tokens.weight": table + 1})
    model = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'a'}")
    assert model.config["tie_word_embeddings"] is False
    assert torch.equal(model.tensor("lm_head.weight"), table)


def test_names_as_in_memory(tmp_path: Path) -> None:
    """Of a vision-language model, whose files name the modules otherwise than PEFT saw them."""
    architecture = ARCHITECTURES["llava"]
    architecture.build().save_pretrained(tmp_path / "base")
    base = open_checkpoint(str(tmp_path / "base"))
    key = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    shape = (2, 16)
    a, b = torch.ones(shape), torch.ones(shape[::-1])
    _write(tmp_path / "a", {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b})
    model = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'a'}")
    changed = [name for name in base.tensors if not torch.equal(base.tensor(name), model.tensor(name))]
    assert [name.endswith("layers.1.self_attn.q_proj.weight") and "vision" not in name for name in changed] == [True]


def test_a_tokenizer_of_its_own(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    _write(tmp_path / "a", {"base_model.model.model.norm.weight": torch.ones(32)})
    reference = f"{tiny_family['base']}+{tmp_path / 'a'}"
    assert open_checkpoint(reference).load_tokenizer().folder == tiny_family["base"]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "a")
    model = open_checkpoint(reference)
    assert model.load_tokenizer().chat_template == tokenizer.chat_template
    assert {path.parent for path in model.tokenizer_files} == {tmp_path / "a"}
    assert model.folder == tiny_family["base"]


def test_biases(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", attention_bias=True)
    settings = {"r": 2, "target_modules": ["q_proj"]}
    for bias in ("all", "lora_only"):
        expected = _train(base, tmp_path / bias, bias=bias, **settings)
        model = open_checkpoint(f"{base}+{tmp_path / bias}")
        _compare(model, expected)
        name = "model.layers.0.self_attn.q_proj.bias"
        assert not torch.equal(model.tensor(name), open_checkpoint(str(base)).tensor(name))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT: fan_in_fan_out is set for it
def test_weights_stored_as_in_by_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    settings = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    expected = _train(tmp_path / "base", tmp_path / "adapter", **settings)
    _compare(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"), expected)
    # A base saved from the bare model lacks the first part of every name.
    bare = {name.removeprefix("transformer."): value for name, value in _tensors(tmp_path / "base").items()}
    save_file(bare, tmp_path / "bare.safetensors")
    model = open_checkpoint(f"{tmp_path / 'bare.safetensors'}+{tmp_path / 'adapter'}")
    _compare(model, {name.removeprefix("transformer."): value for name, value in expected.items()})


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_head_of_its_own_unties_it(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    base = open_checkpoint(str(tiny_family["base"]))
    head = torch.full(base.tensors["model.embed_tokens.weight"].shape, 0.5)
    _write(tmp_path / "a", {"base_model.model.lm_head.modules_to_save.weight": head})
    model = open_checkpoint(f"{tiny_family['base']}+{tmp_path / 'a'}")
    assert torch.equal(model.tensor("lm_head.weight"), head)
    assert (model.layout.tied_head, model.layout.head) == (False, "lm_head.weight")
    assert model.config["tie_word_embeddings"] is False
    # Factors on the head start from the embedding that the base ties it to.
    a, b = torch.ones(2, 32), torch.ones(head.shape[0], 2)
    prefix = "base_model.model.lm_head"
    _write(tmp_path / "b", {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, r=2, lora_alpha=3)
    model = open_checkpoint(f"{tiny_family['base']}+{tmp_path / 'b'}")
    embedding = base.tensor("model.embed_tokens.weight")
    assert torch.equal(model.tensor("model.embed_tokens.weight"), embedding)
    torch.testing.assert_close(model.tensor("lm_head.weight"), embedding + 1.5 * 2)


def test_a_saved_copy_of_the_tied_embedding_does_not_untie(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    table = torch.ones(259, 32)
    saved = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    _write(tmp_path / "a", {f"base_model.model.{name}": value for name, value in saved.items()})
    model = open_checkpoint(f"{tiny_family['base']}+{tmp_path / 'a'}")
    assert model.layout.tied_head
    assert torch.equal(model.tensor("model.embed_tokens.weight"), table)


def test_rounded_once(tmp_path: Path) -> None:
    """bf16 has 8 bits: 256 + 0.75 + 0.75 is 258 when rounded once, 256 when rounded after each addition."""
    save_file({"layers.weight": torch.full((1, 1), 256.0, dtype=torch.bfloat16)}, tmp_path / "base.safetensors")
    a = torch.full((2, 1), 1.0, dtype=torch.bfloat16)
    b = torch.full((1, 2), 0.75, dtype=torch.bfloat16)
    _write(tmp_path / "a", {"base_model.model.layers.lora_A.weight": a, "base_model.model.layers.lora_B.weight": b})
    model = open_checkpoint(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'a'}")
    assert model.tensor("layers.weight").item() == 258.0
    assert model.tensor("layers.weight").dtype == torch.bfloat16


def test_several_adapters_and_plus_signs_in_names(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    key = "base_model.model.model.norm.weight"
    _write(tmp_path / "one", {key: torch.full((32,), 2.0)})
    _write(tmp_path / "c++", {key.replace("model.norm", "model.layers.0.input_layernorm"): torch.full((32,), 3.0)})
    both = open_checkpoint(f"{tiny_family['base']}+one+c++", beside=tmp_path)
    assert both.tensor("model.norm.weight")[0] == 2
    assert both.tensor("model.layers.0.input_layernorm.weight")[0] == 3
    assert len(both.files) == 3
    copy = tmp_path / "a+b"
    copy.mkdir()
    (copy / "model.safetensors").symlink_to(tiny_family["base"] / "model.safetensors")
    assert len(open_checkpoint("a+b", beside=tmp_path).files) == 1
    assert open_checkpoint("a+b+one", beside=tmp_path).tensor("model.norm.weight")[0] == 2


def test_fingerprint(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.o_proj"
    factors = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    _write(tmp_path / "one", factors)
    _write(tmp_path / "same", factors, lora_dropout=0.3, base_model_name_or_path="elsewhere")
    _write(tmp_path / "scale", factors, lora_alpha=5)
    _write(tmp_path / "values", {name: 2 * value for name, value in factors.items()})
    base, other = tiny_family["base"], tiny_family["a"]
    found = {
        name: open_checkpoint(reference).fingerprint
        for name, reference in {
            "base": str(base),
            "one": f"{base}+{tmp_path / 'one'}",
            "same": f"{base}+{tmp_path / 'same'}",
            "scale": f"{base}+{tmp_path / 'scale'}",
            "values": f"{base}+{tmp_path / 'values'}",
            "other": f"{other}+{tmp_path / 'one'}",
        }.items()
    }
    assert found["one"] == found["same"]
    assert len(set(found.values())) == len(found) - 1


def _write(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3': only LORA"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is not supported"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters is not supported"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices must list rows"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"use_qalora": True}, "use_qalora is not supported"),
        ({"use_something_new": True}, "use_something_new is not supported"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base too"),
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"lora_alpha": "big"}, "lora_alpha must be a number, got 'big'"),
        ({"rank_pattern": [1]}, "rank_pattern must map"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern: 'q' has 0"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is no regular expression"),
        ({"r": 3}, "o_proj has rank 2, adapter_config.json says 3"),
    ],
)
def test_refuses_settings(tiny_family: dict[str, Path], tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    key = "base_model.model.model.layers.0.self_attn.o_proj"
    _write(
        tmp_path / "a",
        {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)},
        **settings,
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(f"{tiny_family['base']}+{tmp_path / 'a'}")


_O = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{_O}.lora_A.weight": (2, 32)}, "o_proj has lora_A alone"),
        ({f"{_O}.lora_A.weight": (2, 31), f"{_O}.lora_B.weight": (32, 2)}, "B·A has shape 32x31, .* has 32x32"),
        ({f"{_O}.lora_A.weight": (2, 32, 1, 1), f"{_O}.lora_B.weight": (32, 2)}, "o_proj is no linear layer"),
        ({f"{_O}.lora_magnitude_vector": (32,)}, "o_proj has lora_magnitude_vector alone"),
        ({f"{_O}.lora_B.bias": (32,)}, "the base has no tensor for .*lora_B.bias"),
        ({f"{_O[:-2]}x.lora_A.weight": (2, 32), f"{_O[:-2]}x.lora_B.weight": (32, 2)}, "the base has no tensor for"),
        (
            {"base_model.model.model.embed_tokens.weight": (260, 32)},
            "changes the number of tokens in some tensors only",
        ),
        ({"base_model.model.model.embed_tokens.weight": (259, 31)}, "has shape 259x31, .* of the base has 259x32"),
        ({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 32)}, "names 0 rows"),
    ],
)
def test_refuses_what_does_not_fit(
    tiny_family: dict[str, Path], tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    _write(tmp_path / "a", {name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(f"{tiny_family['base']}+{tmp_path / 'a'}")


def test_refuses_quantised_bases(tmp_path: Path) -> None:
    save_file({"layers.weight": torch.ones(4, 4, dtype=torch.uint8)}, tmp_path / "base.safetensors")
    key = "base_model.model.layers"
    _write(tmp_path / "a", {f"{key}.lora_A.weight": torch.ones(2, 4), f"{key}.lora_B.weight": torch.ones(4, 2)})
    with pytest.raises(CheckpointError, match="is U8, not a float type"):
        open_checkpoint(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'a'}")


def test_adapters_that_are_none(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_family["base"]
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json"):
        open_checkpoint(f"{base}+{tiny_family['a']}")
    with pytest.raises(CheckpointError, match="no such model: 'nowhere'"):
        open_checkpoint(f"{base}+nowhere")
    adapter = _write(tmp_path / "a", {})
    with pytest.raises(CheckpointError, match=f"is an adapter, not a model: write BASE\\+{adapter}"):
        open_checkpoint(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        open_checkpoint(f"{base}+{adapter}")


def test_pickled_adapters_need_leave(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    adapter = _write(tmp_path / "a", {})
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.model.norm.weight": torch.full((32,), 2.0)}, adapter / "adapter_model.bin")
    reference = f"{tiny_family['base']}+{adapter}"
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is a pickle"):
        open_checkpoint(reference)
    assert open_checkpoint(reference, allow_pickle=True).tensor("model.norm.weight")[0] == 2


@pytest.mark.real
@pytest.mark.skipif(
    not ((REAL / "math").is_dir() and (REAL_ADAPTERS / "math").is_dir()), reason="the real models are not built"
)
def test_a_real_adapter_gives_its_fine_tune_exactly() -> None:
    merged = open_checkpoint(str(REAL / "math"))
    applied = open_checkpoint(f"{REAL / 'base'}+{REAL_ADAPTERS / 'math'}")
    assert list(applied.tensors) == list(merged.tensors)
    for name in merged.tensors:
        assert applied.tensor(name).dtype == torch.bfloat16
        assert torch.equal(applied.tensor(name), merged.tensor(name)), name
