"""Ranks of magnitudes within rows, segment by segment."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray

from evomerge.methods.della import TOP

Levels = NDArray[np.uint8]

SEGMENT = 1 << 20  # elements, in whole rows


def levels_of(magnitudes: NDArray[np.float32]) -> Levels:
    """`evomerge.methods.della.levels`: uint8 [rows, columns]."""
    from evomerge.engine.kernels import spread

    out = np.full(magnitudes.shape, TOP // 2, dtype=np.uint8)
    if magnitudes.shape[1] > 1:
        spread.rank_levels(magnitudes, magnitudes.argsort(axis=1), TOP, out)
    return out


class Latest:
    """The latest few arrays that were asked for.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._held: OrderedDict[Hashable, Levels] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], Levels]) -> Levels:
        """The array of this key; computed when it is not there."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        value = compute()
        with self._lock:
            self._held[key] = value
            if len(self._held) > self._count:
                self._held.popitem(last=False)
        return value
