"""Where a run stands, from its record alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evomerge.evaluation.scores import ScoreTable, table_from_json
from evomerge.report.result import (
    BestCandidate,
    CandidateCounts,
    FrontMember,
    FrontSoFar,
    ItemCounts,
    RunResult,
    RunStatus,
)
from evomerge.run.folder import RunFolder
from evomerge.study.budget import count_items
from evomerge.study.candidate import Candidate, count_states
from evomerge.study.ranking import best, growth, pareto_front, ranked
from evomerge.system.locks import is_locked


def read_status(run: Path) -> RunStatus:
    """Reads the status of a run.

    Raises:
        RunError: When there is no run.
    """
    folder = RunFolder.existing(run)
    return status_of(folder, folder.candidates())


def status_of(folder: RunFolder, history: tuple[Candidate, ...]) -> RunStatus:
    """Works out where a run stands, given its candidates."""
    result = folder.result()
    budget = folder.spec.search.candidates
    final = result if result is not None and result.candidates.budget >= budget else None
    state = "running" if is_locked(folder.root / ".lock") else ("finished" if final else "stopped")
    seconds = [c.seconds["total"] for c in history if c.state != "failed" and "total" in c.seconds]
    rate = len(seconds) / sum(seconds) * 3600 * folder.spec.run.workers if seconds and sum(seconds) > 0 else None
    baselines = {c.operator: _scores(c) for c in history if c.generation == 0 and c.state == "done"}
    if final is not None:
        baselines |= {name: dict(row.scores) for name, row in final.baselines.items()}
    return RunStatus(
        run=folder.spec.name,
        state=state,
        candidates=CandidateCounts(**count_states(history), budget=budget),
        items=ItemCounts(**count_items(history)),
        best=_winner(final) if final else _best(history),
        front=_front(folder.spec.objectives, history),
        baselines=baselines,
        candidates_per_hour=rate,
        seconds_left=None if rate is None else max(0, budget - len(history)) / rate * 3600,
        verdict=final.verdict if final else None,
        metrics=_metrics(folder, final),
    )


def _metrics(folder: RunFolder, result: RunResult | None) -> dict[str, str]:
    """The metric of each task, as far as that is known without the tasks themselves."""
    if result is not None:
        return {goal.task: goal.metric for goal in result.goals}
    return {task.task: task.metric for task in folder.spec.evaluation.tasks if task.metric is not None}


def _winner(result: RunResult) -> BestCandidate:
    winner = result.winner
    return BestCandidate(winner.candidate, winner.fitness["search"].value, winner.scores, winner.fitness)


def _best(history: Sequence[Candidate]) -> BestCandidate | None:
    leader = best(history)
    if leader is None or leader.fitness is None:
        return None
    return BestCandidate(leader.number, leader.fitness, _scores(leader))


def _front(names: Sequence[str], history: Sequence[Candidate]) -> FrontSoFar | None:
    """The candidates that none dominates on the items that steer, the fittest first; None with one objective."""
    if not names:
        return None
    steps = growth(history)
    members = tuple(
        FrontMember(c.number, c.fitness, dict(zip(names, c.objectives, strict=True)))
        for c in ranked(pareto_front(history))
        if c.fitness is not None and c.objectives is not None
    )
    return FrontSoFar(len(members), steps[-1].hypervolume if steps else None, members)


def _scores(candidate: Candidate) -> dict[str, ScoreTable]:
    return {split: table_from_json(table) for split, table in candidate.scores.items()}
