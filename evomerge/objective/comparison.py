"""The winner beside what it has to beat: paired differences, intervals, tests by task, and one honest sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from evomerge.evaluation.scores import ItemScores, paired_difference
from evomerge.evaluation.statistics import Interval, intervals, mcnemar
from evomerge.objective.fitness import Fitness

Scores = Mapping[str, ItemScores]


def compare(winner: Scores, rivals: Mapping[str, Scores], fitness: Fitness) -> dict[str, dict[str, Any]]:
    """The winner less each rival on the same items, as JSON.

    Returns:
        Rival -> `{"value", "stderr", "n", "interval", "joint_interval", "tasks"}`: the difference in fitness, its
        standard error, its 95% interval by paired bootstrap, and one of intervals that hold for all rivals at once;
        None where a goal is no mean or ratio of items. `tasks` has each goal's own difference, and for a metric that is
        right or wrong the items that only one of the two has right, with McNemar's p-value.
    """
    if not rivals:
        return {}
    measured = {name: fitness.difference(winner, scores) for name, scores in rivals.items()}
    resampled = fitness.resampled([winner, *rivals.values()])
    spans: list[Interval] | list[None] = [None] * len(rivals)
    if resampled is not None and all(math.isfinite(stderr) for _, stderr in measured.values()):
        spans = intervals([value for value, _ in measured.values()], resampled[0] - resampled[1:])
    return {
        name: {
            "value": measured[name][0],
            "stderr": number(measured[name][1]),
            "n": fitness.count(winner),
            "interval": None if span is None else [span.low, span.high],
            "joint_interval": None if span is None else [span.joint_low, span.joint_high],
            "tasks": {goal.task: _by_task(winner, scores, goal.task, goal.metric) for goal in fitness.goals},
        }
        for (name, scores), span in zip(rivals.items(), spans, strict=True)
    }


def _by_task(winner: Scores, rival: Scores, task: str, metric: str) -> dict[str, Any]:
    ours, theirs = winner[task], rival[task]
    if not ours.raceable(metric):
        value = ours.score(metric).value - theirs.score(metric).value
        return {"metric": metric, "value": value, "stderr": None}
    value, stderr = paired_difference(ours, theirs, metric)
    found: dict[str, Any] = {"metric": metric, "value": value, "stderr": stderr}
    differing = mcnemar(ours, theirs, metric)
    if differing is not None:
        found |= {"wins": differing.wins, "losses": differing.losses, "p": differing.p}
    return found


def number(value: float) -> float | None:
    """The value as JSON has it: None for no number."""
    return None if math.isnan(value) else value


def close_rivals(differences: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rivals that the winner is not surely better than: their own interval reaches zero, or nothing is known."""
    spans = {name: row["interval"] for name, row in differences.items()}
    return [name for name, span in spans.items() if span is None or span[0] <= 0]


def verdict(differences: Mapping[str, Mapping[str, Any]], test: Mapping[str, float]) -> str:
    """One sentence on whether the winner is better than what a person would have tried first.

    It is better when every baseline's own interval is above zero: beating them all takes beating each of them,
    which needs no correction for their number. It is worse when one of the joint intervals is below zero: with several
    baselines one of them looks good by chance, so there the correction counts.

    Args:
        differences: Of `compare`.
        test: Every baseline's fitness on the test items.
    """
    if not differences:
        return "There was nothing to compare the winner with."
    best = max(test, key=lambda name: test[name])
    measured = f"the best baseline ({best}): {_difference(differences[best])} on the test items"
    if any(row["joint_interval"] is not None and row["joint_interval"][1] < 0 for row in differences.values()):
        return f"The winner is worse than {measured}."
    close = close_rivals(differences)
    if not close:
        return f"The winner is better than every baseline. Compared with {measured}."
    others = [name for name in close if name != best]
    also = f" (and of {', '.join(others)})" if others and best in close else ""
    if best in close:
        return f"The winner is within noise of {measured}{also}."
    return f"The winner is within noise of {', '.join(others)}, though not of {measured}."


def _difference(row: Mapping[str, Any]) -> str:
    if row["interval"] is None:
        return f"fitness {row['value']:+.3f} (its noise is unknown)"
    low, high = row["interval"]
    return f"fitness {row['value']:+.3f} (95% interval {low:+.3f} to {high:+.3f}, paired)"
