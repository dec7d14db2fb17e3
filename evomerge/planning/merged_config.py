"""The merged model's config.json: the reference model's, made to agree with the merged weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.config_values import without_implementations
from evomerge.checkpoints.dtypes import FLOATS, config_word
from evomerge.checkpoints.layout import Layout, Stack
from evomerge.checkpoints.quantised import CONFIG_KEYS
from evomerge.errors import RecipeError
from evomerge.planning.modules import side_of
from evomerge.planning.operation import Operation

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_SIDES = {
    "encoder": ("encoder_layers", "num_encoder_layers", *DEPTHS),  # of two sides, a plain depth is the encoder's
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
# Lists that have as many entries as layers by chance.
_NO_LAYERS = re.compile("token|architectures|limit|multipliers|section|_mean|_std|_map")
_INDICES = re.compile(r"layers$|layer_ids$|layer_idx|layers?_ind|_idxs?$|block_ind|visual_ind")
_LEADING = ("first_k_dense_replace", "num_dense_layers")  # how many layers come first that have no experts

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
        A new mapping: the depths, what is said layer by layer, and the dtype agree with the weights. Where layers
        have moved, what transformers derives from their numbers is written out, so that each stays of its kind.

    Raises:
        RecipeError: The number of a stack's layers changes and the config does not say where it has it, or it has only
            the number of layers of one kind, which no longer come first.
    """
    config = copy.deepcopy(without_implementations(checkpoints[reference].config))
    if not config:
        return config
    for stack, layers in origins.items():
        path, keys = _settings_of(config, stack, layout)
        section, depth = _at(config, path), stack.length
        moved = [layer for _, layer in layers] != list(range(depth))
        sections = {
            model: _at(checkpoints[model].whole_config if moved else checkpoints[model].config, path)
            for model in (reference, *(model for model, _ in layers))
        }
        for key, value in (sections[reference] | section).items():
            if _is_layer_list(key, value, depth) and (moved or key in section):
                entries = [_entry(sections[model], key, layer, value) for model, layer in layers]
                section[key] = "".join(entries) if isinstance(value, str) else entries
            elif moved and _is_index_list(key, value, depth):
                listed = {model: own.get(key) or () for model, own in sections.items()}
                section[key] = [i for i, (model, layer) in enumerate(layers) if layer in listed[model]]
            elif moved and key in _LEADING and isinstance(value, int):
                section[key] = _leading(key, [(m, i, i < sections[m].get(key, value)) for m, i in layers])
        depths = [key for key in keys if section.get(key) == depth]
        listed_kinds = any(_is_layer_list(key, value, depth) for key, value in sections[reference].items())
        if len(layers) != depth and not (depths or listed_kinds):  # Nemotron-H has as many layers as kinds
            raise RecipeError(
                f"slices: {stack.prefix} would have {len(layers)} layers instead of {depth}, and config.json of "
                f"{reference} does not say where it keeps that number"
            )
        section |= dict.fromkeys(depths, len(layers))
    _set_dtype(config, operations)
    config.pop("_name_or_path", None)
    for key in CONFIG_KEYS:
        config.pop(key, None)
    return config


def says_kinds(config: Config, stack: Stack, layout: Layout) -> bool:
    """Returns whether a model's config says of one of its stacks, layer by layer, which kind each layer is of."""
    path, _ = _settings_of(config, stack, layout)
    return any(
        _is_layer_list(key, value, stack.length) or _is_index_list(key, value, stack.length) or key in _LEADING
        for key, value in _at(config, path).items()
    )


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


def _is_layer_list(key: str, value: Any, depth: int) -> bool:
    """Tells a list, or a word such as "M-M*", with one entry a layer."""
    if isinstance(value, str):
        return len(value) == depth > 1 and "pattern" in key
    listed = isinstance(value, list) and len(value) == depth > 1 and not _NO_LAYERS.search(key)
    return listed and not _is_index_list(key, value, depth)


def _is_index_list(key: str, value: Any, depth: int) -> bool:
    """Tells a list of layers by their numbers, such as those that have experts."""
    if not isinstance(value, list) or not value or not _INDICES.search(key):
        return False
    numbers = [entry for entry in value if isinstance(entry, int) and not isinstance(entry, bool)]
    rising = len(numbers) < depth or numbers == sorted(numbers)  # [1, 0] of two layers: a flag for each
    return rising and len(numbers) == len(value) == len(set(numbers)) and all(0 <= number < depth for number in numbers)


def _leading(key: str, layers: Sequence[tuple[str, int, bool]]) -> int:
    """How many layers come first that are of the kind which the config counts."""
    kinds = [kind for _, _, kind in layers]
    count = kinds.index(False) if False in kinds else len(kinds)
    late = next((i for i in range(count, len(kinds)) if kinds[i]), None)
    if late is not None:
        model, layer, _ = layers[late]
        raise RecipeError(
            f"slices: layer {late} of the output is layer {layer} of {model}, which is of another kind than layer "
            f"{count} before it (other tensors), and config.json has only the number of those that come first: {key}"
        )
    return count


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
