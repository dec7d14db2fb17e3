"""What may not get worse, or not grow: constraints on metrics and sizes, and whether fresh items tell that one holds.

A limit is a number, or another model's value with a number added or multiplied: then both are measured on the same
items, and what is uncertain is their difference.

Sources: Agresti and Coull, 1998, https://doi.org/10.1080/00031305.1998.10480550 (an interval of a share); Agresti and
Min, 2005, https://doi.org/10.1002/sim.1781 (of the difference of two paired shares); the others are by bootstrap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from evomerge.errors import SpecError, TaskError
from evomerge.evaluation.tasks.task import TOKENS, Task
from evomerge.objective.comparison import LEVEL
from evomerge.objective.fitness import Fitness, Scores
from evomerge.objective.goals import Goal
from evomerge.spec.schema import LIMIT, Bound, Evaluation, Limits
from evomerge.spec.schema import Constraint as Section
from evomerge.system.arrays import FloatArray

Verdict = Literal["held", "broken", "not to be told"]

_Z = 1.959964  # of a normal distribution, for `LEVEL`
_SMALLEST_LIMIT = 1e-9  # a limit nearer to 0 has no shares: a violation is then in the metric's own units


@dataclass(frozen=True)
class Limit:
    """What a value may not exceed, or fall below: `amount`, plus `factor` times what a model has.

    Attributes:
        upper: Whether it is the most that is allowed, rather than the least.
        amount: A number.
        factor: Of the model's value.
        model: The model's name in the specification; None where there is none.
    """

    upper: bool
    amount: float
    factor: float = 0.0
    model: str | None = None

    @classmethod
    def of(cls, limits: Limits) -> Limit:
        """Reads what a specification says."""
        upper = limits.at_most is not None
        bound: Bound = limits.at_most if limits.at_most is not None else limits.at_least or 0.0
        if not isinstance(bound, str):
            return cls(upper, float(bound))
        match = re.fullmatch(LIMIT, bound.strip())
        if match is None:
            raise SpecError(f"evaluation.constraints: {bound!r} is no limit")
        model, sign, number = match[1], match[2], float(match[3] or 0.0)
        if sign == "*":
            return cls(upper, 0.0, number, model)
        return cls(upper, -number if sign == "-" else number, 1.0, model)

    def __call__(self, of_model: float) -> float:
        """Returns the limit, where the model has this value."""
        return self.amount + self.factor * of_model

    def violation(self, value: float, limit: float) -> float:
        """Returns how far a value is beyond the limit, as a share of the limit; negative where there is room."""
        return (value - limit) * self.slope(limit)

    def slope(self, limit: float) -> float:
        """Returns how the violation moves with the value."""
        share = 1.0 / abs(limit) if abs(limit) > _SMALLEST_LIMIT else 1.0
        return share if self.upper else -share


@dataclass(frozen=True)
class Measurement:
    """What there is to measure of a model: scores on disjoint sets of items, and its sizes."""

    parts: tuple[Scores, ...]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Constraint:
    """One limit.

    Attributes:
        name: As it is shown: ``hellaswag acc >= base - 0.01``.
        limit: The limit.
        measure: The mean of the metrics that are limited; it has no goals where a size is.
        size: The size that is limited; None where a metric is.
    """

    name: str
    limit: Limit
    measure: Fitness = field(default_factory=lambda: Fitness(()))
    size: str | None = None

    def weighted(self, fitness: Fitness) -> Constraint:
        """Takes over the weights of the items that were drawn for a fitness."""
        return replace(self, measure=replace(self.measure, items=fitness.items))

    def value(self, model: Measurement) -> float:
        """Returns what a model has of it."""
        if self.size is not None:
            return float(model.sizes[self.size])
        return self.measure(model.parts[0]) if len(model.parts) == 1 else self.measure.pooled(model.parts)

    def interval(self, model: Measurement, other: Measurement | None) -> tuple[float, float] | None:
        """Computes the 95% interval of a model's value less the limit, on the items of one part.

        None where nothing is known of its noise.

        Args:
            model: The model.
            other: The model that the limit is relative to, on the same items; None where there is none.
        """
        if self.size is not None:
            beyond = self.value(model) - self.limit(0.0 if other is None else self.value(other))
            return beyond, beyond
        shares = self._shares(model, other)
        if shares is not None:
            return shares
        models = [model.parts[0], *([] if other is None else [other.parts[0]])]
        samples = self.measure.bootstrap(models)
        if samples is None:
            return None
        values = samples[0] - self.limit.amount - (self.limit.factor * samples[1] if other is not None else 0.0)
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(values) > 1 else (math.nan,) * 2
        return (float(low), float(high)) if math.isfinite(low) and len(_items(self.measure, models[0])) > 1 else None

    def _shares(self, model: Measurement, other: Measurement | None) -> tuple[float, float] | None:
        """The same of a metric that is right or wrong on every item, where a bootstrap sees no noise in a few items."""
        if len(self.measure.goals) != 1 or self.limit.factor not in (0.0, 1.0):
            return None
        own, of_other = (None if m is None else _items(self.measure, m.parts[0]) for m in (model, other))
        if own is None or not np.isin(own, (0.0, 1.0)).all():
            return None
        if other is None:
            n = len(own) + _Z**2
            share = (float(own.sum()) + _Z**2 / 2) / n
            spread = _Z * math.sqrt(share * (1 - share) / n)
            return share - spread - self.limit.amount, share + spread - self.limit.amount
        if of_other is None or len(of_other) != len(own) or not np.isin(of_other, (0.0, 1.0)).all():
            return None
        n = len(own) + 2.0
        wins, losses = float(np.sum(own > of_other)) + 0.5, float(np.sum(own < of_other)) + 0.5
        difference = (wins - losses) / n
        spread = _Z * math.sqrt(max(wins + losses - (wins - losses) ** 2 / n, 0.0)) / n
        return difference - spread - self.limit.amount, difference + spread - self.limit.amount

    def verdict(self, interval: tuple[float, float] | None) -> Verdict:
        """Says whether a limit holds, by the interval of the value less the limit."""
        if interval is None:
            return "not to be told"
        low, high = interval if self.limit.upper else (-interval[1], -interval[0])
        return "held" if high <= 0 else "broken" if low > 0 else "not to be told"


def constraints_of(
    evaluation: Evaluation, tasks: Mapping[str, Task], members: Mapping[str, Sequence[str]]
) -> tuple[Constraint, ...]:
    """Reads the constraints of a specification.

    Args:
        evaluation: The section.
        tasks: Task name to task.
        members: Each name in the section to the names of its tasks; a name that is missing is somebody else's problem.

    Raises:
        TaskError: A task does not have its metric, or no task generates text whose tokens could be counted.
    """
    constraints: list[Constraint] = []
    problems: list[str] = []
    for section in evaluation.constraints:
        try:
            constraints += _read(section, evaluation, tasks, members)
        except TaskError as error:
            problems += [f"evaluation.constraints: {problem}" for problem in error.problems]
    names = [constraint.name for constraint in constraints]
    problems += [f"evaluation.constraints: '{n}' is listed twice" for n in sorted(set(names)) if names.count(n) > 1]
    if problems:
        raise TaskError(problems)
    return tuple(constraints)


def _read(
    section: Section, evaluation: Evaluation, tasks: Mapping[str, Task], members: Mapping[str, Sequence[str]]
) -> Iterator[Constraint]:
    limits = section.limits
    limit = Limit.of(limits)
    sign, bound = ("<=", limits.at_most) if limit.upper else (">=", limits.at_least)
    shown = bound if isinstance(bound, str) else f"{bound:g}"
    if section.task is not None:
        for name in members.get(section.task, ()):
            metric = tasks[name].metric_name(section.metric or next(iter(tasks[name].metrics), ""))
            measure = Fitness((Goal(name, metric, 1.0, higher_is_better=True),))
            yield Constraint(f"{name} {metric} {sign} {shown}", limit, measure)
    elif section.tokens is not None:
        measure = tokens_measure(evaluation, tasks, members)
        yield Constraint(f"{TOKENS} {sign} {shown}", limit, measure)
    else:
        size = "layers" if section.layers is not None else "parameters"
        yield Constraint(f"{size} {sign} {shown}", limit, size=size)


def tokens_measure(evaluation: Evaluation, tasks: Mapping[str, Task], members: Mapping[str, Sequence[str]]) -> Fitness:
    """Returns the tokens that are written an item, as the mean over the tasks that generate text.

    Raises:
        TaskError: None does.
    """
    listed = [name for task in evaluation.tasks for name in members.get(task.task, ())]
    writing = [name for name in listed if TOKENS in tasks[name].metrics]
    if not writing:
        raise TaskError(f"{TOKENS}: none of the tasks generates text ({', '.join(listed)})")
    return Fitness(tuple(Goal(name, TOKENS, 1.0, higher_is_better=True) for name in writing))


def _items(measure: Fitness, scores: Scores) -> FloatArray:
    """The values of the items of a measure's first goal, where they have one."""
    goal = measure.goals[0]
    part = scores[goal.task]
    if not part.is_itemwise(goal.metric):
        return np.full(len(part.items), math.nan)
    values = part.values(goal.metric)
    kept: FloatArray = values[~np.isnan(values)]
    return kept
