"""The winners of the rounds so far as sources of the next: who they are, and their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evomerge.engine.to_disk import write_checkpoint
from evomerge.errors import RunError
from evomerge.objective.fitness import Fitness, Scores
from evomerge.problem.candidate_evaluator import CandidateEvaluator
from evomerge.problem.model_runner import ModelRunner, Runner
from evomerge.problem.problem import Problem
from evomerge.report.lineage import whole_recipe
from evomerge.report.model_card import merge_card
from evomerge.run.folder import ROUNDS
from evomerge.space.baselines import PARENT, Start, baselines, raced_last
from evomerge.space.decode import recipe_hash
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate
from evomerge.study.ranking import best_first
from evomerge.study.rounds import WINNERS, is_copy, winner_name, winner_number
from evomerge.system.arrays import FloatArray

_BEST = 4 * WINNERS
"""Candidates that they are chosen from."""


def choose_winners(
    problem: Problem, runner: Runner, evaluator: CandidateEvaluator, history: Sequence[Candidate]
) -> list[Candidate]:
    """Chooses the sources that the next round has beside the first one's: the best, and what adds most to it by item.

    They are of the best candidates of all rounds, with several objectives of the front, with as many layers as the
    models have; one that is but a source is there already.

    Raises:
        RunError: There is none.
    """
    layers = problem.space.layer_count
    eligible: list[Candidate] = []
    for candidate in best_first(c for c in history if c.state == "done" and not c.operator.startswith(PARENT)):
        if len(eligible) < _BEST and runner.sizes(runner.plan(candidate.recipe))["layers"] == layers:
            eligible.append(candidate)
    if not eligible:
        raise RunError("search.rounds: no merge of this round has a score, so that the next would have no new sources")
    objective = evaluator.objective
    scores = [evaluator.stored_scores(runner.plan(c.recipe), objective.split) for c in eligible]
    return [eligible[k] for k in complementary(objective.fitness, scores, WINNERS)]


def complementary(fitness: Fitness, models: Sequence[Scores], count: int) -> list[int]:
    """Chooses the first of some models, and then, one by one, who adds most to what the best of the chosen has.

    What is added is counted item by item and goal by goal, as a share of what the first model has; of equal ones the
    first is chosen. A goal that is no mean or ratio of items says nothing of single items and has no part in it.

    Args:
        fitness: The goals and their weights.
        models: Their scores on the same items, the best model first.
        count: How many, if there are so many.

    Returns:
        Positions in `models`.
    """
    values = [_of_items(fitness, scores, models[0]) for scores in models]
    chosen = list(range(min(1, len(models))))
    while len(chosen) < min(count, len(models)):
        best = np.max([values[k] for k in chosen], axis=0)
        rest = [k for k in range(len(models)) if k not in chosen]
        gains = [float(np.maximum(values[k] - best, 0.0).sum()) for k in rest]
        chosen.append(rest[int(np.argmax(gains))])
    return chosen


def _of_items(fitness: Fitness, scores: Scores, first: Scores) -> FloatArray:
    """Every item's value for every goal, higher is better, in units of the goal's share of the fitness."""
    parts = [np.zeros(0)]
    for goal in fitness.goals:
        if not all(one[goal.task].is_itemwise(goal.metric) for one in (scores, first)):
            continue
        own, reference = (np.nan_to_num(one[goal.task].values(goal.metric)) for one in (scores, first))
        unit = float(np.abs(reference).sum()) or 1.0
        parts.append(goal.weight * (own if goal.higher_is_better else -own) / unit)
    return np.concatenate(parts)


def write_winners(
    problem: Problem, runner: Runner, root: Path, history: Sequence[Candidate], winners: Sequence[Candidate]
) -> None:
    """Writes winners as checkpoints into a run's folder, each once; nothing of a formula, which has no weights."""
    if not isinstance(runner, ModelRunner):
        return
    for winner in winners:
        out = root / ROUNDS / winner_name(winner.number)
        if out.exists():
            continue
        out.parent.mkdir(exist_ok=True)
        recipe = whole_recipe(history, winner)
        text = f"Candidate {winner.number} of the search `{problem.spec.name}`: a source of its later rounds.\n"
        card = merge_card(recipe, problem.checkpoints, text)
        runner.check_inputs()
        write_checkpoint(runner.plan(winner.recipe), problem.checkpoints, out, card=card)


def first_candidates(space: SearchSpace, history: Sequence[Candidate]) -> tuple[Start, ...]:
    """Lists generation 0 of a later round: the winners, and what a person would try first with them, raced by them."""
    recorded = {candidate.recipe_hash for candidate in history if not is_copy(candidate)}
    starts = (start for start in baselines(space) if recipe_hash(start.recipe) not in recorded)
    return raced_last(replace(s, raced=winner_number(s.name.removeprefix(PARENT)) is None) for s in starts)
