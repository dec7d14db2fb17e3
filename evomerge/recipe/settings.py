"""What a parameter may be set to in a recipe, and what that is for one tensor.

As in mergekit, a setting is a scalar, a gradient (a list that runs over the layers of a slice) or a list of
conditionals (``filter`` and ``value``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from evomerge.errors import is_number

Scalar = float | int | bool | str
Gradient = tuple[Scalar, ...]


@dataclass(frozen=True)
class Conditional:
    """A value for the tensors whose name contains `filter`; None or ``*`` is every tensor."""

    value: Scalar | Gradient
    filter: str | None = None

    def matches(self, tensor_name: str) -> bool:
        """Tells whether the condition holds for a tensor."""
        return self.filter is None or self.filter == "*" or self.filter in tensor_name


Setting = Scalar | Gradient | tuple[Conditional, ...]


class Parameters(Mapping[str, Setting]):
    """The ``parameters:`` of one level of a recipe: an immutable, hashable mapping from name to setting."""

    def __init__(self, items: Mapping[str, Setting] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, name: str) -> Setting:
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"Parameters({self._items!r})"


def evaluate(setting: Setting, tensor_name: str, t: float) -> Scalar | None:
    """Returns the value of a setting for one tensor.

    Args:
        setting: Scalar, gradient or conditionals; of conditionals the first that matches counts.
        tensor_name: The name that filters are matched against.
        t: Position within the slice, 0 for its first layer and 1 for its last.

    Returns:
        The value; None when no conditional matches. Numbers are interpolated linearly, words and truth values take the
        last point of the gradient that is not after t.
    """
    if not isinstance(setting, tuple):
        return setting
    for entry in setting:
        if not isinstance(entry, Conditional):
            break
        if entry.matches(tensor_name):
            return evaluate(entry.value, tensor_name, t)
    else:
        return None
    return _along(setting, t)


def _along(gradient: tuple[Any, ...], t: float) -> Scalar:
    position = min(max(t, 0.0), 1.0) * (len(gradient) - 1)
    # A list with one value for each layer has to give exactly those, whatever idx / (n - 1) rounds to.
    if abs(position - round(position)) < 1e-9:
        position = round(position)
    low = int(position)
    part = position - low
    if part == 0 or not all(is_number(value) for value in gradient):
        value: Scalar = gradient[low]
        return value
    return float((1 - part) * gradient[low] + part * gradient[low + 1])


def restrict(setting: Setting, start: int, stop: int, total: int) -> Setting:
    """Returns a setting over `total` layers, rewritten for the slice of layers `start` to `stop` (exclusive)."""
    entries = conditionals(setting)
    if entries is None:
        return _restrict_gradient(cast("Scalar | Gradient", setting), start, stop, total)
    return tuple(Conditional(_restrict_gradient(e.value, start, stop, total), e.filter) for e in entries)


def _restrict_gradient(value: Scalar | Gradient, start: int, stop: int, total: int) -> Scalar | Gradient:
    if not isinstance(value, tuple):
        return value
    return tuple(_along(value, layer_t(layer, total)) for layer in range(start, stop))


def chain(first: Setting | None, second: Setting | None) -> Setting | None:
    """Joins the settings of two levels: the first, or the second where no conditional of the first matches."""
    if first is None or second is None:
        return second if first is None else first
    head = conditionals(first)
    if head is None:
        return first
    tail = conditionals(second)
    if tail is None:
        tail = (Conditional(cast("Scalar | Gradient", second)),)
    return head + tail


def conditionals(setting: Setting) -> tuple[Conditional, ...] | None:
    """Returns the conditionals of a setting; None for a scalar or gradient."""
    if isinstance(setting, tuple) and any(isinstance(entry, Conditional) for entry in setting):
        return tuple(entry for entry in setting if isinstance(entry, Conditional))
    return None


def layer_t(offset: int, length: int) -> float:
    """Returns where a layer is in its slice: 0 for the first, 1 for the last, 1 for an only one (as mergekit)."""
    return offset / (length - 1) if length > 1 else 1.0


def plain(setting: Setting) -> Any:
    """Returns the setting as YAML and JSON have it."""
    if not isinstance(setting, tuple):
        return setting
    return [_plain_conditional(entry) if isinstance(entry, Conditional) else entry for entry in setting]


def _plain_conditional(entry: Conditional) -> dict[str, Any]:
    value = list(entry.value) if isinstance(entry.value, tuple) else entry.value
    return {"value": value} if entry.filter is None else {"filter": entry.filter, "value": value}
