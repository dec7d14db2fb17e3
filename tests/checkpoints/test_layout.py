"""The structure of models from names and shapes, on state dicts made from transformers' own configs (meta device)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.layout import Layout, Stack, layout_of, residual_writers, vocabulary_tensors

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_PLAIN = {key: _SMALL[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}


@dataclass(frozen=True)
class Family:
    """One architecture: how to build it, and what its structure is known to be."""

    config: str
    model: str
    options: dict[str, Any]
    stack: str
    writers: set[str]  # within a layer
    attention: str  # one tensor of each group, within a layer
    mlp: str
    tied: bool = False
    stacks: int = 1
    after: set[str] = field(default_factory=lambda: {"model.norm.weight", "lm_head.weight"})


def _llama_like(name: str, **changes: Any) -> Family:
    values: dict[str, Any] = {
        "config": f"{name}Config",
        "model": f"{name}ForCausalLM",
        "options": _GROUPED,
        "stack": "model.layers",
        "writers": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
        "attention": "self_attn.q_proj.weight",
        "mlp": "mlp.up_proj.weight",
    }
    return Family(**(values | changes))


_DENSE_4H = {
    "self_attention.dense.weight",
    "self_attention.dense.bias",
    "mlp.dense_4h_to_h.weight",
    "mlp.dense_4h_to_h.bias",
}
_POST_NORMS = {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight"}
_LN_F = {"transformer.ln_f.weight", "transformer.ln_f.bias"}

FAMILIES = {
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral"),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3", options=_GROUPED | {"head_dim": 8}),
    "gemma2": _llama_like(
        "Gemma2", options=_GROUPED | {"head_dim": 8}, writers=_POST_NORMS, tied=True, after={"model.norm.weight"}
    ),
    "gemma3": _llama_like(
        "Gemma3Text",
        model="Gemma3ForCausalLM",
        options=_GROUPED | {"head_dim": 8},
        writers=_POST_NORMS,
        tied=True,
        after={"model.norm.weight"},
    ),
    "olmo2": _llama_like("Olmo2", writers=_POST_NORMS),
    "glm4": _llama_like(
        "Glm4",
        options=_GROUPED | {"head_dim": 8},
        writers={"post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"},
        mlp="mlp.gate_up_proj.weight",
    ),
    "phi": _llama_like(
        "Phi",
        writers={"self_attn.dense.weight", "self_attn.dense.bias", "mlp.fc2.weight", "mlp.fc2.bias"},
        mlp="mlp.fc1.bias",
        after={"model.final_layernorm.weight", "model.final_layernorm.bias", "lm_head.weight", "lm_head.bias"},
    ),
    "phi3": _llama_like("Phi3", attention="self_attn.qkv_proj.weight", mlp="mlp.gate_up_proj.weight"),
    "mixtral": _llama_like(
        "Mixtral",
        options=_GROUPED | {"num_local_experts": 4},
        writers={"self_attn.o_proj.weight", "mlp.experts.down_proj"},
        mlp="mlp.gate.weight",
    ),
    "qwen2_moe": _llama_like(
        "Qwen2Moe",
        options=_GROUPED | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        writers={"self_attn.o_proj.weight", "mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight"},
        mlp="mlp.shared_expert_gate.weight",
    ),
    "gpt2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        _PLAIN | {"n_embd": 32, "n_layer": 3, "n_head": 4},
        "transformer.h",
        {"attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"},
        "attn.c_attn.weight",
        "mlp.c_fc.weight",
        tied=True,
        after=_LN_F,
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        _SMALL,
        "gpt_neox.layers",
        {name.replace("self_attention", "attention") for name in _DENSE_4H},
        "attention.query_key_value.weight",
        "mlp.dense_h_to_4h.weight",
        after={"gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias", "lm_head.weight"},
    ),
    "bloom": Family(
        "BloomConfig",
        "BloomForCausalLM",
        _PLAIN | {"hidden_size": 32, "n_layer": 3, "n_head": 4},
        "transformer.h",
        _DENSE_4H,
        "self_attention.query_key_value.weight",
        "mlp.dense_h_to_4h.weight",
        tied=True,
        after=_LN_F,
    ),
    "falcon": Family(
        "FalconConfig",
        "FalconForCausalLM",
        _PLAIN | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
        "transformer.h",
        {"self_attention.dense.weight", "mlp.dense_4h_to_h.weight"},
        "self_attention.query_key_value.weight",
        "mlp.dense_h_to_4h.weight",
        tied=True,
        after=_LN_F,
    ),
    "opt": Family(
        "OPTConfig",
        "OPTForCausalLM",
        _PLAIN
        | {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 3}
        | {"num_attention_heads": 4},
        "model.decoder.layers",
        {"self_attn.out_proj.weight", "self_attn.out_proj.bias", "fc2.weight", "fc2.bias"},
        "self_attn.k_proj.weight",
        "fc1.weight",
        tied=True,
        after={"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"},
    ),
    "mamba": Family(
        "MambaConfig",
        "MambaForCausalLM",
        _PLAIN | {"hidden_size": 32, "num_hidden_layers": 3},
        "backbone.layers",
        {"mixer.out_proj.weight"},
        "mixer.A_log",
        "",
        tied=True,
        after={"backbone.norm_f.weight"},
    ),
    "bert": Family(
        "BertConfig",
        "BertModel",
        _SMALL,
        "encoder.layer",
        {"attention.output.dense.weight", "attention.output.dense.bias", "output.dense.weight", "output.dense.bias"},
        "attention.self.query.weight",
        "intermediate.dense.weight",
        tied=True,  # config.json says so of a model without a head, too
        after={"pooler.dense.weight", "pooler.dense.bias"},
    ),
    "vit": Family(
        "ViTConfig",
        "ViTForImageClassification",
        {key: _SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        "vit.layers",
        {"attention.o_proj.weight", "attention.o_proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"},
        "attention.q_proj.weight",
        "mlp.fc1.weight",
        after={"vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight", "classifier.bias"},
    ),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        _PLAIN | {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 3, "num_heads": 4},
        "decoder.block",
        {"layer.0.SelfAttention.o.weight", "layer.1.EncDecAttention.o.weight", "layer.2.DenseReluDense.wo.weight"},
        "layer.1.EncDecAttention.k.weight",
        "layer.2.DenseReluDense.wi.weight",
        tied=True,
        stacks=2,
        after={"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"},
    ),
}
each_family = pytest.mark.parametrize("name", list(FAMILIES))


@cache
def _build(name: str) -> tuple[dict[str, TensorSpec], dict[str, Any], Layout]:
    """Tensors as a checkpoint stores them (a tied tensor once), config and layout."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**family.options)
    with torch.device("meta"):
        model = getattr(transformers, family.model)(config)
    model.tie_weights()
    stored: dict[str, TensorSpec] = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            stored[key] = TensorSpec(key, tuple(tensor.shape), "F32")
        seen.add(id(tensor))
    settings = config.to_dict()
    return stored, settings, layout_of(stored, settings)


