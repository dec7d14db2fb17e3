"""How a number made of items' metrics changes with the log-likelihoods that the items were scored by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.evaluation.scorers.lm_eval import item_scores
from evomerge.evaluation.scores import Array
from evomerge.evaluation.tasks.requests import Requests
from evomerge.evaluation.tasks.task import Task

_STEP = 1e-4
"""Nats. In float64 the truncation (its square) and the rounding of central differences are both below 1e-8."""

Answers = Sequence[Sequence[Sequence[Any]]]
"""For each item, for each of its instances, its responses."""


def sensitivities(
    task: Task, requests: Requests, indices: Sequence[int], answers: Answers, pulls: Mapping[str, Array]
) -> list[list[float]]:
    """The derivative of Σ pull · numerator with respect to every log-likelihood, by central differences.

    It goes through the metrics' own code, so it knows nothing of how they are defined. Items are independent of each
    other: the k-th request of all of them is moved at once.

    Args:
        task: The task.
        requests: What it asks.
        indices: The items.
        answers: The log-likelihoods.
        pulls: Metric to one number per item: what its numerator counts.

    Returns:
        For each item, one number per instance.
    """

    def total(moved: int, by: float) -> Array:
        instances = requests.fresh(indices)
        for group, given in zip(instances, answers, strict=True):
            for k, (instance, responses) in enumerate(zip(group, given, strict=True)):
                instance.resps.extend(_moved(response, by) if k == moved else response for response in responses)
        metrics = item_scores(task, indices, instances).metrics
        value: Array = np.sum([pull * metrics[metric][0] for metric, pull in pulls.items()], axis=0)
        return value

    found: list[list[float]] = [[] for _ in indices]
    for k in range(max(map(len, answers))):
        slopes = (total(k, _STEP) - total(k, -_STEP)) / (2 * _STEP)
        for row, given, slope in zip(found, answers, slopes.tolist(), strict=True):
            if k < len(given):
                row.append(slope)
    return found


def _moved(response: Any, by: float) -> Any:
    """A response with another log-likelihood: a number, or (log-likelihood, whether it is greedy)."""
    return (response[0] + by, *response[1:]) if isinstance(response, tuple) else response + by
