"""Proposals to outcomes: scores candidates by the objective, and races them against the best."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evomerge.errors import BadInput, CandidateError, OutputError, RecipeError
from evomerge.evaluation.score_store import RunScores
from evomerge.evaluation.scores import ResponseJacobian, score_table, table_to_json
from evomerge.evaluation.splits import SEARCH, Selection
from evomerge.evaluation.tasks.task import TOKENS
from evomerge.objective.constraints import Constraint, Measurement
from evomerge.objective.fitness import Fitness, Scores
from evomerge.objective.goals import Goal
from evomerge.objective.item_sampling import Sample
from evomerge.objective.likelihood_model import LikelihoodModel, Limited, Term, joined
from evomerge.objective.racing import (
    CONTROLS,
    CUTOFF_RANK,
    InterimAnalysis,
    Race,
    block_order,
    blocks_at_analyses,
)
from evomerge.planning.plan import Plan
from evomerge.problem.genome_jacobian import COST, genome_jacobian, sample_items
from evomerge.problem.model_runner import (
    Runner,
    item_ids,
    join_items,
    likelihood_term,
    selection_size,
    take_items,
)
from evomerge.problem.problem import Problem
from evomerge.space.decode import decode, why_invalid
from evomerge.space.genome import Genome
from evomerge.study.candidate import Candidate, ConstraintValue, Outcome, Proposal
from evomerge.study.ranking import ranked

log = logging.getLogger(__name__)

SAMPLED = "steer"
"""The split under which scores are kept, where a sample of the search items steers."""

KNOWN = "known"
"""As a split: scores that were there before the search began, and cost it nothing."""


@dataclass(frozen=True)
class Objective:
    """What candidates are compared by: fixed before the first of them, and the same in every session of a run.

    Attributes:
        fitness: What steers, on the scale asked for, with the weights of the items that were drawn.
        reported: The same goals by the metrics that were asked for: what the result is given in.
        split: The split under which scores of the items that steer are kept.
        selection: Those items.
        blocks: The parts in which they are scored: one, or with racing several.
        samples: Task to the items that were drawn of it, where a sample of the search items steers.
        reference_sizes: What the reference model has of what is minimized beside the tasks.
        multi_objective: Whether there are several objectives.
        constraints: What is limited, with the weights of the items that were drawn.
        limiting: Name of a model that a limit is relative to -> what it has, on the items that steer.
        tokens: Measures the tokens written an item; None where they are not minimized.
    """

    fitness: Fitness
    reported: Fitness
    split: str
    selection: Selection
    blocks: tuple[Selection, ...]
    samples: Mapping[str, Sample] = field(default_factory=dict)
    reference_sizes: Mapping[str, float] = field(default_factory=dict)
    multi_objective: bool = False
    constraints: tuple[Constraint, ...] = ()
    limiting: Mapping[str, Measurement] = field(default_factory=dict)
    tokens: Fitness | None = None


@dataclass(frozen=True)
class Incumbents:
    """What a race has to know of a history.

    Attributes:
        leaders: Number, recipe hash and recipe of the best candidates with a full score, best first.
        generation: The generation that races.
    """

    leaders: tuple[tuple[int, str, Mapping[str, Any]], ...]
    generation: int


RaceMessage = tuple[Incumbents, Mapping[str, bytes]]
"""Whom to race against, and files with their scores."""


@dataclass
class _Evaluation:
    """What was measured of a plan on a split: scores, items, seconds by stage, and a race's interim analyses."""

    scores: Scores = field(default_factory=dict)
    items: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    analyses: list[InterimAnalysis] = field(default_factory=list)


