"""Differentiates merged tensors with respect to the numbers in a recipe's settings.

No method says how its result depends on its parameters: central differences of the merge in float32, for any method.
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
from evomerge.methods.contract import ParameterKey as ParameterKey  # handed on
from evomerge.methods.contract import Settings
from evomerge.planning.operation import Family, Operation
from evomerge.system.threads import run_all

ParameterRange = tuple[float, float]

STEP = 0.04
"""Of the range. Where elements change sides (masks, elected signs) a smaller one sees fewer of them and more noise."""


def float_parameters(settings: Settings) -> dict[ParameterKey, float]:
    """Returns the settings that are real numbers."""
    floats: dict[ParameterKey, float] = {(name, None): v for name, v in settings.shared.items() if isinstance(v, float)}
    for k, source in enumerate(settings.sources):
        floats |= {(name, k): value for name, value in source.items() if isinstance(value, float)}
    return floats


def setting_derivatives(
    work: Sequence[tuple[Operation, Mapping[ParameterKey, ParameterRange]]],
    store: StatisticsStore,
    family: Family = (),
) -> Iterator[tuple[str, dict[ParameterKey, Tensor]]]:
    """Differentiates the outputs of operations with respect to their settings.

    Args:
        work: Operations, with the parameters to differentiate by and the range of each.
        store: Statistics and tensors of the open checkpoints.
        family: The inputs that together make the model, for `scope: model`.

    Yields:
        Output and parameter to derivative, float32 in the output's shape, without those that are zero throughout.
        One-sided where a parameter is at the end of its range.
    """
    calls = [partial(_of_operation, operation, ranges, store, family) for operation, ranges in work]
    for (operation, _), derivatives in zip(work, run_all(calls, torch.get_num_threads()), strict=True):
        yield operation.output, derivatives


def _of_operation(
    operation: Operation, ranges: Mapping[ParameterKey, ParameterRange], store: StatisticsStore, family: Family
) -> dict[ParameterKey, Tensor]:
    derivatives = {key: _derivative(operation, key, allowed, store, family) for key, allowed in ranges.items()}
    return {key: derivative for key, derivative in derivatives.items() if derivative is not None}


def _derivative(
    operation: Operation, key: ParameterKey, allowed: ParameterRange, store: StatisticsStore, family: Family
) -> Tensor | None:
    value, step = float_parameters(operation.settings)[key], STEP * (allowed[1] - allowed[0])
    low, high = max(value - step, min(value, allowed[0])), min(value + step, max(value, allowed[1]))
    if not low < high:
        return None
    derivative = torch.empty(math.prod(operation.shape))
    for start, stop, difference in _differences(
        _changed(operation, key, high), _changed(operation, key, low), store, family
    ):
        torch.div(difference, high - low, out=derivative[start:stop])
    return derivative.reshape(operation.shape) if bool(derivative.any()) else None


def _changed(operation: Operation, key: ParameterKey, value: float) -> Operation:
    name, source = key
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
        values = [_computed(side[0], at.start, at.stop) for side in (left, right)]
        yield at.start, at.stop, values[0].sub_(values[1])


def _computed(part: Part, start: int, stop: int) -> Tensor:
    out = torch.empty(stop - start)
    replace(part, start=start, stop=stop).compute(out)
    return out
