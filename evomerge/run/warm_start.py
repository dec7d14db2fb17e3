"""Generation 0 of a warm start: the baselines, then candidates of other runs and recipes from files."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.errors import BadInput, RecipeError, SpecError
from evomerge.evaluation.score_store import RunScores
from evomerge.evaluation.scores import ItemScores, concatenate
from evomerge.evaluation.splits import SEARCH, SELECT, TEST
from evomerge.methods.registry import get_method
from evomerge.problem.candidate_evaluator import KNOWN
from evomerge.problem.model_runner import Runner
from evomerge.problem.problem import Problem
from evomerge.recipe import Recipe, load_recipe, parse_recipe
from evomerge.run.folder import RunFolder
from evomerge.space.baselines import Start, baselines, raced_last
from evomerge.space.decode import decode, recipe_hash, why_invalid
from evomerge.space.genes import REST, layer_groups
from evomerge.space.space import SearchSpace
from evomerge.space.transfer import SpaceLayout, TensorLayer, nearest_genome, transfer_genome
from evomerge.spec.schema import SearchSpec
from evomerge.study.candidate import Candidate, Outcome
from evomerge.study.ranking import best_first, ranked
from evomerge.study.rounds import winners_in

PlanRecipe = Callable[[Mapping[str, Any]], object]

KnownOutcome = Callable[[Candidate], Outcome | None]
"""What a candidate of another run comes to here, if that is known without scoring it."""

WHERE = "search.warm_start"

MAX_OF_A_RUN = 8
"""Candidates that are taken of a run."""


@dataclass(frozen=True)
class Seed:
    """One entry of `search.warm_start`, read.

    Attributes:
        path: The run folder or the recipe file.
        recipe: What the file says; None for a run.
        spec: The run's specification; None for a recipe.
        candidates: The run's candidates with a score: its winner, then the best first.
    """

    path: Path
    recipe: Recipe | None = None
    spec: SearchSpec | None = None
    candidates: tuple[Candidate, ...] = ()


def read_seeds(spec: SearchSpec) -> tuple[Seed, ...]:
    """Reads what a specification starts from; no model is opened.

    Raises:
        SpecError: With everything that is missing, no run and no recipe, or about other models.
    """
    seeds: list[Seed] = []
    problems: list[str] = []
    for text in spec.search.warm_starts:
        try:
            seeds.append(_read(spec, Path(text)))
        except BadInput as error:
            problems += [f"{WHERE}: {problem}" for problem in error.problems]
    if problems:
        raise SpecError(problems)
    return tuple(seeds)


def _read(spec: SearchSpec, path: Path) -> Seed:
    if path.is_dir():
        return _read_run(spec, path)
    if not path.exists():
        raise SpecError(f"no run folder and no recipe {path} beside the file, above it or in {Path.cwd()}")
    recipe = load_recipe(path)
    if recipe.steps or recipe.modules or recipe.asks_for_tokenizer:
        raise SpecError(f"{path}: a candidate is one merge with the models' tokenizer; no steps, modules or tokenizer")
    models = [*([spec.models.base] if spec.models.base else []), *spec.models.sources.values()]
    unknown = [model for model in recipe.models() if model not in models]
    if unknown:
        raise SpecError(f"{path}: names {', '.join(unknown)}, which this search does not have ({', '.join(models)})")
    return Seed(path, recipe=recipe)


def _read_run(spec: SearchSpec, path: Path) -> Seed:
    folder = RunFolder.existing(path)
    if not common_sources(folder.spec, spec):
        there, here = ", ".join(folder.spec.models.sources), ", ".join(spec.models.sources)
        raise SpecError(f"{path}: has no source in common with this search: {there} there, {here} here")
    candidates = folder.candidates()
    order = ranked(candidates)
    if not order:
        raise SpecError(f"{path}: no candidate of that run has been scored")
    winner = folder.winner(candidates)
    first = [candidate for candidate in order if candidate.number == winner]
    best = [*first, *(candidate for candidate in order if candidate.number != winner)]
    return Seed(path, spec=folder.spec, candidates=tuple(best))


def common_sources(there: SearchSpec, here: SearchSpec) -> dict[str, str]:
    """Returns the sources that two searches share, their names there and here: the same model, or the same name."""
    by_reference = {reference: name for name, reference in here.models.sources.items()}
    names = {name: by_reference[ref] for name, ref in there.models.sources.items() if ref in by_reference}
    taken = set(names.values())
    alike = [name for name in there.models.sources if name in here.models.sources]
    return names | {name: name for name in alike if name not in names and name not in taken}


def keep_known_scores(problem: Problem, runner: Runner, store: RunScores) -> None:
    """Takes over what other runs have measured of their candidates on items that are scored here too.

    Of the tasks that are the same, items and settings; nothing where models are scored in another way.
    """
    for seed in read_seeds(problem.spec):
        if seed.spec is None or _scoring(seed.spec) != _scoring(problem.spec):
            continue
        other, names = RunFolder.existing(seed.path), common_sources(seed.spec, problem.spec)
        items = other.environment().get("content", {}).get("items", {})
        tasks = [name for name, task in problem.tasks.items() if items.get(name) == task.digest]
        for candidate in seed.candidates:
            recipe = _translated(candidate.recipe, seed.spec, problem.spec, names)
            if recipe is None:
                continue
            try:
                digest = runner.plan(recipe).digest
            except RecipeError:
                continue
            parts = [other.scores.load(digest, split) or {} for split in (SEARCH, SELECT, TEST)]
            scores = {task: _together([part[task] for part in parts if task in part]) for task in tasks}
            if any(scores.values()):
                store.save(digest, KNOWN, {task: own for task, own in scores.items() if own is not None})


def _scoring(spec: SearchSpec) -> tuple[Any, ...]:
    """What the scores of a model depend on beside its weights and the items."""
    return spec.models.base, spec.models.tokenizer, spec.evaluation.model_dump(include=_SCORING)


_SCORING = {
    *("device", "dtype", "backend", "max_length", "apply_chat_template", "fewshot_as_multiturn"),
    *("system_instruction", "chat_template", "chat_template_args", "think_end_token"),
}


def _together(parts: Sequence[ItemScores]) -> ItemScores | None:
    """The scores of a task on disjoint sets of items; of metrics of the whole corpus only those of one set."""
    if any(part.corpus for part in parts):
        return parts[0]
    return concatenate(parts) if parts else None


def warm_starts(
    spec: SearchSpec,
    space: SearchSpace,
    reference: Checkpoint,
    plan: PlanRecipe,
    outcome: KnownOutcome | None = None,
) -> tuple[Start, ...]:
    """Collects generation 0: the baselines, then each seed in the order of the specification, every recipe once.

    Those that race come last. Of a run, the best that are not there yet, `MAX_OF_A_RUN`.

    Args:
        spec: The specification.
        space: Its search space.
        reference: The model whose layout counts.
        plan: Resolves a recipe, and raises where it cannot be carried out.
        outcome: Gives what is known of candidates here, which then says who is best; None for the order of their run.

    Raises:
        SpecError: As `read_seeds`; and for a recipe that cannot be carried out, or a run that does not fit.
    """
    target = _Target(spec, space, _tensors(reference), plan, outcome)
    starts = {recipe_hash(start.recipe): start for start in baselines(space)}
    problems: list[str] = []
    for seed in read_seeds(spec):
        try:
            more = [_of_recipe(target, seed)] if seed.recipe is not None else _of_run(target, seed, starts)
        except BadInput as error:
            problems += [f"{WHERE}: {seed.path}: {problem}" for problem in error.problems]
            continue
        for start in more:
            starts.setdefault(recipe_hash(start.recipe), start)
    if problems:
        raise SpecError(problems)
    return raced_last(starts.values())


@dataclass(frozen=True)
class _Target:
    """The search that is to begin."""

    spec: SearchSpec
    space: SearchSpace
    tensors: Sequence[TensorLayer]
    plan: PlanRecipe
    outcome: KnownOutcome | None = None


def _tensors(model: Checkpoint) -> list[TensorLayer]:
    """The tensors of the models, with their layer in the stack that is searched."""
    main = model.layout.main
    located = {name: model.layout.locate(name) for name in model.tensors}
    return [(name, at.layer if main is not None and at.stack == main.prefix else None) for name, at in located.items()]


def _of_recipe(target: _Target, seed: Seed) -> Start:
    """The start that a recipe's file gives."""
    if seed.recipe is None:
        raise ValueError(f"{seed.path} is no recipe")
    recipe = seed.recipe.to_mapping()
    target.plan(recipe)  # whether it can be carried out
    return Start(f"seed: {seed.path.name}", recipe, nearest_genome(target.space, seed.recipe, target.tensors))


