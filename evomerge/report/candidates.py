"""The candidates of a run, chosen and sorted, as a table, as CSV and as rows for pandas."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any, Literal

from evomerge.study.candidate import Candidate, State, score_values
from evomerge.study.ranking import best_first

Order = Literal["fitness", "number", "time"]


def list_candidates(
    history: Sequence[Candidate], *, sort: Order = "fitness", state: State | None = None, made_by: str = ""
) -> list[Candidate]:
    """Chooses candidates of a run and sorts them.

    Args:
        history: The run's candidates by number.
        sort: By fitness (best first, those without one last), number, or time taken (longest first).
        state: Only those that are done, pruned or failed; None for all.
        made_by: Only those whose operator contains this.
    """
    chosen = [c for c in history if state in (None, c.state) and made_by.lower() in c.operator.lower()]
    if sort == "fitness":
        ranked = best_first(chosen)
        numbers = {c.number for c in ranked}
        chosen = [*ranked, *(c for c in chosen if c.number not in numbers)]
    elif sort == "time":
        chosen = sorted(chosen, key=lambda c: -float(c.seconds.get("total", 0.0)))
    return chosen


def candidate_rows(candidates: Sequence[Candidate], objectives: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Writes candidates as rows: what is recorded of each, its scores as TASK/METRIC, its genes by name."""
    rows = []
    for c in candidates:
        row: dict[str, Any] = {
            "candidate": c.number,
            "generation": c.generation,
            "operator": c.operator,
            "parents": list(c.parents),
            "state": c.state,
            "fitness": c.fitness,
            "items": c.items,
            "seconds": c.seconds.get("total"),
            "failure": c.failure,
        }
        row |= dict(zip(objectives, c.objectives or (None,) * len(objectives), strict=True))
        row |= {f"{task}/{m}": value for _, task, m, value in score_values(c.scores)}
        rows.append(row | {f"gene:{name}": value for name, value in c.genome.scalars})
    return rows


def candidate_csv(candidates: Sequence[Candidate], objectives: Sequence[str] = ()) -> str:
    """Writes candidates as CSV, a column for everything that any of them has."""
    rows = candidate_rows(candidates, objectives)
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names or ["candidate"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows)
    return buffer.getvalue()
