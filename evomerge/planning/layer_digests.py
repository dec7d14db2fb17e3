"""What two plans have in common from the embedding upwards."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.layout import layout_of
from evomerge.planning.merged_config import DEPTHS
from evomerge.planning.plan import Plan
from evomerge.system.hashing import digest

_LAST = re.compile(r"(^|\.)(norm|ln_f|final_(layer_?)?norm|lm_head|embed_out)\.(weight|bias)$")
"""Tensors used behind the last layer. Whatever has another name counts as if the first layer needed it."""


def depth_digests(plan: Plan) -> tuple[str, ...]:
    """For each layer, the identity of the hidden states before it: the embedding, the config, the layers below.

    Plans with equal digests at k compute the same hidden states before layer k. Empty where the model has no one stack
    of layers.
    """
    specs = {op.output: TensorSpec(op.output, op.shape, op.dtype) for op in plan.operations}
    layout = layout_of(specs, plan.config)
    if layout.main is None:
        return ()
    below: list[tuple[str, str]] = []
    layers: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for op in plan.operations:
        location = layout.locate(op.output)
        if location.stack == layout.main.prefix and location.layer is not None:
            layers[location.layer].append((location.suffix, op.digest))
        elif not _LAST.search(op.output):
            below.append((op.output, op.digest))
    common, of_layers = _config(plan.config, layout.layer_count)
    digest, digests = _hash(["", common, below]), []
    for k in range(layout.layer_count):
        # A layer's own entries of the config may decide the masks and rotary embeddings it is given, not what is below.
        digests.append(digest)
        digest = _hash([digest, {key: values[k] for key, values in of_layers.items()}, sorted(layers[k])])
    return tuple(digests)


def _config(config: Mapping[str, Any], depth: int) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The config apart from its depth and its lists of one entry a layer; and these lists."""
    nested = isinstance(config.get("text_config"), Mapping)
    body = dict(config["text_config"] if nested else config)
    lists = {key: value for key, value in body.items() if isinstance(value, list) and len(value) == depth > 1}
    rest = {key: value for key, value in body.items() if key not in lists and key not in DEPTHS}
    return ({**config, "text_config": rest} if nested else rest), lists


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str, separators=(",", ":"))
    return digest(text)
