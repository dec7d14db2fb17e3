"""What a device has room for: how much of it stored tensors may take, and what scoring needs beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import torch_dtype
from evomerge.engine.device.copier import streams_of
from evomerge.engine.device.sources import Room
from evomerge.system.memory import available

_BLOCKS = 2 << 30  # bytes of what methods compute with: some thirty blocks in float32
_MARGIN = 0.1  # of what is free
_LOGITS = 1 << 28  # of a batch that are there at once, at most
_PINNED_SHARE = 0.5  # of the free memory


def room_for(
    checkpoints: Iterable[Checkpoint],
    device: torch.device,
    dtype: torch.dtype | None,
    budget: int | None = None,
    activations: int = 0,
) -> Room:
    """Decides what the stored tensors of a run may take.

    Args:
        checkpoints: The models that are read.
        device: Where they are merged.
        dtype: What the live model computes in; None for the models' own dtypes.
        budget: Bytes of the device for them; None for what is free, less the model, the activations and a margin.
        activations: Bytes that scoring takes beside the model.
    """
    specs = [list(checkpoint.tensors.values()) for checkpoint in checkpoints]
    if budget is None:
        free = free_memory(device)
        model = max(
            (sum(_bytes_of(info.nbytes, info.dtype, dtype) for info in tensors) for tensors in specs), default=0
        )
        budget = max(0, free - model - activations - max(_BLOCKS, int(_MARGIN * free)))
    return Room.within(
        budget, sum(info.nbytes for tensors in specs for info in tensors), int(_PINNED_SHARE * (available() or 0))
    )


def _bytes_of(stored: int, name: str, dtype: torch.dtype | None) -> int:
    """What a stored tensor takes in the live model."""
    own = torch_dtype(name)
    return stored if dtype is None or not own.is_floating_point else stored // own.itemsize * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Returns the bytes of a device that are free, those included that torch keeps for its next tensors."""
    module = streams_of(device)
    if module is not None:
        kept = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0] + kept)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return 0


def activation_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Estimates what scoring a batch takes beside the model: hidden states, keys and values, logits.

    Args:
        config: A config.json.
        tokens: Of a batch.
    """
    text = config.get("text_config") or config
    hidden, inner, layers, vocabulary = (
        int(text.get(name) or 0) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    states = 4 * (16 * hidden + 3 * inner) + 4 * layers * hidden
    return tokens * states + 12 * min(_LOGITS, tokens * vocabulary)
