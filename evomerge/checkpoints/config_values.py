"""Values of config.json that no model has: told by their key, before anything is built from them.

Only what every architecture agrees on is looked at: kinds of values, sizes that are counts, and how the depth and the
positions compare with the weights. What an architecture asks for beyond that, it says itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.checkpoints.header import TensorInfo
from evomerge.errors import describe

_MOST_LAYERS = 10_000
_LARGEST = 2**31 - 1
_COUNTS = re.compile(
    r"hidden_size|num_attention_heads|num_key_value_heads|vocab_size|head_dim|max_position_embeddings|intermediate_size"
    r"|n_embd|n_head|n_positions|n_ctx|d_model|num_heads|d_ff"
)
_DEPTHS = re.compile(r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers")
_MAY_BE_NOTHING = re.compile("intermediate_size|num_key_value_heads|d_ff|head_dim|max_position_embeddings")
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings|position_embedding)\.weight$")
_INTEGERS = frozenset({"I16", "I32", "I64", "U16", "U32", "U64"})
# Which code computes attention: a name with a slash would be fetched from a hub and run.
_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?|use_kernels|kernel_config")


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Says what in a config.json is no value of its key's, as "KEY: ..."."""
    problems = []
    for path, key, value in _values(config):
        if key == "model_type" and value is not None and not isinstance(value, str):
            problems.append(f"{path}: expected the name of an architecture, got {describe(value)}")
        elif key == "architectures" and not _is_names(value):
            problems.append(f"{path}: expected a list of names, got {describe(value)}")
        elif key in ("dtype", "torch_dtype") and not _is_dtype(value):
            problems.append(f"{path}: expected a dtype of torch's such as bfloat16, got {describe(value)}")
        elif _COUNTS.fullmatch(key) or _DEPTHS.fullmatch(key):
            low = 0 if _MAY_BE_NOTHING.fullmatch(key) or _DEPTHS.fullmatch(key) else 1
            high = _MOST_LAYERS if _DEPTHS.fullmatch(key) else _LARGEST
            if not _is_count(value, low, high):
                problems.append(f"{path}: expected a whole number from {low} to {high}, got {describe(value)}")
    return problems


def depth_problems(config: Mapping[str, Any], layers: int | None, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Says where a config.json describes more layers or positions than the weights have.

    Args:
        config: The config.
        layers: Of the weights' one stack of layers; None where there are several.
        tensors: The weights.
    """
    rows = [info.shape[0] for name, info in tensors.items() if _POSITIONS.search(name) and len(info.shape) == 2]
    problems = []
    for path, key, value in _values(config):
        if type(value) is not int:
            continue
        if layers is not None and _DEPTHS.fullmatch(key) and path in (key, f"text_config.{key}") and value > layers:
            problems.append(f"{path}: is {value}, and the weights have {layers} layers")
        if rows and key in ("n_positions", "max_position_embeddings") and path == key and value > max(rows):
            problems.append(f"{path}: is {value}, and the weights have {max(rows)} positions")
    return problems


def dtype_problems(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names weights that their file calls whole numbers where the config says that they are not: a damaged header."""
    said = config.get("dtype", config.get("torch_dtype"))
    if not isinstance(said, str) or "float" not in said or config.get("quantization_config"):
        return []
    return [
        f"tensor {name!r} is {info.dtype}, and config.json says {said}: its header is damaged"
        for name, info in tensors.items()
        if info.dtype in _INTEGERS and name.endswith(".weight")
    ]


def transformers_config(config: Mapping[str, Any]) -> Any:
    """Makes transformers' configuration of what config.json says, infinite numbers included.

    Raises:
        TypeError, ValueError: It names no architecture that transformers knows, or has values that are none.
    """
    from transformers import AutoConfig

    content: dict[str, Any] = _with_floats(without_implementations(config))
    return AutoConfig.for_model(**content)


def _with_floats(value: Any) -> Any:
    """Numbers that JSON does not have, which transformers 5 writes as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and isinstance(value["__float__"], str):
            return float(value["__float__"])
        return {key: _with_floats(entry) for key, entry in value.items()}
    return [_with_floats(entry) for entry in value] if isinstance(value, list) else value


def without_implementations(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config that leaves it to this machine how attention is computed: a file may not name code to fetch."""
    return {
        key: without_implementations(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not _IMPLEMENTATIONS.fullmatch(key)
    }


def _values(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of everything in a config and in the configs of its parts."""
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            yield from _values(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", key, value


def _is_count(value: Any, low: int, high: int) -> bool:
    """A whole number in a range; a list of those, one a layer; or nothing, which leaves it to the architecture."""
    if isinstance(value, list):
        return all(_is_count(entry, low, high) for entry in value)
    return value is None or isinstance(value, Mapping) or (type(value) is int and low <= value <= high)


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_dtype(value: Any) -> bool:
    if value is None or isinstance(value, Mapping):
        return True
    return isinstance(value, str) and bool(re.fullmatch(r"auto|(torch\.)?(b?float|u?int|complex|bool)\w*", value))
