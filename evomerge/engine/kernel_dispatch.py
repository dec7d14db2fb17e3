"""The compiled kernel, if any, that does what a method does with its settings.

A kernel is an equal of the method's own function, only faster: the methods do not know of it, and where there is none
(other settings, a method without one) the engine calls the method.

To add one: write the loop in `evomerge.engine.kernels`; here, a function `_NAME(method, settings, statistics)` that
turns the settings into the loop's arguments (or returns None where it does not do what they ask), and its row in
`KERNELS`. `tests/engine/test_execute.py` then compares it with the method's function, bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from evomerge.engine.kernels import linear, merge, sce_della
from evomerge.engine.statistics.dropped_topk import Dropout, dropped_topk_cutoff
from evomerge.engine.statistics.exact_topk import density_cutoff
from evomerge.engine.statistics.operation_statistics import OperationStatistics
from evomerge.engine.statistics.row_ranks import Levels
from evomerge.engine.statistics.tensor_reader import CHUNK
from evomerge.engine.symbolic_merge import BASE, linear_combination
from evomerge.methods import della, sce
from evomerge.methods.arithmetic import normalized_weights, participants, scaled_weights
from evomerge.methods.contract import Cutoff, Settings
from evomerge.methods.dare import keep_probability, terms
from evomerge.methods.dare_ties import trims_after_drop
from evomerge.methods.dfs import row_anchor, scaled_alphas
from evomerge.methods.nearswap import reach_of
from evomerge.methods.nuslerp import vector_terms
from evomerge.methods.ram import reinforcements
from evomerge.methods.random_field import LANES, STEPS, keep_threshold

Floats = NDArray[np.float32]
BlockLevels = Callable[[int, int], Levels]
"""(flat index of the first element, number of elements) -> DELLA's rank levels, uint8 [sources, elements]."""

KEEP_ALL: Cutoff = (-1.0, -1)
DROP_NONE: Cutoff = (math.inf, -1)
_NO_LEVELS: Levels = np.empty((0, 0), np.uint8)


@dataclass(frozen=True)
class KernelCall:
    """A kernel and its arguments, to run over a tensor part by part.

    Attributes:
        inputs: The tensors it reads, by index of the source; -1 is the base.
        run: (the inputs [inputs, n], flat index of the first element, result [n]), all float32.
    """

    inputs: tuple[int, ...]
    run: Callable[[Floats, int, Floats], None]


Dispatch = Callable[[str, Settings, OperationStatistics], KernelCall | None]


