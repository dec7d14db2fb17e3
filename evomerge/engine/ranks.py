"""Ranks of magnitudes within rows, segment by segment: computed once per run as far as they may be kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray

from evomerge.methods.della import TOP

Levels = NDArray[np.uint8]

SEGMENT = 1 << 20  # elements, in whole rows
_RECENT = 32  # segments beyond the limit, for the parts that follow


def levels_of(magnitudes: NDArray[np.float32]) -> Levels:
    """`evomerge.methods.della.levels`: uint8 [rows, columns]."""
    from evomerge.engine.kernels import spread

    out = np.full(magnitudes.shape, TOP // 2, dtype=np.uint8)
    if magnitudes.shape[1] > 1:
        spread.rank_levels(magnitudes, magnitudes.argsort(axis=1), TOP, out)
    return out


class LevelCache:
    """The levels of the segments of tensors: the first ones stay, up to a limit; of the others, the latest.

    Args:
        limit: Bytes that stay.
    """

    def __init__(self, limit: int) -> None:
        self._room = limit
        self._kept: dict[Hashable, Levels] = {}
        self._recent: OrderedDict[Hashable, Levels] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], Levels]) -> Levels:
        """The levels of a segment, flat; computed when they are not there."""
        with self._lock:
            found = self._kept.get(key)
            if found is None and key in self._recent:
                self._recent.move_to_end(key)
                found = self._recent[key]
        if found is not None:
            return found
        value = compute()
        with self._lock:
            if value.nbytes <= self._room:
                if self._kept.setdefault(key, value) is value:
                    self._room -= value.nbytes
            else:
                self._recent[key] = value
                if len(self._recent) > _RECENT:
                    self._recent.popitem(last=False)
        return value
