"""One line of the final table: a model and its per-item scores by split, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.errors import CandidateError
from evomerge.evaluation.scores import score_table, table_to_json
from evomerge.evaluation.splits import GUARD
from evomerge.objective.comparison import nan_to_none
from evomerge.objective.fitness import Fitness, Scores

if TYPE_CHECKING:
    from evomerge.problem.candidate_evaluator import Scorer
    from evomerge.study.interfaces import Tracker


@dataclass(frozen=True)
class Row:
    """One line of the final table: a model and its per-item scores by split."""

    name: str
    candidate: int | None
    recipe: Mapping[str, Any]
    splits: Mapping[str, Scores]


def read_row(row: Row, splits: Sequence[str], scorer: Scorer, tracker: Tracker) -> Row | None:
    """The row with its scores on these splits; None when its scores are not finite, which is said."""
    try:
        read = {split: scorer.scores(row.recipe, split)[0] for split in splits if split not in row.splits}
    except CandidateError as error:
        tracker.report(f"{row.name} is left out: {error}")
        return None
    return Row(row.name, row.candidate, row.recipe, {**row.splits, **read})


def row_json(row: Row, fitness: Fitness) -> dict[str, Any]:
    """A row by all that it has."""
    return {
        "candidate": row.candidate,
        "recipe": dict(row.recipe),
        **fitness_json(row.splits, fitness),
        "scores": scores_json(row),
    }


def scores_json(row: Row) -> dict[str, Any]:
    """Value, standard error and number of items by split, task and metric."""
    return {split: table_to_json(score_table(scores)) for split, scores in row.splits.items()}


def fitness_json(splits: Mapping[str, Scores], fitness: Fitness) -> dict[str, Any]:
    """The fitness by split, but on the guard tasks, which have none."""
    return {
        "fitness": {
            split: {
                "value": fitness(scores),
                "stderr": nan_to_none(fitness.stderr(scores)),
                "n": fitness.count(scores),
            }
            for split, scores in splits.items()
            if split != GUARD
        }
    }
