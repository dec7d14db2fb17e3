"""Which compiled kernel, if any, does what a method does with its settings.

A kernel is an equal of the method's own function, only faster: the methods do not know of it, and where there is none
(other settings, a method without one) the engine calls the method. Adding one costs a function here and a line in
`KERNELS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.engine.facts import CHUNK, OperationFacts
from evomerge.engine.kernels import merging
from evomerge.engine.selection import top, top_sampled
from evomerge.methods.combine import participants, shares
from evomerge.methods.dare import keep_probability, terms
from evomerge.methods.dare_ties import trims
from evomerge.methods.declaration import Block, Settings
from evomerge.methods.random_field import STEPS, keep_threshold
from evomerge.methods.registry import get_method

Floats = NDArray[np.float32]

BASE = -1
KEEP_ALL = (-1.0, -1)


@dataclass(frozen=True)
class Work:
    """What to run over a tensor, part by part.

    Attributes:
        inputs: The tensors it reads, by index of the source; -1 is the base.
        run: (the inputs [inputs, n], flat index of the first element, result [n]), all float32.
    """

    inputs: tuple[int, ...]
    run: Callable[[Floats, int, Floats], None]


Kernel = Callable[[str, Settings, OperationFacts], Work | None]


def compiled(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    """The kernel for a method, or None when the method has to be called.

    Args:
        method: Its name.
        settings: Its settings for the tensor.
        facts: Facts about the tensor; asked here, once, for all its parts.
    """
    kernel = KERNELS.get(method)
    work = None if kernel is None else kernel(method, settings, facts)
    return None if work is None or (facts.base is None and BASE in work.inputs) else work


# ---------------------------------------------------------------- ties and dare


def _ties(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    sources = [(i, float(settings.sources[i]["density"])) for i in participants(settings)[0]]
    scope = settings.shared["scope"]
    cuts = [KEEP_ALL if density >= 1.0 else facts.trim(i, density, scope) for i, density in sources]
    return _elect(settings, cuts, _field([1.0 for _ in sources], []), [1.0 for _ in sources])


def _dare_ties(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    indices = participants(settings)[0]
    chances = [keep_probability(settings.sources[i]) for i in indices]
    rescale = settings.shared["rescale"]
    factors = [1.0 / chance if rescale and 0.0 < chance < 1.0 else 1.0 for chance in chances]
    keeps, keys = _field(chances, [facts.key(i) for i in indices])
    cuts = [KEEP_ALL] * len(indices)
    for k, (i, factor) in enumerate(zip(indices, _singles(factors), strict=True)):
        if trims(settings.sources[i]) and keeps[k] > 0:
            survivors = partial(_survivors, facts, i, int(keeps[k]), keys[k], factor)
            density, known = float(settings.sources[i]["density"]), facts.magnitudes(i)
            sampled = top_sampled(survivors, density, known, chances[k], float(factor))
            cuts[k] = sampled or top(survivors, facts.size, density)
    return _elect(settings, cuts, (keeps, keys), factors)


def _survivors(
    facts: OperationFacts, source: int, keep: int, key: NDArray[np.uint64], factor: np.float32
) -> Iterator[tuple[int, Floats]]:
    """One source's delta after the drop, NaN where it is dropped."""
    held = np.empty(CHUNK, dtype=np.float32)
    for start, (base, theirs) in facts.store.rows(facts.inputs([BASE, source])):
        out = held[: base.size]
        merging.survivors(base, theirs, start, keep, key, factor, out)
        yield start, out


def _elect(
    settings: Settings,
    cuts: Sequence[tuple[float, int]],
    field: tuple[NDArray[np.int64], NDArray[np.uint64]],
    factors: Sequence[float],
) -> Work | None:
    indices, weights = participants(settings)
    sizes = [abs(weight) for weight in weights]
    if not indices or not all(_singles(sizes)):
        return None
    shared = settings.shared
    arguments = (
        _singles(threshold for threshold, _ in cuts),
        np.array([last for _, last in cuts], dtype=np.int64),
        *field,
        _singles(factors),
        _singles(weights),
        _singles(size / total for size, total in zip(sizes, itertools.accumulate(sizes), strict=True)),
        np.float32(shared["lambda"]),
        shared["consensus"] == "count",
        0 if not shared["normalize"] else 1 if shared["average"] == "all" else 2,
    )
    return Work((BASE, *indices), lambda x, start, out: merging.ties(x[0], x[1:], start, *arguments, out))


