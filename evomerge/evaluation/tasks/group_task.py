"""A group of lm-eval's as one task: its items are those of its members, its metrics what the group itself reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError
from evomerge.evaluation.scores import ItemScores, pool
from evomerge.evaluation.tasks.task import Task
from evomerge.system.hashing import digest


@dataclass(frozen=True, eq=False)
class GroupTask(Task):
    """A group of tasks.

    Attributes:
        lm_eval_task: lm-eval's group.
        parts: Its tasks.
        by_size: Each metric that the group states, to whether it counts every item alike; otherwise, every task.
    """

    parts: tuple[Task, ...] = ()
    by_size: Mapping[str, bool] = field(default_factory=dict)

    @property
    def output_type(self) -> str:
        """That of the parts, or "group" where they differ."""
        types = {part.output_type for part in self.parts}
        return types.pop() if len(types) == 1 else "group"

    @property
    def filters(self) -> tuple[str, ...]:
        """The filters that all parts have."""
        return tuple(name for name in self.parts[0].filters if all(name in part.filters for part in self.parts))

    @cached_property
    def docs(self) -> tuple[Any, ...]:
        """Every document, part by part."""
        return tuple(doc for part in self.parts for doc in part.docs)

    @cached_property
    def items(self) -> tuple[str, ...]:
        """The ids that the items have in their tasks."""
        return tuple(item for part in self.parts for item in part.items)

    @cached_property
    def higher_is_better(self) -> dict[str, bool]:
        """Direction of every metric that all parts have, those that the group states first."""
        shared = [name for name in self.parts[0].metrics if all(name in part.metrics for part in self.parts)]
        shared.sort(key=lambda name: [*self.by_size].index(name) if name in self.by_size else len(self.by_size))
        return {name: self.parts[0].higher_is_better[name] for name in shared}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that all parts have."""
        return tuple(self.higher_is_better)

    @property
    def scores_itself(self) -> bool:
        """Whether any part does."""
        return any(part.scores_itself for part in self.parts)

    @property
    def runs_programs(self) -> bool:
        """Whether any part does."""
        return any(part.runs_programs for part in self.parts)

    def smooth_metric(self, metric: str) -> str:
        """Returns the smooth metric where it is the same one for all parts."""
        smooth = {part.smooth_metric(metric) for part in self.parts}
        return smooth.pop() if len(smooth) == 1 else metric

    def metric_name(self, metric: str) -> str:
        """Returns the name that the scores of all parts have for a metric.

        Raises:
            TaskError: A part does not have it.
        """
        if metric.partition(",")[0] not in self.metrics:
            have = ", ".join(self.metrics) or "none"
            raise TaskError(f"group {self.name!r} has no metric {metric!r} in all its tasks; what they share: {have}")
        names = {part.metric_name(metric) for part in self.parts}
        if len(names) > 1:
            raise TaskError(f"group {self.name!r}: {metric!r} is not one filter's in all its tasks: {sorted(names)}")
        return names.pop()

    @cached_property
    def python_files(self) -> tuple[Path, ...]:
        """The files of all parts."""
        return tuple(dict.fromkeys(path for part in self.parts for path in part.python_files))

    def document_notes(self, indices: Sequence[int]) -> list[str]:
        """Says of each part what is odd about some of its documents."""
        chosen, notes, start = set(indices), [], 0
        for part in self.parts:
            own = [k for k in range(len(part.items)) if start + k in chosen]
            notes += part.document_notes(own) if own else []
            start += len(part.items)
        return notes

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all parts."""
        return tuple(dict.fromkeys(path for part in self.parts for path in part.files))

    @cached_property
    def digest(self) -> str:
        """Identity of the parts and of how they are weighed."""
        return digest(repr(sorted(self.by_size.items())), *(part.digest for part in self.parts))

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the part that an item belongs to, and its number there."""
        return self._places[index]

    @cached_property
    def _places(self) -> tuple[tuple[int, int], ...]:
        return tuple((k, item) for k, part in enumerate(self.parts) for item in range(len(part.items)))

    def pool(self, indices: Sequence[int], parts: Mapping[int, ItemScores]) -> ItemScores:
        """Joins scores of the parts, by the number of the part, in the order of the group's items.

        Where a metric counts every task alike, an item weighs the less the more items its task has.
        """
        share = len(self.items) / len(self.parts)
        by_part = {k: share / len(part.items) for k, part in enumerate(self.parts)}
        uneven = [name for name in self.metrics if not self.by_size.get(name, True)]
        return pool(self.name, [self.items[k] for k in indices], parts, by_part, uneven)
