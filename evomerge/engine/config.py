"""The merged model's config.json: the reference model's, made to agree with the merged weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.layout import Layout
from evomerge.engine.dtypes import config_word
from evomerge.engine.operation import Operation

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def merged_config(
    checkpoints: Mapping[str, Checkpoint],
    reference: str,
    layers: Sequence[tuple[str, int]],
    layout: Layout,
    operations: Sequence[Operation],
) -> dict[str, Any]:
    """The config of the merged model.

    Args:
        checkpoints: Open checkpoints by reference.
        reference: The model whose config is taken.
        layers: (model, layer) that each output layer comes from.
        layout: The reference's layout.
        operations: The plan's operations, for the dtype.

    Returns:
        A new mapping: the depth, the lists with one entry a layer, and the dtype agree with the weights.
    """
    config = copy.deepcopy(dict(checkpoints[reference].config))
    if not config:
        return config
    body = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    depth = layout.layer_count
    theirs = {model: _body(checkpoints[model].config) for model, _ in layers}
    if layout.main is not None:
        for key, value in list(body.items()):
            if isinstance(value, list) and len(value) == depth and depth > 1:
                body[key] = [_entry(theirs[model], key, layer, value) for model, layer in layers]
        for key in DEPTHS:
            if body.get(key) == depth:
                body[key] = len(layers)
    dtypes = [operation.dtype for operation in operations if operation.dtype in ("F64", "F32", "F16", "BF16")]
    if dtypes:
        word = config_word(max(set(dtypes), key=dtypes.count))
        for holder in (config, body):
            holder |= {key: word for key in ("dtype", "torch_dtype") if key in holder}
        if "torch_dtype" not in config:
            config["dtype"] = word
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    return config


def _body(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _entry(config: Mapping[str, Any], key: str, layer: int, default: list[Any]) -> Any:
    values = config.get(key)
    held = values if isinstance(values, list) and layer < len(values) else default
    return held[min(layer, len(held) - 1)]
