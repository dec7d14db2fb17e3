"""The scores of one model on some items: from the user's cache if any run has measured them, else measured now."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from evomerge.checkpoints.tokenizer import tokenizer_digest
from evomerge.errors import CandidateError
from evomerge.evaluation.score_store import ScoreCache, key_of
from evomerge.evaluation.scores import ItemScores, concatenate
from evomerge.evaluation.splits import Selection
from evomerge.objective.fitness import Scores
from evomerge.planning.plan import Plan
from evomerge.problem.problem import Workbench
from evomerge.system.files import cache_folder

log = logging.getLogger(__name__)


class Measurer:
    """Measures models, and asks the cache first.

    Args:
        bench: Models and tasks.

    Attributes:
        reused: Item evaluations that came from the cache.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._cache = ScoreCache(cache_folder("scores")) if bench.spec.evaluation.cache else None
        self._contents: dict[str, Mapping[str, Any]] = {}
        self.reused = 0

    def __call__(self, plan: Plan, part: Selection) -> tuple[Scores, dict[str, float]]:
        """Scores a plan on some items.

        Returns:
            Per-item scores by task, and the seconds that each stage took: none when they were in the cache.

        Raises:
            CandidateError: When the merged model gives no finite scores.
        """
        settings = self._settings  # also without a cache: numbers must not depend on there being one
        if self._cache is None or settings is None:
            return self._bench.measure(plan, part)
        key = key_of({"plan": plan.digest, "settings": settings, "items": self._content(part)})
        known = self._cache.get(key, self.items(part))
        if known is not None:
            self.reused += size(part)
            return known, {}
        scores, seconds = self._bench.measure(plan, part)
        self._cache.put(key, scores)
        return scores, seconds

    def items(self, part: Selection) -> dict[str, tuple[str, ...]]:
        """The ids of a part's items, by task."""
        ids = {task: self._bench.evaluator.items(task) for task in part}
        return {task: tuple(ids[task][position] for position in positions) for task, positions in part.items()}

    @cached_property
    def _settings(self) -> Mapping[str, Any] | None:
        """What the scores depend on beside the model and the items; None when that cannot be said."""
        try:
            self._bench.settle()
        except CandidateError as error:
            log.warning("scores are not cached, because the reference model cannot be scored: %s", error)
            return None
        evaluation = self._bench.spec.evaluation
        return {
            "format": 2,
            "settings": evaluation.model_dump(include={"device", "dtype", "backend"}),
            "max_length": self._bench.evaluator.max_length,
            "tokenizer": tokenizer_digest(self._bench.tokenizer),
            "versions": self._bench.environment()["versions"],
        }

    def _content(self, part: Selection) -> Mapping[str, Any]:
        """The items themselves, their tasks' settings, and the batches they come in."""
        evaluator = self._bench.evaluator
        layout = evaluator.batch_digest(part)
        if layout not in self._contents:
            self._contents[layout] = {
                "layout": layout,
                "tasks": {task: self._bench.tasks[task].digest for task in part},
                "items": {task: [evaluator.item_hash(task, k) for k in positions] for task, positions in part.items()},
            }
        return self._contents[layout]


def size(part: Selection) -> int:
    """How many items a selection has."""
    return sum(map(len, part.values()))


def taken(scores: Scores, items: Mapping[str, tuple[str, ...]]) -> Scores | None:
    """The scores on some of the items, in that order; None when some are not there."""
    found: dict[str, ItemScores] = {}
    for task, wanted in items.items():
        part = scores.get(task)
        if part is None:
            return None
        if part.items == wanted:
            found[task] = part
            continue
        places = {item: place for place, item in enumerate(part.items)}
        if not all(item in places for item in wanted):
            return None
        found[task] = part.take([places[item] for item in wanted])
    return found


def joined(before: Scores, more: Scores, order: Mapping[str, Mapping[str, int]]) -> Scores:
    """Scores on two disjoint sets of items as one, in the order of the items' places."""
    if not before:
        return more
    both = {task: concatenate([before[task], part]) for task, part in more.items()}
    return {
        task: part.take(sorted(range(len(part.items)), key=lambda k, part=part, task=task: order[task][part.items[k]]))  # type: ignore[misc]
        for task, part in both.items()
    }