def _dare(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    parts = terms(settings)
    if all(chance >= 1.0 for _, _, chance in parts):
        return _combination(method, settings, facts)
    parts = [part for part in parts if part[2] > 0.0]
    factors = _singles(factor for _, factor, _ in parts)
    field = _field([chance for _, _, chance in parts], [facts.key(i) for i, _, _ in parts])
    inputs = (BASE, *(i for i, _, _ in parts))
    return Work(inputs, lambda x, start, out: merging.dare(x[0], x[1:], start, *field, factors, out))


def _field(chances: Sequence[float], keys: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """(numbers below this are kept, keys); without keys nothing is drawn."""
    keeps = [0 if chance <= 0.0 else STEPS if chance >= 1.0 else keep_threshold(chance) for chance in chances]
    drawn = np.array(list(keys) or [(0, 0)] * len(chances), dtype=np.uint64)
    return np.array(keeps, dtype=np.int64), drawn.reshape(len(chances), 2)


def _singles(values: Iterable[float]) -> NDArray[np.float32]:
    return np.array(list(values), dtype=np.float64).astype(np.float32)


# ---------------------------------------------------------------- dfs


def _dfs(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    if settings.shared["mode"] == "model":  # by row, the coefficients differ from row to row
        return _combination(method, settings, facts) if settings.shared["scope"] == "tensor" else None
    indices, weights = participants(settings)
    parts = shares(method, weights)
    anchor = max(range(len(parts)), key=lambda k: abs(parts[k]))
    spread = (_singles(parts), anchor, np.float32(float(settings.shared["tau"]) / len(parts)))
    density = float(settings.shared["density"])
    inputs = (BASE, *indices)
    cut = KEEP_ALL if density >= 1.0 else top(partial(_certainties, facts, inputs, spread), facts.size, density)
    rest = (*spread, np.float32(cut[0]), cut[1], np.float32(settings.shared["lambda"]))
    return Work(inputs, lambda x, start, out: merging.positions(x[0], x[1:], start, *rest, out))


def _certainties(
    facts: OperationFacts, inputs: Sequence[int], spread: tuple[Floats, int, np.float32]
) -> Iterator[tuple[int, Floats]]:
    held = np.empty(CHUNK, dtype=np.float32)
    for start, x in facts.store.rows(facts.inputs(inputs)):
        out = held[: x.shape[1]]
        merging.certainty(x[0], x[1:], *spread, out)
        yield start, out


# ---------------------------------------------------------------- linear combinations


class _Symbol:
    """Stands for a tensor while a method says which combination of its inputs it computes.

    It knows the few operations that `evomerge.methods.combine` builds its sums from, and keeps their terms in order:
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


def _combination(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    """A method that turns out to be a linear combination of its inputs: run once, on symbols, to learn which."""
    merge = get_method(method).merge
    if merge is None:
        return None
    symbols = [_Symbol([(i, 1.0)]) for i in range(BASE, len(settings.sources))]
    try:
        found: Any = merge(Block(symbols[0], symbols[1:], 0, facts), settings)  # type: ignore[arg-type]
    except (TypeError, AttributeError):
        return None
    if not isinstance(found, _Symbol) or not (found.started or found.pivot is None):
        return None
    others, coefficients = tuple(i for i, _ in found.terms), _singles(c for _, c in found.terms)
    if found.pivot is None:
        return Work(others, lambda x, start, out: merging.weighted_sum(x, coefficients, out))
    return Work((found.pivot, *others), lambda x, start, out: merging.affine(x[0], x[1:], coefficients, out))


KERNELS: dict[str, Kernel] = {
    "linear": _combination,
    "slerp": _combination,
    "task_arithmetic": _combination,
    "dfs": _dfs,
    "ties": _ties,
    "dare": _dare,
    "dare_linear": _dare,
    "dare_ties": _dare_ties,
}
