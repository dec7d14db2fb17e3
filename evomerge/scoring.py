"""Scores recipes on splits, and proposals for the search; what was measured once is read back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evomerge.errors import CandidateError, EvoMergeError, RecipeError
from evomerge.evaluation.informative import Sample, draw_samples
from evomerge.evaluation.scores import ItemScores, score_table, table_to_json
from evomerge.fitness import Fitness
from evomerge.models import single_model
from evomerge.search import Outcome, Proposal
from evomerge.search.baselines import baselines
from evomerge.workbench import SEARCH, STEER, Workbench

if TYPE_CHECKING:
    from evomerge.display import Display
    from evomerge.runfolder import RunFolder


class Scorer:
    """Scores proposals; what was measured once is read back.

    Attributes:
        fitness: What steers.
        reported: What the result is told in: the same goals by the metrics that were asked for.
        samples: Task to the items that steer, where they are a part of the search items.

    Args:
        bench: Models, tasks and splits.
        folder: Where per-item scores are kept.
    """

    def __init__(self, bench: Workbench, folder: RunFolder) -> None:
        self._bench = bench
        self._folder = folder
        self.fitness: Fitness = bench.steering
        self.reported: Fitness = bench.goals
        self.samples: Mapping[str, Sample] = {}

    def settle_references(self, display: Display) -> None:
        """Scores the sources on the search items, which fixes the relative scale and what items can tell."""
        evaluation = self._bench.spec.evaluation
        if evaluation.scale == "relative":
            sources = [
                self._reference(f"models.sources.{name}", single_model(reference), display)
                for name, reference in self._bench.spec.models.sources.items()
            ]
            self.fitness = self._bench.relative(self._bench.steering, sources)
            self.reported = self._bench.relative(self._bench.goals, sources)
        if evaluation.informative is not None:
            self._settle_informative(evaluation.informative, display)

    def _settle_informative(self, fraction: float, display: Display) -> None:
        """Draws the items that steer, from what generation 0 does on all of them."""
        scouts = []
        for start in baselines(self._bench.space):
            display.say(f"scoring {start.name} on all search items, to see which of them tell candidates apart")
            try:
                scouts.append(self.scores(start.recipe, SEARCH)[0])
            except (CandidateError, RecipeError) as error:
                display.say(f"{start.name} is left out: {error}")
        if not scouts:
            raise EvoMergeError(f"{self._folder.root}: no candidate of generation 0 could be scored")
        smooth = {goal.task: self._bench.tasks[goal.task].smooth(goal.metric) for goal in self.fitness.goals}
        seed = self._bench.spec.search.seed
        self.samples = self._folder.samples() or draw_samples(scouts, smooth, fraction, seed)
        self._folder.write_samples(self.samples)
        self._bench.steer_by(self.samples)
        weights = {t: dict(zip(s.items, s.weights, strict=True)) for t, s in self.samples.items()}
        self.fitness = replace(self.fitness, items=weights)
        told = (f"{task} {len(s.items)} of {sum(n for n, _ in s.strata)}" for task, s in self.samples.items())
        display.say(f"the items that tell candidates apart steer: {', '.join(told)}")

    def _reference(self, name: str, recipe: Mapping[str, Any], display: Display) -> Mapping[str, ItemScores]:
        display.say(f"scoring {name} on the search items")
        try:
            return self.scores(recipe, SEARCH)[0]
        except CandidateError as error:
            raise EvoMergeError(f"{name}: cannot be scored: {error}") from error

    def scores(self, recipe: Mapping[str, Any], split: str) -> tuple[Mapping[str, ItemScores], Mapping[str, float]]:
        """Per-item scores of a recipe on a split, and the seconds they cost (none when they were kept)."""
        started = time.perf_counter()
        plan = self._bench.plan(recipe)
        seconds = {"plan": time.perf_counter() - started}
        kept = self._folder.scores(plan.digest, split)
        if kept is not None:
            return kept, seconds
        if split == STEER and (whole := self._folder.scores(plan.digest, SEARCH)) is not None:
            return self._bench.taken(whole, STEER), seconds
        scores, stages = self._bench.measure(plan, split)
        self._folder.write_scores(plan.digest, split, scores)
        return scores, seconds | stages

    def __call__(self, proposal: Proposal) -> Outcome:
        """Scores one proposal on the search items; a candidate's own failure is an outcome, not an error."""
        try:
            scores, seconds = self.scores(proposal.recipe, STEER if self.samples else SEARCH)
        except CandidateError as error:
            return Outcome(None, state="failed", failure=f"not scored: {error}")
        except RecipeError as error:
            return Outcome(None, state="failed", failure=f"impossible recipe: {error}")
        except MemoryError:
            return Outcome(None, state="failed", failure="out of memory: the model could not be materialised or scored")
        table = {SEARCH: table_to_json(score_table(self.fitness.weighed(scores)))}
        return Outcome(self.fitness(scores), scores=table, seconds=dict(seconds))
