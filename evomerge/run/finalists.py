"""The end of a run: finalists on fresh items, the winner once on the test items, beside everything it has to beat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.errors import EvoMergeError, RunError
from evomerge.evaluation.splits import GUARD, SEARCH, SELECT, TEST
from evomerge.objective.comparison import compare, nan_to_none, verdict, within_noise
from evomerge.objective.fitness import Fitness
from evomerge.problem.problem import Workbench
from evomerge.report.rows import Row, fitness_json, read_row, row_json
from evomerge.run.tradeoff import best_first, front_json, hypervolume_json
from evomerge.space.baselines import PARENT
from evomerge.study.candidate import Candidate, count_items, count_states, ranked
from evomerge.study.ranking import finalists as choose_finalists

if TYPE_CHECKING:
    from evomerge.problem.candidate_evaluator import Scorer
    from evomerge.run.folder import RunFolder
    from evomerge.study.interfaces import Tracker


def finish(
    bench: Workbench,
    folder: RunFolder,
    scorer: Scorer,
    known: tuple[Candidate, ...],
    tracker: Tracker,
    baseline: tuple[Candidate, ...] = (),
    ended: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Chooses the winner and measures it.

    The best candidates on `search` are scored on `select`; the winner is the best over both, which are fresh items and
    old ones in their proportion. With several objectives these are members of the front, and the winner is the knee of
    the front over both; what else is on that front is read on `test` as well. The winner is read once on `test`, beside
    every source, the base, the uniform average and the best candidate of generation 0; the guard tasks are read for the
    same models. A candidate that gives no finite scores on the new items is left out, and said to be.

    Args:
        bench: Models, tasks and splits.
        folder: Where the result goes.
        scorer: Scores recipes.
        known: The search's candidates.
        tracker: Where progress is shown.
        baseline: The candidates of an equal-budget random search, whose winner is one more of those to beat.
        ended: Why the search ended, for the result.

    Returns:
        The result, also written to result.json.

    Raises:
        RunError: When no candidate has a score.
    """
    finalists = choose_finalists(known, folder.spec.search.finalists)
    if not finalists:
        reasons = sorted({c.failure_kind or "unknown" for c in known})
        raise RunError(f"{folder.root}: none of {len(known)} candidates could be scored ({', '.join(reasons)})")
    scored, pooled = _finals(finalists, scorer, tracker, "finalist")
    steering, reported = scorer.fitness.unweighted, scorer.reported
    in_order = best_first(scored, pooled, bench, steering)
    winner = next(filter(None, (_complete(row, bench, scorer, tracker) for row in in_order)), None)
    if winner is None:
        raise EvoMergeError(f"{folder.root}: none of the {len(finalists)} finalists could be scored on the new items")
    wanted = _rivals(bench, known, winner.candidate) + _random_winner(folder, bench, scorer, baseline, tracker)
    completed = [_complete(row, bench, scorer, tracker) for row in wanted]
    rivals = {row.name: row for row in completed if row is not None}
    candidate = next(c for c in finalists if c.number == winner.candidate)
    differences = compare(winner.splits[TEST], {name: row.splits[TEST] for name, row in rivals.items()}, reported)
    result = {
        "run": folder.spec.name,
        "state": "finished",
        "ended": dict(ended or {}),
        "candidates": {**count_states(known), "budget": folder.spec.search.candidates},
        "items": count_items(known),
        "scale": folder.spec.evaluation.scale,
        "goals": _goals_json(reported, steering),
        "winner": {
            **row_json(winner, reported),
            "generation": candidate.generation,
            "operator": candidate.operator,
            "parents": list(candidate.parents),
        },
        "selection_bias": _selection_bias(winner, reported),
        "baselines": {
            name: {**row_json(row, reported), "winner_less_this": differences[name]} for name, row in rivals.items()
        },
        "finalists": [
            {
                "candidate": row.candidate,
                "pooled": pooled[row.candidate],
                "winner_less_this": _on_all_choosing_items(winner, row, steering),
                **fitness_json(row.splits, reported),
            }
            for row in scored
        ],
        "objectives": list(folder.spec.objectives),
        "front": front_json(winner, scored, bench, scorer, tracker),
        "hypervolume": hypervolume_json(folder, known),
        "informative": _informative_json(scorer, {c.number: c.fitness for c in finalists}, scored),
        "within_noise_of": within_noise(differences),
        "verdict": verdict(differences, {name: reported(row.splits[TEST]) for name, row in rivals.items()}),
    }
    folder.write_result(result)
    return result


