"""From scores to one number: what a search maximises, and how sure of it one can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from evomerge.errors import TaskError
from evomerge.evaluation.scores import ItemScores, bootstrap_sums, concatenate
from evomerge.objective.goals import Goal
from evomerge.system.arrays import FloatArray

Scores = Mapping[str, ItemScores]
"""Task to per-item scores."""

DRAWS = 2000
"""Bootstrap samples."""


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
        """The same goals, with items that all count alike."""
        return replace(self, items={})

    def weighted(self, scores: Scores) -> Scores:
        """Applies the weights of the items to the scores."""
        return {
            task: part.weighted([self.items[task][item] for item in part.items]) if task in self.items else part
            for task, part in scores.items()
        }

    def __call__(self, scores: Scores) -> float:
        """Returns the fitness of a candidate's scores."""
        return self._mean(self._values(scores))

    def objectives(self, scores: Scores) -> dict[str, float]:
        """Returns each task's own value, higher is better, or the mean of a group's tasks, as the goals come."""
        return self._by_objective(self._values(scores))

    def count(self, scores: Scores) -> int:
        """Counts the items that the fitness is made of, over all goals."""
        return sum(scores[goal.task].score(goal.metric).n for goal in self.goals)

    def pooled(self, parts: Sequence[Scores]) -> float:
        """Returns the fitness over several disjoint sets of items taken together.

        A metric that is no mean or ratio of items is averaged over the sets, by their numbers of items.
        """
        return self._mean(self._pooled_values(parts))

    def pooled_objectives(self, parts: Sequence[Scores]) -> dict[str, float]:
        """Returns `objectives` over several disjoint sets of items taken together."""
        return self._by_objective(self._pooled_values(parts))

    def stderr(self, scores: Scores) -> float:
        """Returns the standard error of the fitness (delta method; tasks are independent); NaN where there is none."""
        weighted = self.weighted(scores)
        return self._stderr([_variance_of_value(weighted, goal) for goal in self.goals])

    def difference(self, a: Scores, b: Scores) -> tuple[float, float]:
        """Returns the fitness of `a` less that of `b` on the same items, and the paired difference's standard error.

        Raises:
            ValueError: When the items differ.
        """
        for goal in self.goals:
            _same_items(a, b, goal.task)
        left, right = self.weighted(a), self.weighted(b)
        influences = [_influence(left, goal) - _influence(right, goal) for goal in self.goals]
        return self(a) - self(b), self._stderr([_variance(influence) for influence in influences])

    def pooled_difference(self, a: Sequence[Scores], b: Sequence[Scores]) -> tuple[float, float]:
        """Returns `difference` over several disjoint sets of items taken together."""
        value = self.pooled(a) - self.pooled(b)
        if not all(s[goal.task].is_itemwise(goal.metric) for goal in self.goals for s in (*a, *b)):
            return value, math.nan
        joined = [{g.task: concatenate([s[g.task] for s in parts]) for g in self.goals} for parts in (a, b)]
        return value, self.difference(*joined)[1]

    def bootstrap(self, models: Sequence[Scores], draws: int = DRAWS, seed: int = 0) -> FloatArray | None:
        """Returns the fitness of some models on bootstrap samples of the items: the same samples for all of them.

        Each task's items are drawn by themselves, as many as there are.

        Returns:
            [models, draws]; None when a goal is no mean or ratio of items, so that nothing is known of its noise.

        Raises:
            ValueError: When the items differ.
        """
        models = [self.weighted(scores) for scores in models]
        values = []
        for k, goal in enumerate(self.goals):
            parts = [_same_items(scores, models[0], goal.task) for scores in models]
            if not all(part.is_itemwise(goal.metric) for part in parts):
                return None
            columns = np.stack([column for part in parts for column in part.columns(goal.metric)], axis=1)
            sums = bootstrap_sums(columns, draws, np.random.default_rng([seed, k]))
            values.append(
                [
                    [goal.value(part.of_sums(goal.metric, *pair))[0] for pair in sums[:, 2 * m : 2 * m + 2].tolist()]
                    for m, part in enumerate(parts)
                ]
            )
        weights = np.array([goal.weight for goal in self.goals])
        mean: FloatArray = np.einsum("g,gmd->md", weights / weights.sum(), np.array(values))
        return mean

    def relative_to(self, sources: Sequence[Scores]) -> Fitness:
        """Replaces the goals by ratios to the best source's value.

        Raises:
            TaskError: When no source scores above zero on a task, so that there is no ratio.
        """
        goals, problems = [], []
        for goal in self.goals:
            values = [_value(scores, goal) for scores in sources]
            best = max(values) if goal.higher_is_better else min(values)
            if not best > 0:
                problems.append(_without_ratio(goal, best, sources))
            goals.append(replace(goal, reference=best))
        if problems:
            raise TaskError(problems)
        return replace(self, goals=tuple(goals))

    def _values(self, scores: Scores) -> list[float]:
        weighted = self.weighted(scores)
        return [goal.value(_value(weighted, goal))[0] for goal in self.goals]

    def _pooled_values(self, parts: Sequence[Scores]) -> list[float]:
        return [goal.value(_pooled_value(parts, goal))[0] for goal in self.goals]

    def _by_objective(self, values: Sequence[float]) -> dict[str, float]:
        objectives: dict[str, list[float]] = {}
        for goal, value in zip(self.goals, values, strict=True):
            objectives.setdefault(goal.group or goal.task, []).append(value)
        return {name: sum(parts) / len(parts) for name, parts in objectives.items()}

    def _mean(self, values: Sequence[float]) -> float:
        total = sum(goal.weight for goal in self.goals)
        return sum(goal.weight * value for goal, value in zip(self.goals, values, strict=True)) / total

    def _stderr(self, variances: Sequence[tuple[float, int]]) -> float:
        """The mean's standard error, from the variance of one item of each goal and the number of its items."""
        total = sum(goal.weight for goal in self.goals)
        shares = [(goal.weight / total) ** 2 for goal in self.goals]
        return math.sqrt(sum(share * of_one / n for share, (of_one, n) in zip(shares, variances, strict=True)))