def _of_run(target: _Target, seed: Seed, known_recipes: Container[str]) -> list[Start]:
    """The best candidates of a run whose recipes are new, `MAX_OF_A_RUN` at most."""
    if seed.spec is None:
        raise ValueError(f"{seed.path} is no run")
    names = common_sources(seed.spec, target.spec)
    shape = _shape(seed.spec, target.space)
    starts: dict[str, Start] = {}
    any_fits = False
    for candidate in _best_here(target, seed.spec, seed.candidates, names):
        start = _of_candidate(target, seed.spec, shape, names, candidate, f"seed: {seed.path.name} #{candidate.number}")
        any_fits = any_fits or start is not None
        if start is not None and recipe_hash(start.recipe) not in known_recipes:
            starts.setdefault(recipe_hash(start.recipe), start)
        if len(starts) >= MAX_OF_A_RUN:
            break
    if not any_fits:
        raise SpecError(f"nothing of its {len(seed.candidates)} candidates can be said in this space")
    return list(starts.values())


def _best_here(
    target: _Target, origin: SearchSpec, candidates: Sequence[Candidate], names: Mapping[str, str]
) -> Sequence[Candidate]:
    """The candidates by what is known of them here, best first, then the others as they come."""
    if target.outcome is None:
        return candidates
    scored: list[Candidate] = []
    for candidate in candidates:
        recipe = _translated(candidate.recipe, origin, target.spec, names)
        outcome = None if recipe is None else target.outcome(replace(candidate, recipe=recipe))
        if outcome is not None and outcome.fitness is not None:
            scored.append(Candidate.of(candidate, outcome))
    numbers = {candidate.number for candidate in scored}
    return [*best_first(scored), *(candidate for candidate in candidates if candidate.number not in numbers)]


