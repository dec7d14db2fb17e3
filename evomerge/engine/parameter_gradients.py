"""How a merged model moves with its recipe's parameters: differences of its weights, in float32, along a gradient.

No method says how its result depends on its parameters. Two merges a little apart say it, for any of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evomerge.engine.execute import Part, parts
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.methods.contract import Settings
from evomerge.planning.operation import Family, Operation
from evomerge.system.threads import run_all

Entry = tuple[str, int | None]
"""A number in an operation's settings: the parameter, and the index of the source that it is for."""
Bounds = tuple[float, float]

STEP = 0.04
"""Of the range. Where elements change sides (masks, elected signs) a smaller one sees fewer of them and more noise."""


def entries(settings: Settings) -> dict[Entry, float]:
    """The settings that are real numbers."""
    found: dict[Entry, float] = {(name, None): v for name, v in settings.shared.items() if isinstance(v, float)}
    for k, source in enumerate(settings.sources):
        found |= {(name, k): value for name, value in source.items() if isinstance(value, float)}
    return found


def slopes(
    work: Sequence[tuple[Operation, Mapping[Entry, Bounds]]],
    gradient: Mapping[str, Tensor],
    store: StatisticsStore,
    family: Family = (),
) -> dict[str, dict[Entry, float]]:
    """How a number changes with the settings of operations, given how it changes with the weights.

    Args:
        work: Operations, with the settings to look at and the range of each.
        gradient: Output to the derivative of the number with respect to it, float32; a missing one counts as 0.
        store: Statistics and tensors of the open checkpoints.
        family: The inputs that together make the model, for `scope: model`.

    Returns:
        Output to setting to derivative. One-sided where a setting is at the end of its range.
    """
    wanted = [(operation, bounds) for operation, bounds in work if operation.output in gradient and bounds]
    wanted.sort(key=lambda pair: -math.prod(pair[0].shape))
    pieces = [partial(_slopes, *pair, gradient[pair[0].output], store, family) for pair in wanted]
    found = run_all(pieces, torch.get_num_threads())
    return {operation.output: slope for (operation, _), slope in zip(wanted, found, strict=True)}


def _slopes(
    operation: Operation, bounds: Mapping[Entry, Bounds], gradient: Tensor, store: StatisticsStore, family: Family
) -> dict[Entry, float]:
    flat = gradient.reshape(-1).cpu()
    return {entry: _slope(operation, entry, bounds[entry], flat, store, family) for entry in bounds}


def _slope(
    operation: Operation, entry: Entry, bounds: Bounds, gradient: Tensor, store: StatisticsStore, family: Family
) -> float:
    value, step = entries(operation.settings)[entry], STEP * (bounds[1] - bounds[0])
    low, high = max(value - step, min(value, bounds[0])), min(value + step, max(value, bounds[1]))
    if not low < high:
        return 0.0
    sums = [
        float((gradient[start:stop] * difference).sum(dtype=torch.float64))
        for start, stop, difference in _differences(
            _changed(operation, entry, high), _changed(operation, entry, low), store, family
        )
    ]
    return math.fsum(sums) / (high - low)


def _changed(operation: Operation, entry: Entry, value: float) -> Operation:
    name, source = entry
    settings = operation.settings
    if source is None:
        return replace(operation, settings=Settings({**settings.shared, name: value}, settings.sources))
    changed: list[Mapping[str, Any]] = list(settings.sources)
    changed[source] = {**changed[source], name: value}
    return replace(operation, settings=Settings(settings.shared, tuple(changed)))


def _differences(
    one: Operation, other: Operation, store: StatisticsStore, family: Family
) -> Iterator[tuple[int, int, Tensor]]:
    """One result minus the other, neither rounded: (start, stop, elements start..stop) part by part."""
    left, right = list(parts(one, store, family)), list(parts(other, store, family))
    for at in min(left, right, key=len):  # settings may decide how much has to be seen at once: the larger parts
        values = [_computed(held[0], at.start, at.stop) for held in (left, right)]
        yield at.start, at.stop, values[0].sub_(values[1])


def _computed(part: Part, start: int, stop: int) -> Tensor:
    out = torch.empty(stop - start)
    replace(part, start=start, stop=stop).compute(out)
    return out