class CandidateEvaluator:
    """Scores proposals; what was measured once in a run is read back.

    The items of a split are scored in parts, the same for every candidate: one part, or with racing several blocks of
    the items that steer.

    Args:
        problem: Models, tasks and splits.
        runner: Scores plans.
        store: Where the run's per-item scores are kept.
        objective: What candidates are compared by.

    Attributes:
        objective: As given.
    """

    def __init__(self, problem: Problem, runner: Runner, store: RunScores, objective: Objective) -> None:
        self.objective = objective
        self._problem = problem
        self._runner = runner
        self._store = store
        self._positions = {name: {item: k for k, item in enumerate(t.items)} for name, t in problem.tasks.items()}
        self._race: Race | None = None
        self._block_order: tuple[int, ...] = ()  # in which the generation sees the blocks
        self._full_scores: dict[str, Scores] = {}  # of the incumbents, by recipe hash
        self._incumbents: Incumbents | None = None
        self._latest_message: RaceMessage | None = None
        self._latest_model: tuple[Genome, LikelihoodModel | None] | None = None

    def __call__(self, proposal: Proposal) -> Outcome:
        """Scores one proposal on the search items; a candidate's own failure is an outcome, not an error."""
        race, objective = self._race, self.objective
        try:
            started = time.perf_counter()
            plan = self._runner.plan(proposal.recipe)
            evaluation = self._evaluate(plan, objective.split, time.perf_counter() - started, race)
        except CandidateError as error:
            return Outcome(None, state="failed", failure=f"not scored: {error}")
        except RecipeError as error:
            return Outcome(None, state="failed", failure=f"impossible recipe: {error}")
        except MemoryError:
            return Outcome(None, state="failed", failure="out of memory: the model could not be materialised or scored")
        table = {SEARCH: table_to_json(score_table(objective.fitness.weighted(evaluation.scores)))}
        estimates = {analysis.items: analysis.estimate for analysis in evaluation.analyses}
        constraints = self._constraint_values(plan, evaluation.scores)
        if race is not None and evaluation.analyses and evaluation.analyses[-1].stopped:
            last = evaluation.analyses[-1]
            return Outcome(
                last.estimate,
                table,
                "pruned",
                race.reason(last),
                evaluation.seconds,
                estimates=estimates,
                constraints=constraints,
            )
        fitness = objective.fitness(evaluation.scores)
        return Outcome(
            fitness,
            table,
            seconds=evaluation.seconds,
            objectives=self._objectives(plan, evaluation.scores),
            estimates={**estimates, evaluation.items: fitness},
            constraints=constraints,
        )

    def begin_generation(self, history: tuple[Candidate, ...]) -> None:
        """Fixes whom a generation races against: nothing that happens in it changes that."""
        self.race_against(self.incumbents(history))

    def incumbents(self, history: tuple[Candidate, ...]) -> Incumbents | None:
        """Returns whom to race against, given this history; None for nobody.

        Nobody while none is feasible: a lower fitness is no reason to stop one that may be nearer to the limits.

        Raises:
            ChangedInput: A model or data have changed since they were opened.
        """
        self._runner.check_inputs()
        leaders = ranked(history)[:CONTROLS]
        if not leaders or leaders[0].violation > 0 or len(self.objective.blocks) == 1:
            return None
        generation = 1 + max(candidate.generation for candidate in history)
        return Incumbents(tuple((c.number, c.recipe_hash, c.recipe) for c in leaders), generation)

    def race_message(self, history: tuple[Candidate, ...]) -> RaceMessage | None:
        """Returns whom to race against with what is kept of their scores, for an evaluator far from the run's folder.

        Raises:
            ChangedInput: A model or data have changed since they were opened.
        """
        incumbents = self.incumbents(history)
        if incumbents is None:
            return None
        if self._latest_message is None or self._latest_message[0] != incumbents:
            files = (self._files(recipe) for _, _, recipe in incumbents.leaders)
            self._latest_message = incumbents, {name: content for of in files for name, content in of.items()}
        return self._latest_message

    def kept_files(self, proposal: Proposal) -> dict[str, bytes]:
        """Returns what the run has kept of a proposal's scores, for an evaluator far from its folder."""
        try:
            return self._files(proposal.recipe)
        except RecipeError:
            return {}  # as its outcome will say

    def _files(self, recipe: Mapping[str, Any]) -> dict[str, bytes]:
        splits = dict.fromkeys((self.objective.split, SEARCH, KNOWN))
        return self._store.files(self._runner.plan(recipe).digest, splits)

    def take_message(self, message: RaceMessage | None) -> None:
        """Has the next proposals race against those of a message of `race_message`."""
        incumbents, files = message or (None, {})
        self._store.add(files)
        self.race_against(incumbents)

    def race_against(self, incumbents: Incumbents | None) -> None:
        """Has the next proposals race against these candidates, until others are named."""
        if incumbents == self._incumbents:
            return
        self._race, self._incumbents = None, incumbents
        if incumbents is None:
            return
        before, self._full_scores = self._full_scores, {}
        for _, recipe_hash, recipe in incumbents.leaders:
            scores = before.get(recipe_hash) or self.scores(recipe, self.objective.split)[0]
            self._full_scores[recipe_hash] = scores
        blocks = len(self.objective.blocks)
        self._block_order = block_order(blocks, self._problem.spec.search.seed, incumbents.generation)
        controls = {
            number: self._scores_at_analyses(self._full_scores[recipe_hash])
            for number, recipe_hash, _ in incumbents.leaders
        }
        cutoff, _, _ = incumbents.leaders[min(CUTOFF_RANK, len(incumbents.leaders)) - 1]
        self._race = Race.against(self.objective.fitness, cutoff, controls)

    def scores(self, recipe: Mapping[str, Any], split: str) -> tuple[Scores, Mapping[str, float]]:
        """Returns per-item scores of a recipe on a whole split, and the seconds they cost (hardly any when kept)."""
        started = time.perf_counter()
        plan = self._runner.plan(recipe)
        evaluation = self._evaluate(plan, split, time.perf_counter() - started)
        return evaluation.scores, evaluation.seconds

    def sizes(self, recipe: Mapping[str, Any]) -> dict[str, int]:
        """Counts the layers and the parameters of a recipe's result."""
        return self._runner.sizes(self._runner.plan(recipe))

    def measurement(self, recipe: Mapping[str, Any], parts: Sequence[Scores]) -> Measurement:
        """Puts a recipe's scores on disjoint sets of items and its sizes together."""
        return Measurement(tuple(parts), self.sizes(recipe))

    def smallness(self, recipe: Mapping[str, Any], parts: Sequence[Scores]) -> dict[str, float]:
        """Returns what is minimized beside the tasks, as objectives: what the reference model has over a recipe's."""
        return self._smallness(self._runner.plan(recipe), parts)

    def stored_scores(self, plan: Plan, split: str) -> Scores:
        """Reads what the run has kept of a plan's scores on a split: all, some, or none."""
        kept: Scores | None = self._store.load(plan.digest, split)
        if kept is None and split == SAMPLED and (whole := self._store.load(plan.digest, SEARCH)) is not None:
            kept = take_items(whole, item_ids(self._problem.tasks, self.objective.selection))
        return kept or {}

    def keep_known(self, recipe: Mapping[str, Any], scores: Scores) -> None:
        """Keeps scores that a recipe had before the search began: on these items it is scored without being charged."""
        self._store.save(self._runner.plan(recipe).digest, KNOWN, scores)

    def known_outcome(self, proposal: Proposal) -> Outcome | None:
        """Returns a proposal's outcome where all its scores were there before the search began; else None."""
        earlier: Scores = self._store.load(self._runner.plan(proposal.recipe).digest, KNOWN) or {}
        is_whole = take_items(earlier, item_ids(self._problem.tasks, self.objective.selection)) is not None
        return self(proposal) if is_whole else None

    def likelihood_model(self, candidate: Candidate) -> LikelihoodModel | None:
        """Returns a model of the fitness around a candidate: how every log-likelihood moves with its genes.

        The genes are those of its genome, which for some of generation 0 is only the nearest to its recipe. None for a
        candidate without a full score, and where there are no derivatives (`genome_jacobian`). Differentiated once in a
        run and kept.
        """
        if candidate.state != "done" or why_invalid(self._problem.space, candidate.genome) is not None:
            return None
        if self._latest_model is None or self._latest_model[0] != candidate.genome:  # a search asks every generation
            self._latest_model = candidate.genome, self._make_model(candidate)
        return self._latest_model[1]

    def _make_model(self, candidate: Candidate) -> LikelihoodModel | None:
        space, objective = self._problem.space, self.objective
        try:
            plan = self._runner.plan(decode(space, candidate.genome))
            # Scored already, but for a baseline that the space says in other words, or only nearly.
            scores = self._evaluate(plan, objective.split, planning=0.0).scores
        except CandidateError as error:
            log.warning("no derivatives of candidate %d: %s", candidate.number, error)
            return None
        sample = sample_items(objective.selection, plan.digest)
        selection = {task: tuple(objective.selection[task][k] for k in of_task) for task, of_task in sample.items()}
        kept = self._store.load_jacobian(plan.digest)
        if kept is None:
            try:
                kept = genome_jacobian(space, self._runner, selection, candidate.genome)
            except (OutputError, BadInput):
                raise  # the run's trouble, not the candidate's
            except Exception:  # what a model's own code may raise when it is differentiated
                log.warning("no derivatives of candidate %d", candidate.number, exc_info=True)
                kept = {}
            self._store.save_jacobian(plan.digest, kept)
        sampled = {task: scores[task].take(sample[task]) for task in kept}
        return self._model_of(kept, selection, sampled, candidate) if kept else None

    def _model_of(
        self, jacobian: Mapping[str, ResponseJacobian], selection: Selection, scores: Scores, candidate: Candidate
    ) -> LikelihoodModel | None:
        fitness = self.objective.fitness
        responses, requests = joined(jacobian)

        def term(goal: Goal) -> Term | None:
            if goal.task not in requests:
                return None
            own, part, weights = requests[goal.task], scores[goal.task], fitness.items.get(goal.task)
            return likelihood_term(
                self._runner,
                self._problem.tasks[goal.task],
                goal,
                selection[goal.task],
                responses.loglikelihoods[own],
                responses.items[own],
                part,
                start=own.start,
                weights=None if weights is None else np.array([weights[item] for item in part.items]),
            )

        terms = [one for one in map(term, fitness.goals) if one is not None]
        limits = []
        for constraint in self.objective.constraints:
            moving = term(constraint.measure.goals[0]) if len(constraint.measure.goals) == 1 else None
            if moving is not None and constraint.name in candidate.constraints:
                at = candidate.constraints[constraint.name]
                limits.append(Limited(moving, at.violation, constraint.limit.slope(at.limit)))
        unit = self._problem.space.unit(candidate.genome)
        total = sum(goal.weight for goal in fitness.goals)
        return LikelihoodModel(terms, total, responses, -unit, 1.0 - unit, limits) if terms else None

    @property
    def jacobian_items(self) -> int:
        """What `likelihood_model` costs when asked first, in item evaluations."""
        return round(COST * selection_size(sample_items(self.objective.selection, "")))

    def _objectives(self, plan: Plan, scores: Scores) -> tuple[float, ...] | None:
        """One value per objective, higher is better; None where there is one, which is the fitness."""
        if not self.objective.multi_objective:
            return None
        return (*self.objective.fitness.objectives(scores).values(), *self._smallness(plan, [scores]).values())

    def _smallness(self, plan: Plan, parts: Sequence[Scores]) -> dict[str, float]:
        if not self.objective.reference_sizes:
            return {}
        sizes = self._runner.sizes(plan) | self.tokens(parts)
        return {name: reference / sizes[name] for name, reference in self.objective.reference_sizes.items()}

    def tokens(self, parts: Sequence[Scores]) -> dict[str, float]:
        """Returns the tokens written an item, where they are minimized; at least one, the end."""
        if self.objective.tokens is None:
            return {}
        measure = self.objective.tokens if len(parts) == 1 else self.objective.tokens.unweighted
        return {TOKENS: max(1.0, measure(parts[0]) if len(parts) == 1 else measure.pooled(parts))}

    def _constraint_values(self, plan: Plan, scores: Scores) -> dict[str, ConstraintValue]:
        """What a candidate has of everything that is limited, on the items that it was scored on."""
        if not self.objective.constraints:
            return {}
        own = Measurement((scores,), self._runner.sizes(plan))
        ids = {task: part.items for task, part in scores.items()}
        others = {
            model: replace(other, parts=(take_items(other.parts[0], ids) or other.parts[0],))
            for model, other in self.objective.limiting.items()
        }
        return {one.name: constraint_value(one, own, others) for one in self.objective.constraints}

    def _parts(self, split: str) -> tuple[Selection, ...]:
        """A split's items in the parts in which they are scored."""
        return self.objective.blocks if split == self.objective.split else (self._problem.splits[split],)

    def _evaluate(self, plan: Plan, split: str, planning: float, race: Race | None = None) -> _Evaluation:
        """Scores a plan, made in `planning` seconds, part by part, until the split is done or the race is lost."""
        evaluation = _Evaluation(seconds={"plan": planning})
        stored = before = self.stored_scores(plan, split)
        earlier: Scores = self._store.load(plan.digest, KNOWN) or {}
        parts = self._parts(split)
        analysed_after = blocks_at_analyses(len(parts))
        for count, number in enumerate(self._block_order if race is not None else range(len(parts)), start=1):
            ids = item_ids(self._problem.tasks, parts[number])
            scores = take_items(stored, ids)
            free = {task: part for task in ids if (part := take_items(earlier, {task: ids[task]}))}
            charged = {task: chosen for task, chosen in parts[number].items() if task not in free}
            if scores is None:
                measured, stages = self._runner.scores(plan, charged) if charged else ({}, {})
                scores = {task: free[task][task] if task in free else measured[task] for task in ids}
                stored = join_items(stored, scores, self._positions)
                for stage, seconds in stages.items():
                    evaluation.seconds[stage] = evaluation.seconds.get(stage, 0.0) + seconds
            evaluation.scores = join_items(evaluation.scores, scores, self._positions)
            evaluation.items += selection_size(charged)
            if race is not None and count in analysed_after[:-1]:
                analysis = race.analyse(analysed_after.index(count), evaluation.scores)
                evaluation.analyses += [] if analysis is None else [analysis]
                if analysis is not None and analysis.stopped:
                    break
        if stored is not before:
            self._store.save(plan.digest, split, stored)
        return evaluation

    def _scores_at_analyses(self, scores: Scores) -> list[Scores]:
        """A full score as it is at every interim analysis of the generation."""
        seen: Scores = {}
        at_analyses = []
        for count, block in enumerate(self._block_order, start=1):
            of_block = take_items(scores, item_ids(self._problem.tasks, self.objective.blocks[block]))
            if of_block is None:
                raise ValueError("a candidate with a full score lacks items of a block")
            seen = join_items(seen, of_block, self._positions)
            if count in blocks_at_analyses(len(self._block_order)):
                at_analyses.append(seen)
        return at_analyses


def constraint_value(constraint: Constraint, own: Measurement, others: Mapping[str, Measurement]) -> ConstraintValue:
    """Compares what a model has with its limit.

    Args:
        constraint: The constraint.
        own: The model.
        others: Those that limits are relative to, on the same items.
    """
    model = constraint.limit.model
    value, limit = constraint.value(own), constraint.limit(0.0 if model is None else constraint.value(others[model]))
    return ConstraintValue(value, limit, constraint.limit.violation(value, limit))
