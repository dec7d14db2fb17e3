"""Scores with their noise: per-item values of every metric, what they add up to, and how sure that is.

Every metric that can be compared between candidates item by item is a ratio of two sums over items, seen through a
transform: a mean has denominators of 1, bits per byte is ``-sum(ll) / sum(bytes) / ln 2``. Metrics that are no such
ratio (F1, BLEU) are kept as one number for exactly these items.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from evomerge.errors import TaskError, suggest
from evomerge.system.arrays import FloatArray, IntArray

NORMAL = 1.96
"""Standard errors on both sides of a 95% interval."""

_MAX_COUNTS = 2_000_000  # of a bootstrap, held at once

MEAN, BITS, EXP = "mean", "bits", "exp"
"""Transforms of the ratio r: r itself, ``-r / ln 2`` (bits per byte), ``exp(-r)`` (perplexities)."""


@dataclass(frozen=True)
class Score:
    """One metric over some items.

    Attributes:
        value: The metric, as lm-eval aggregates it.
        stderr: Its standard error, or None where none can be given (one item, or no mean or ratio of items).
        n: The items that were scored.
    """

    value: float
    stderr: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the value; None where its standard error is unknown."""
        if self.stderr is None:
            return None
        return self.value - NORMAL * self.stderr, self.value + NORMAL * self.stderr

    def to_json(self) -> dict[str, float | int | None]:
        """Returns ``{"value", "stderr", "n"}``."""
        return {"value": self.value, "stderr": self.stderr, "n": self.n}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        """Reads what `to_json` wrote; other keys are ignored."""
        stderr = data["stderr"]
        return cls(float(data["value"]), None if stderr is None else float(stderr), int(data["n"]))


ScoreTable = Mapping[str, Mapping[str, Score]]
"""``{task: {metric: Score}}``."""


