"""Learns which linear combination of its inputs a method computes, by running it once on symbols instead of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.engine.statistics.operation_statistics import OperationStatistics
from evomerge.methods.contract import Block, Settings
from evomerge.methods.registry import get_method

BASE = -1
"""Index of the base among an operation's inputs, whose sources count from 0."""


@dataclass(frozen=True)
class LinearCombination:
    """Σ ci xi, or xa + Σ ci (xi − xa) where there is a pivot.

    Attributes:
        pivot: Index a, or None.
        inputs: The indices i, in the order of the sum.
        coefficients: Their ci.
    """

    pivot: int | None
    inputs: tuple[int, ...]
    coefficients: tuple[float, ...]


def linear_combination(method: str, settings: Settings, statistics: OperationStatistics) -> LinearCombination | None:
    """Finds the combination that a method computes with these settings; None where it computes anything else."""
    merge = get_method(method).merge
    if merge is None:
        return None
    base = None if statistics.base is None else _Symbol([(BASE, 1.0)])
    sources = [_Symbol([(i, 1.0)]) for i in range(len(settings.sources))]
    try:
        result: Any = merge(Block(base, sources, 0, statistics), settings)  # type: ignore[arg-type]
    except (TypeError, AttributeError):
        return None
    if not isinstance(result, _Symbol) or not (result.started or result.pivot is None):
        return None
    inputs, coefficients = tuple(i for i, _ in result.terms), tuple(c for _, c in result.terms)
    return LinearCombination(result.pivot, inputs, coefficients)


class _Symbol:
    """Stands for a tensor while a method says which combination of its inputs it computes.

    It knows the few operations that `evomerge.methods.arithmetic` builds its sums from, and keeps their terms in order:
    (source, coefficient), the source as it is or minus the pivot. Anything else fails, and the method is called on
    tensors instead.
    """

    shape = ()

    def __init__(self, terms: Sequence[tuple[int, float]], pivot: int | None = None, started: bool = False) -> None:
        self.terms = list(terms)
        self.pivot = pivot
        self.started = started  # a copy of the pivot, to which terms are added

    def clone(self) -> _Symbol:
        return _Symbol([], self._name(), started=True)

    def __sub__(self, other: _Symbol) -> _Symbol:
        return _Symbol([(self._name(), 1.0)], other._name())

    def __mul__(self, coefficient: float) -> _Symbol:
        return _Symbol([(self._name(), float(coefficient))])

    def mul_(self, coefficient: float) -> _Symbol:
        if self.started or len(self.terms) != 1 or self.terms[0][1] != 1.0:
            raise TypeError("not one term of a sum")
        self.terms = [(self.terms[0][0], float(coefficient))]
        return self

    def add_(self, other: _Symbol) -> _Symbol:
        if other.started or other.pivot != self.pivot:
            raise TypeError("not a sum around one pivot")
        self.terms += other.terms
        return self

    def _name(self) -> int:
        if self.started or self.pivot is not None or len(self.terms) != 1 or self.terms[0][1] != 1.0:
            raise TypeError("not an input")
        return self.terms[0][0]
