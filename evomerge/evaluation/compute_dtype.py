"""The dtype that a model computes fastest in on a device, found by timing matrix products of its own shapes.

Processors without bfloat16 arithmetic take several times as long in it as in float32; accelerators, and processors that
have it, half as long.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

CHOICES = ("float32", "bfloat16")
"""Of equal ones the first is taken, and of nearly equal ones."""

_CLEARLY = 1.15  # times as fast: less is chance, on a machine that does other things too
_ELEMENTS, _ROWS, _FLOPS = 2**25, 256, 2e9  # of all matrices; tokens of a product; what all products may take
_ROUNDS, _SECONDS = 4, 0.15  # of which the best counts; and when there are no more

log = logging.getLogger(__name__)


def fastest_dtype(shapes: Iterable[tuple[int, ...]], device: str = "cpu") -> str:
    """Times products with matrices of some shapes, in well under a second.

    Args:
        shapes: Of a model's weights; what is no matrix does not count.
        device: Where it runs.

    Returns:
        "float32" or "bfloat16".
    """
    matrices = {(shape[0], shape[1]) for shape in shapes if len(shape) == 2 and min(shape) > 1}
    chosen: list[tuple[int, int]] = []
    for shape in sorted(matrices, key=math.prod):
        if not chosen or sum(map(math.prod, chosen)) + math.prod(shape) <= _ELEMENTS:
            chosen.append(shape)
    if not chosen:
        return CHOICES[0]
    elements = sum(map(math.prod, chosen))
    rows = int(min(_ROWS, max(8.0, _FLOPS / (2 * elements))))
    rates = {name: 2 * rows * elements / _seconds(chosen, rows, name, device) for name in CHOICES}
    log.info("matrix products on %s: %s", device, ", ".join(f"{r / 1e9:.0f} GFLOP/s in {n}" for n, r in rates.items()))
    return max(CHOICES, key=lambda name: rates[name] * (_CLEARLY if name == CHOICES[0] else 1.0))


def _seconds(matrices: Sequence[tuple[int, int]], rows: int, dtype: str, device: str) -> float:
    """The seconds of one product with each."""
    on: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    work = [(torch.ones(rows, inputs, **on), torch.ones(outputs, inputs, **on)) for outputs, inputs in matrices]
    clock = time.process_time if device == "cpu" else time.perf_counter  # the first counts no other program's turns
    best, end = float("inf"), math.inf
    with torch.inference_mode():
        for turn in range(_ROUNDS + 1):  # the first of which does what is done once
            begin = clock()
            for inputs, weight in work:
                torch.nn.functional.linear(inputs, weight)
            if device != "cpu":
                torch.accelerator.synchronize()
            if turn:
                best, end = min(best, clock() - begin), min(end, begin + _SECONDS)
            if clock() > end:
                break
    return best
