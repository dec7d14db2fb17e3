"""Where configs disagree on what equal tensors mean: a merge takes one of them; the other is said, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint

_MEANS = re.compile(
    r"rope|rotary|(^|[._])act(_fn|ivation\w*)?$|hidden_act|activation_func|eps(ilon)?$|window|layer_types|attention_chunk"
    r"|alibi|position_embedding_type|soft_?cap|logits?_scal|scaling|multiplier|scale_|_scale$|query_pre_attn|topk"
    r"|experts_per_tok|n_group$|scoring|parallel_(residual|attn)|time_step|pooling|causal|bidirectional"
)
_HEADS = re.compile(r"(num_\w*heads?|n_heads?|n_head_kv|head_dim|\w+_head_dim|num_kv_heads|multi_query|attn_type)$")
_NOT_OURS = re.compile(r"dropout|_loss|initializer|num_logits|quantization|(^|\.)(_|architectures|auto_map)")


def disagreements(reference: Checkpoint, model: Checkpoint, *, by_layer: bool = True) -> str:
    """Says in which settings a model's config disagrees with that of the model whose config the merge takes.

    Args:
        reference: The model whose config is taken.
        model: The other one.
        by_layer: Whether lists count, which may say something of every layer.

    Returns:
        The settings with both values; "" where none matters.
    """
    different = _different(reference, model, _MEANS)
    named = [
        f"{key} {own} against {taken}"
        for key, (taken, own) in different.items()
        if by_layer or not isinstance(own, list) or "rope" in key
    ]
    if not named:
        return ""
    which = f"{model.reference}: its config disagrees with that of {reference.reference}, which the merge takes"
    return f"{which}: {'; '.join(named)}"


def other_heads(reference_name: str, reference: Checkpoint, name: str, model: Checkpoint) -> list[str]:
    """Says where equal matrices are split into other attention heads, which no average of them survives."""
    return [
        f"{name}: {key} is {own}, {taken} in {reference_name}: equal matrices mean other heads, and cannot be merged"
        for key, (taken, own) in _different(reference, model, _HEADS).items()
    ]


def _different(reference: Checkpoint, model: Checkpoint, keys: re.Pattern[str]) -> dict[str, tuple[Any, Any]]:
    """What both configs say of some settings, where they differ; spelled by transformers where the files differ."""
    if dict(_settings(reference.config, keys)) == dict(_settings(model.config, keys)):
        return {}
    taken, own = (dict(_settings(one.whole_config, keys)) for one in (reference, model))
    return {key: (value, own[key]) for key, value in taken.items() if key in own and own[key] != value}


def _settings(config: Mapping[str, Any], keys: re.Pattern[str], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(config.items()):
        at = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _settings(value, keys, f"{at}.")
        elif value is not None and keys.search(at) and not _NOT_OURS.search(at):
            yield at, value
