"""What each task counts in the fitness: its metric, its weight, its direction and its unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evomerge.errors import SpecError, TaskError
from evomerge.evaluation.tasks.task import Task
from evomerge.spec.schema import Evaluation

_MIN_LOSS = 1e-9  # a loss below this counts as this, so that its ratio stays a number
_SHARES = {"acc", "acc_norm", "exact_match", "prob", "f1", "win_rate"}
_OF_PROGRAMS = ("pass@", "pass_at_")  # and a number of samples


@dataclass(frozen=True)
class Goal:
    """One task's part in the fitness.

    Attributes:
        task: The task.
        metric: The metric that is optimised.
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
        """Returns the goal's value (higher is better), and its derivative with respect to the metric."""
        if self.reference is None:
            sign = 1.0 if self.higher_is_better else -1.0
            return sign * metric, sign
        if self.higher_is_better:
            return metric / self.reference, 1.0 / self.reference
        metric = max(metric, _MIN_LOSS)
        return self.reference / metric, -self.reference / metric**2


def reported_goals(
    evaluation: Evaluation,
    tasks: Mapping[str, Task],
    members: Mapping[str, Sequence[str]],
    problems: Sequence[str] = (),
) -> tuple[Goal, ...]:
    """Lists the goals by the metrics that were asked for, on the raw scale; a group's weight is shared by its members.

    Args:
        evaluation: The section of the specification.
        tasks: Task name to task.
        members: Each name in the section to the names of its tasks.
        problems: What is wrong with the names that are missing in `members`; raised with what is wrong here.

    Raises:
        TaskError: A task does not have its metric.
        SpecError: The raw scale would add up different units.
    """
    goals: list[Goal] = []
    problems = list(problems)
    for part in evaluation.tasks:
        names = members.get(part.task, ())
        for name in names:
            task = tasks[name]
            if not task.metrics:
                problems.append(f"task {name!r} has no metric that its parts share; name its tasks one by one")
                continue
            try:
                metric = task.metric_name(part.metric or task.metrics[0])
            except TaskError as error:
                problems += error.problems
                continue
            group = part.task if name != part.task else None
            goals.append(Goal(name, metric, part.weight / len(names), task.direction(metric), group=group))
    if problems:
        raise TaskError(problems)
    if mixed := mixed_units(goals, evaluation.scale):
        raise SpecError(mixed)
    return tuple(goals)


def smooth_goals(goals: Sequence[Goal], tasks: Mapping[str, Task]) -> tuple[Goal, ...]:
    """Replaces each goal's metric by the one that varies smoothly with the model, where its task has one."""
    smooth = []
    for goal in goals:
        task = tasks[goal.task]
        metric = task.smooth_metric(goal.metric)
        smooth.append(replace(goal, metric=metric, higher_is_better=task.direction(metric)))
    return tuple(smooth)


def mixed_units(goals: Sequence[Goal], scale: str) -> list[str]:
    """Says what is wrong with adding up these goals: on the raw scale, tasks must share a unit.

    A unit is a share of items (accuracy, exact match, ...), or one metric.
    """
    names = [goal.metric.partition(",")[0] for goal in goals]
    units = {"a share of items" if name in _SHARES or name.startswith(_OF_PROGRAMS) else name for name in names}
    if scale == "raw" and len(units) > 1:
        return [f"evaluation.scale: raw cannot add up {', '.join(sorted(units))}; use relative"]
    return []
