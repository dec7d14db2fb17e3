"""Fixes what candidates are compared by before the first of them: the scale, the items that steer, a race's blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from evomerge.errors import CandidateError, EvoMergeError, RecipeError
from evomerge.evaluation.score_store import RunScores
from evomerge.evaluation.splits import SEARCH
from evomerge.objective.fitness import Scores
from evomerge.objective.item_sampling import Sample, draw_samples
from evomerge.objective.racing import (
    draw_blocks,
)
from evomerge.problem.candidate_evaluator import SAMPLED, CandidateEvaluator, Objective
from evomerge.problem.model_runner import Runner, item_ids, selection_size, take_items
from evomerge.problem.problem import Problem
from evomerge.recipe.parse import single_model
from evomerge.space.baselines import baselines
from evomerge.study.interfaces import Tracker


def prepare_objective(problem: Problem, runner: Runner, store: RunScores, tracker: Tracker) -> Objective:
    """Fixes what candidates are compared by: the scale, the items that steer, and the blocks of a race.

    Args:
        problem: Models, tasks, splits and goals.
        runner: Scores the sources and, for a sample of items, generation 0.
        store: Where their scores are kept.
        tracker: Is told what is scored, and decided.

    Raises:
        EvoMergeError: When what the scale or the sample rests on cannot be scored.
    """
    spec, evaluation = problem.spec, problem.spec.evaluation
    goals = zip(problem.reported.goals, problem.steering.goals, strict=True)
    if changed := {f"{by.metric} in place of {asked.metric}": None for asked, by in goals if by != asked}:
        tracker.report(f"search metric: {', '.join(changed)}; scores are reported by the metrics that were asked for")
    racing = evaluation.racing and not spec.objectives
    if evaluation.racing != racing:
        tracker.report("no racing: with several objectives, no one number says who cannot catch up any more")
    objective = Objective(
        fitness=problem.steering,
        reported=problem.reported,
        split=SEARCH,
        selection=problem.splits[SEARCH],
        blocks=(problem.splits[SEARCH],),
        multi_objective=bool(spec.objectives),
        constraints=problem.constraints,
        tokens=problem.tokens,
    )
    if racing and evaluation.informative is None:  # first, so that the sources are scored by blocks too
        objective = _with_blocks(objective, problem, runner, store, tracker)
    if evaluation.scale == "relative":
        sources = _score_sources(CandidateEvaluator(problem, runner, store, objective), spec.models.sources, tracker)
        fitness, reported = (goals.relative_to(sources) for goals in (problem.steering, problem.reported))
        objective = replace(objective, fitness=fitness, reported=reported)
    if evaluation.informative is not None:
        objective = _with_sample(objective, evaluation.informative, problem, runner, store, tracker)
        if racing:
            objective = _with_blocks(objective, problem, runner, store, tracker)
    return _with_references(objective, problem, runner, store, tracker)


def _with_references(
    objective: Objective, problem: Problem, runner: Runner, store: RunScores, tracker: Tracker
) -> Objective:
    """Measures the models that limits are relative to, and the one that sizes and tokens are compared with."""
    objective = replace(
        objective,
        constraints=tuple(constraint.weighted(objective.fitness) for constraint in objective.constraints),
        tokens=None if objective.tokens is None else replace(objective.tokens, items=objective.fitness.items),
    )
    evaluator = CandidateEvaluator(problem, runner, store, objective)
    limiting = {}
    for constraint in objective.constraints:
        name = constraint.limit.model
        if name is not None and name not in limiting:
            reference = problem.model(name)
            recipe = single_model(reference)
            scores = _score(evaluator, name, reference, objective.split, tracker)
            limiting[name] = evaluator.measurement(recipe, [scores])
    names = problem.spec.search.also_minimize
    sizes: dict[str, float] = dict(evaluator.sizes(single_model(problem.reference))) if names else {}
    if objective.tokens is not None:
        scores = _score(evaluator, "base", problem.reference, objective.split, tracker)
        sizes |= evaluator.tokens([scores])
    return replace(objective, limiting=limiting, reference_sizes={name: sizes[name] for name in names})


def _score_sources(evaluator: CandidateEvaluator, sources: Mapping[str, str], tracker: Tracker) -> list[Scores]:
    return [_score(evaluator, f"sources.{name}", ref, SEARCH, tracker) for name, ref in sources.items()]


def _score(evaluator: CandidateEvaluator, name: str, reference: str, split: str, tracker: Tracker) -> Scores:
    tracker.report(f"scoring models.{name} on the search items")
    try:
        return evaluator.scores(single_model(reference), split)[0]
    except CandidateError as error:
        raise EvoMergeError(f"models.{name}: cannot be scored: {error}") from error


def _with_sample(
    objective: Objective, fraction: float, problem: Problem, runner: Runner, store: RunScores, tracker: Tracker
) -> Objective:
    """Draws the items that steer, from what generation 0 does on all of them."""
    evaluator = CandidateEvaluator(problem, runner, store, objective)
    scored = []
    for start in baselines(problem.space):
        tracker.report(f"scoring {start.name} on all search items, to see which of them tell candidates apart")
        try:
            scored.append(evaluator.scores(start.recipe, SEARCH)[0])
        except (CandidateError, RecipeError) as error:
            tracker.report(f"{start.name} is left out: {error}")
    if not scored:
        raise EvoMergeError("no candidate of generation 0 could be scored")
    smooth = {goal.task: problem.tasks[goal.task].smooth_metric(goal.metric) for goal in objective.fitness.goals}
    kept = store.load_samples()
    if kept is None:
        samples = draw_samples(scored, smooth, fraction, problem.spec.search.seed)
        store.save_samples({task: sample.to_json() for task, sample in samples.items()})
    else:
        samples = {task: Sample.from_json(sample) for task, sample in kept.items()}
    if not samples:
        return objective
    drawn = {}
    for task, sample in samples.items():
        positions = {item: k for k, item in enumerate(problem.tasks[task].items)}
        drawn[task] = tuple(positions[item] for item in sample.items)
    selection = {**problem.splits[SEARCH], **drawn}
    weights = {task: dict(zip(s.items, s.weights, strict=True)) for task, s in samples.items()}
    counts = (f"{task} {len(s.items)} of {sum(n for n, _ in s.strata)}" for task, s in samples.items())
    tracker.report(f"searching on the items that tell candidates apart: {', '.join(counts)}")
    return replace(
        objective,
        fitness=replace(objective.fitness, items=weights),
        split=SAMPLED,
        selection=selection,
        blocks=(selection,),
        samples=samples,
    )


def _with_blocks(
    objective: Objective, problem: Problem, runner: Runner, store: RunScores, tracker: Tracker
) -> Objective:
    """Cuts the items that steer into blocks, if candidates can be compared on part of them."""
    ids = {task: problem.tasks[task].items for task in objective.selection}
    blocks = draw_blocks(objective.selection, problem.spec.search.seed, ids)
    if len(blocks) == 1:
        tracker.report("no racing: a task has too few search items for blocks")
        return objective
    plan = runner.plan(single_model(next(iter(problem.spec.models.sources.values()))))
    evaluator = CandidateEvaluator(problem, runner, store, objective)
    kept = take_items(evaluator.stored_scores(plan, objective.split), item_ids(problem.tasks, blocks[0]))
    try:
        seen = kept or runner.scores(plan, blocks[0])[0]
    except CandidateError as error:
        tracker.report(f"no racing: the first source cannot be scored: {error}")
        return objective
    # Where all search items steer, what is reported of them is put together from the blocks too.
    limited = [goal for constraint in objective.constraints for goal in constraint.measure.goals]
    goals = [*objective.fitness.goals, *limited, *(() if objective.samples else objective.reported.goals)]
    whole = dict.fromkeys(f"{g.task} {g.metric}" for g in goals if not seen[g.task].is_itemwise(g.metric))
    if whole:
        tracker.report(f"no racing: {', '.join(whole)} is no mean or ratio of items, so a part of them says nothing")
        return objective
    if kept is None:
        store.save(plan.digest, objective.split, seen)
    sizes = dict.fromkeys(str(selection_size(block)) for block in blocks)
    tracker.report(f"racing: the search items come in {len(blocks)} blocks of {' or '.join(sizes)}")
    return replace(objective, blocks=blocks)
