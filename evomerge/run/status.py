"""Where a run stands, from its record alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from evomerge.evaluation.scores import Score, table_to_json
from evomerge.report.result import ResultRow
from evomerge.report.tables import gradients_text, score_text, table
from evomerge.run.folder import RunFolder
from evomerge.study.budget import count_items
from evomerge.study.candidate import Candidate, count_states
from evomerge.study.ranking import best, growth, pareto_front, ranked
from evomerge.system.locks import is_locked

_SHOWN = 12  # members of a front


def read_status(run: Path) -> dict[str, Any]:
    """The status contract: run, state, candidates, best, baselines; and rate and time left.

    Raises:
        RunError: When there is no run.
    """
    folder = RunFolder.existing(run)
    history = folder.candidates()
    result = folder.result()
    budget = folder.spec.search.candidates
    finished = result is not None and result.candidates.budget >= budget
    running = is_locked(folder.root / ".lock")
    state = "running" if running else ("finished" if finished else "stopped")
    leader = best(history)
    seconds = [c.seconds["total"] for c in history if c.state != "failed" and "total" in c.seconds]
    rate = len(seconds) / sum(seconds) * 3600 * folder.spec.run.workers if seconds and sum(seconds) > 0 else None
    status: dict[str, Any] = {
        "run": folder.spec.name,
        "state": state,
        "candidates": {**count_states(history), "budget": budget},
        "items": count_items(history),
        "best": None if leader is None else _entry(leader),
        "front": _front(folder.spec.objectives, history),
        "baselines": {c.operator: dict(c.scores) for c in history if c.generation == 0 and c.state == "done"},
        "candidates_per_hour": rate,
        "seconds_left": None if rate is None else max(0, budget - len(history)) / rate * 3600,
        "verdict": result.verdict if result else None,
    }
    if finished and result is not None:
        winner = result.winner
        status["best"] = {
            "candidate": winner.candidate,
            "fitness": winner.fitness["search"].value,
            "scores": _scores_json(winner),
        }
        status["baselines"] |= {name: _scores_json(row) for name, row in result.baselines.items()}
    return status


def _front(names: Sequence[str], history: Sequence[Candidate]) -> dict[str, Any] | None:
    """The candidates that none dominates on the items that steer, the fittest first; None with one objective."""
    if not names:
        return None
    members = ranked(pareto_front(history))
    grown = growth(history)
    return {
        "size": len(members),
        "hypervolume": grown[-1].hypervolume if grown else None,
        "candidates": [
            {
                "candidate": candidate.number,
                "fitness": candidate.fitness,
                "objectives": dict(zip(names, candidate.objectives or (), strict=True)),
            }
            for candidate in members
        ],
    }


def render_status(status: Mapping[str, Any]) -> str:
    """The status as text."""
    counts = status["candidates"]
    lines = [
        f"{status['run']}: {status['state']}; {counts['done']} scored, {counts['failed']} failed, "
        f"{counts['pruned']} pruned of {counts['budget']}"
    ]
    if counts["pruned"]:
        items = status["items"]
        lines.append(
            f"racing: {items['evaluated']} item evaluations instead of {items['without_racing']}, "
            f"{items['saved']:.0%} saved"
        )
    if gradients := gradients_text(status["items"]["gradients"]):
        lines.append(gradients)
    if status["candidates_per_hour"] and status["state"] != "finished":
        left = timedelta(seconds=round(status["seconds_left"]))
        lines.append(f"{status['candidates_per_hour']:.0f} candidates an hour, {left} left")
    if status["best"]:
        best_so_far = status["best"]
        lines.append(f"best: candidate {best_so_far['candidate']}, fitness {best_so_far['fitness']:.4f}")
        rows = [
            [split, task, metric, score_text(Score.from_json(score))]
            for split, tasks in best_so_far["scores"].items()
            for task, metrics in tasks.items()
            for metric, score in metrics.items()
        ]
        lines.append(table(["items", "task", "metric", "value"], rows))
    if status["front"] and status["front"]["size"]:
        lines += _front_lines(status["front"])
    if status["verdict"]:
        lines.append(status["verdict"])
    return "\n".join(lines)


def _front_lines(front: Mapping[str, Any]) -> list[str]:
    volume = "" if front["hypervolume"] is None else f", hypervolume {front['hypervolume']:.4g}"
    shown = front["candidates"][:_SHOWN]
    more = "" if len(shown) == front["size"] else f"; the {len(shown)} fittest:"
    names = list(shown[0]["objectives"])
    rows = [
        [str(row["candidate"]), f"{row['fitness']:.4f}", *(f"{row['objectives'][name]:.4f}" for name in names)]
        for row in shown
    ]
    return [f"front: {front['size']} candidates{volume}{more}", table(["candidate", "fitness", *names], rows)]


def _scores_json(row: ResultRow) -> dict[str, Any]:
    return {split: table_to_json(scores) for split, scores in row.scores.items()}


def _entry(candidate: Candidate) -> dict[str, Any]:
    return {"candidate": candidate.number, "fitness": candidate.fitness, "scores": dict(candidate.scores)}
