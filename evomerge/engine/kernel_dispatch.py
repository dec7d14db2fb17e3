"""Which compiled kernel, if any, does what a method does with its settings.

A kernel is an equal of the method's own function, only faster: the methods do not know of it, and where there is none
(other settings, a method without one) the engine calls the method. Adding one costs a function here and a line in
`KERNELS`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.engine.kernels import merge as merging
from evomerge.engine.kernels import sce_della as spread
from evomerge.engine.statistics.dropped_topk import Drop, cut_survivors
from evomerge.engine.statistics.exact_topk import top
from evomerge.engine.statistics.operation_statistics import OperationFacts
from evomerge.engine.statistics.row_ranks import Levels
from evomerge.engine.statistics.tensor_statistics import CHUNK
from evomerge.methods import breadcrumbs, della, sce
from evomerge.methods.arithmetic import participants, shares
from evomerge.methods.contract import Block, Cut, Settings
from evomerge.methods.dare import keep_probability, terms
from evomerge.methods.dare_ties import trims
from evomerge.methods.dfs import row_anchor, scaled_alphas
from evomerge.methods.nearswap import reach_of
from evomerge.methods.nuslerp import vector_terms
from evomerge.methods.random_field import LANES, STEPS, keep_threshold
from evomerge.methods.registry import get_method

Floats = NDArray[np.float32]

BASE = -1
KEEP_ALL: Cut = (-1.0, -1)
_NONE: Levels = np.empty((0, 0), np.uint8)


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
    return _elect(settings, _edits(len(cuts), cuts=cuts))


def _dare_ties(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    indices = participants(settings)[0]
    chances = [keep_probability(settings.sources[i]) for i in indices]
    rescale = settings.shared["rescale"]
    factors = [1.0 / chance if rescale and 0.0 < chance < 1.0 else 1.0 for chance in chances]
    edits = _edits(len(indices), chances=chances, keys=[facts.key(i) for i in indices], factors=factors)
    if any(trims(settings.sources[i]) for i in indices):
        edits = edits._replace(marks=np.empty((len(indices), -(-facts.size // LANES)), dtype=np.uint16))
    for k, i in enumerate(indices):
        if trims(settings.sources[i]) and chances[k] > 0.0:
            _trim_survivors(facts, i, float(settings.sources[i]["density"]), chances[k], edits, k)
    return _elect(settings, edits)


def _trim_survivors(
    facts: OperationFacts, source: int, density: float, chance: float, edits: merging.Edits, k: int
) -> None:
    """Has a source's delta trimmed after the drop: entry k of the edits."""
    population, found = facts.magnitudes(source), KEEP_ALL
    if density <= 0.0 or chance >= 1.0:
        found = facts.trim(source, density)
    elif population.bins.any() or population.mixed.any():  # of a delta of zeros it does not matter what is kept
        drop = Drop(chance, int(edits.keeps[k]), edits.keys[k], edits.factors[k])
        found = cut_survivors(facts.parts(source), population, facts.size, density, drop, edits.marks[k])
        edits.marked[k] = True
    edits.thresholds[k], edits.lasts[k] = found


def _elect(settings: Settings, edits: merging.Edits, levels: Callable[[int, int], Levels] | None = None) -> Work | None:
    indices, weights = participants(settings)
    sizes = [abs(weight) for weight in weights]
    if not indices or not all(_singles(sizes)):
        return None
    shared = settings.shared
    arguments = (
        _singles(weights),
        _singles(size / total for size, total in zip(sizes, itertools.accumulate(sizes), strict=True)),
        np.float32(shared["lambda"]),
        shared["consensus"] == "count",
        0 if not shared["normalize"] else 1 if shared["average"] == "all" else 2,
    )

    def run(x: Floats, start: int, out: Floats) -> None:
        merging.ties(x[0], x[1:], start, edits, _NONE if levels is None else levels(start, x.shape[1]), *arguments, out)

    return Work((BASE, *indices), run)


def _add(
    indices: Sequence[int],
    edits: merging.Edits,
    scales: Iterable[float],
    levels: Callable[[int, int], Levels] | None = None,
) -> Work:
    factors = _singles(scales)

    def run(x: Floats, start: int, out: Floats) -> None:
        merging.add(x[0], x[1:], start, edits, _NONE if levels is None else levels(start, x.shape[1]), factors, out)

    return Work((BASE, *indices), run)