@dataclass(frozen=True)
class ItemScores:
    """The scores of one task on some items, item by item.

    Attributes:
        task: The task's name.
        items: Our own stable item ids, length n.
        metrics: Metric to (numerators, denominators), float64 arrays of length n. A denominator of 0 means that the
            item has no value for this metric.
        higher_is_better: The direction of every metric, as the task states it.
        transforms: Metric to transform (`MEAN`, `BITS` or `EXP`); `MEAN` where absent.
        corpus: Metrics that are no mean or ratio of items: their value on exactly these items.
        corpus_rows: What these are made of, a value an item as JSON has it, where lm-eval knows their error.
        corpus_errors: Their standard errors, where those were asked for.
        noise: Metric to the standard deviation of an item's value, were the same answer valued again, as by a judge.
    """

    task: str
    items: tuple[str, ...]
    metrics: Mapping[str, tuple[FloatArray, FloatArray]]
    higher_is_better: Mapping[str, bool]
    transforms: Mapping[str, str] = field(default_factory=dict)
    corpus: Mapping[str, float] = field(default_factory=dict)
    corpus_rows: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    corpus_errors: Mapping[str, float] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Every metric, those that can be compared item by item first."""
        return (*self.metrics, *self.corpus)

    def is_itemwise(self, metric: str) -> bool:
        """Checks whether `metric` is a mean or ratio of items, so that candidates can be compared on part of them."""
        return metric in self.metrics

    def score(self, metric: str) -> Score:
        """Aggregates the metric over all items here.

        Raises:
            TaskError: The task has no such metric, or no item has a value for it.
        """
        if metric in self.corpus:
            return Score(self.corpus[metric], self.corpus_errors.get(metric), len(self.items))
        value, influence = self.influence(metric)
        n = int(np.count_nonzero(self.metrics[metric][1]))
        return Score(value, max(_standard_error(influence), self.noise_error(metric)) if n > 1 else None, n)

    def noise_error(self, metric: str) -> float:
        """Returns the standard error that noise alone makes of the metric's value; 0 where there is none.

        What items spread by has the noise in it, unless they are few, or happen to have been valued alike.
        """
        denominators = self.metrics[metric][1]
        total, counted = float(np.sum(denominators)), int(np.count_nonzero(denominators))
        return self.noise.get(metric, 0.0) * math.sqrt(counted) / total if total else 0.0

    def influence(self, metric: str) -> tuple[float, FloatArray]:
        """Returns the metric's value, and each item's influence on it.

        Returns:
            (value, influences of length n): the delta method's terms, whose mean is 0 and whose variance over n is the
            squared standard error of the value. Influences of several metrics or candidates on the same items add up.

        Raises:
            TaskError: As `score`, or the metric is no mean or ratio of items.
        """
        numerators, denominators = self.columns(metric)
        total = float(np.sum(denominators))
        if total == 0:
            raise TaskError(f"task {self.task!r}, metric {metric!r}: nothing was scored, so there is no score")
        ratio = float(np.sum(numerators)) / total
        value, slope = self.of_ratio(metric, ratio)
        return value, slope * ((numerators - ratio * denominators) * (len(self.items) / total))

    def of_sums(self, metric: str, numerator: float, denominator: float) -> float:
        """Returns the metric where its items' numerators and denominators add up to these; NaN where nothing does."""
        return _apply(self.transforms.get(metric, MEAN), numerator / denominator) if denominator else math.nan

    def of_ratio(self, metric: str, ratio: float) -> tuple[float, float]:
        """Returns the metric where its items' ratio is this, and its derivative by the ratio."""
        transform = self.transforms.get(metric, MEAN)
        return _apply(transform, ratio), _derivative(transform, ratio)

    def scores(self) -> dict[str, Score]:
        """Aggregates every metric that has a value here."""
        measured = (name for name in self.names if name in self.corpus or np.any(self.metrics[name][1] != 0))
        return {name: self.score(name) for name in measured}

    def values(self, metric: str) -> FloatArray:
        """Returns the metric of every item on its own, transformed; NaN where an item has no value."""
        numerators, denominators = self.columns(metric)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = np.where(denominators != 0, numerators / denominators, np.nan)
        return np.array([_apply(self.transforms.get(metric, MEAN), float(ratio)) for ratio in ratios])

    def take(self, positions: Sequence[int]) -> ItemScores:
        """Restricts the scores to some items (positions in `items`), without corpus metrics: they do not divide."""
        index = np.asarray(positions, dtype=np.int64)
        return ItemScores(
            self.task,
            tuple(self.items[i] for i in positions),
            {name: (a[index], b[index]) for name, (a, b) in self.metrics.items()},
            self.higher_is_better,
            self.transforms,
            noise=self.noise,
        )

    def weighted(self, weights: npt.ArrayLike) -> ItemScores:
        """Weights the scores, each item standing for `weights[k]` items of a whole that they were drawn from.

        Ratios become Hájek's estimates for the whole. Their standard errors treat the items as drawn independently,
        which is never too optimistic for a stratified draw. Corpus metrics are left out: they cannot be weighted.
        """
        scale = np.asarray(weights, dtype=np.float64)
        columns = {name: (a * scale, b * scale) for name, (a, b) in self.metrics.items()}
        return ItemScores(self.task, self.items, columns, self.higher_is_better, self.transforms, noise=self.noise)

    def columns(self, metric: str) -> tuple[FloatArray, FloatArray]:
        """Returns the items' numerators and denominators.

        Raises:
            TaskError: The task has no such metric, or it is no mean or ratio of items.
        """
        if metric not in self.metrics:
            names = ", ".join(self.names)
            raise TaskError(f"task {self.task!r} has no metric {metric!r}{suggest(metric, self.names)}; it has {names}")
        return self.metrics[metric]


@dataclass(frozen=True)
class ResponseJacobian:
    """How log-likelihoods move with some numbers.

    Attributes:
        loglikelihoods: Of the requests, item by item, [requests].
        derivatives: [requests, numbers].
        lengths: Tokens of each answer, [requests].
        items: Each request's item, [requests].
    """

    loglikelihoods: FloatArray
    derivatives: FloatArray
    lengths: FloatArray
    items: IntArray


