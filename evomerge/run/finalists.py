"""The end of a run: finalists on fresh items, the winner once on the test items, beside everything it has to beat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.errors import CandidateError, EvoMergeError, RunError
from evomerge.evaluation.scorers.lm_eval import with_corpus_errors
from evomerge.evaluation.scores import Score, ScoreTable, member_tables, score_table
from evomerge.evaluation.splits import GUARD, SEARCH, SELECT, TEST
from evomerge.objective.comparison import compare, nan_to_none, verdict, within_noise
from evomerge.objective.constraints import Measurement
from evomerge.objective.fitness import Fitness, Scores
from evomerge.problem.candidate_evaluator import CandidateEvaluator, constraint_value
from evomerge.problem.problem import Problem
from evomerge.recipe import parse_recipe
from evomerge.recipe.parse import single_model
from evomerge.report.result import (
    BaselineRow,
    CandidateCounts,
    ConstraintResult,
    DrawnItems,
    Ending,
    Estimate,
    EstimatedFitness,
    Finalist,
    FrontEntry,
    GoalResult,
    Hypervolume,
    InformativeItems,
    ItemCounts,
    RunResult,
    Stratum,
    WinnerRow,
)
from evomerge.space.baselines import PARENT
from evomerge.spec.schema import SearchSpec
from evomerge.study import pareto
from evomerge.study.budget import count_items
from evomerge.study.candidate import Candidate, ConstraintValue, count_states
from evomerge.study.ranking import finalists as choose_finalists
from evomerge.study.ranking import growth, ranked, reference_point
from evomerge.study.rounds import is_copy
from evomerge.system.arrays import FloatArray

if TYPE_CHECKING:
    from evomerge.study.interfaces import Tracker


@dataclass(frozen=True)
class ScoredModel:
    """A model and its per-item scores by split.

    Attributes:
        name: As the result shows it.
        candidate: Its number; None for one that is not of this search.
        recipe: What was merged.
        splits: Split to its scores.
    """

    name: str
    candidate: int | None
    recipe: Mapping[str, Any]
    splits: Mapping[str, Scores]


def choose_winner(
    problem: Problem,
    evaluator: CandidateEvaluator,
    history: tuple[Candidate, ...],
    tracker: Tracker,
    ended: Ending,
    others: Sequence[ScoredModel] = (),
    *,
    where: str,
) -> RunResult:
    """Chooses the winner and measures it.

    The best candidates on `search` are scored on `select`; the winner is the best over both, which are fresh items and
    old ones in their proportion. With several objectives these are members of the front, and the winner is the knee of
    the front over both; what else is on that front is read on `test` as well. The winner is read once on `test`, beside
    every source, the base, the uniform average and the best candidate of generation 0; the guard tasks are read for the
    same models. A candidate that gives no finite scores on the new items is left out, and said to be.

    Args:
        problem: Models, tasks and splits.
        evaluator: Scores recipes.
        history: The search's candidates.
        tracker: Where progress is shown.
        ended: Why the search ended.
        others: What else it has to beat: winners of other searches (`winner_of`).
        where: What an error calls the run.

    Raises:
        RunError: When no candidate has a score.
    """
    scorer = _Scorer(problem, evaluator, [split for split, items in problem.splits.items() if items], tracker)
    choice = _choose(problem.spec, scorer, history, others, where)
    return _result(problem.spec, scorer, history, ended, choice)


@dataclass(frozen=True)
class _Choice:
    """The candidates chosen from, their models as far as they have scores, the winner, and what it has to beat.

    The winner and the baselines have been read on all splits.
    """

    candidates: Sequence[Candidate]
    finalists: Sequence[ScoredModel]
    winner: ScoredModel
    baselines: Mapping[str, ScoredModel]


def _choose(
    spec: SearchSpec,
    scorer: _Scorer,
    history: tuple[Candidate, ...],
    others: Sequence[ScoredModel],
    where: str,
) -> _Choice:
    candidates = choose_finalists([c for c in history if not is_copy(c)], spec.search.finalists)
    if not candidates:
        reasons = sorted({c.failure_kind or "unknown" for c in history})
        raise RunError(f"{where}: none of {len(history)} candidates could be scored ({', '.join(reasons)})")
    finalists = scorer.finalists(candidates, "finalist")
    winner = next(filter(None, map(scorer.complete, scorer.best_first(finalists))), None)
    if winner is None:
        raise EvoMergeError(f"{where}: none of the {len(candidates)} finalists could be scored on the new items")
    to_beat = [*_baselines(spec, history, winner.candidate), *others]
    completed = [model for model in map(scorer.complete, to_beat) if model is not None]
    return _Choice(candidates, finalists, winner, {model.name: model for model in completed})


def _result(
    spec: SearchSpec, scorer: _Scorer, history: tuple[Candidate, ...], ended: Ending, choice: _Choice
) -> RunResult:
    """What was chosen, beside everything that it is compared with; reads the front on the test items."""
    objective, winner, baselines = scorer.evaluator.objective, choice.winner, choice.baselines
    steering, reported = objective.fitness.unweighted, objective.reported
    differences = compare(
        winner.splits[TEST], {name: model.splits[TEST] for name, model in baselines.items()}, reported
    )
    over_limits = [name for name, model in baselines.items() if scorer.is_over_a_limit(model)]
    return RunResult(
        run=spec.name,
        state="finished",
        ended=ended,
        candidates=CandidateCounts(**count_states(history), budget=spec.search.candidates),
        items=ItemCounts(**count_items(history)),
        scale=spec.evaluation.scale,
        goals=_goals(reported, steering),
        winner=_winner_row(winner, next(c for c in choice.candidates if c.number == winner.candidate), reported),
        selection_bias=_selection_bias(winner, reported),
        baselines={
            name: BaselineRow(
                model.candidate,
                model.recipe,
                _fitness(model, reported),
                _tables(model),
                differences[name],
                members=_members(model),
            )
            for name, model in baselines.items()
        },
        finalists=tuple(
            Finalist(
                _number(model),
                scorer.pooled(model),
                _pooled_difference(winner, model, steering),
                _fitness(model, reported),
            )
            for model in choice.finalists
        ),
        objectives=tuple(spec.objectives),
        front=tuple(
            FrontEntry(
                _number(model),
                scorer.objectives_by_split(model),
                scorer.sizes(model),
                _fitness(model, reported),
                _tables(model),
                members=_members(model),
            )
            for model in scorer.front(winner, choice.finalists)
        ),
        constraints=scorer.constraints(winner),
        hypervolume=_hypervolume(spec.objectives, history),
        informative=_informative(scorer.evaluator, {c.number: c.fitness for c in choice.candidates}, choice.finalists),
        within_noise_of=tuple(name for name in within_noise(differences) if name not in over_limits),
        verdict=verdict(
            differences, {name: reported(model.splits[TEST]) for name, model in baselines.items()}, over_limits
        ),
    )


@dataclass(frozen=True)
class _Scorer:
    """Scores models on splits, and ranks them by search and select items together.

    `splits` are those that have items.
    """

    problem: Problem
    evaluator: CandidateEvaluator
    splits: Sequence[str]
    tracker: Tracker

    def read(self, model: ScoredModel, splits: Sequence[str]) -> ScoredModel | None:
        """Adds the scores on these splits; None when they are not finite, which is reported."""
        try:
            read = {
                split: self.evaluator.scores(model.recipe, split)[0] for split in splits if split not in model.splits
            }
        except CandidateError as error:
            self.tracker.report(f"{model.name} is left out: {error}")
            return None
        return replace(model, splits={**model.splits, **read})

    def finalists(self, chosen: Sequence[Candidate], what: str) -> list[ScoredModel]:
        """Reads candidates on `search` and `select`; gives those that have scores there, in their order."""
        models = []
        for count, candidate in enumerate(chosen, start=1):
            self.tracker.report(f"scoring {what} {count} of {len(chosen)} on the select items")
            model = ScoredModel(f"candidate {candidate.number}", candidate.number, candidate.recipe, {})
            models.append(self.read(model, (SEARCH, SELECT)))
        return [model for model in models if model is not None]

    def complete(self, model: ScoredModel) -> ScoredModel | None:
        """Adds the test and guard scores, and errors by the bootstrap; None when there are no scores."""
        self.tracker.report(f"scoring {model.name} on the test items")
        read = self.read(model, [split for split in (SEARCH, TEST, GUARD) if split in self.splits])
        return None if read is None else self._with_corpus_errors(read)

    def _with_corpus_errors(self, model: ScoredModel) -> ScoredModel:
        tasks, iters = self.problem.tasks, self.problem.spec.evaluation.bootstrap_iters
        splits = {
            split: {task: with_corpus_errors(tasks[task], part, iters) for task, part in scores.items()}
            for split, scores in model.splits.items()
        }
        return replace(model, splits=splits)

    def pooled(self, model: ScoredModel) -> float:
        """Computes the fitness over search and select items together."""
        return self.evaluator.objective.fitness.unweighted.pooled([model.splits[SEARCH], model.splits[SELECT]])

    def best_first(self, models: Sequence[ScoredModel]) -> list[ScoredModel]:
        """Sorts finalists by what they are on `search` and `select` items together, the feasible first, best first.

        With several objectives the knee of their front, then the knee of the front of the rest, and so on; otherwise by
        their pooled fitness, and of equal ones the first.
        """
        fitness = np.array([self.pooled(model) for model in models])
        violations = np.array([self.violation(model) for model in models])
        order = np.lexsort((-fitness, violations)).tolist()
        if models and self.evaluator.objective.multi_objective:
            feasible = [model for model, violation in zip(models, violations, strict=True) if violation == 0]
            by_knee = pareto.by_knee(self._pooled_objectives(feasible), fitness[violations == 0]) if feasible else []
            return [*(feasible[k] for k in by_knee), *(models[k] for k in order if violations[k] > 0)]
        return [models[k] for k in order]

    def violation(self, model: ScoredModel) -> float:
        """Adds up how far a finalist is beyond the limits, on `search` and `select` items together."""
        values = self.constraint_values(model, (SEARCH, SELECT)).values()
        return sum(max(0.0, value.violation) for value in values)

    def is_over_a_limit(self, model: ScoredModel) -> bool:
        """Tells whether a model that was read on the test items breaks a constraint there.

        An adapter that a control trained is no model of the problem, and has the size of its base.
        """
        if not self.evaluator.objective.constraints:
            return False
        is_open = set(parse_recipe(model.recipe, where=model.name).models()) <= self.problem.checkpoints.keys()
        measured = model if is_open else replace(model, recipe=single_model(self.problem.reference))
        return any(value.violation > 0 for value in self.constraint_values(measured, (TEST,)).values())

    def constraint_values(self, model: ScoredModel, splits: Sequence[str]) -> dict[str, ConstraintValue]:
        """Measures what is limited on the items of some splits together."""
        objective = self.evaluator.objective
        if not objective.constraints:
            return {}
        own = self.evaluator.measurement(model.recipe, [model.splits[split] for split in splits])
        others = {name: self._limiting(name, splits) for name in objective.limiting}
        return {c.name: constraint_value(c.weighted(Fitness(())), own, others) for c in objective.constraints}

    def _limiting(self, name: str, splits: Sequence[str]) -> Measurement:
        """What a model that a limit is relative to has on the items of some splits."""
        recipe = single_model(self.problem.model(name))
        return self.evaluator.measurement(recipe, [self.evaluator.scores(recipe, split)[0] for split in splits])

    def constraints(self, winner: ScoredModel) -> tuple[ConstraintResult, ...]:
        """Measures the winner against every limit on the test items, which chose nothing."""
        values = {split: self.constraint_values(winner, (split,)) for split in (SEARCH, SELECT, TEST)}
        results = []
        for constraint in self.evaluator.objective.constraints:
            plain, model = constraint.weighted(Fitness(())), constraint.limit.model
            own = self.evaluator.measurement(winner.recipe, [winner.splits[TEST]])
            interval = plain.interval(own, None if model is None else self._limiting(model, (TEST,)))
            measured = {split: by_name[constraint.name] for split, by_name in values.items()}
            results.append(ConstraintResult(constraint.name, plain.verdict(interval), measured, interval))
        return tuple(results)

    def front(self, winner: ScoredModel, finalists: Sequence[ScoredModel]) -> list[ScoredModel]:
        """Lists the finalists that none dominates on the items that chose, the winner first; none with one objective.

        The others than the winner are read on the test items here.
        """
        if not self.evaluator.objective.multi_objective:
            return []
        feasible = [model for model in finalists if self.violation(model) == 0] or [winner]
        on_front = pareto.ranks(self._pooled_objectives(feasible), 1) == 0
        others = [
            model for model, on in zip(feasible, on_front, strict=True) if on and model.candidate != winner.candidate
        ]
        members = [winner]
        for model in others:
            self.tracker.report(f"scoring {model.name}, of the front, on the test items")
            members.append(self._with_corpus_errors(self.read(model, (TEST,)) or model))
        return members

    def objectives_by_split(self, model: ScoredModel) -> dict[str, dict[str, float]]:
        """Computes the objectives, by the metrics that steered, on each split that the model was read on."""
        choosing = {"pooled": (SEARCH, SELECT), **{s: (s,) for s in (SEARCH, SELECT, TEST) if s in model.splits}}
        return {name: self._objectives(model, splits) for name, splits in choosing.items()}

    def _pooled_objectives(self, models: Sequence[ScoredModel]) -> FloatArray:
        """What chooses between finalists with several objectives, shape [models, objectives]."""
        return np.array([[*self._objectives(model, (SEARCH, SELECT)).values()] for model in models])

    def _objectives(self, model: ScoredModel, splits: Sequence[str]) -> dict[str, float]:
        """Its objectives by name, on the items of some splits together."""
        parts = [model.splits[split] for split in splits]
        tasks = self.evaluator.objective.fitness.unweighted.pooled_objectives(parts)
        return {**tasks, **self.evaluator.smallness(model.recipe, parts)}

    def sizes(self, model: ScoredModel) -> dict[str, float]:
        """Its layers and parameters, and the tokens it writes for an item, where they are minimized."""
        tokens = self.evaluator.tokens([model.splits[TEST]]) if TEST in model.splits else {}
        return {**self.evaluator.sizes(model.recipe), **tokens}


def winner_of(
    search: str, problem: Problem, evaluator: CandidateEvaluator, history: Sequence[Candidate], tracker: Tracker
) -> list[ScoredModel]:
    """Finds the winner of another search by the same rule; its number is one of its own record, so it has none here.

    Args:
        search: What it is called.
        problem: Its models, tasks and splits.
        evaluator: Scores its recipes.
        history: Its candidates.
        tracker: Where progress is shown.

    Returns:
        The winner, read on all splits; nothing where no candidate has a score.
    """
    models = [
        ScoredModel(f"candidate {candidate.number}", None, candidate.recipe, {})
        for candidate in choose_finalists(history, problem.spec.search.finalists)
    ]
    return best_of(search, problem, evaluator, models, tracker)


def best_of(
    search: str, problem: Problem, evaluator: CandidateEvaluator, models: Sequence[ScoredModel], tracker: Tracker
) -> list[ScoredModel]:
    """Finds the best of some models as a winner is found; as `winner_of`."""
    scorer = _Scorer(problem, evaluator, [split for split, items in problem.splits.items() if items], tracker)
    read = (scorer.read(model, (SEARCH, SELECT)) for model in models)
    complete = map(scorer.complete, scorer.best_first([model for model in read if model is not None]))
    best = next(filter(None, complete), None)
    return [] if best is None else [replace(best, name=f"{search}: its {best.name}")]


def _baselines(spec: SearchSpec, history: Sequence[Candidate], winner: int | None) -> list[ScoredModel]:
    """Every source, the base, the uniform average, and the best of generation 0; the winner and the failed left out."""
    first = [c for c in history if c.generation == 0 and c.state == "done"]
    by_name = {c.operator: c for c in first}
    best = next((c for c in ranked(first)), None)
    names = [*(f"{PARENT}{name}" for name in (*spec.models.sources, "base")), "uniform average"]
    models = [ScoredModel(name, by_name[name].number, by_name[name].recipe, {}) for name in names if name in by_name]
    if best is not None and best.operator not in names:
        models.append(ScoredModel(f"best of generation 0: {best.operator}", best.number, best.recipe, {}))
    return [model for model in models if model.candidate != winner]


def _goals(reported: Fitness, steering: Fitness) -> tuple[GoalResult, ...]:
    return tuple(
        GoalResult(goal.task, goal.metric, goal.weight, goal.reference, steered_by=by.metric)
        for goal, by in zip(reported.goals, steering.goals, strict=True)
    )


def _winner_row(model: ScoredModel, candidate: Candidate, reported: Fitness) -> WinnerRow:
    return WinnerRow(
        candidate.number,
        model.recipe,
        _fitness(model, reported),
        _tables(model),
        candidate.generation,
        candidate.operator,
        candidate.parents,
        members=_members(model),
    )


def _fitness(model: ScoredModel, fitness: Fitness) -> dict[str, Score]:
    """Its fitness by split, but on the guard tasks, which have none."""
    return {
        split: Score(fitness(scores), nan_to_none(fitness.stderr(scores)), fitness.count(scores))
        for split, scores in model.splits.items()
        if split != GUARD
    }


def _tables(model: ScoredModel) -> dict[str, ScoreTable]:
    return {split: score_table(scores) for split, scores in model.splits.items()}


def _members(model: ScoredModel) -> dict[str, Mapping[str, ScoreTable]]:
    tables: dict[str, Mapping[str, ScoreTable]] = {
        split: member_tables(scores) for split, scores in model.splits.items()
    }
    return {split: groups for split, groups in tables.items() if groups}


def _number(model: ScoredModel) -> int:
    if model.candidate is None:
        raise ValueError(f"{model.name} is not of this search")
    return model.candidate


def _selection_bias(winner: ScoredModel, fitness: Fitness) -> Estimate:
    """What the fitness lost from the items that steered to those that chose nothing; other items, so not paired."""
    searched, tested = winner.splits[SEARCH], winner.splits[TEST]
    stderr = math.hypot(fitness.stderr(searched), fitness.stderr(tested))
    return Estimate(fitness(searched) - fitness(tested), nan_to_none(stderr))


def _pooled_difference(winner: ScoredModel, model: ScoredModel, fitness: Fitness) -> Estimate:
    """The winner less another finalist, by what chose it: `search` and `select` items together."""
    parts = [[one.splits[split] for split in (SEARCH, SELECT)] for one in (winner, model)]
    value, stderr = fitness.pooled_difference(*parts)
    return Estimate(value, nan_to_none(stderr))


def _hypervolume(objectives: Sequence[str], history: Sequence[Candidate]) -> Hypervolume | None:
    """How the front grew on the items that steered; None where there is one objective."""
    reference = reference_point(history)
    if not objectives or reference is None:
        return None
    return Hypervolume(dict(zip(objectives, reference.tolist(), strict=True)), tuple(growth(history)))


def _informative(
    evaluator: CandidateEvaluator, estimates: Mapping[int, float | None], models: Sequence[ScoredModel]
) -> InformativeItems | None:
    """The items that steered, and the finalists' fitness by these beside that by all search items."""
    if not evaluator.objective.samples:
        return None
    steering = evaluator.objective.fitness.unweighted
    tasks = {
        task: DrawnItems(
            items=len(sample.items),
            of=sum(size for size, _ in sample.strata),
            effective=sample.effective,
            strata=tuple(Stratum(size, drawn) for size, drawn in sample.strata),
        )
        for task, sample in evaluator.objective.samples.items()
    }
    return InformativeItems(
        tasks,
        tuple(
            EstimatedFitness(_number(model), estimates[_number(model)], steering(model.splits[SEARCH]))
            for model in models
        ),
    )
