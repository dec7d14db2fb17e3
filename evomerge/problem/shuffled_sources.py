"""A control: sources that know nothing. What a search gains from them is what fitting many numbers to many items gives.

The sizes of the sources' differences from the base are as they were, tensor by tensor; their places are shuffled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.fingerprint import derived_fingerprint
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.tensors import Weights
from evomerge.system.hashing import digest_bytes


class ShuffledWeights:
    """A model whose differences from a base are shuffled within every tensor.

    Sizes of the differences are as they were, tensor by tensor; what they know is gone. What was read is kept.

    Args:
        weights: The model's tensors.
        base: The base's. A tensor that it lacks, or has in another shape, stays as it is.
        seed: Another seed gives another order.
    """

    def __init__(self, weights: Weights, base: Weights, seed: int) -> None:
        self._weights, self._base, self._seed = weights, base, seed
        self._read: dict[str, Tensor] = {}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors by name."""
        return self._weights.tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The files they are read from."""
        return self._weights.files

    def read(self, name: str) -> Tensor:
        """Reads a tensor, shuffled."""
        if name not in self._read:
            self._read[name] = self._shuffled(name)
        return self._read[name]

    def _shuffled(self, name: str) -> Tensor:
        own, other = self._weights.read(name), self._base.tensors.get(name)
        if other is None or tuple(other.shape) != tuple(own.shape) or not own.is_floating_point():
            return own
        base = self._base.read(name).to(torch.float32)
        key = digest_bytes(f"shuffled\0{self._seed}\0{self._weights.fingerprint()}\0{name}", size=8)
        order = np.random.default_rng(int.from_bytes(key)).permutation(own.numel())
        difference = (own.to(torch.float32) - base).flatten()[torch.from_numpy(order)]
        return (base + difference.view(own.shape)).to(own.dtype)

    def release(self, name: str) -> None:
        """Gives back a tensor's memory."""
        self._read.pop(name, None)
        self._weights.release(name)

    def fingerprint(self, *, anew: bool = False) -> str:
        """Returns the identity of the content."""
        parts = (self._weights.fingerprint(anew=anew), self._base.fingerprint(anew=anew))
        return derived_fingerprint("shuffled", str(self._seed), *parts)


def shuffled(checkpoints: Mapping[str, Checkpoint], base: str, seed: int) -> dict[str, Checkpoint]:
    """Shuffles the differences of all models from the base."""
    weights = checkpoints[base].weights
    return {
        reference: one if reference == base else one.changed(weights=ShuffledWeights(one.weights, weights, seed))
        for reference, one in checkpoints.items()
    }
