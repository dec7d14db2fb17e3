"""Ranks of magnitudes within rows, segment by segment."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evomerge.methods.della import TOP

Levels = NDArray[np.uint8]

SEGMENT = 1 << 20  # elements, in whole rows
_PART = 1 << 16  # elements that are ordered at once


def row_rank_levels(magnitudes: NDArray[np.float32]) -> Levels:
    """`evomerge.methods.della.rank_levels`: uint8 [rows, columns]."""
    from evomerge.engine.kernels import sce_della

    out = np.full(magnitudes.shape, TOP // 2, dtype=np.uint8)
    rows, columns = magnitudes.shape
    for first in range(0, rows if columns > 1 else 0, max(1, _PART // columns)):
        part = magnitudes[first : first + max(1, _PART // columns)]
        sce_della.rank_levels(part, part.argsort(axis=1), TOP, out[first : first + part.shape[0]])
    return out


class LruCache:
    """The latest few tensors that were asked for.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._tensors: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Returns the tensor of this key; computed when it is not there."""
        with self._lock:
            if key in self._tensors:
                self._tensors.move_to_end(key)
                return self._tensors[key]
        value = compute()
        with self._lock:
            self._tensors[key] = value
            if len(self._tensors) > self._count:
                self._tensors.popitem(last=False)
        return value
