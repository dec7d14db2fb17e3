"""Tiny random models of many architectures, made from transformers' own configs, and what their structure is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models import VOCABULARY as BYTES

LAYERS = 2
VOCABULARY = 40
NOISE = 0.05

_LENGTHS = ("max_position_embeddings", "n_positions", "seq_length", "n_ctx")
_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = _SMALL | _TOKENS | {"max_position_embeddings": 32}
_GROUPED = _PLAIN | {"num_key_value_heads": 1}
_PICTURE = {"image_size": 8, "patch_size": 4}
_CLIP_VISION = _SMALL | _PICTURE | {"projection_dim": 16}


def _ids(model: Any) -> dict[str, Any]:
    return {"input_ids": torch.arange(3, 15).view(2, 6)}


def _picture() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)


def _to_and_from(model: Any) -> dict[str, Any]:
    return _ids(model) | {"decoder_input_ids": torch.arange(5, 13).view(2, 4)}


def _sound(model: Any) -> dict[str, Any]:
    features = torch.linspace(-1, 1, 8 * 12).view(1, 8, 12)
    return {"input_features": features, "decoder_input_ids": torch.arange(5, 9).view(1, 4)}


def _text_and_picture(model: Any) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[3, 4, 5, 2]]), "pixel_values": _picture()}


def _picture_in_text(model: Any) -> dict[str, Any]:
    places = [model.config.image_token_id] * 4  # 8x8 pixels in patches of 4x4, the class token left out
    return {"input_ids": torch.tensor([[1, *places, 5, 6]]), "pixel_values": _picture()}


def _patches_in_text(model: Any) -> dict[str, Any]:
    """One picture of 8x8 pixels: four patches of 4x4, which are merged into one token."""
    config = model.config
    tokens = [1, config.vision_start_token_id, config.image_token_id, config.vision_end_token_id, 5, 6]
    return {
        "input_ids": torch.tensor([tokens]),
        "mm_token_type_ids": torch.tensor([[int(token == config.image_token_id) for token in tokens]]),
        "pixel_values": torch.linspace(-1, 1, 4 * 3 * 4 * 4).view(4, 48),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }


def _only_picture(model: Any) -> dict[str, Any]:
    return {"pixel_values": _picture()}


@dataclass(frozen=True)
class Architecture:
    """One architecture: how to build it, and what its structure is known to be.

    Attributes:
        config: Name of the config's class.
        model: Name of the model's class.
        options: The config's arguments.
        stacks: The layer stacks of a stored checkpoint, sorted.
        embedding: The token embedding, None where there is none.
        head: The stored output head; None where it is tied or there is none.
        inputs: Arguments for the model's `forward`.
        tied: The head is the embedding.
        depth: Layers of each stack.
        loose: Matrices of a layer that are neither attention nor MLP, by the first part of their names.
        immovable: Why its last layer cannot stand behind itself, as a pattern for the message; None where it can.
    """

    config: str
    model: str
    options: dict[str, Any]
    stacks: tuple[str, ...] = ("model.layers",)
    embedding: str | None = "model.embed_tokens.weight"
    head: str | None = "lm_head.weight"
    inputs: Callable[[Any], dict[str, Any]] = _ids
    tied: bool = False
    depth: int = LAYERS
    loose: tuple[str, ...] = ()
    immovable: str | None = None

    @property
    def causal(self) -> bool:
        """Whether it is a language model that continues text."""
        return self.model.endswith(("ForCausalLM", "LMHeadModel"))

    def build_for_bytes(self, length: int, seed: int = 0) -> Any:
        """A random model with the vocabulary of `byte_tokenizer` and room for prompts of so many tokens."""
        tokens = {"vocab_size": BYTES, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
        return self.build(seed, **tokens, **{key: length for key in _LENGTHS if key in self.options})

    def build(self, seed: int = 0, **options: Any) -> Any:
        """A random model, with other options where some are given; no two elements of a norm or bias are equal."""
        config = getattr(transformers, self.config)(**self.options | options)
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(config)
        return shaken(model, seed, 0.1).eval()


def _llama_like(name: str, **changes: Any) -> Architecture:
    values: dict[str, Any] = {"config": f"{name}Config", "model": f"{name}ForCausalLM", "options": _GROUPED}
    return Architecture(**(values | changes))


def _tied(**changes: Any) -> dict[str, Any]:
    return {"tied": True, "head": None} | changes


_H = {"stacks": ("transformer.h",), "embedding": "transformer.word_embeddings.weight"}
_EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
_WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
_DELTA_NET = {"linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2}
_DELTA_NET |= {"linear_num_value_heads": 4, "linear_conv_kernel_dim": 2}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_chunk_size": 8}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral"),
    "phi": _llama_like("Phi"),
    "stablelm": _llama_like("StableLm"),
    "qwen2": _llama_like("Qwen2", options=_GROUPED | {"tie_word_embeddings": True}, **_tied()),
    "qwen3": _llama_like("Qwen3", options=_GROUPED | {"head_dim": 8}),
    "gemma2": _llama_like("Gemma2", options=_GROUPED | {"head_dim": 8, "sliding_window": 4}, **_tied()),
    "gemma3": _llama_like(
        "Gemma3Text",
        model="Gemma3ForCausalLM",
        options=_GROUPED | {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
        **_tied(),
    ),
    "phi3": _llama_like("Phi3"),
    "olmo2": _llama_like("Olmo2"),
    "gpt2": Architecture(
        "GPT2Config",
        "GPT2LMHeadModel",
        _TOKENS | {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32},
        **_tied(stacks=("transformer.h",), embedding="transformer.wte.weight"),
    ),
    "gpt_neox": Architecture(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        _PLAIN,
        ("gpt_neox.layers",),
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
    ),
    "falcon": Architecture(
        "FalconConfig", "FalconForCausalLM", _TOKENS | {k: v for k, v in _SMALL.items() if k[0] != "i"}, **_tied(**_H)
    ),
    "bloom": Architecture(
        "BloomConfig",
        "BloomForCausalLM",
        _TOKENS | {"hidden_size": 16, "n_layer": LAYERS, "n_head": 2},
        **_tied(**_H),
    ),
    "mixtral": _llama_like("Mixtral", options=_GROUPED | {"num_local_experts": 3}),
    "qwen3_moe": _llama_like("Qwen3Moe", options=_GROUPED | _EXPERTS | {"head_dim": 8, "num_experts": 3}),
    "deepseek_v3": _llama_like(
        "DeepseekV3",
        options=_PLAIN
        | _EXPERTS
        | {"num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
    "mamba": Architecture(
        "MambaConfig",
        "MambaForCausalLM",
        _TOKENS | {"hidden_size": 16, "num_hidden_layers": LAYERS, "state_size": 4},
        **_tied(stacks=("backbone.layers",), embedding="backbone.embeddings.weight"),
    ),
    "qwen3_next": _llama_like(
        "Qwen3Next",
        options=_GROUPED
        | _EXPERTS
        | _HYBRID
        | _DELTA_NET
        | {"head_dim": 8, "num_experts": 3, "shared_expert_intermediate_size": 8},
    ),
    "qwen3_5": _llama_like(
        "Qwen3_5Text", model="Qwen3_5ForCausalLM", options=_GROUPED | _HYBRID | _DELTA_NET | {"head_dim": 8}
    ),
    "granitemoehybrid": _llama_like(
        "GraniteMoeHybrid",
        options=_GROUPED | _HYBRID | _MAMBA2 | {"num_local_experts": 3, "shared_intermediate_size": 8},
    ),
    "falcon_h1": _llama_like("FalconH1", options=_GROUPED | _MAMBA2 | {"mamba_d_ssm": 32}),
    "nemotron_h": _llama_like(
        "NemotronH",
        options=_GROUPED
        | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "head_dim": 8}
        | {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "conv_kernel": 2}
        | {"chunk_size": 8, "n_routed_experts": 3, "moe_intermediate_size": 8}
        | {"moe_shared_expert_intermediate_size": 8},
        stacks=("backbone.layers",),
        embedding="backbone.embeddings.weight",
        depth=4,
    ),
    "bamba": _llama_like("Bamba", options=_GROUPED | _MAMBA2 | {"attn_layer_indices": [1]}),
    "jamba": _llama_like(
        "Jamba",
        options=_GROUPED
        | {"num_experts": 3, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 2},
        immovable=r"a useless model\.layers\.2\.feed_forward\.experts",  # kinds of layers come back after a period
    ),
    "lfm2": _llama_like("Lfm2", options=_GROUPED | _CONVOLUTIONS | {"block_multiple_of": 8}, **_tied()),
    "lfm2_moe": _llama_like(
        "Lfm2Moe", options=_GROUPED | _EXPERTS | _CONVOLUTIONS | {"num_experts": 3, "num_dense_layers": 1}, **_tied()
    ),
    "zamba2": _llama_like(
        "Zamba2",
        options=_PLAIN
        | {"layers_block_type": ["linear_attention", "hybrid"], "mamba_d_state": 4, "mamba_d_conv": 2}
        | {"n_mamba_heads": 4, "chunk_size": 8, "adapter_rank": 4},
        loose=("linear",),
        immovable=r"no model\.layers\.1\.shared_transformer\.feed_forward\.gate_up_proj_adapter_list\.1",
        **_tied(),
    ),
    "gpt_oss": _llama_like(
        "GptOss",
        options=_GROUPED
        | _WINDOWED
        | {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "llama4": _llama_like(
        "Llama4Text",
        model="Llama4ForCausalLM",
        options=_GROUPED | {"num_local_experts": 3, "moe_layers": [1], "intermediate_size_mlp": 24, "head_dim": 8},
    ),
    "glm4_moe": _llama_like("Glm4Moe", options=_GROUPED | _EXPERTS | {"n_routed_experts": 3, "head_dim": 8}),
    "gemma3n": _llama_like(
        "Gemma3nText",
        model="Gemma3nForCausalLM",
        options=_GROUPED
        | _WINDOWED
        | {"head_dim": 8, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4}
        | {"num_kv_shared_layers": 0, "laurel_rank": 4},
        loose=("altup", "laurel", "per_layer_input_gate", "per_layer_projection"),
        immovable=r"another shape of model\.embed_tokens_per_layer",
        **_tied(),
    ),
    "smollm3": _llama_like("SmolLM3", options=_GROUPED | {"no_rope_layers": [1, 0]}, **_tied()),
    "cohere2": _llama_like("Cohere2", options=_GROUPED | _WINDOWED, **_tied()),
    "minimax": _llama_like("MiniMax", options=_GROUPED | _HYBRID | {"num_local_experts": 3, "block_size": 4}),
    "ernie4_5": _llama_like("Ernie4_5", options=_GROUPED | {"head_dim": 8}, **_tied()),
    "dots1": _llama_like(
        "Dots1",
        options=_GROUPED | _EXPERTS | {"n_routed_experts": 3, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "modernbert": Architecture(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        _PLAIN | {"global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
        **_tied(embedding="model.embeddings.tok_embeddings.weight"),
    ),
    "bert": Architecture(
        "BertConfig",
        "BertForMaskedLM",
        _PLAIN,
        **_tied(stacks=("bert.encoder.layer",), embedding="bert.embeddings.word_embeddings.weight"),
    ),
    "roberta": Architecture(
        "RobertaConfig",
        "RobertaForMaskedLM",
        _PLAIN,
        **_tied(stacks=("roberta.encoder.layer",), embedding="roberta.embeddings.word_embeddings.weight"),
    ),
    "t5": Architecture(
        "T5Config",
        "T5ForConditionalGeneration",
        _TOKENS
        | {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": 2},
        inputs=_to_and_from,
        **_tied(stacks=("decoder.block", "encoder.block"), embedding="shared.weight"),
    ),
    "whisper": Architecture(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        _TOKENS
        | {"d_model": 16, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "num_mel_bins": 8}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        | {"max_source_positions": 6, "max_target_positions": 16, "decoder_start_token_id": 1}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        inputs=_sound,
        **_tied(stacks=("model.decoder.layers", "model.encoder.layers"), embedding="model.decoder.embed_tokens.weight"),
    ),
    "clip": Architecture(
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": _PLAIN | {"projection_dim": 16},
            "vision_config": _CLIP_VISION,
            "projection_dim": 16,
        },
        ("text_model.encoder.layers", "vision_model.encoder.layers"),
        "text_model.embeddings.token_embedding.weight",
        None,
        _text_and_picture,
    ),
    "vit": Architecture(
        "ViTConfig",
        "ViTForImageClassification",
        _SMALL | _PICTURE,
        ("vit.encoder.layer",),
        None,
        None,
        _only_picture,
    ),
    "llava": Architecture(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": transformers.LlamaConfig(**_GROUPED),
            "vision_config": transformers.CLIPVisionConfig(**_CLIP_VISION),
            "image_token_index": VOCABULARY - 1,
        },
        ("language_model.model.layers", "vision_tower.encoder.layers"),
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        _picture_in_text,
    ),
    "qwen3_vl": Architecture(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": _GROUPED
            | {"head_dim": 8}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
            "vision_config": {"depth": LAYERS, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
            | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, "out_hidden_size": 16}
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            "image_token_id": VOCABULARY - 1,
            "video_token_id": VOCABULARY - 2,
            "vision_start_token_id": VOCABULARY - 3,
            "vision_end_token_id": VOCABULARY - 4,
        },
        ("model.language_model.layers", "model.visual.blocks"),
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
        _patches_in_text,
    ),
}
CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.causal]


def shaken(model: Any, seed: int, noise: float = NOISE) -> Any:
    """The model with noise added to every parameter, in place: a stand-in for a fine-tune."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model


def write_family(architecture: Architecture, root: Path) -> dict[str, Path]:
    """A base and two noisy copies of it: {"base", "a", "b"} -> folder."""
    folders = {}
    for seed, name in enumerate(("base", "a", "b")):
        model = architecture.build()
        if seed:
            shaken(model, seed)
        folders[name] = root / name
        model.save_pretrained(folders[name])
    return folders


def outputs(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """What the model computes, as one tensor."""
    with torch.inference_mode():
        result = model(**arguments)
    value = result.logits_per_image if hasattr(result, "logits_per_image") else result.logits
    return torch.as_tensor(value)
