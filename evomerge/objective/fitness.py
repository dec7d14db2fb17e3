"""From scores to one number: what a search maximises, and how sure of it one can be. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import TaskError
from evomerge.evaluation.scores import ItemScores, concatenate
from evomerge.evaluation.statistics import DRAWS, resampled_sums

Scores = Mapping[str, ItemScores]

_TINY = 1e-9  # a loss below this counts as this, so that its ratio stays a number


@dataclass(frozen=True)
class Goal:
    """One task's part in the fitness.

    Attributes:
        task: The task.
        metric: The metric that steers.
        weight: Its weight in the mean.
        higher_is_better: As the task says.
        reference: The best source's value, or None on the raw scale.
        group: What it is listed as, where that is a group of tasks.
    """

    task: str
    metric: str
    weight: float
    higher_is_better: bool
    reference: float | None = None
    group: str | None = None

    def value(self, metric: float) -> tuple[float, float]:
        """The goal's value (higher is better), and its derivative with respect to the metric."""
        if self.reference is None:
            sign = 1.0 if self.higher_is_better else -1.0
            return sign * metric, sign
        if self.higher_is_better:
            return metric / self.reference, 1.0 / self.reference
        metric = max(metric, _TINY)
        return self.reference / metric, -self.reference / metric**2


@dataclass(frozen=True)
class Fitness:
    """Weighted mean of the goals. Higher is better, whatever the metrics' own directions are.

    Attributes:
        goals: The goals.
        items: Task to the weights of its items, by id, where they were drawn unevenly; then it takes scores on
            these items of that task, or on some of them.
    """

    goals: tuple[Goal, ...]
    items: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def unweighted(self) -> Fitness:
        """The same goals on items that all count alike."""
        return replace(self, items={})

    def weighed(self, scores: Scores) -> Scores:
        """The scores with the weights of their items."""
        return {
            task: part.weighted([self.items[task][item] for item in part.items]) if task in self.items else part
            for task, part in scores.items()
        }

    def __call__(self, scores: Scores) -> float:
        """The fitness of a candidate's scores."""
        return self._mean(self._values(scores))

    def objectives(self, scores: Scores) -> dict[str, float]:
        """Each task's own value, higher is better, or the mean of a group's tasks; in the order of the goals."""
        return self._by_objective(self._values(scores))

    def by_item(self, scores: Scores) -> NDArray[np.float64]:
        """What every item says for a candidate, higher is better, shape [items]: goal by goal, by the goal's weight.

        An item without a value says nothing (0).
        """
        weighed, parts = self.weighed(scores), []
        for goal in self.goals:
            values = weighed[goal.task].values(goal.metric)
            told = np.array([goal.value(float(value))[0] if math.isfinite(value) else 0.0 for value in values])
            parts.append(told * (goal.weight / len(values)))
        return np.concatenate(parts)

    def derivatives(self, scores: Scores) -> dict[str, dict[str, NDArray[np.float64]]]:
        """The derivative of the fitness with respect to the items' numerators.

        Returns:
            Task to metric to one number per item. Metrics that are no mean or ratio of items are left out.
        """
        total = sum(goal.weight for goal in self.goals)
        found: dict[str, dict[str, NDArray[np.float64]]] = {}
        for goal in self.goals:
            part = scores[goal.task]
            if not part.raceable(goal.metric):
                continue
            weights = np.array([self.items[goal.task][i] for i in part.items]) if goal.task in self.items else 1.0
            weighed = self.weighed({goal.task: part})[goal.task]
            slope = goal.weight / total * goal.value(weighed.score(goal.metric).value)[1]
            mine = found.setdefault(goal.task, {})
            mine[goal.metric] = mine.get(goal.metric, 0.0) + slope * weighed.derivative(goal.metric) * weights
        return found

    def count(self, scores: Scores) -> int:
        """The items that the fitness is made of, over all goals."""
        return sum(scores[goal.task].score(goal.metric).n for goal in self.goals)

    def pooled(self, parts: Sequence[Scores]) -> float:
        """The fitness over several disjoint sets of items taken together.

        A metric that is no mean or ratio of items is averaged over the sets, by their numbers of items.
        """
        return self._mean(self._pooled_values(parts))

    def pooled_objectives(self, parts: Sequence[Scores]) -> dict[str, float]:
        """As `objectives`, over several disjoint sets of items taken together."""
        return self._by_objective(self._pooled_values(parts))

    def stderr(self, scores: Scores) -> float:
        """Standard error of the fitness (delta method; tasks are independent); NaN where there is none."""
        weighed = self.weighed(scores)
        return self._spread([_influence(weighed, goal) for goal in self.goals])

    def difference(self, ours: Scores, theirs: Scores) -> tuple[float, float]:
        """Fitness of one candidate less another's on the same items, and the standard error of that paired difference.

        Raises:
            ValueError: When the items differ.
        """
        for goal in self.goals:
            _same_items(ours, theirs, goal.task)
        left, right = self.weighed(ours), self.weighed(theirs)
        influences = [_influence(left, goal) - _influence(right, goal) for goal in self.goals]
        return self(ours) - self(theirs), self._spread(influences)

    def pooled_difference(self, ours: Sequence[Scores], theirs: Sequence[Scores]) -> tuple[float, float]:
        """As `difference`, over several disjoint sets of items taken together."""
        value = self.pooled(ours) - self.pooled(theirs)
        if not all(s[goal.task].raceable(goal.metric) for goal in self.goals for s in (*ours, *theirs)):
            return value, math.nan
        joined = [{g.task: concatenate([s[g.task] for s in parts]) for g in self.goals} for parts in (ours, theirs)]
        return value, self.difference(joined[0], joined[1])[1]

    def resampled(self, models: Sequence[Scores], draws: int = DRAWS, seed: int = 0) -> NDArray[np.float64] | None:
        """The fitness of some models on bootstrap samples of the items: the same samples for all of them.

        Each task's items are drawn by themselves, as many as there are.

        Returns:
            [models, draws]; None when a goal is no mean or ratio of items, so that nothing is known of its noise.

        Raises:
            ValueError: When the items differ.
        """
        models = [self.weighed(scores) for scores in models]
        values = []
        for k, goal in enumerate(self.goals):
            parts = [_same_items(scores, models[0], goal.task) for scores in models]
            if not all(part.raceable(goal.metric) for part in parts):
                return None
            columns = np.stack([column for part in parts for column in part.columns(goal.metric)], axis=1)
            sums = resampled_sums(columns, draws, np.random.default_rng([seed, k]))
            values.append(
                [
                    [goal.value(part.of_sums(goal.metric, *pair))[0] for pair in sums[:, 2 * m : 2 * m + 2].tolist()]
                    for m, part in enumerate(parts)
                ]
            )
        weights = np.array([goal.weight for goal in self.goals])
        mean: NDArray[np.float64] = np.einsum("g,gmd->md", weights / weights.sum(), np.array(values))
        return mean

    def relative_to(self, sources: Sequence[Scores]) -> Fitness:
        """The same goals as ratios to the best source's value.

        Raises:
            TaskError: When no source scores above zero on a task, so that there is no ratio.
        """
        goals, problems = [], []
        for goal in self.goals:
            values = [_value(scores, goal) for scores in sources]
            best = max(values) if goal.higher_is_better else min(values)
            if not best > 0:
                problems.append(f"{goal.task}: the best source's {goal.metric} is {best:g}; use `scale: raw`")
            goals.append(replace(goal, reference=best))
        if problems:
            raise TaskError(problems)
        return replace(self, goals=tuple(goals))

    def _values(self, scores: Scores) -> list[float]:
        weighed = self.weighed(scores)
        return [goal.value(_value(weighed, goal))[0] for goal in self.goals]

    def _pooled_values(self, parts: Sequence[Scores]) -> list[float]:
        return [goal.value(_pooled_value(parts, goal))[0] for goal in self.goals]

    def _by_objective(self, values: Sequence[float]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for goal, value in zip(self.goals, values, strict=True):
            found.setdefault(goal.group or goal.task, []).append(value)
        return {name: sum(parts) / len(parts) for name, parts in found.items()}

    def _mean(self, values: Sequence[float]) -> float:
        total = sum(goal.weight for goal in self.goals)
        return sum(goal.weight * value for goal, value in zip(self.goals, values, strict=True)) / total

    def _spread(self, influences: Sequence[NDArray[np.float64]]) -> float:
        total = sum(goal.weight for goal in self.goals)
        variance = 0.0
        for goal, influence in zip(self.goals, influences, strict=True):
            n = len(influence)
            if n < 2:
                return math.nan
            variance += (goal.weight / total) ** 2 * float(influence.var(ddof=1)) / n
        return math.sqrt(variance)


def _same_items(ours: Scores, theirs: Scores, task: str) -> ItemScores:
    """Our scores of a task, if they are of the same items."""
    if ours[task].items != theirs[task].items:
        raise ValueError(f"{task}: the two were not scored on the same items")
    return ours[task]


def _value(scores: Scores, goal: Goal) -> float:
    return scores[goal.task].score(goal.metric).value


def _pooled_value(parts: Sequence[Scores], goal: Goal) -> float:
    held = [scores[goal.task] for scores in parts]
    if all(scores.raceable(goal.metric) for scores in held):
        return concatenate(held).score(goal.metric).value
    sizes = [len(scores.items) for scores in held]
    return sum(n * scores.score(goal.metric).value for n, scores in zip(sizes, held, strict=True)) / sum(sizes)


def _influence(scores: Scores, goal: Goal) -> NDArray[np.float64]:
    """Each item's pull on the goal's value: its variance over n is the value's squared standard error.

    NaN for a metric that is no mean or ratio of items: nothing is known of its error.
    """
    if not scores[goal.task].raceable(goal.metric):
        return np.full(len(scores[goal.task].items), math.nan)
    value, influence = scores[goal.task].influence(goal.metric)
    return influence * goal.value(value)[1]


def refuse_mixed_units(goals: Sequence[Goal], scale: Literal["relative", "raw"]) -> list[str]:
    """On the raw scale, tasks must share a unit: shares of items (accuracy, exact match, ...), or one metric."""
    shares = {"acc", "acc_norm", "exact_match", "prob", "f1"}
    names = [goal.metric.partition(",")[0] for goal in goals]
    units = {"a share of items" if name in shares else name for name in names}
    if scale == "raw" and len(units) > 1:
        return [f"evaluation.scale: raw cannot add up {', '.join(sorted(units))}; use relative"]
    return []
