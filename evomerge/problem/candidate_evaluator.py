"""Scores recipes on splits, and proposals for the search; what was measured once is read back."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from evomerge.errors import BadInput, CandidateError, EvoMergeError, OutputError, RecipeError
from evomerge.evaluation.scores import ItemScores, score_table, table_to_json
from evomerge.evaluation.splits import SEARCH, Selection
from evomerge.objective.fitness import Fitness, Scores
from evomerge.objective.item_sampling import Sample, draw_samples
from evomerge.objective.racing import (
    CONTROLS,
    CUTOFF_RANK,
    InterimAnalysis,
    Race,
    block_order,
    blocks_at_analyses,
    draw_blocks,
)
from evomerge.planning.plan import Plan
from evomerge.problem.fitness_gradients import COST, fitness_slopes, sample
from evomerge.problem.model_runner import Measurer, joined, size, taken
from evomerge.problem.planner import Planner
from evomerge.problem.problem import STEER, Workbench
from evomerge.recipe.parse import single_model
from evomerge.space.baselines import baselines
from evomerge.space.decode import decode, why_invalid
from evomerge.space.genome import Genome
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.study.interfaces import Tracker
from evomerge.study.ranking import ranked
from evomerge.system.arrays import FloatArray

if TYPE_CHECKING:
    from evomerge.run.folder import RunFolder


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rivals:
    """What a race has to know of a history.

    Attributes:
        leaders: Number, recipe_hash and recipe of the best candidates with a full score, best first.
        generation: The generation that races.
    """

    leaders: tuple[tuple[int, str, Mapping[str, Any]], ...]
    generation: int


@dataclass
class _Measured:
    """What is known of a recipe on a split: its scores, on how many items, in how many seconds by stage, and what a
    race saw, block by block."""

    scores: Scores = field(default_factory=dict)
    items: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    looks: list[InterimAnalysis] = field(default_factory=list)


class Scorer:
    """Scores proposals; what was measured once is read back.

    The items of a split are scored in parts, the same for every candidate: one part, or with racing several blocks of
    the items that steer.

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
        self._planner = Planner(bench)
        self._measurer = Measurer(bench)
        self._parts: dict[str, tuple[Selection, ...]] = {split: (part,) for split, part in bench.selections.items()}
        self._order = {task: {item: k for k, item in enumerate(bench.evaluator.items(task))} for task in bench.tasks}
        self._race: Race | None = None
        self._blocks: tuple[int, ...] = ()  # the order in which the generation sees the blocks
        self._full: dict[str, Scores] = {}  # the full scores that it races against, by recipe_hash
        self._rivals: Rivals | None = None
        self.fitness: Fitness = bench.steering
        self.reported: Fitness = bench.goals
        self.samples: Mapping[str, Sample] = {}

    @property
    def reused(self) -> int:
        """Item evaluations that came from the user's cache."""
        return self._measurer.reused

    def items(self, candidate: Candidate) -> FloatArray | None:
        """What each item that steers says for a candidate, as `Fitness.by_item`; None if it was not scored on all."""
        if candidate.state != "done":
            return None
        scores, _ = self.scores(candidate.recipe, self._steering)
        return self.fitness.by_item(scores)

    @property
    def _steering(self) -> str:
        """The split that steers."""
        return STEER if self.samples else SEARCH

    def settle(self, tracker: Tracker) -> None:
        """Settles what every candidate is measured by: the sources' scores, the items that steer, a race's blocks."""
        evaluation = self._bench.spec.evaluation
        goals = zip(self.reported.goals, self.fitness.goals, strict=True)
        if changed := {f"{by.metric} in place of {asked.metric}": None for asked, by in goals if by != asked}:
            tracker.report(f"what steers is {', '.join(changed)}; the result will be told in what was asked for")
        racing = evaluation.racing and not self._bench.spec.objectives
        if evaluation.racing != racing:
            tracker.report("no racing: with several objectives, no one number says who cannot catch up any more")
        if racing and evaluation.informative is None:  # first, so that the sources are scored by blocks too
            self._settle_racing(tracker)
        if evaluation.scale == "relative":
            sources = [
                self._reference(f"models.sources.{name}", single_model(reference), tracker)
                for name, reference in self._bench.spec.models.sources.items()
            ]
            self.fitness = self._bench.relative(self._bench.steering, sources)
            self.reported = self._bench.relative(self._bench.goals, sources)
        if evaluation.informative is not None:
            self._settle_informative(evaluation.informative, tracker)
            if racing:
                self._settle_racing(tracker)

    def _settle_informative(self, fraction: float, tracker: Tracker) -> None:
        """Draws the items that steer, from what generation 0 does on all of them."""
        scouts = []
        for start in baselines(self._bench.space):
            tracker.report(f"scoring {start.name} on all search items, to see which of them tell candidates apart")
            try:
                scouts.append(self.scores(start.recipe, SEARCH)[0])
            except (CandidateError, RecipeError) as error:
                tracker.report(f"{start.name} is left out: {error}")
        if not scouts:
            raise EvoMergeError(f"{self._folder.root}: no candidate of generation 0 could be scored")
        smooth = {goal.task: self._bench.tasks[goal.task].smooth_metric(goal.metric) for goal in self.fitness.goals}
        seed = self._bench.spec.search.seed
        kept = self._folder.scores.load_samples()
        drawn = draw_samples(scouts, smooth, fraction, seed) if kept is None else None
        self.samples = drawn or {task: Sample.from_json(sample) for task, sample in (kept or {}).items()}
        self._folder.scores.save_samples({task: sample.to_json() for task, sample in self.samples.items()})
        self._bench.steer_by(self.samples)
        self._parts[STEER] = (self._bench.selections[STEER],)
        weights = {t: dict(zip(s.items, s.weights, strict=True)) for t, s in self.samples.items()}
        self.fitness = replace(self.fitness, items=weights)
        told = (f"{task} {len(s.items)} of {sum(n for n, _ in s.strata)}" for task, s in self.samples.items())
        tracker.report(f"the items that tell candidates apart steer: {', '.join(told)}")

    def _reference(self, name: str, recipe: Mapping[str, Any], tracker: Tracker) -> Mapping[str, ItemScores]:
        tracker.report(f"scoring {name} on the search items")
        try:
            return self.scores(recipe, SEARCH)[0]
        except CandidateError as error:
            raise EvoMergeError(f"{name}: cannot be scored: {error}") from error

    def _settle_racing(self, tracker: Tracker) -> None:
        """Cuts the items that steer into blocks, if candidates can be compared on part of them."""
        spec = self._bench.spec
        blocks = draw_blocks(self._bench.selections[self._steering], spec.search.seed)
        if len(blocks) == 1:
            tracker.report("no racing: a task has too few items that steer for blocks")
            return
        plan = self._bench.plan(single_model(next(iter(spec.models.sources.values()))))
        kept = taken(self._kept(plan, self._steering), self._measurer.items(blocks[0]))
        try:
            seen = kept or self._measurer(plan, blocks[0])[0]
        except CandidateError as error:
            tracker.report(f"no racing: the first source cannot be scored: {error}")
            return
        # Where all search items steer, what is reported of them is put together from the blocks too.
        goals = [*self.fitness.goals, *(() if self.samples else self.reported.goals)]
        whole = dict.fromkeys(f"{g.task} {g.metric}" for g in goals if not seen[g.task].is_itemwise(g.metric))
        if whole:
            tracker.report(
                f"no racing: {', '.join(whole)} is no mean or ratio of items, so a part of them says nothing"
            )
            return
        self._parts[self._steering] = blocks
        if kept is None:
            self._folder.scores.save(plan.digest, self._steering, seen)
        sizes = dict.fromkeys(str(size(block)) for block in blocks)
        tracker.report(f"racing: the items that steer come in {len(blocks)} blocks of {' or '.join(sizes)}")

    def arrange(self, proposals: Sequence[Proposal]) -> list[int]:
        """The order in which a generation costs least; the scores are the same bits in any."""
        return self._planner.arrange(proposals)

    def before_generation(self, history: tuple[Candidate, ...]) -> None:
        """Freezes whom a generation races against: nothing that happens in it changes that."""
        self.race_against(self.rivals(history))

    def rivals(self, history: tuple[Candidate, ...]) -> Rivals | None:
        """Whom to race against, given this history; None for nobody."""
        leaders = ranked(history)[:CONTROLS]
        if not leaders or len(self._parts[self._steering]) == 1:
            return None
        generation = 1 + max(candidate.generation for candidate in history)
        return Rivals(tuple((c.number, c.recipe_hash, c.recipe) for c in leaders), generation)

    def race_against(self, rivals: Rivals | None) -> None:
        """Has the next proposals race against these candidates, until others are named."""
        if rivals == self._rivals:
            return
        self._race, self._rivals = None, rivals
        if rivals is None:
            return
        known, self._full = self._full, {}
        for _, recipe_hash, recipe in rivals.leaders:
            self._full[recipe_hash] = known.get(recipe_hash) or self.scores(recipe, self._steering)[0]
        self._blocks = block_order(len(self._parts[self._steering]), self._bench.spec.search.seed, rivals.generation)
        looks = {number: self._looks(self._full[recipe_hash]) for number, recipe_hash, _ in rivals.leaders}
        cutoff, _, _ = rivals.leaders[min(CUTOFF_RANK, len(rivals.leaders)) - 1]
        self._race = Race.against(self.fitness, cutoff, looks)

    def _looks(self, scores: Scores) -> list[Scores]:
        """A full score as it is at every look of the generation."""
        seen: Scores = {}
        looks = []
        for count, block in enumerate(self._blocks, start=1):
            piece = taken(scores, self._measurer.items(self._parts[self._steering][block]))
            if piece is None:
                raise ValueError("a candidate with a full score lacks items of a block")
            seen = joined(seen, piece, self._order)
            if count in blocks_at_analyses(len(self._blocks)):
                looks.append(seen)
        return looks

    def scores(self, recipe: Mapping[str, Any], split: str) -> tuple[Scores, Mapping[str, float]]:
        """Per-item scores of a recipe on a whole split, and the seconds they cost (hardly any when they were kept)."""
        started = time.perf_counter()
        plan = self._bench.plan(recipe)
        measured = self._measure(plan, split, time.perf_counter() - started)
        return measured.scores, measured.seconds

    def _measure(self, plan: Plan, split: str, planning: float, race: Race | None = None) -> _Measured:
        """Scores a plan, made in `planning` seconds, part by part, until the split is done or the race is lost."""
        measured = _Measured(seconds={"plan": planning})
        kept = before = self._kept(plan, split)
        parts = self._parts[split]
        looks = blocks_at_analyses(len(parts))
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
                look = race.analyse(looks.index(count), measured.scores)
                measured.looks += [] if look is None else [look]
                if look is not None and look.stopped:
                    break
        if kept is not before:
            self._folder.scores.save(plan.digest, split, kept)
        return measured

    def _kept(self, plan: Plan, split: str) -> Scores:
        """What the run's folder has of a plan's scores on a split: all, some, or none."""
        kept: Scores | None = self._folder.scores.load(plan.digest, split)
        if kept is None and split == STEER and (whole := self._folder.scores.load(plan.digest, SEARCH)) is not None:
            kept = taken(whole, self._measurer.items(self._bench.selections[STEER]))
        return kept or {}

    def slopes(self, candidate: Candidate) -> Mapping[str, float] | None:
        """How the fitness changes with each real gene of a candidate, by name, in units of the gene.

        They are those of its genome, which for some of generation 0 is only the nearest to its recipe. None for a
        candidate without a full score, and where there is no derivative (`fitness_slopes`). Worked out once in a run
        and kept.
        """
        if candidate.state != "done":
            return None
        plan = self._bench.plan(candidate.recipe)
        known = self._folder.scores.load_gradients(plan.digest)
        if known is None:
            try:
                known = (self._find_slopes(candidate.genome),)
            except (OutputError, BadInput):
                raise  # the run's trouble, not the candidate's
            except Exception:
                log.warning("no slopes of candidate %d", candidate.number, exc_info=True)
                known = (None,)
            self._folder.scores.save_gradients(plan.digest, known[0])
        return known[0]

    def _find_slopes(self, genome: Genome) -> Mapping[str, float] | None:
        if why_invalid(self._bench.space, genome) is not None:
            return None
        try:  # scored already, but for a baseline that the space says in other words, or only nearly
            plan = self._bench.plan(decode(self._bench.space, genome))
            scores = self._measure(plan, self._steering, planning=0.0).scores
        except CandidateError:
            return None
        selection = self._bench.selections[self._steering]
        places = sample(selection, plan.digest)
        return fitness_slopes(self._bench, self.fitness, selection, genome, scores, places)

    @property
    def gradient_items(self) -> int:
        """What `slopes` costs when asked first, in item evaluations."""
        return round(COST * size(sample(self._bench.selections[self._steering], "")))

    def __call__(self, proposal: Proposal) -> Outcome:
        """Scores one proposal on the search items; a candidate's own failure is an outcome, not an error."""
        race = self._race
        try:
            plan, planning = self._planner(proposal)
            measured = self._measure(plan, self._steering, planning, race)
        except CandidateError as error:
            return Outcome(None, state="failed", failure=f"not scored: {error}")
        except RecipeError as error:
            return Outcome(None, state="failed", failure=f"impossible recipe: {error}")
        except MemoryError:
            return Outcome(None, state="failed", failure="out of memory: the model could not be materialised or scored")
        table = {SEARCH: table_to_json(score_table(self.fitness.weighted(measured.scores)))}
        estimates = {look.items: look.estimate for look in measured.looks}
        if race is not None and measured.looks and measured.looks[-1].stopped:
            last = measured.looks[-1]
            return Outcome(last.estimate, table, "pruned", race.reason(last), measured.seconds, estimates=estimates)
        fitness = self.fitness(measured.scores)
        return Outcome(
            fitness,
            table,
            seconds=measured.seconds,
            objectives=self._objectives(plan, measured.scores),
            estimates={**estimates, measured.items: fitness},
        )

    def _objectives(self, plan: Plan, scores: Scores) -> tuple[float, ...] | None:
        """One value per objective, higher is better; None where there is one, which is the fitness."""
        if not self._bench.spec.objectives:
            return None
        return (*self.fitness.objectives(scores).values(), *self._bench.smallness(plan).values())
