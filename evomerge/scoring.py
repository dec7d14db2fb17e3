"""Scores recipes on splits, and proposals for the search; what was measured once is read back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evomerge.errors import CandidateError, EvoMergeError, RecipeError
from evomerge.evaluation.scores import ItemScores, score_table, table_to_json
from evomerge.fitness import Fitness
from evomerge.models import single_model
from evomerge.search import Outcome, Proposal
from evomerge.workbench import SEARCH, Workbench

if TYPE_CHECKING:
    from evomerge.display import Display
    from evomerge.runfolder import RunFolder


class Scorer:
    """Scores proposals; what was measured once is read back.

    Attributes:
        fitness: What steers.
        reported: What the result is told in: the same goals by the metrics that were asked for.

    Args:
        bench: Models, tasks and splits.
        folder: Where per-item scores are kept.
    """

    def __init__(self, bench: Workbench, folder: RunFolder) -> None:
        self._bench = bench
        self._folder = folder
        self.fitness: Fitness = bench.steering
        self.reported: Fitness = bench.goals

    def settle_references(self, display: Display) -> None:
        """Scores the sources on the search items, which fixes the relative scale."""
        if self._bench.spec.evaluation.scale == "raw":
            return
        sources = []
        for name, reference in self._bench.spec.models.sources.items():
            display.say(f"scoring {name}, for the relative scale")
            try:
                sources.append(self.scores(single_model(reference), SEARCH)[0])
            except CandidateError as error:
                raise EvoMergeError(f"models.sources.{name}: cannot be scored: {error}") from error
        self.fitness = self._bench.relative(self._bench.steering, sources)
        self.reported = self._bench.relative(self._bench.goals, sources)

    def scores(self, recipe: Mapping[str, Any], split: str) -> tuple[Mapping[str, ItemScores], Mapping[str, float]]:
        """Per-item scores of a recipe on a split, and the seconds they cost (none when they were kept)."""
        started = time.perf_counter()
        plan = self._bench.plan(recipe)
        seconds = {"plan": time.perf_counter() - started}
        kept = self._folder.scores(plan.digest, split)
        if kept is not None:
            return kept, seconds
        scores, stages = self._bench.measure(plan, split)
        self._folder.write_scores(plan.digest, split, scores)
        return scores, seconds | stages

    def __call__(self, proposal: Proposal) -> Outcome:
        """Scores one proposal on the search items; a candidate's own failure is an outcome, not an error."""
        try:
            scores, seconds = self.scores(proposal.recipe, SEARCH)
        except CandidateError as error:
            return Outcome(None, state="failed", failure=f"not scored: {error}")
        except RecipeError as error:
            return Outcome(None, state="failed", failure=f"impossible recipe: {error}")
        except MemoryError:
            return Outcome(None, state="failed", failure="out of memory: the model could not be materialised or scored")
        table = {SEARCH: table_to_json(score_table(scores))}
        return Outcome(self.fitness(scores), scores=table, seconds=dict(seconds))
