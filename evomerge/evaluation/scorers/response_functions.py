"""Metrics as functions of log-likelihoods: what a task's numerators are where its requests' log-likelihoods move.

The smooth metrics of tasks with choices have a form of their own; any other that moves with log-likelihoods at all is
taken to be linear, which perplexities and bits per byte are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.evaluation.scorers.lm_eval import item_scores, right_choices
from evomerge.evaluation.scores import SmoothMetric
from evomerge.evaluation.tasks.requests import Requests
from evomerge.evaluation.tasks.task import Task
from evomerge.system.arrays import FloatArray, IntArray, Mask

_STEP = 1e-4
"""Nats. In float64 the truncation (its square) and the rounding of central differences are both below 1e-8."""


def smooth_metric(
    task: Task, metric: str, requests: Requests, indices: Sequence[int], loglikelihoods: FloatArray
) -> SmoothMetric | None:
    """Gives a metric on some items as a function of log-likelihoods; None for one that jumps.

    Args:
        task: The task.
        metric: The metric.
        requests: What the task asks.
        indices: The items.
        loglikelihoods: Of all their requests, item by item: where a metric without a form of its own is linear.
    """
    if task.smooth_metric(metric) != metric:
        return None
    counts = [len(requests.by_item[index]) for index in indices]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    items = np.repeat(np.arange(len(counts)), counts)
    if task.output_type == "loglikelihood" and metric in ("prob", "nll"):
        return _Probability(starts, log=metric == "nll")
    if task.output_type == "multiple_choice" and metric in _CHOICES:
        return _choices(task, metric, indices, items, starts)
    return _linearised(task, metric, requests, indices, loglikelihoods, items, starts)


@dataclass(frozen=True)
class _Probability:
    """The probability of each item's first answer, or minus its logarithm."""

    starts: IntArray
    log: bool
    weighted = False

    def __call__(self, loglikelihoods: FloatArray) -> tuple[FloatArray, FloatArray]:
        own = loglikelihoods[self.starts]
        slopes = np.zeros_like(loglikelihoods)
        values = -own if self.log else np.exp(own)
        slopes[self.starts] = -1.0 if self.log else values
        return values, slopes


@dataclass(frozen=True)
class _Share:
    """The right choices' share of the choices' total probability, or minus its logarithm.

    Attributes:
        items: Each request's item.
        starts: Each item's first request.
        factors: What log-likelihoods are multiplied by; 0 for requests that are no choice.
        right: The right choices.
        log: Minus the logarithm.
    """

    items: IntArray
    starts: IntArray
    factors: FloatArray
    right: Mask
    log: bool
    weighted = False

    def __call__(self, loglikelihoods: FloatArray) -> tuple[FloatArray, FloatArray]:
        scaled = np.where(self.factors > 0, loglikelihoods * self.factors, -np.inf)
        likely = np.exp(scaled - np.maximum.reduceat(scaled, self.starts)[self.items])
        total = np.add.reduceat(likely, self.starts)
        of_right = np.maximum(np.add.reduceat(np.where(self.right, likely, 0.0), self.starts), 1e-300)
        share = of_right / total
        slopes = self.factors * likely * (self.right / of_right[self.items] - 1.0 / total[self.items])
        return (-np.log(share), -slopes) if self.log else (share, slopes * share[self.items])


@dataclass(frozen=True)
class _PerByte:
    """Minus the most likely right choice's log-likelihood per byte."""

    items: IntArray
    starts: IntArray
    factors: FloatArray
    right: Mask
    weighted = False

    def __call__(self, loglikelihoods: FloatArray) -> tuple[FloatArray, FloatArray]:
        scaled = np.where(self.right, loglikelihoods * self.factors, -np.inf)
        best = np.maximum.reduceat(scaled, self.starts)
        any_right = np.isfinite(best)
        slopes = np.where((scaled == best[self.items]) & self.right, -self.factors, 0.0)
        return np.where(any_right, -best, 0.0), slopes


@dataclass(frozen=True)
class Linear:
    """Values at some log-likelihoods, and the derivatives there."""

    at: FloatArray
    values: FloatArray
    slopes: FloatArray
    starts: IntArray
    weighted = True

    def __call__(self, loglikelihoods: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Returns the values, and the derivatives."""
        moved = np.add.reduceat(self.slopes * (loglikelihoods - self.at), self.starts)
        return self.values + moved, self.slopes


_CHOICES = ("prob", "loss", "prob_norm", "nll_byte")


def _choices(task: Task, metric: str, indices: Sequence[int], items: IntArray, starts: IntArray) -> SmoothMetric | None:
    factors, right = np.zeros(len(items)), np.zeros(len(items), dtype=np.bool_)
    for start, index in zip(starts.tolist(), indices, strict=True):
        labels, choices = right_choices(task, index)
        lengths = np.array([max(len(choice), 1) for choice in choices], dtype=np.float64)
        sizes = np.array([max(len(choice.encode()), 1) for choice in choices], dtype=np.float64)
        own = {"prob_norm": lengths.mean() / lengths, "nll_byte": 1.0 / sizes}.get(metric, np.ones(len(choices)))
        factors[start : start + len(choices)] = own
        right[[start + label for label in labels]] = True
    if metric == "nll_byte":
        return _PerByte(items, starts, factors, right)
    return _Share(items, starts, factors, right, metric == "loss")


def _linearised(
    task: Task,
    metric: str,
    requests: Requests,
    indices: Sequence[int],
    loglikelihoods: FloatArray,
    items: IntArray,
    starts: IntArray,
) -> SmoothMetric | None:
    """Central differences through the task's own code: items are independent, so the k-th request of all moves at once.

    None where nothing moves.
    """

    def numerators(moved: int | None, by: float) -> FloatArray | None:
        instances = requests.fresh(indices)
        rest = iter(loglikelihoods.tolist())
        for group in instances:
            for k, instance in enumerate(group):
                value = next(rest) + (by if k == moved else 0.0)
                rolling = instance.request_type == "loglikelihood_rolling"
                instance.resps.extend([value if rolling else (value, False)] * int(instance.repeats))
        columns = item_scores(task, indices, instances).metrics.get(metric)
        return None if columns is None else columns[0]

    values = numerators(None, 0.0)
    if values is None:  # a metric of the whole corpus
        return None
    slopes, positions = np.zeros(len(items)), np.arange(len(items)) - starts[items]
    for k in range(int(positions.max()) + 1):
        up, down = numerators(k, _STEP), numerators(k, -_STEP)
        differences = np.zeros(len(indices)) if up is None or down is None else (up - down) / (2 * _STEP)
        slopes[positions == k] = differences[items[positions == k]]
    return Linear(loglikelihoods, values, slopes, starts) if slopes.any() else None
