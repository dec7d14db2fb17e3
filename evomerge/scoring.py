"""Scores recipes on splits, and proposals for the search; what was measured once is read back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evomerge.errors import CandidateError, EvoMergeError, RecipeError
from evomerge.evaluation.scores import score_table, table_to_json
from evomerge.fitness import Fitness, Scores
from evomerge.measuring import Measurer, joined, size, taken
from evomerge.models import single_model
from evomerge.racing import CONTROLS, PLACE, Look, Race, block_order, draw_blocks, look_after
from evomerge.search import Candidate, Outcome, Proposal, ranked
from evomerge.workbench import SEARCH, Selection, Workbench

if TYPE_CHECKING:
    from evomerge.display import Display
    from evomerge.runfolder import RunFolder


@dataclass
class _Measured:
    """What is known of a recipe on a split: its scores, on how many items, in how many seconds by stage, and what a
    race saw, block by block."""

    scores: Scores = field(default_factory=dict)
    items: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)


class Scorer:
    """Scores proposals; what was measured once is read back.

    The items of a split are scored in parts, the same for every candidate: one part, or with racing several blocks of
    the search items.

    Args:
        bench: Models, tasks and splits.
        folder: Where per-item scores are kept.
    """

    def __init__(self, bench: Workbench, folder: RunFolder) -> None:
        self._bench = bench
        self._folder = folder
        self._measurer = Measurer(bench)
        self._parts: dict[str, tuple[Selection, ...]] = {split: (part,) for split, part in bench.selections.items()}
        self._order = {task: {item: k for k, item in enumerate(bench.evaluator.items(task))} for task in bench.tasks}
        self._race: Race | None = None
        self._blocks: tuple[int, ...] = ()  # the order in which the generation sees the blocks
        self._full: dict[str, Scores] = {}  # the full scores that it races against, by phenotype
        self.fitness: Fitness = bench.goals

    @property
    def reused(self) -> int:
        """Item evaluations that came from the user's cache."""
        return self._measurer.reused

    def settle(self, display: Display) -> None:
        """Settles what every candidate is measured by: the blocks of a race, and the sources for the relative scale."""
        if self._bench.spec.evaluation.racing:
            self._settle_racing(display)
        if self._bench.spec.evaluation.scale == "raw":
            return
        sources = []
        for name, reference in self._bench.spec.models.sources.items():
            display.say(f"scoring {name}, for the relative scale")
            try:
                sources.append(self.scores(single_model(reference), SEARCH)[0])
            except CandidateError as error:
                raise EvoMergeError(f"models.sources.{name}: cannot be scored: {error}") from error
        self.fitness = self._bench.relative(self._bench.goals, sources)

    def _settle_racing(self, display: Display) -> None:
        """Cuts the search items into blocks, if candidates can be compared on part of them."""
        spec = self._bench.spec
        blocks = draw_blocks(self._bench.selections[SEARCH], spec.search.seed)
        if len(blocks) == 1:
            display.say("no racing: a task has too few search items for blocks")
            return
        plan = self._bench.plan(single_model(next(iter(spec.models.sources.values()))))
        kept = self._folder.scores(plan.digest, SEARCH)
        try:
            seen = (kept and taken(kept, self._measurer.items(blocks[0]))) or self._measurer(plan, blocks[0])[0]
        except CandidateError as error:
            display.say(f"no racing: the first source cannot be scored: {error}")
            return
        whole = [f"{g.task} {g.metric}" for g in self._bench.goals.goals if not seen[g.task].raceable(g.metric)]
        if whole:
            display.say(f"no racing: {', '.join(whole)} is no mean or ratio of items, so a part of them says nothing")
            return
        self._parts[SEARCH] = blocks
        sizes = dict.fromkeys(str(size(block)) for block in blocks)
        display.say(f"racing: the search items come in {len(blocks)} blocks of {' or '.join(sizes)}")

    def before_generation(self, history: tuple[Candidate, ...]) -> None:
        """Freezes whom a generation races against: nothing that happens in it changes that."""
        self._race = None
        leaders = ranked(history)[:CONTROLS]
        if not leaders or len(self._parts[SEARCH]) == 1:
            return
        rival = leaders[min(PLACE, len(leaders)) - 1]
        known, self._full = self._full, {}
        for leader in leaders:
            self._full[leader.phenotype] = known.get(leader.phenotype) or self.scores(leader.recipe, SEARCH)[0]
        generation = 1 + max(candidate.generation for candidate in history)
        self._blocks = block_order(len(self._parts[SEARCH]), self._bench.spec.search.seed, generation)
        looks = {c.number: self._looks(self._full[c.phenotype]) for c in leaders}
        self._race = Race.against(self.fitness, rival.number, looks)

    def _looks(self, scores: Scores) -> list[Scores]:
        """A full score as it is at every look of the generation."""
        seen: Scores = {}
        looks = []
        for count, block in enumerate(self._blocks, start=1):
            piece = taken(scores, self._measurer.items(self._parts[SEARCH][block]))
            if piece is None:
                raise ValueError("a candidate with a full score lacks items of a block")
            seen = joined(seen, piece, self._order)
            if count in look_after(len(self._blocks)):
                looks.append(seen)
        return looks

    def scores(self, recipe: Mapping[str, Any], split: str) -> tuple[Scores, Mapping[str, float]]:
        """Per-item scores of a recipe on a whole split, and the seconds they cost (hardly any when they were kept)."""
        measured = self._measure(recipe, split)
        return measured.scores, measured.seconds

    def _measure(self, recipe: Mapping[str, Any], split: str, race: Race | None = None) -> _Measured:
        """Scores a recipe part by part, until the split is done or the race is lost."""
        started = time.perf_counter()
        plan = self._bench.plan(recipe)
        measured = _Measured(seconds={"plan": time.perf_counter() - started})
        kept: Scores = self._folder.scores(plan.digest, split) or {}
        before = kept
        parts = self._parts[split]
        looks = look_after(len(parts))
        for count, number in enumerate(self._blocks if race is not None else range(len(parts)), start=1):
            piece = taken(kept, self._measurer.items(parts[number]))
            if piece is None:
                piece, stages = self._measurer(plan, parts[number])
                kept = joined(kept, piece, self._order)
                for stage, seconds in stages.items():
                    measured.seconds[stage] = measured.seconds.get(stage, 0.0) + seconds
            measured.scores = joined(measured.scores, piece, self._order)
            measured.items += size(parts[number])
            if race is not None and count in looks[:-1]:
                look = race.look(looks.index(count), measured.scores)
                measured.looks += [] if look is None else [look]
                if look is not None and look.lost:
                    break
        if kept is not before:
            self._folder.write_scores(plan.digest, split, kept)
        return measured

    def __call__(self, proposal: Proposal) -> Outcome:
        """Scores one proposal on the search items; a candidate's own failure is an outcome, not an error."""
        race = self._race
        try:
            measured = self._measure(proposal.recipe, SEARCH, race)
        except CandidateError as error:
            return Outcome(None, state="failed", failure=f"not scored: {error}")
        except RecipeError as error:
            return Outcome(None, state="failed", failure=f"impossible recipe: {error}")
        except MemoryError:
            return Outcome(None, state="failed", failure="out of memory: the model could not be materialised or scored")
        table = {SEARCH: table_to_json(score_table(measured.scores))}
        estimates = {look.items: look.estimate for look in measured.looks}
        if race is not None and measured.looks and measured.looks[-1].lost:
            last = measured.looks[-1]
            return Outcome(last.estimate, table, "pruned", race.reason(last), measured.seconds, estimates=estimates)
        fitness = self.fitness(measured.scores)
        return Outcome(fitness, table, seconds=measured.seconds, estimates={**estimates, measured.items: fitness})
