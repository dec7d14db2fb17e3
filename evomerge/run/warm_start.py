"""Generation 0 of a warm start: the baselines, and what other runs and recipes have to offer."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import BadInput, SpecError
from evomerge.methods.registry import get_method
from evomerge.recipe import Recipe, load_recipe, parse_recipe
from evomerge.run.folder import RunFolder
from evomerge.space.baselines import Start, baselines
from evomerge.space.decode import decode, recipe_hash, why_invalid
from evomerge.space.genes import REST, layer_groups
from evomerge.space.space import SearchSpace
from evomerge.space.transfer import Place, Shape, of_genome, of_recipe
from evomerge.spec.schema import SearchSpec
from evomerge.study.candidate import Candidate
from evomerge.study.ranking import ranked

if TYPE_CHECKING:
    from evomerge.problem.problem import Workbench

WHERE = "search.warm_start"


AS_MANY = 8
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
    known = [*([spec.models.base] if spec.models.base else []), *spec.models.sources.values()]
    unknown = [model for model in recipe.models() if model not in known]
    if unknown:
        raise SpecError(f"{path}: names {', '.join(unknown)}, which this search does not have ({', '.join(known)})")
    return Seed(path, recipe=recipe)


def _read_run(spec: SearchSpec, path: Path) -> Seed:
    folder = RunFolder.existing(path)
    if not same_names(folder.spec, spec):
        theirs, ours = ", ".join(folder.spec.models.sources), ", ".join(spec.models.sources)
        raise SpecError(f"{path}: has no source in common with this search: {theirs} there, {ours} here")
    known = folder.candidates()
    order = ranked(known)
    if not order:
        raise SpecError(f"{path}: no candidate of that run has been scored")
    winner = folder.winner(known)
    first = [candidate for candidate in order if candidate.number == winner]
    best = [*first, *(candidate for candidate in order if candidate.number != winner)]
    return Seed(path, spec=folder.spec, candidates=tuple(best))


def same_names(theirs: SearchSpec, ours: SearchSpec) -> dict[str, str]:
    """The sources that two searches have in common, their names there and here: the same model, or the same name."""
    by_reference = {reference: name for name, reference in ours.models.sources.items()}
    found = {name: by_reference[ref] for name, ref in theirs.models.sources.items() if ref in by_reference}
    taken = set(found.values())
    names = [name for name in theirs.models.sources if name in ours.models.sources]
    return found | {name: name for name in names if name not in found and name not in taken}


def warm_starts(bench: Workbench) -> tuple[Start, ...]:
    """Generation 0: the baselines, then each seed in the order of the specification, every recipe once.

    Of a run, the best that are not there yet, `AS_MANY`.

    Raises:
        SpecError: As `read_seeds`; and for a recipe that cannot be carried out, or a run that does not fit.
    """
    starts = {recipe_hash(start.recipe): start for start in baselines(bench.space)}
    problems: list[str] = []
    for seed in read_seeds(bench.spec):
        try:
            found = _of_recipe_file(bench, seed) if seed.recipe is not None else _of_run(bench, seed, starts)
        except BadInput as error:
            problems += [f"{WHERE}: {seed.path}: {problem}" for problem in error.problems]
            continue
        for start in found:
            starts.setdefault(recipe_hash(start.recipe), start)
    if problems:
        raise SpecError(problems)
    return tuple(starts.values())


def _places(bench: Workbench) -> list[Place]:
    """The tensors of the models, with their layer in the stack that is searched."""
    model = bench.reference_model
    main = model.layout.main
    found: list[Place] = []
    for name in model.tensors:
        where = model.layout.locate(name)
        found.append((name, where.layer if main is not None and where.stack == main.prefix else None))
    return found


def _of_recipe_file(bench: Workbench, seed: Seed) -> list[Start]:
    if seed.recipe is None:
        return []
    recipe = seed.recipe.to_mapping()
    bench.plan(recipe)  # whether it can be carried out
    return [Start(f"seed: {seed.path.name}", recipe, of_recipe(bench.space, seed.recipe, _places(bench)))]


def _of_run(bench: Workbench, seed: Seed, known: Container[str]) -> list[Start]:
    """The best candidates of a run whose recipes are not known yet, `AS_MANY` at most."""
    if seed.spec is None:
        return []
    names = same_names(seed.spec, bench.spec)
    shape = _shape(seed.spec, bench.space)
    starts: dict[str, Start] = {}
    said = False
    for candidate in seed.candidates:
        start = _of_candidate(bench, seed.spec, shape, names, candidate, f"seed: {seed.path.name} #{candidate.number}")
        said = said or start is not None
        if start is not None and recipe_hash(start.recipe) not in known:
            starts.setdefault(recipe_hash(start.recipe), start)
        if len(starts) >= AS_MANY:
            break
    if not said:
        raise SpecError(f"nothing of its {len(seed.candidates)} candidates can be said in this space")
    return list(starts.values())


def _of_candidate(
    bench: Workbench, theirs: SearchSpec, shape: Shape, names: Mapping[str, str], candidate: Candidate, name: str
) -> Start | None:
    """One candidate here: of generation 0 the exact recipe, which need not be in either space; else its genome's."""
    space = bench.space
    if candidate.generation == 0:
        exact = _translated(candidate.recipe, theirs, bench.spec, names)
        if exact is not None:
            bench.plan(exact)  # whether it can be carried out
            return Start(name, exact, of_recipe(space, parse_recipe(exact, where=name), _places(bench)))
    genome = of_genome(space, candidate.genome, shape, names)
    if genome is None or why_invalid(space, genome) is not None:
        return None
    return Start(name, decode(space, genome), genome)


def _shape(spec: SearchSpec, space: SearchSpace) -> Shape:
    """How the other search lays its genes over models of as many layers as these.

    Raises:
        SpecError: When its groups do not fit so many layers.
    """
    names = [name for name in spec.space.tensor_groups or () if name != REST]
    return Shape(
        layer_groups(spec.space.layer_groups, space.layer_count),
        isinstance(spec.space.layer_groups, Mapping),
        (*names, REST) if spec.space.tensor_groups else (),
        get_method(spec.space.methods[0]).name,
    )


def _translated(
    recipe: Mapping[str, Any], theirs: SearchSpec, ours: SearchSpec, names: Mapping[str, str]
) -> dict[str, Any] | None:
    """A recipe with the models' references of this search; None where it has a model that is not here."""
    here = {theirs.models.sources[other]: ours.models.sources[mine] for other, mine in names.items()}
    if theirs.models.base is not None and ours.models.base is not None:
        here[theirs.models.base] = ours.models.base
    if not set(parse_recipe(recipe).models()) <= set(here):
        return None

    def moved(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: moved(entry, name) for name, entry in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [moved(entry) for entry in value]
        return here[value] if key in ("model", "base_model") else value

    return dict(moved(recipe))