def find_kernel(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    """Finds the kernel for a method, or None when the method has to be called.

    Args:
        method: Its name.
        settings: Its settings for the tensor.
        statistics: Those of the tensor; asked here, once, for all its parts.
    """
    dispatch = KERNELS.get(method)
    if settings.shared.get("rescale") and method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        return None  # what is kept is scaled by sums over the tensor, for which no kernel has a place
    call = None if dispatch is None else dispatch(method, settings, statistics)
    return None if call is None or (statistics.base is None and BASE in call.inputs) else call


# ---------------------------------------------------------------- linear combinations


def _linear(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    """A method that turns out to be a linear combination of its inputs."""
    sum_ = linear_combination(method, settings, statistics)
    if sum_ is None:
        return None
    coefficients = _float32(sum_.coefficients)
    if sum_.pivot is None:
        return KernelCall(sum_.inputs, lambda x, start, out: linear.weighted_sum(x, coefficients, out))
    return KernelCall((sum_.pivot, *sum_.inputs), lambda x, start, out: linear.affine(x[0], x[1:], coefficients, out))


def _model_stock(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    return None if settings.shared["filter_wise"] else _linear(method, settings, statistics)


def _nuslerp(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    if settings.shared["nuslerp_flatten"]:
        return _linear(method, settings, statistics)
    rows = statistics.at(0, (statistics.size // statistics.columns if statistics.columns else 0, statistics.columns))
    terms = vector_terms(rows, statistics.base is not None, settings)
    of_pivot = _float32(terms.of_pivot.reshape(-1))
    coefficients = np.array([_float32(c.reshape(-1)) for _, c in terms.others], np.float32).reshape(-1, of_pivot.size)
    inputs = (terms.pivot, *(i for i, _ in terms.others))
    if of_pivot.size == 0:
        return None
    if terms.along == "columns" and len(statistics.whole) > 1:
        return KernelCall(
            inputs, lambda x, start, out: linear.by_column(x[0], x[1:], start, of_pivot, coefficients, out)
        )
    length = statistics.size // of_pivot.size
    return KernelCall(
        inputs, lambda x, start, out: linear.by_row(x[0], x[1:], start, length, of_pivot, coefficients, out)
    )


def _nearswap(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    indices, weights = participants(settings)
    shares = normalized_weights(method, weights)
    anchor = max(range(len(shares)), key=lambda k: abs(shares[k]))
    others = [k for k in range(len(shares)) if k != anchor]
    coefficients, reach = _float32(shares[k] for k in others), np.float32(reach_of(settings))
    inputs = (BASE, indices[anchor], *(indices[k] for k in others))
    return KernelCall(inputs, lambda x, start, out: linear.nearswap(x[0], x[1], x[2:], coefficients, reach, out))


# ---------------------------------------------------------------- deltas trimmed or dropped


def _ties(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    sources = [(i, float(settings.sources[i]["density"])) for i in participants(settings)[0]]
    scope = settings.shared["scope"]
    cutoffs = [KEEP_ALL if density >= 1.0 else statistics.trim(i, density, scope) for i, density in sources]
    return _elect_and_merge(settings, _edits(len(cutoffs), cutoffs=cutoffs))


def _dare(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    parts = terms(settings)
    if all(chance >= 1.0 for _, _, chance in parts):
        return _linear(method, settings, statistics)
    parts = [part for part in parts if part[2] > 0.0]
    chances, keys = [chance for _, _, chance in parts], [statistics.key(i) for i, _, _ in parts]
    edits = _edits(len(parts), chances=chances, keys=keys)
    return _add([i for i, _, _ in parts], edits, [factor for _, factor, _ in parts])


def _dare_ties(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    indices = participants(settings)[0]
    chances = [keep_probability(settings.sources[i]) for i in indices]
    rescale = settings.shared["rescale"]
    factors = [1.0 / chance if rescale and 0.0 < chance < 1.0 else 1.0 for chance in chances]
    edits = _edits(len(indices), chances=chances, keys=[statistics.key(i) for i in indices], factors=factors)
    if any(trims_after_drop(settings.sources[i]) for i in indices):
        edits = edits._replace(marks=np.empty((len(indices), -(-statistics.size // LANES)), dtype=np.uint16))
    for k, i in enumerate(indices):
        if trims_after_drop(settings.sources[i]) and chances[k] > 0.0:
            _trim_after_drop(statistics, i, float(settings.sources[i]["density"]), chances[k], edits, k)
    return _elect_and_merge(settings, edits)


def _trim_after_drop(
    statistics: OperationStatistics, source: int, density: float, chance: float, edits: merge.Edits, k: int
) -> None:
    """Has a source's delta trimmed after the drop: entry k of the edits."""
    population, cutoff = statistics.magnitudes(source), KEEP_ALL
    if density <= 0.0 or chance >= 1.0:
        cutoff = statistics.trim(source, density)
    elif population.bins.any() or population.mixed.any():  # of a delta of zeros it does not matter what is kept
        dropout = Dropout(chance, int(edits.keeps[k]), edits.keys[k], edits.factors[k])
        parts, marks = statistics.parts(source), edits.marks[k]
        cutoff = dropped_topk_cutoff(parts, population, statistics.size, density, dropout, marks)
        edits.marked[k] = True
    edits.thresholds[k], edits.lasts[k] = cutoff


def _breadcrumbs(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    parts = scaled_weights(settings)
    if all(settings.sources[i]["density"] >= 1.0 for i, _ in parts):
        return _linear(method, settings, statistics)
    indices = [i for i, _ in parts]
    return _add(indices, _bands(settings, statistics, indices), [factor for _, factor in parts])


def _breadcrumbs_ties(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    return _elect_and_merge(settings, _bands(settings, statistics, participants(settings)[0]))


def _bands(settings: Settings, statistics: OperationStatistics, indices: Sequence[int]) -> merge.Edits:
    bands = []
    for i in indices:
        density, gamma = float(settings.sources[i]["density"]), float(settings.sources[i]["gamma"])
        bands.append((DROP_NONE, KEEP_ALL) if density >= 1.0 else statistics.band(i, density, gamma))
    return _edits(len(indices), outliers=[outliers for outliers, _ in bands], cutoffs=[inside for _, inside in bands])


def _della(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    indices = participants(settings)[0]
    return _elect_and_merge(settings, *_magprune(settings, statistics, [(i, 1.0) for i in indices]))


def _della_linear(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    parts = scaled_weights(settings)
    if all(della.keeps_all(settings.sources[i]) for i, _ in parts):
        return _linear(method, settings, statistics)
    edits, levels = _magprune(settings, statistics, parts)
    return _add([i for i, _ in parts], edits, [1.0] * len(parts), levels)


def _magprune(
    settings: Settings, statistics: OperationStatistics, parts: Sequence[tuple[int, float]]
) -> tuple[merge.Edits, BlockLevels]:
    """The edits of (source, scale), and the rank levels of any block."""
    rescale = float(settings.shared["rescale"])
    lines = [(*della.line(settings.sources[i]), scale, rescale) for i, scale in parts]

    def levels(start: int, size: int) -> Levels:
        return np.stack([statistics.at(start, (size,)).rank_levels(i).numpy() for i, _ in parts])

    return _edits(len(parts), keys=[statistics.key(i) for i, _ in parts], lines=lines), levels


def _elect_and_merge(settings: Settings, edits: merge.Edits, levels: BlockLevels | None = None) -> KernelCall | None:
    """Elects signs over the edited deltas of the sources that take part, and merges what agrees."""
    indices, weights = participants(settings)
    sizes = [abs(weight) for weight in weights]
    if not indices or not all(_float32(sizes)):
        return None
    shared = settings.shared
    arguments = (
        _float32(weights),
        _float32(size / total for size, total in zip(sizes, itertools.accumulate(sizes), strict=True)),
        np.float32(shared["lambda"]),
        shared["consensus"] == "count",
        0 if not shared["normalize"] else 1 if shared["average"] == "all" else 2,
    )

    def run(x: Floats, start: int, out: Floats) -> None:
        block_levels = _NO_LEVELS if levels is None else levels(start, x.shape[1])
        merge.ties(x[0], x[1:], start, edits, block_levels, *arguments, out)

    return KernelCall((BASE, *indices), run)


def _add(
    indices: Sequence[int], edits: merge.Edits, scales: Iterable[float], levels: BlockLevels | None = None
) -> KernelCall:
    """Adds up the edited deltas of these sources."""
    factors = _float32(scales)

    def run(x: Floats, start: int, out: Floats) -> None:
        block_levels = _NO_LEVELS if levels is None else levels(start, x.shape[1])
        merge.add(x[0], x[1:], start, edits, block_levels, factors, out)

    return KernelCall((BASE, *indices), run)


def _edits(
    count: int,
    *,
    chances: Sequence[float] = (),
    keys: Sequence[tuple[int, int]] = (),
    lines: Sequence[tuple[float, float, float, float]] = (),
    factors: Sequence[float] = (),
    cutoffs: Sequence[Cutoff] = (),
    outliers: Sequence[Cutoff] = (),
) -> merge.Edits:
    """What becomes of the deltas of `count` sources; nothing, for what is left out.

    Args:
        count: How many sources take part.
        chances: Probability to keep an element.
        keys: Of the sources' random fields.
        lines: For elements with rank levels, (a, b, factor, whether over the probability to keep).
        factors: After the drop.
        cutoffs: What is kept.
        outliers: What of that is left out.
    """
    keeps = [0 if c <= 0.0 else STEPS if c >= 1.0 else keep_threshold(c) for c in chances or [1.0] * count]
    cutoffs, outliers = cutoffs or [KEEP_ALL] * count, outliers or [DROP_NONE] * count
    return merge.Edits(
        np.array(keeps, dtype=np.int64),
        np.array(keys or [(0, 0)] * count, dtype=np.uint64).reshape(count, 2),
        _float32(value for line in lines for value in line).reshape(-1, 4),
        _float32(factors or [1.0] * count),
        _float32(threshold for threshold, _ in cutoffs),
        np.array([last for _, last in cutoffs], dtype=np.int64),
        _float32(threshold for threshold, _ in outliers),
        np.array([last for _, last in outliers], dtype=np.int64),
        np.zeros(count, dtype=np.bool_),
        np.empty((count, 0), dtype=np.uint16),
    )


def _float32(values: Iterable[float]) -> NDArray[np.float32]:
    return np.array(list(values), dtype=np.float64).astype(np.float32)


# ---------------------------------------------------------------- variances


def _sce(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    selection = statistics.marked_selection(float(settings.shared["select_topk"]))
    chosen, weights = sce.coefficients(selection.energies)
    if not chosen:
        return KernelCall((BASE,), lambda x, start, out: np.copyto(out, x[0]))
    if not all(_float32(weights)):
        return None
    count = len(settings.sources)
    marks = np.empty(0, np.uint16) if selection.marks is None else selection.marks
    arguments = (marks, np.array(chosen), _float32(weights), np.ones(count, np.float32))
    inputs = (BASE, *range(count))
    return KernelCall(inputs, lambda x, start, out: sce_della.sce(x[0], x[1:], start, *arguments, out))


def _ram(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    factors = np.array(reinforcements(statistics, settings))
    arguments = (np.float32(settings.shared["epsilon"]), factors, np.float32(settings.shared["lambda"]))
    inputs = (BASE, *range(len(settings.sources)))
    return KernelCall(inputs, lambda x, start, out: merge.ram(x[0], x[1:], *arguments, out))


def _dfs(method: str, settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    if settings.shared["mode"] == "model":
        by_row = settings.shared["scope"] != "tensor"
        return _dfs_by_row(settings, statistics) if by_row else _linear(method, settings, statistics)
    indices, weights = participants(settings)
    shares = normalized_weights(method, weights)
    anchor = max(range(len(shares)), key=lambda k: abs(shares[k]))
    shrinkage = (_float32(shares), anchor, np.float32(float(settings.shared["tau"]) / len(shares)))
    density, inputs = float(settings.shared["density"]), (BASE, *indices)
    cutoff = KEEP_ALL
    if density < 1.0:
        cutoff = density_cutoff(partial(_certainties, statistics, inputs, shrinkage), statistics.size, density)
    arguments = (*shrinkage, np.float32(cutoff[0]), cutoff[1], np.float32(settings.shared["lambda"]))
    return KernelCall(inputs, lambda x, start, out: merge.positions(x[0], x[1:], start, *arguments, out))


def _dfs_by_row(settings: Settings, statistics: OperationStatistics) -> KernelCall | None:
    """Inverse variances by row: a linear combination whose coefficients differ from row to row."""
    if statistics.size == 0:
        return None
    count, columns, scale = statistics.size // statistics.columns, statistics.columns, float(settings.shared["lambda"])
    alphas = [_float32(alpha) for alpha in scaled_alphas(statistics.at(0, (count, columns)), settings)]
    inputs, anchor = [BASE, *participants(settings)[0]], row_anchor(scale)
    alphas.insert(0, np.full(count, 1.0 - scale, dtype=np.float32))
    others = [k for k in range(len(inputs)) if k != anchor and not (k == 0 and scale == 1.0)]
    coefficients = np.array([alphas[k] for k in others], dtype=np.float32).reshape(len(others), count)
    ones = np.ones(count, dtype=np.float32)
    order = (inputs[anchor], *(inputs[k] for k in others))
    return KernelCall(order, lambda x, start, out: linear.by_row(x[0], x[1:], start, columns, ones, coefficients, out))


def _certainties(
    statistics: OperationStatistics, inputs: Sequence[int], shrinkage: tuple[Floats, int, np.float32]
) -> Iterator[tuple[int, Floats]]:
    """DFS's factor of every element of the mean delta, chunk by chunk."""
    buffer = np.empty(CHUNK, dtype=np.float32)
    for start, x in statistics.store.tensors.rows(statistics.inputs(inputs)):
        out = buffer[: x.shape[1]]
        merge.certainty(x[0], x[1:], *shrinkage, out)
        yield start, out


KERNELS: dict[str, Dispatch] = {
    "linear": _linear,
    "slerp": _linear,
    "task_arithmetic": _linear,
    "multislerp": _linear,
    "karcher": _linear,
    "model_stock": _model_stock,
    "nuslerp": _nuslerp,
    "nearswap": _nearswap,
    "ties": _ties,
    "dare": _dare,
    "dare_linear": _dare,
    "dare_ties": _dare_ties,
    "breadcrumbs": _breadcrumbs,
    "breadcrumbs_ties": _breadcrumbs_ties,
    "della": _della,
    "della_linear": _della_linear,
    "sce": _sce,
    "dfs": _dfs,
    "ram": _ram,
    "ramplus_tl": _ram,
}