@each_family
def test_stack(name: str) -> None:
    family, (_, _, layout) = FAMILIES[name], _build(name)
    assert Stack(family.stack, 3) in layout.stacks
    assert len(layout.stacks) == family.stacks
    assert layout.main == (Stack(family.stack, 3) if family.stacks == 1 else None)
    assert layout.layer_count == (3 if family.stacks == 1 else 0)


@each_family
def test_groups_and_positions(name: str) -> None:
    family, (tensors, _, layout) = FAMILIES[name], _build(name)
    places = {tensor: layout.locate(tensor) for tensor in tensors}
    assert places[f"{family.stack}.2.{family.attention}"].group == "attention"
    if family.mlp:
        assert places[f"{family.stack}.2.{family.mlp}"].group == "mlp"
    for tensor, place in places.items():
        assert (place.layer is None) == (place.group == "outer") == (place.position is not None)
        if place.layer is not None and place.stack is not None:
            assert layout.name(place.stack, place.layer, place.suffix) == tensor
            assert place.suffix in layout.suffixes(place.stack, place.layer)
            is_norm = "norm" in tensor.lower() or ".ln_" in tensor
            assert place.group == "rest" or not is_norm
    outer = {tensor for tensor, place in places.items() if place.group == "outer"}
    assert set(layout.outer) == outer
    assert {tensor for tensor in outer if places[tensor].position == "after"} == family.after


@each_family
def test_every_matrix_of_a_layer_is_attention_or_mlp(name: str) -> None:
    family, (tensors, _, layout) = FAMILIES[name], _build(name)
    loose = [
        tensor
        for tensor, spec in tensors.items()
        if tensor.startswith(f"{family.stack}.0.") and len(spec.shape) == 2 and layout.locate(tensor).group == "rest"
    ]
    assert loose == []


@each_family
def test_tied_head(name: str) -> None:
    family, (tensors, settings, layout) = FAMILIES[name], _build(name)
    assert layout.tied_head == family.tied
    if not family.tied or layout.embedding is None:
        return
    # Stored after all: kept as stored.
    head = TensorSpec("lm_head.weight", tensors[layout.embedding].shape, "F32")
    stored = layout_of(tensors | {"lm_head.weight": head}, settings)
    assert (stored.tied_head, stored.head) == (False, "lm_head.weight")