class SmoothMetric(Protocol):
    """One metric's numerators, item by item, as a function of the log-likelihoods of all requests.

    Attributes:
        weighted: Whether they are numerators of scores as they are; else each item's own value, to be multiplied by its
            denominator, which is other than 1 where a group weighs its items, or an item has no value.
    """

    @property
    def weighted(self) -> bool: ...

    def __call__(self, loglikelihoods: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Returns the numerators [items], and the derivative of each request's own item's [requests]."""
        ...


def dump_scores(file: IO[bytes], scores: Mapping[str, ItemScores]) -> None:
    """Writes the scores of several tasks as one npz archive; the same scores give the same bytes."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    meta = []
    for k, part in enumerate(scores.values()):
        meta.append(
            {
                "task": part.task,
                "items": list(part.items),
                "metrics": list(part.metrics),
                "higher_is_better": dict(part.higher_is_better),
                "transforms": dict(part.transforms),
                "corpus": dict(part.corpus),
                "corpus_rows": dict(part.corpus_rows),
                "noise": dict(part.noise),
            }
        )
        columns = [column for pair in part.metrics.values() for column in pair]
        arrays[f"table{k}"] = np.stack(columns) if columns else np.zeros((0, len(part.items)))
    text = json.dumps({"names": list(scores), "tasks": meta})
    arrays["meta"] = np.frombuffer(text.encode(), dtype=np.uint8)
    np.savez_compressed(file, allow_pickle=False, **arrays)


def load_scores(source: Path | IO[bytes]) -> dict[str, ItemScores]:
    """Reads what `dump_scores` wrote."""
    with np.load(source) as archive:
        meta = json.loads(archive["meta"].tobytes())
        tables = [archive[f"table{k}"] for k in range(len(meta["tasks"]))]
    return {
        name: ItemScores(
            part["task"],
            tuple(part["items"]),
            {metric: (table[2 * k], table[2 * k + 1]) for k, metric in enumerate(part["metrics"])},
            part["higher_is_better"],
            part["transforms"],
            part["corpus"],
            part.get("corpus_rows", {}),
            noise=part.get("noise", {}),
        )
        for name, part, table in zip(meta["names"], meta["tasks"], tables, strict=True)
    }


def concatenate(parts: Sequence[ItemScores]) -> ItemScores:
    """Joins the scores of one task on disjoint items. Only metrics that every part has item by item remain.

    Raises:
        TaskError: No parts, parts of different tasks, or an item that occurs twice.
    """
    if not parts:
        raise TaskError("no scores to join")
    first = parts[0]
    if names := sorted({part.task for part in parts} - {first.task}):
        raise TaskError(f"scores of different tasks cannot be joined: {first.task!r} and {names[0]!r}")
    items = tuple(item for part in parts for item in part.items)
    if len(set(items)) != len(items):
        raise TaskError(f"task {first.task!r}: an item was scored twice")
    shared = [name for name in first.metrics if all(name in part.metrics for part in parts)]
    columns = {
        name: (
            np.concatenate([part.metrics[name][0] for part in parts]),
            np.concatenate([part.metrics[name][1] for part in parts]),
        )
        for name in shared
    }
    return ItemScores(first.task, items, columns, first.higher_is_better, first.transforms, noise=first.noise)


def pool(
    task: str,
    items: Sequence[str],
    parts: Mapping[int, ItemScores],
    weights: Mapping[int, float],
    weighted: Sequence[str],
) -> ItemScores:
    """Joins the scores of several tasks to those of one, which has every metric that all of them have item by item.

    Args:
        task: The one's name.
        items: Its items, in order.
        parts: The tasks' scores by number, on these items.
        weights: What an item of each task weighs.
        weighted: The metrics, whatever their filters, of which that counts.
    """
    first = next(iter(parts.values()))
    names = [
        name
        for name in first.metrics
        if all(name in p.metrics and p.transforms.get(name) == first.transforms.get(name) for p in parts.values())
    ]
    places = {item: k for k, item in enumerate(items)}
    order = [[places[item] for item in part.items] for part in parts.values()]
    metrics = {}
    for name in names:
        columns = np.zeros((2, len(items)))
        for where, (k, part) in zip(order, parts.items(), strict=True):
            weight = weights[k] if name.partition(",")[0] in weighted else 1.0
            columns[:, where] = np.stack(part.metrics[name]) * weight
        metrics[name] = columns[0], columns[1]
    up = {name: first.higher_is_better[name] for name in names}
    transforms = {name: first.transforms[name] for name in names if name in first.transforms}
    return ItemScores(task, tuple(items), metrics, up, transforms)


def score_table(scores: Mapping[str, ItemScores]) -> dict[str, dict[str, Score]]:
    """Aggregates every metric of every task: ``{task: {metric: Score}}``."""
    return {task: item_scores.scores() for task, item_scores in scores.items()}


def member_tables(scores: Mapping[str, ItemScores]) -> dict[str, dict[str, dict[str, Score]]]:
    """Aggregates every metric of the tasks of each group among some tasks: ``{group: {task: {metric: Score}}}``."""
    tables: dict[str, dict[str, dict[str, Score]]] = {}
    for name, part in scores.items():
        positions: dict[str, list[int]] = {}
        for k, item in enumerate(part.items):
            positions.setdefault(item.rpartition(":")[0], []).append(k)
        if positions.keys() != {name}:  # items keep the ids that they have in their own tasks
            tables[name] = {member: part.take(own).scores() for member, own in positions.items()}
    return tables


def table_to_json(table: ScoreTable) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Converts to ``{task: {metric: {"value", "stderr", "n"}}}``."""
    return {task: {metric: score.to_json() for metric, score in row.items()} for task, row in table.items()}


def table_from_json(data: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Score]]:
    """Reads what `table_to_json` wrote."""
    return {task: {metric: Score.from_json(score) for metric, score in row.items()} for task, row in data.items()}


def paired_difference(a: ItemScores, b: ItemScores, metric: str) -> tuple[float, float | None]:
    """Returns how much `a` exceeds `b` on the same items, and the standard error of that.

    The items' own difficulty cancels: the error is that of the per-item differences (for ratios, of their linearised
    terms), which is what a comparison of two candidates needs.

    Returns:
        (value of a - value of b, its standard error or None for a single item).

    Raises:
        TaskError: The scores are of different tasks or items, or the metric is no mean or ratio of items.
    """
    if a.task != b.task or a.items != b.items:
        raise TaskError(f"a paired comparison needs the same items: got {a.task!r} and {b.task!r} on different items")
    value_a, influence_a = a.influence(metric)
    value_b, influence_b = b.influence(metric)
    difference = influence_a - influence_b
    return value_a - value_b, _standard_error(difference) if len(difference) > 1 else None


def bootstrap_sums(columns: FloatArray, draws: int, generator: np.random.Generator) -> FloatArray:
    """Sums columns over bootstrap samples of their rows.

    Args:
        columns: [n, k]; every column is summed over the same samples.
        draws: Samples of n rows, drawn with replacement.
        generator: Draws them.

    Returns:
        [draws, k].
    """
    n = len(columns)
    chunk = max(1, _MAX_COUNTS // n)
    sums = []
    for start in range(0, draws, chunk):
        counts = generator.multinomial(n, np.full(n, 1.0 / n), size=min(chunk, draws - start))
        sums.append(counts @ columns)
    return np.concatenate(sums)


def _standard_error(influence: FloatArray) -> float:
    """Of a mean: sample standard deviation over the root of n; at least two items."""
    return float(np.std(influence, ddof=1)) / math.sqrt(len(influence))


def _apply(transform: str, ratio: float) -> float:
    if transform == MEAN:
        return ratio
    return -ratio / math.log(2) if transform == BITS else _exp(-ratio)


def _derivative(transform: str, ratio: float) -> float:
    """Derivative of the transform at `ratio`."""
    if transform == MEAN:
        return 1.0
    return -1 / math.log(2) if transform == BITS else -_exp(-ratio)


def _exp(x: float) -> float:
    """exp(x), infinite rather than an error where a model is so bad that its perplexity overflows."""
    return math.exp(x) if x < 709.0 else math.inf
