"""Compares the winner with the baselines: paired differences, intervals, tests by task, and one honest sentence.

Sources: Efron and Tibshirani, 1993, chapters 13 and 16 (paired bootstrap, percentile intervals); Westfall and Young,
1993 (intervals that hold for several comparisons at once); Berger, 1982, https://doi.org/10.1080/00401706.1982.10487790
(to be better than all baselines, it is enough to be better than each); McNemar, 1947,
https://doi.org/10.1007/BF02295996.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from evomerge.errors import TaskError
from evomerge.evaluation.scores import ItemScores, paired_difference
from evomerge.objective.fitness import Fitness, Scores
from evomerge.system.arrays import FloatArray

LEVEL = 0.95
_LEFT_OUT = Field(exclude_if=lambda value: value is None)  # where a difference is written as JSON


@dataclass(frozen=True)
class TaskDifference:
    """The winner less a baseline on one task, by the task's own metric.

    Attributes:
        metric: The metric.
        value: The difference.
        stderr: Its standard error, paired; None where none can be given.
        wins: Items that only the winner has right; None, as the two below, for a metric that is not right or wrong.
        losses: Items that only the baseline has right.
        p: McNemar's p-value that both are equally likely.
    """

    metric: str
    value: float
    stderr: float | None
    wins: Annotated[int | None, _LEFT_OUT] = None
    losses: Annotated[int | None, _LEFT_OUT] = None
    p: Annotated[float | None, _LEFT_OUT] = None


@dataclass(frozen=True)
class Difference:
    """The winner less a baseline on the same items.

    Attributes:
        value: The difference in fitness.
        stderr: Its standard error, paired; None where none can be given.
        n: Items that the fitness is made of.
        interval: Its 95% interval by paired bootstrap; None where a goal is no mean or ratio of items.
        joint_interval: One of intervals that hold for all baselines at once.
        tasks: The difference of each goal.
    """

    value: float
    stderr: float | None
    n: int
    interval: tuple[float, float] | None
    joint_interval: tuple[float, float] | None
    tasks: Mapping[str, TaskDifference]


def compare(winner: Scores, baselines: Mapping[str, Scores], fitness: Fitness) -> dict[str, Difference]:
    """Subtracts each baseline from the winner on the same items."""
    if not baselines:
        return {}
    differences = {name: fitness.difference(winner, scores) for name, scores in baselines.items()}
    samples = fitness.bootstrap([winner, *baselines.values()])
    intervals: list[Interval] | list[None] = [None] * len(baselines)
    if samples is not None and all(math.isfinite(stderr) for _, stderr in differences.values()):
        intervals = bootstrap_intervals([value for value, _ in differences.values()], samples[0] - samples[1:])
    return {
        name: Difference(
            value=differences[name][0],
            stderr=nan_to_none(differences[name][1]),
            n=fitness.count(winner),
            interval=None if interval is None else (interval.low, interval.high),
            joint_interval=None if interval is None else (interval.joint_low, interval.joint_high),
            tasks={goal.task: _compare_task(winner, scores, goal.task, goal.metric) for goal in fitness.goals},
        )
        for (name, scores), interval in zip(baselines.items(), intervals, strict=True)
    }


def _compare_task(winner: Scores, baseline: Scores, task: str, metric: str) -> TaskDifference:
    a, b = winner[task], baseline[task]
    if not a.is_itemwise(metric):
        return TaskDifference(metric, a.score(metric).value - b.score(metric).value, None)
    value, stderr = paired_difference(a, b, metric)
    discordant = mcnemar(a, b, metric)
    if discordant is None:
        return TaskDifference(metric, value, stderr)
    return TaskDifference(metric, value, stderr, discordant.wins, discordant.losses, discordant.p)


def nan_to_none(value: float) -> float | None:
    """Converts a value to what JSON has: None for NaN."""
    return None if math.isnan(value) else value


def within_noise(differences: Mapping[str, Difference]) -> list[str]:
    """Lists the baselines that the winner is not surely better than: their own interval is unknown or reaches zero."""
    intervals = {name: difference.interval for name, difference in differences.items()}
    return [name for name, interval in intervals.items() if interval is None or interval[0] <= 0]


def verdict(differences: Mapping[str, Difference], test: Mapping[str, float], over_limits: Collection[str] = ()) -> str:
    """Says in one sentence whether the winner is better than what a person would have tried first.

    It is better when every baseline's own interval is above zero: beating them all takes beating each of them,
    which needs no correction for their number. It is worse when one of the joint intervals is below zero: with several
    baselines one of them looks good by chance, so there the correction counts.

    Args:
        differences: Of `compare`.
        test: Every baseline's fitness on the test items.
        over_limits: Those of them that break a constraint: nobody could have taken one of these.
    """
    if over_limits:
        names = ", ".join(over_limits)
        rest = {name: row for name, row in differences.items() if name not in over_limits}
        left_out = f"{names} {'break' if len(over_limits) > 1 else 'breaks'} a constraint, and did not count here."
        return f"{verdict(rest, {name: test[name] for name in rest})} {left_out}"
    if not differences:
        return "There was nothing to compare the winner with."
    best = max(test, key=lambda name: test[name])
    comparison = f"the best baseline ({best}): {_difference(differences[best])} on the test items"
    joint = [difference.joint_interval for difference in differences.values()]
    if any(interval is not None and interval[1] < 0 for interval in joint):
        return f"The winner is worse than {comparison}."
    close = within_noise(differences)
    if not close:
        return f"The winner is better than every baseline. Compared with {comparison}."
    others = [name for name in close if name != best]
    also = f" (and of {', '.join(others)})" if others and best in close else ""
    if best in close:
        return f"The winner is within noise of {comparison}{also}."
    return f"The winner is within noise of {', '.join(others)}, though not of {comparison}."


def _difference(difference: Difference) -> str:
    if difference.interval is None:
        return f"overall score {difference.value:+.3f} (its noise is unknown)"
    low, high = difference.interval
    return f"overall score {difference.value:+.3f} (95% interval {low:+.3f} to {high:+.3f}, paired)"


@dataclass(frozen=True)
class Discordant:
    """Where two models differ on items that are right or wrong.

    Attributes:
        wins: Items that only the first has right.
        losses: Items that only the second has right.
        p: Exact two-sided p-value of McNemar's test that wins and losses are equally likely.
    """

    wins: int
    losses: int
    p: float


def mcnemar(a: ItemScores, b: ItemScores, metric: str) -> Discordant | None:
    """Tests by McNemar's exact test whether two models differ on the same items.

    Returns:
        None when the metric's values are not all 0 or 1.

    Raises:
        TaskError: When the items differ, or the metric is no mean or ratio of items.
    """
    if a.task != b.task or a.items != b.items:
        raise TaskError(f"a paired test needs the same items: got {a.task!r} and {b.task!r} on different items")
    left, right = a.values(metric), b.values(metric)
    scored = ~(np.isnan(left) | np.isnan(right))
    left, right = left[scored], right[scored]
    if not all(np.isin(values, (0.0, 1.0)).all() for values in (left, right)):
        return None
    wins, losses = int(np.sum(left > right)), int(np.sum(left < right))
    if wins + losses == 0:
        return Discordant(0, 0, 1.0)
    from scipy.stats import binomtest  # here: it takes longer to import than all else

    return Discordant(wins, losses, float(binomtest(wins, wins + losses).pvalue))


@dataclass(frozen=True)
class Interval:
    """A confidence interval of one difference.

    Attributes:
        low: Its lower end, for this comparison alone.
        high: Its upper end, for this comparison alone.
        joint_low: The lower end of one of several intervals that hold all at once.
        joint_high: The upper end of it.
    """

    low: float
    high: float
    joint_low: float
    joint_high: float


def bootstrap_intervals(observed: Sequence[float], samples: FloatArray, level: float = LEVEL) -> list[Interval]:
    """Computes percentile intervals of several differences, and those that hold for all of them at once.

    The joint ones are max-t intervals: each difference plus or minus its bootstrap standard error times the quantile of
    the largest standardised deviation over all comparisons.

    Args:
        observed: The differences, [k].
        samples: The same on bootstrap samples, [k, draws]; all on the same samples. A sample that gives one of them
            no number (none of its items has a value) is passed over.
        level: The probability of covering the truth.
    """
    values = np.asarray(observed, dtype=np.float64)
    samples = samples[:, np.isfinite(samples).all(axis=0)]
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=1)
    stderr = samples.std(axis=1, ddof=1)
    deviation = np.divide(
        np.abs(samples - values[:, None]), stderr[:, None], out=np.zeros_like(samples), where=stderr[:, None] > 0
    )
    margin = float(np.quantile(deviation.max(axis=0), level)) * stderr
    return [
        Interval(float(low[k]), float(high[k]), float(values[k] - margin[k]), float(values[k] + margin[k]))
        for k in range(len(values))
    ]