@each_family
def test_residual_writers(name: str) -> None:
    family, (tensors, _, layout) = FAMILIES[name], _build(name)
    found = residual_writers(layout, tensors, 1, stack=family.stack)
    assert set(found) == {f"{family.stack}.1.{suffix}" for suffix in family.writers}
    assert residual_writers(layout, tensors, 3, stack=family.stack) == ()
    if family.stacks > 1:
        assert residual_writers(layout, tensors, 1) == ()


def _specs(**shapes: tuple[int, ...]) -> dict[str, TensorSpec]:
    return {
        name.replace("__", "."): TensorSpec(name.replace("__", "."), shape, "F32") for name, shape in shapes.items()
    }


def _blocks(
    prefix: str, count: int, *, suffixes: tuple[str, ...] = ("attn.q_proj.weight", "mlp.up_proj.weight")
) -> Any:
    names = [f"{prefix}{i}.{suffix}" for i in range(count) for suffix in suffixes]
    return {name: TensorSpec(name, (4, 4), "F32") for name in names}


def test_a_bare_model_has_the_same_stacks() -> None:
    assert layout_of(_blocks("h.", 3), {}).stacks == (Stack("h", 3),)


def test_numbers_without_a_name_before_them() -> None:
    layout = layout_of(_blocks("", 2), {})
    assert layout.main == Stack("", 2)
    assert layout.name("", 1, "attn.q_proj.weight") == "1.attn.q_proj.weight"
    assert layout.locate("1.attn.q_proj.weight").layer == 1


def test_experts_are_no_stack() -> None:
    experts = tuple(f"mlp.experts.{i}.w1.weight" for i in range(8))
    layout = layout_of(_blocks("model.layers.", 2, suffixes=experts), {})
    assert layout.stacks == (Stack("model.layers", 2),)
    place = layout.locate("model.layers.1.mlp.experts.7.w1.weight")
    assert (place.layer, place.suffix, place.group) == (1, "mlp.experts.7.w1.weight", "mlp")


def test_every_expert_writes() -> None:
    experts = tuple(f"block_sparse_moe.experts.{i}.{w}.weight" for i in range(2) for w in ("w1", "w2", "w3"))
    tensors = _blocks(
        "model.layers.", 2, suffixes=(*experts, "self_attn.o_proj.weight", "block_sparse_moe.gate.weight")
    )
    assert residual_writers(layout_of(tensors, {}), tensors, 1) == (
        "model.layers.1.block_sparse_moe.experts.0.w2.weight",
        "model.layers.1.block_sparse_moe.experts.1.w2.weight",
        "model.layers.1.self_attn.o_proj.weight",
    )


def test_an_unknown_name_for_the_down_projection_is_found_by_its_shape() -> None:
    shapes = {"norm.weight": (4,), "mlp.widen.weight": (16, 4), "mlp.narrow.weight": (4, 16), "mlp.narrow.bias": (4,)}
    tensors = {
        f"layers.{i}.{s}": TensorSpec(f"layers.{i}.{s}", shape, "F32") for i in range(2) for s, shape in shapes.items()
    }
    assert residual_writers(layout_of(tensors, {}), tensors, 0) == (
        "layers.0.mlp.narrow.bias",
        "layers.0.mlp.narrow.weight",
    )


def test_short_sequences_are_no_stack() -> None:
    projector = _specs(mm_projector__0__weight=(4, 4), mm_projector__2__weight=(4, 4))
    layout = layout_of(_blocks("model.layers.", 2) | projector, {})
    assert layout.main == Stack("model.layers", 2)
    assert layout.outer == ("mm_projector.0.weight", "mm_projector.2.weight")


def test_one_matrix_a_layer_is_a_stack_when_the_config_says_so() -> None:
    tensors = _blocks("layers.", 5, suffixes=("weight",))
    assert layout_of(tensors, {}).stacks == ()
    assert layout_of(tensors, {"num_hidden_layers": 5}).main == Stack("layers", 5)


def test_a_side_stack_beside_the_depth_that_the_config_names() -> None:
    tensors = _blocks("model.layers.", 4) | _blocks("adapter.layers.", 1)
    assert layout_of(tensors, {}).main is None
    assert layout_of(tensors, {"num_hidden_layers": 4}).main == Stack("model.layers", 4)


