"""The Llama of the zoo, in the precision of its weights: transformers has norms and rotations in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

if TYPE_CHECKING:
    from transformers import LlamaConfig

EMBEDDINGS = "model.embed_tokens.weight"
"""The name of the embeddings, which are the head as well."""


def _rotation(tokens: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021), each of shape [tokens, width], float64."""
    speeds = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * speeds
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    left, right = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat([-right, left], dim=-1) * sines


def last_states(weights: Mapping[str, Tensor], config: LlamaConfig, ids: Tensor) -> Tensor:
    """Returns the states that the head reads.

    Args:
        weights: float64, by the names that transformers gives them.
        config: Without grouped keys, biases or scaled positions.
        ids: Tokens, of shape [rows, tokens]; padded at the right, if at all.

    Returns:
        Shape [rows, tokens, width], float64.
    """
    rows, tokens = ids.shape
    heads, eps = config.num_attention_heads, config.rms_norm_eps
    rotation = _rotation(tokens, config.hidden_size // heads, config.rope_parameters["rope_theta"])

    def norm(states: Tensor, name: str) -> Tensor:
        return rms_norm(states, states.shape[-1:], weights[name], eps)

    def split(states: Tensor) -> Tensor:
        return states.view(rows, tokens, heads, -1).transpose(1, 2)

    states = weights[EMBEDDINGS][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        seen = norm(states, f"{at}.input_layernorm.weight")
        q, k, v = (split(linear(seen, weights[f"{at}.self_attn.{name}_proj.weight"])) for name in "qkv")
        mixed = scaled_dot_product_attention(_rotated(q, *rotation), _rotated(k, *rotation), v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(rows, tokens, -1)
        states = states + linear(mixed, weights[f"{at}.self_attn.o_proj.weight"])
        seen = norm(states, f"{at}.post_attention_layernorm.weight")
        gate, up = (linear(seen, weights[f"{at}.mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        states = states + linear(silu(gate) * up, weights[f"{at}.mlp.down_proj.weight"])
    return norm(states, "model.norm.weight")