def _of_candidate(
    target: _Target, origin: SearchSpec, shape: SpaceLayout, names: Mapping[str, str], candidate: Candidate, name: str
) -> Start | None:
    """One candidate here: of generation 0 the exact recipe, which need not be in either space; else its genome's."""
    space = target.space
    if winners_in(candidate.recipe):  # sources of a round, which are not here
        return None
    if candidate.generation == 0:
        exact = _translated(candidate.recipe, origin, target.spec, names)
        if exact is not None:
            target.plan(exact)  # whether it can be carried out
            return Start(name, exact, nearest_genome(space, parse_recipe(exact, where=name), target.tensors))
    genome = transfer_genome(space, candidate.genome, shape, names)
    if genome is None or why_invalid(space, genome) is not None:
        return None
    return Start(name, decode(space, genome), genome)


def _shape(spec: SearchSpec, space: SearchSpace) -> SpaceLayout:
    """How the other search lays its genes over models of as many layers as these.

    Raises:
        SpecError: When its groups do not fit so many layers.
    """
    names = [name for name in spec.space.tensor_groups or () if name != REST]
    return SpaceLayout(
        layer_groups(spec.space.layer_groups, space.layer_count),
        isinstance(spec.space.layer_groups, Mapping),
        (*names, REST) if spec.space.tensor_groups else (),
        get_method(spec.space.methods[0]).name,
    )


def _translated(
    recipe: Mapping[str, Any], origin: SearchSpec, target: SearchSpec, names: Mapping[str, str]
) -> dict[str, Any] | None:
    """A recipe with the models' references of this search; None where it has a model that is not here."""
    references = {origin.models.sources[name]: target.models.sources[own] for name, own in names.items()}
    if origin.models.base is not None and target.models.base is not None:
        references[origin.models.base] = target.models.base
    if not set(parse_recipe(recipe).models()) <= set(references):
        return None

    def translate(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: translate(entry, name) for name, entry in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [translate(entry) for entry in value]
        return references[value] if key in ("model", "base_model") else value

    return dict(translate(recipe))
