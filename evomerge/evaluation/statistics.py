"""How sure a comparison of models is: paired bootstrap and McNemar's test. Imports no torch.

Sources: Efron and Tibshirani, 1993, chapters 13 and 16 (paired bootstrap, percentile intervals); Westfall and Young,
1993 (intervals that hold for several comparisons at once); Berger, 1982, https://doi.org/10.1080/00401706.1982.10487790
(to be better than all rivals, it is enough to be better than each); McNemar, 1947,
https://doi.org/10.1007/BF02295996.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evomerge.errors import TaskError
from evomerge.evaluation.scores import ItemScores

Array = npt.NDArray[np.float64]

DRAWS = 2000
LEVEL = 0.95


_CELLS = 2_000_000  # counts held at once


def resampled_sums(columns: Array, draws: int, generator: np.random.Generator) -> Array:
    """Sums of columns over bootstrap samples of their rows.

    Args:
        columns: [n, k]; every column is summed over the same samples.
        draws: Samples of n rows, drawn with replacement.
        generator: Draws them.

    Returns:
        [draws, k].
    """
    n = len(columns)
    chunk = max(1, _CELLS // n)
    sums = []
    for start in range(0, draws, chunk):
        counts = generator.multinomial(n, np.full(n, 1.0 / n), size=min(chunk, draws - start))
        sums.append(counts @ columns)
    return np.concatenate(sums)


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
    """McNemar's exact test of two models on the same items.

    Returns:
        None when the metric's values are not all 0 or 1.

    Raises:
        TaskError: When the items differ, or the metric is no mean or ratio of items.
    """
    if a.task != b.task or a.items != b.items:
        raise TaskError(f"a paired test needs the same items: got {a.task!r} and {b.task!r} on different items")
    left, right = a.values(metric), b.values(metric)
    known = ~(np.isnan(left) | np.isnan(right))
    left, right = left[known], right[known]
    if not all(np.isin(values, (0.0, 1.0)).all() for values in (left, right)):
        return None
    wins, losses = int(np.sum(left > right)), int(np.sum(left < right))
    return Discordant(wins, losses, _two_sided(wins, losses))


def _two_sided(wins: int, losses: int) -> float:
    """Twice the smaller tail of a binomial distribution with equal chances, at most 1."""
    n = wins + losses
    if n == 0:
        return 1.0
    terms = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(wins, losses) + 1)]
    return min(1.0, 2.0 * math.exp(float(np.logaddexp.reduce(terms)) - n * math.log(2)))


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


def intervals(observed: Sequence[float], resampled: Array, level: float = LEVEL) -> list[Interval]:
    """Percentile intervals of several differences, and those that hold for all of them at once.

    The joint ones are max-t intervals: each difference plus or minus its bootstrap standard error times the quantile of
    the largest standardised deviation over all comparisons.

    Args:
        observed: The differences, [k].
        resampled: The same on bootstrap samples, [k, draws]; all on the same samples. A sample that gives one of them
            no number (none of its items has a value) is passed over.
        level: The probability of covering the truth.
    """
    values = np.asarray(observed, dtype=np.float64)
    resampled = resampled[:, np.isfinite(resampled).all(axis=0)]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=1)
    spread = resampled.std(axis=1, ddof=1)
    deviation = np.divide(
        np.abs(resampled - values[:, None]), spread[:, None], out=np.zeros_like(resampled), where=spread[:, None] > 0
    )
    reach = float(np.quantile(deviation.max(axis=0), level)) * spread
    return [
        Interval(float(low[k]), float(high[k]), float(values[k] - reach[k]), float(values[k] + reach[k]))
        for k in range(len(values))
    ]
