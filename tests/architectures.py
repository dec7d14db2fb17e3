"""Tiny random models of many architectures, made from transformers' own configs, and what their structure is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

LAYERS = 2
VOCABULARY = 40
NOISE = 0.05

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
    """

    config: str
    model: str
    options: dict[str, Any]
    stacks: tuple[str, ...] = ("model.layers",)
    embedding: str | None = "model.embed_tokens.weight"
    head: str | None = "lm_head.weight"
    inputs: Callable[[Any], dict[str, Any]] = _ids
    tied: bool = False

    @property
    def causal(self) -> bool:
        """Whether it is a language model that continues text."""
        return self.model.endswith(("ForCausalLM", "LMHeadModel"))

    def build(self, seed: int = 0) -> Any:
        """A random model; no two elements of a norm or bias are equal."""
        config = getattr(transformers, self.config)(**self.options)
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
