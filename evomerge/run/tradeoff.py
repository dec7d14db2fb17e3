"""The end of a search with several objectives: which finalist is the knee, what else is worth having, how it grew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.evaluation.splits import SEARCH, SELECT, TEST
from evomerge.objective.fitness import Fitness
from evomerge.problem.problem import Workbench
from evomerge.report.rows import Row, fitness_json, read_row, scores_json
from evomerge.study import pareto
from evomerge.study.candidate import Candidate
from evomerge.study.ranking import growth, reference_point

if TYPE_CHECKING:
    from evomerge.problem.candidate_evaluator import Scorer
    from evomerge.run.folder import RunFolder
    from evomerge.study.interfaces import Tracker


def best_first(
    rows: Sequence[Row], pooled: Mapping[int | None, float], bench: Workbench, steering: Fitness
) -> list[Row]:
    """The finalists by what they are on `search` and `select` items together, best first.

    With several objectives the knee of their front, then the knee of the front of the rest, and so on; otherwise by
    their pooled fitness, and of equal ones the first.
    """
    fitness = np.array([pooled[row.candidate] for row in rows])
    if not rows or not bench.spec.objectives:
        return [rows[k] for k in np.argsort(-fitness, kind="stable").tolist()]
    return [rows[k] for k in pareto.by_knee(_pooled_objectives(rows, bench, steering), fitness)]


def front_json(
    winner: Row, scored: Sequence[Row], bench: Workbench, scorer: Scorer, tracker: Tracker
) -> list[dict[str, Any]]:
    """The finalists that none dominates on the items that chose, the winner first; none where there is one objective.

    Objectives are told by split, in what steered. The others than the winner are read on the test items here.
    """
    if not bench.spec.objectives:
        return []
    steering, reported = scorer.fitness.unweighted, scorer.reported
    on_front = pareto.ranks(_pooled_objectives(scored, bench, steering), 1) == 0
    others = [row for row, on in zip(scored, on_front, strict=True) if on and row.candidate != winner.candidate]
    entries = []
    for row in [winner, *others]:
        if TEST not in row.splits:
            tracker.report(f"scoring {row.name}, of the front, on the test items")
        tested = read_row(row, (TEST,), scorer, tracker) or row
        choosing = {"pooled": (SEARCH, SELECT), **{s: (s,) for s in (SEARCH, SELECT, TEST) if s in tested.splits}}
        entries.append(
            {
                "candidate": row.candidate,
                "objectives": {name: _objectives(tested, splits, bench, steering) for name, splits in choosing.items()},
                "sizes": bench.sizes(bench.plan(row.recipe)),
                **fitness_json(tested.splits, reported),
                "scores": scores_json(tested),
            }
        )
    return entries


def hypervolume_json(folder: RunFolder, known: Sequence[Candidate]) -> dict[str, Any] | None:
    """How the front grew on the items that steered; None where there is one objective."""
    names, reference = folder.spec.objectives, reference_point(known)
    if not names or reference is None:
        return None
    return {
        "reference": dict(zip(names, reference.tolist(), strict=True)),
        "generations": [asdict(step) for step in growth(known)],
    }


def _pooled_objectives(rows: Sequence[Row], bench: Workbench, steering: Fitness) -> pareto.Array:
    """What chooses between finalists with several objectives, shape [rows, objectives]."""
    return np.array([[*_objectives(row, (SEARCH, SELECT), bench, steering).values()] for row in rows])


def _objectives(row: Row, splits: Sequence[str], bench: Workbench, steering: Fitness) -> dict[str, float]:
    """A model's objectives by name, on the items of some splits together."""
    tasks = steering.pooled_objectives([row.splits[split] for split in splits])
    return {**tasks, **bench.smallness(bench.plan(row.recipe))}