def _dare(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    parts = terms(settings)
    if all(chance >= 1.0 for _, _, chance in parts):
        return _combination(method, settings, facts)
    parts = [part for part in parts if part[2] > 0.0]
    chances, keys = [chance for _, _, chance in parts], [facts.key(i) for i, _, _ in parts]
    edits = _edits(len(parts), chances=chances, keys=keys)
    return _add([i for i, _, _ in parts], edits, [factor for _, factor, _ in parts])


def _edits(
    count: int,
    *,
    chances: Sequence[float] = (),
    keys: Sequence[tuple[int, int]] = (),
    lines: Sequence[tuple[float, float, float, float]] = (),
    factors: Sequence[float] = (),
    cuts: Sequence[Cut] = (),
    outliers: Sequence[Cut] = (),
) -> merging.Edits:
    """What becomes of the deltas of `count` sources; nothing, for what is left out.

    Args:
        count: How many sources take part.
        chances: Probability to keep an element.
        keys: Of the sources' random fields.
        lines: For elements with levels, (a, b, factor, whether over the probability to keep).
        factors: After the drop.
        cuts: What is kept.
        outliers: What of that is left out.
    """
    keeps = [0 if c <= 0.0 else STEPS if c >= 1.0 else keep_threshold(c) for c in chances or [1.0] * count]
    cuts, outliers = cuts or [KEEP_ALL] * count, outliers or [(math.inf, -1)] * count
    return merging.Edits(
        np.array(keeps, dtype=np.int64),
        np.array(keys or [(0, 0)] * count, dtype=np.uint64).reshape(count, 2),
        _singles(value for line in lines for value in line).reshape(-1, 4),
        _singles(factors or [1.0] * count),
        _singles(threshold for threshold, _ in cuts),
        np.array([last for _, last in cuts], dtype=np.int64),
        _singles(threshold for threshold, _ in outliers),
        np.array([last for _, last in outliers], dtype=np.int64),
        np.zeros(count, dtype=np.bool_),
        np.empty((count, 0), dtype=np.uint16),
    )


def _singles(values: Iterable[float]) -> NDArray[np.float32]:
    return np.array(list(values), dtype=np.float64).astype(np.float32)


# ---------------------------------------------------------------- breadcrumbs and della


def _breadcrumbs(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    parts = breadcrumbs.terms(settings)
    if all(settings.sources[i]["density"] >= 1.0 for i, _ in parts):
        return _combination(method, settings, facts)
    indices = [i for i, _ in parts]
    return _add(indices, _bands(settings, facts, indices), [factor for _, factor in parts])


def _breadcrumbs_ties(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    return _elect(settings, _bands(settings, facts, participants(settings)[0]))


def _bands(settings: Settings, facts: OperationFacts, indices: Sequence[int]) -> merging.Edits:
    found = []
    for i in indices:
        density, gamma = float(settings.sources[i]["density"]), float(settings.sources[i]["gamma"])
        found.append(((math.inf, -1), KEEP_ALL) if density >= 1.0 else facts.band(i, density, gamma))
    return _edits(len(indices), outliers=[out for out, _ in found], cuts=[inside for _, inside in found])


def _della(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    indices = participants(settings)[0]
    return _elect(settings, *_pruned(settings, facts, [(i, 1.0) for i in indices]))


def _della_linear(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    parts = della.terms(settings)
    if all(della.keeps_all(settings.sources[i]) for i, _ in parts):
        return _combination(method, settings, facts)
    edits, levels = _pruned(settings, facts, parts)
    return _add([i for i, _ in parts], edits, [1.0] * len(parts), levels)


def _pruned(
    settings: Settings, facts: OperationFacts, parts: Sequence[tuple[int, float]]
) -> tuple[merging.Edits, Callable[[int, int], Levels]]:
    """The edits of (source, scale), and the levels of (first element, number of elements)."""
    rescale = float(settings.shared["rescale"])
    lines = [(*della.line(settings.sources[i]), scale, rescale) for i, scale in parts]

    def levels(start: int, size: int) -> Levels:
        return np.stack([facts.at(start, (size,)).levels(i).numpy() for i, _ in parts])

    return _edits(len(parts), keys=[facts.key(i) for i, _ in parts], lines=lines), levels


# ---------------------------------------------------------------- sce and model stock


def _sce(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    selection = facts.selected(float(settings.shared["select_topk"]))
    chosen, weights = sce.coefficients(selection.energies)
    if not chosen:
        return Work((BASE,), lambda x, start, out: np.copyto(out, x[0]))
    if not all(_singles(weights)):
        return None
    count = len(settings.sources)
    marks = np.empty(0, np.uint16) if selection.marks is None else selection.marks
    rest = (marks, np.array(chosen), _singles(weights), np.ones(count, np.float32))
    inputs = (BASE, *range(count))
    return Work(inputs, lambda x, start, out: spread.sce(x[0], x[1:], start, *rest, out))


def _model_stock(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    return None if settings.shared["filter_wise"] else _combination(method, settings, facts)


# ---------------------------------------------------------------- dfs


def _dfs(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    if settings.shared["mode"] == "model":
        return _combination(method, settings, facts) if settings.shared["scope"] == "tensor" else _rows(settings, facts)
    indices, weights = participants(settings)
    parts = shares(method, weights)
    anchor = max(range(len(parts)), key=lambda k: abs(parts[k]))
    spread = (_singles(parts), anchor, np.float32(float(settings.shared["tau"]) / len(parts)))
    density = float(settings.shared["density"])
    inputs = (BASE, *indices)
    cut = KEEP_ALL if density >= 1.0 else top(partial(_certainties, facts, inputs, spread), facts.size, density)
    rest = (*spread, np.float32(cut[0]), cut[1], np.float32(settings.shared["lambda"]))
    return Work(inputs, lambda x, start, out: merging.positions(x[0], x[1:], start, *rest, out))


def _rows(settings: Settings, facts: OperationFacts) -> Work | None:
    """Inverse variances by row: a linear combination whose coefficients differ from row to row."""
    if facts.size == 0:
        return None
    count, scale = facts.size // facts.columns, float(settings.shared["lambda"])
    columns = [_singles(alpha) for alpha in scaled_alphas(facts.at(0, (count, facts.columns)), settings)]
    inputs, anchor = [BASE, *participants(settings)[0]], row_anchor(scale)
    columns.insert(0, np.full(count, 1.0 - scale, dtype=np.float32))
    others = [k for k in range(len(inputs)) if k != anchor and not (k == 0 and scale == 1.0)]
    coefficients = np.array([columns[k] for k in others], dtype=np.float32).reshape(len(others), count)
    ones = np.ones(count, dtype=np.float32)
    chosen = (inputs[anchor], *(inputs[k] for k in others))
    return Work(
        chosen, lambda x, start, out: merging.by_row(x[0], x[1:], start, facts.columns, ones, coefficients, out)
    )


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


def _combination(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    """A method that turns out to be a linear combination of its inputs: run once, on symbols, to learn which."""
    merge = get_method(method).merge
    if merge is None:
        return None
    base = None if facts.base is None else _Symbol([(BASE, 1.0)])
    symbols = [_Symbol([(i, 1.0)]) for i in range(len(settings.sources))]
    try:
        found: Any = merge(Block(base, symbols, 0, facts), settings)  # type: ignore[arg-type]
    except (TypeError, AttributeError):
        return None
    if not isinstance(found, _Symbol) or not (found.started or found.pivot is None):
        return None
    others, coefficients = tuple(i for i, _ in found.terms), _singles(c for _, c in found.terms)
    if found.pivot is None:
        return Work(others, lambda x, start, out: merging.weighted_sum(x, coefficients, out))
    return Work((found.pivot, *others), lambda x, start, out: merging.affine(x[0], x[1:], coefficients, out))


# ---------------------------------------------------------------- nuslerp and nearswap


def _nuslerp(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    if settings.shared["nuslerp_flatten"]:
        return _combination(method, settings, facts)
    rows = facts.at(0, (facts.size // facts.columns if facts.columns else 0, facts.columns))
    terms = vector_terms(rows, facts.base is not None, settings)
    of_pivot = _singles(terms.of_pivot.reshape(-1))
    coefficients = np.array([_singles(c.reshape(-1)) for _, c in terms.others], np.float32).reshape(-1, of_pivot.size)
    inputs = (terms.pivot, *(i for i, _ in terms.others))
    if of_pivot.size == 0:
        return None
    if terms.along == "columns" and len(facts.whole) > 1:
        return Work(inputs, lambda x, start, out: merging.by_column(x[0], x[1:], start, of_pivot, coefficients, out))
    length = facts.size // of_pivot.size
    return Work(inputs, lambda x, start, out: merging.by_row(x[0], x[1:], start, length, of_pivot, coefficients, out))


def _nearswap(method: str, settings: Settings, facts: OperationFacts) -> Work | None:
    indices, weights = participants(settings)
    parts = shares(method, weights)
    anchor = max(range(len(parts)), key=lambda k: abs(parts[k]))
    others = [k for k in range(len(parts)) if k != anchor]
    coefficients, reach = _singles(parts[k] for k in others), np.float32(reach_of(settings))
    inputs = (BASE, indices[anchor], *(indices[k] for k in others))
    return Work(inputs, lambda x, start, out: merging.nearswap(x[0], x[1], x[2:], coefficients, reach, out))


KERNELS: dict[str, Kernel] = {
    "linear": _combination,
    "slerp": _combination,
    "task_arithmetic": _combination,
    "multislerp": _combination,
    "karcher": _combination,
    "nuslerp": _nuslerp,
    "nearswap": _nearswap,
    "tsv_merge": _combination,
    "iso_c": _combination,
    "dfs": _dfs,
    "ties": _ties,
    "dare": _dare,
    "dare_linear": _dare,
    "dare_ties": _dare_ties,
    "della": _della,
    "della_linear": _della_linear,
    "breadcrumbs": _breadcrumbs,
    "breadcrumbs_ties": _breadcrumbs_ties,
    "sce": _sce,
    "model_stock": _model_stock,
}