def _without_ratio(goal: Goal, best: float, sources: Sequence[Scores]) -> str:
    """Says that no source has a value above zero, and what can be done."""
    plain = goal.metric.partition(",")[0]
    others = {
        name: max(scores[goal.task].score(name).value for scores in sources)
        for name in sources[0][goal.task].scores()
        if name != goal.metric and name.partition(",")[0] == plain
    }
    instead = [f"`metric: {name}`, where it is {value:g}" for name, value in others.items() if value > 0]
    choices = ", or ".join((*instead, "`scale: raw`"))
    return f"{goal.task}: the best source's {goal.metric} is {best:g}, so there is no ratio to it; use {choices}"


def _same_items(scores: Scores, others: Scores, task: str) -> ItemScores:
    """The scores of a task, if the others are on the same items."""
    if scores[task].items != others[task].items:
        raise ValueError(f"{task}: the two were not scored on the same items")
    return scores[task]


def _value(scores: Scores, goal: Goal) -> float:
    return scores[goal.task].score(goal.metric).value


def _pooled_value(parts: Sequence[Scores], goal: Goal) -> float:
    task_scores = [scores[goal.task] for scores in parts]
    if all(scores.is_itemwise(goal.metric) for scores in task_scores):
        return concatenate(task_scores).score(goal.metric).value
    sizes = [len(scores.items) for scores in task_scores]
    return sum(n * scores.score(goal.metric).value for n, scores in zip(sizes, task_scores, strict=True)) / sum(sizes)


def _influence(scores: Scores, goal: Goal) -> FloatArray:
    """Each item's influence on the goal's value: its variance over n is the value's squared standard error.

    NaN for a metric that is no mean or ratio of items: nothing is known of its error.
    """
    if not scores[goal.task].is_itemwise(goal.metric):
        return np.full(len(scores[goal.task].items), math.nan)
    value, influence = scores[goal.task].influence(goal.metric)
    return influence * goal.value(value)[1]


def _variance(influence: FloatArray) -> tuple[float, int]:
    """(the variance of one item, the number of items); NaN of a single item."""
    return float(influence.var(ddof=1)) if len(influence) > 1 else math.nan, len(influence)


def _variance_of_value(scores: Scores, goal: Goal) -> tuple[float, int]:
    """As `_variance`; of a metric of the corpus (that of the whole, 1), where its error was asked for."""
    part = scores[goal.task]
    if part.is_itemwise(goal.metric):
        variance, n = _variance(_influence(scores, goal))
        if goal.metric in part.noise:
            of_noise = part.noise_error(goal.metric) * goal.value(part.score(goal.metric).value)[1]
            variance = max(variance, n * of_noise**2)
        return variance, n
    score = scores[goal.task].score(goal.metric)
    return (math.nan if score.stderr is None else (score.stderr * goal.value(score.value)[1]) ** 2), 1
