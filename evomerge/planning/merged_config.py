"""The merged model's config.json: the reference model's, made to agree with the merged weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import FLOATS, config_word
from evomerge.checkpoints.layout import Layout, Stack
from evomerge.errors import RecipeError
from evomerge.planning.modules import side_of
from evomerge.planning.operation import Operation

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_SIDES = {
    "encoder": ("encoder_layers", "num_encoder_layers", *DEPTHS),  # of two sides, a plain depth is the encoder's
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_NO_LAYERS = re.compile("token|architectures")  # lists that have as many entries as layers by chance

Config = Mapping[str, Any]


def merged_config(
    checkpoints: Mapping[str, Checkpoint],
    reference: str,
    origins: Mapping[Stack, Sequence[tuple[str, int]]],
    layout: Layout,
    operations: Sequence[Operation],
) -> dict[str, Any]:
    """Builds the config of the merged model.

    Args:
        checkpoints: Open checkpoints by reference.
        reference: The model whose config is taken.
        origins: For each stack whose layers are counted, the (model, layer) that each output layer comes from.
        layout: The reference's layout.
        operations: The plan's operations, for the dtype.

    Returns:
        A new mapping: the depths, the lists with one entry a layer, and the dtype agree with the weights.

    Raises:
        RecipeError: The number of a stack's layers changes, and the config does not say where it has it.
    """
    config = copy.deepcopy(dict(checkpoints[reference].config))
    if not config:
        return config
    for stack, layers in origins.items():
        path, keys = _settings_of(config, stack, layout)
        section = _at(config, path)
        sections = {model: _at(checkpoints[model].config, path) for model, _ in layers}
        for key in _layer_lists(section, stack.length):
            section[key] = [_entry(sections[model], key, layer, section[key]) for model, layer in layers]
        depths = [key for key in keys if section.get(key) == stack.length]
        if len(layers) != stack.length and not depths:
            raise RecipeError(
                f"slices: {stack.prefix} would have {len(layers)} layers instead of {stack.length}, and config.json of "
                f"{reference} does not say where it keeps that number"
            )
        section |= dict.fromkeys(depths, len(layers))
    _set_dtype(config, operations)
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    return config


def has_layer_list(config: Config, stack: Stack, layout: Layout) -> bool:
    """Returns whether a model's config says something layer by layer of one of its stacks."""
    path, _ = _settings_of(config, stack, layout)
    return bool(_layer_lists(_at(config, path), stack.length))


def _settings_of(config: Config, stack: Stack, layout: Layout) -> tuple[str | None, tuple[str, ...]]:
    """Where a stack's settings stand: (key of the part of the config or None, keys of its depth)."""
    side = side_of(stack)
    if stack == layout.main or side == "text":
        return ("text_config" if isinstance(config.get("text_config"), dict) else None), DEPTHS
    for key in (f"{side}_config", side):
        if isinstance(config.get(key), dict):
            return key, DEPTHS
    return None, _SIDES.get(side, DEPTHS)


def _at(config: Config, path: str | None) -> Any:
    part = config if path is None else config.get(path)
    return part if isinstance(part, dict) else {}


def _layer_lists(section: Config, depth: int) -> list[str]:
    return [
        key
        for key, value in section.items()
        if isinstance(value, list) and len(value) == depth > 1 and not _NO_LAYERS.search(key)
    ]


def _set_dtype(config: dict[str, Any], operations: Sequence[Operation]) -> None:
    dtypes = [operation.dtype for operation in operations if operation.dtype in FLOATS]
    if dtypes:
        word = config_word(max(set(dtypes), key=dtypes.count))
        for holder in (config, *(part for part in config.values() if isinstance(part, dict))):
            holder |= {key: word for key in ("dtype", "torch_dtype") if key in holder}
        if "torch_dtype" not in config:
            config["dtype"] = word


def _entry(config: Mapping[str, Any], key: str, layer: int, default: list[Any]) -> Any:
    values = config.get(key)
    entries = values if isinstance(values, list) and layer < len(values) else default
    return entries[min(layer, len(entries) - 1)]
