"""What a group of tasks scores as a whole: its tasks' scores, put together by lm-eval's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.evaluation.scores import Score, ScoreTable
from evomerge.evaluation.tasks.lm_eval_tasks import LoadedTask, TaskSet
from evomerge.system.quiet import quiet


def group_scores(found: TaskSet, table: ScoreTable) -> dict[str, dict[str, Score]]:
    """The metrics of every group that states any.

    Args:
        found: The groups and the tasks in them.
        table: The tasks' scores.

    Returns:
        ``{group: {metric: Score}}``; `n` counts the items of the tasks that have the metric.
    """
    results = {name: _as_lm_eval(found.tasks[name], row) for name, row in table.items()}
    scores: dict[str, dict[str, Score]] = {}
    for group in found.groups:
        if not group.has_aggregation:
            continue
        with quiet():
            whole = group.aggregate(results)
        counts = whole.get("sample_count", {})
        if counts:
            scores[group.name] = _as_ours(whole, counts)
    return scores


def _as_lm_eval(loaded: LoadedTask, row: Mapping[str, Score]) -> dict[str, Any]:
    """A task's scores under lm-eval's keys, "metric,filter"."""
    first = loaded.filters[0]
    results: dict[str, Any] = {"sample_len": max((score.n for score in row.values()), default=0)}
    for name, score in row.items():
        metric, _, chosen = name.partition(",")
        results[f"{metric},{chosen or first}"] = score.value
        results[f"{metric}_stderr,{chosen or first}"] = "N/A" if score.stderr is None else score.stderr
    return results


def _as_ours(whole: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Score]:
    """A group's scores by metric; by "metric,filter" where its tasks have several filters."""
    plain = [key.partition(",")[0] for key in counts]
    scores = {}
    for key, n in counts.items():
        metric, _, chosen = key.partition(",")
        error = whole[f"{metric}_stderr,{chosen}"]
        name = metric if plain.count(metric) == 1 else key
        scores[name] = Score(float(whole[key]), None if error == "N/A" else float(error), n)
    return scores