@pytest.mark.parametrize(
    ("further", "config"),
    [
        (_blocks("mtp.layers.", 1), {}),
        (_blocks("model.mtp_layers.", 2), {"num_hidden_layers": 4}),
        (_blocks("model.layers.", 5, suffixes=("eh_proj.weight", "mlp.up_proj.weight")), {"num_hidden_layers": 4}),
        (_blocks("model.layers.", 5), {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}),
    ],
)
def test_layers_for_further_tokens_are_none_of_the_stack(
    further: dict[str, TensorSpec], config: dict[str, int]
) -> None:
    own = _blocks("model.layers.", 4)
    behind = {name: info for name, info in further.items() if not re.match(r"model\.layers\.[0-3]\.", name)}
    layout = layout_of(own | behind, config)
    assert layout.stacks == (Stack("model.layers", 4),)
    assert layout.main == layout.stacks[0]
    assert layout.further == tuple(sorted(behind))
    assert layout.outer == tuple(sorted(behind))


def test_more_layers_than_the_config_names_are_layers() -> None:
    assert layout_of(_blocks("model.layers.", 6), {"num_hidden_layers": 4}).main == Stack("model.layers", 6)


def test_two_towers_have_no_main_stack() -> None:
    tensors = _blocks("language_model.model.layers.", 4) | _blocks("vision_tower.encoder.layers.", 2)
    config = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 2}}
    layout = layout_of(tensors, config)
    assert layout.main is None
    assert {stack.prefix for stack in layout.stacks} == {"language_model.model.layers", "vision_tower.encoder.layers"}


def test_absurd_layer_numbers_are_no_stack() -> None:
    names = ("layers.0.a.weight", "layers.99999999999999999999.a.weight", "layers.01.a.weight")
    tensors = {name: TensorSpec(name, (2, 2), "F32") for name in names}
    assert layout_of(tensors, {"num_hidden_layers": 1}).layer_count <= 1


def test_a_name_beyond_the_stack_is_outer() -> None:
    layout = layout_of(_blocks("model.layers.", 2), {})
    assert layout.locate("model.layers.2.mlp.up_proj.weight").group == "outer"
    assert layout.suffixes("model.layers", 2) == ()
    assert Stack("model.layers", 2).holds("model.layers.1.x")
    assert not Stack("model.layers", 2).holds("model.layers.2.x")
    assert not Stack("model.layers", 2).holds("model.layers.x")


def test_tied_by_the_text_config_and_by_the_class() -> None:
    tensors = _blocks("model.layers.", 2) | _specs(model__embed_tokens__weight=(9, 4))
    assert layout_of(tensors, {"text_config": {"tie_word_embeddings": True}}).tied_head
    assert not layout_of(tensors, {"tie_word_embeddings": False, "architectures": ["XForCausalLM"]}).tied_head
    assert layout_of(tensors, {"architectures": ["XForCausalLM"]}).tied_head
    assert not layout_of(tensors, {"architectures": ["XModel"]}).tied_head
    assert not layout_of(tensors, {}).tied_head


def test_the_embedding_has_as_many_rows_as_the_vocabulary() -> None:
    tensors = _specs(embed__tokens__weight=(9, 4), embed__extra__weight=(50, 4))
    assert layout_of(tensors, {"vocab_size": 9}).embedding == "embed.tokens.weight"
    assert layout_of(tensors, {}).embedding == "embed.extra.weight"


_LAYER = {f"transformer.h.{i}.{part}.weight": (4, 4) for i in range(2) for part in ("attn.c_attn", "mlp.c_fc")}


def _row_tables(shapes: dict[str, tuple[int, ...]], **config: object) -> tuple[str, ...]:
    tensors = {name: TensorSpec(name, shape, "F32") for name, shape in (shapes | _LAYER).items()}
    return vocabulary_tensors(layout_of(tensors, {"vocab_size": 10, **config}), tensors)


def test_embedding_head_and_bias() -> None:
    """Not the positions, though there are as many, nor a norm."""
    shapes = {"transformer.wte.weight": (10, 4), "transformer.wpe.weight": (10, 4), "transformer.ln_f.weight": (4,)}
    assert _row_tables(shapes) == ("transformer.wte.weight",)
    head = {"lm_head.weight": (10, 4), "lm_head.bias": (10,)}
    assert _row_tables(shapes | head) == ("lm_head.bias", "lm_head.weight", "transformer.wte.weight")


def test_a_bias_beside_a_tied_head() -> None:
    shapes = {"embeddings.word_embeddings.weight": (10, 4), "cls.predictions.bias": (10,), "cls.norm.weight": (10,)}
    assert _row_tables(shapes) == ("cls.predictions.bias", "embeddings.word_embeddings.weight")


def test_no_embedding_no_tables() -> None:
    assert _row_tables({}) == ()