def _finals(
    finalists: Sequence[Candidate], scorer: Scorer, tracker: Tracker, what: str
) -> tuple[list[Row], dict[int | None, float]]:
    """The finalists that have scores on `select`, best on `search` first, and by number their fitness over both."""
    measured = []
    for place, candidate in enumerate(finalists, start=1):
        tracker.report(f"scoring {what} {place} of {len(finalists)} on the select items")
        row = Row(f"candidate {candidate.number}", candidate.number, candidate.recipe, {})
        measured.append(read_row(row, (SEARCH, SELECT), scorer, tracker))
    scored = [row for row in measured if row is not None]
    steering = scorer.fitness.unweighted
    pooled = {row.candidate: steering.pooled([row.splits[SEARCH], row.splits[SELECT]]) for row in scored}
    return scored, pooled


def _random_winner(
    folder: RunFolder, bench: Workbench, scorer: Scorer, baseline: Sequence[Candidate], tracker: Tracker
) -> list[Row]:
    """The winner of the random search, by the same rule; its number is one of its own record, so the row has none."""
    finalists = choose_finalists(baseline, folder.spec.search.finalists)
    scored, pooled = _finals(finalists, scorer, tracker, "the random search's finalist")
    chosen = best_first(scored, pooled, bench, scorer.fitness.unweighted)[:1]
    return [Row(f"random search: its {row.name}", None, row.recipe, row.splits) for row in chosen]


def _rivals(bench: Workbench, known: Sequence[Candidate], winner: int | None) -> list[Row]:
    """Every source, the base, the uniform average, and the best of generation 0; the winner and the failed left out."""
    first = [c for c in known if c.generation == 0 and c.state == "done"]
    named = {c.operator: c for c in first}
    best = next((c for c in ranked(first)), None)
    wanted = [*(f"{PARENT}{name}" for name in (*bench.spec.models.sources, "base")), "uniform average"]
    rows = [Row(name, named[name].number, named[name].recipe, {}) for name in wanted if name in named]
    if best is not None and best.operator not in wanted:
        rows.append(Row(f"best of generation 0: {best.operator}", best.number, best.recipe, {}))
    return [row for row in rows if row.candidate != winner]


def _complete(row: Row, bench: Workbench, scorer: Scorer, tracker: Tracker) -> Row | None:
    """The row with its test and guard scores; None when it gives none."""
    tracker.report(f"scoring {row.name} on the test items")
    return read_row(row, [split for split in (SEARCH, TEST, GUARD) if bench.selections[split]], scorer, tracker)


def _goals_json(reported: Fitness, steering: Fitness) -> list[dict[str, Any]]:
    return [
        {"task": g.task, "metric": g.metric, "weight": g.weight, "reference": g.reference, "steered_by": by.metric}
        for g, by in zip(reported.goals, steering.goals, strict=True)
    ]


def _selection_bias(winner: Row, fitness: Fitness) -> dict[str, float | None]:
    """What the fitness lost from the items that steered to those that chose nothing; other items, so not paired."""
    searched, tested = winner.splits[SEARCH], winner.splits[TEST]
    stderr = math.hypot(fitness.stderr(searched), fitness.stderr(tested))
    return {"value": fitness(searched) - fitness(tested), "stderr": nan_to_none(stderr)}


def _on_all_choosing_items(winner: Row, row: Row, fitness: Fitness) -> dict[str, float | None]:
    """The winner less another finalist, by what chose it: `search` and `select` items together."""
    ours, theirs = ([model.splits[split] for split in (SEARCH, SELECT)] for model in (winner, row))
    value, stderr = fitness.pooled_difference(ours, theirs)
    return {"value": value, "stderr": nan_to_none(stderr)}


def _informative_json(
    scorer: Scorer, estimates: Mapping[int, float | None], rows: Sequence[Row]
) -> dict[str, Any] | None:
    """The items that steered, and for the finalists what these said beside what all search items say."""
    if not scorer.samples:
        return None
    steering = scorer.fitness.unweighted
    return {
        "tasks": {
            task: {
                "items": len(sample.items),
                "of": sum(size for size, _ in sample.strata),
                "effective": sample.effective,
                "strata": [{"items": size, "drawn": drawn} for size, drawn in sample.strata],
            }
            for task, sample in scorer.samples.items()
        },
        "finalists": [
            {
                "candidate": row.candidate,
                "estimate": None if row.candidate is None else estimates[row.candidate],
                "all_search_items": steering(row.splits[SEARCH]),
            }
            for row in rows
        ],
    }
