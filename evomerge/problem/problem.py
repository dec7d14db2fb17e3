"""Everything that a search works with, opened and checked once: models, tasks, splits, space, goals."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.compatible import open_compatible
from evomerge.checkpoints.dtypes import parse_dtype, torch_dtype
from evomerge.engine.resident import Resident
from evomerge.errors import BadInput, SpecError
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.scores import ItemScores
from evomerge.evaluation.splits import GUARD, SEARCH, TEST, Selection, split_items
from evomerge.evaluation.tasks.lm_eval_tasks import TaskSet, find_tasks
from evomerge.evaluation.tasks.task import Task
from evomerge.objective.fitness import Fitness
from evomerge.objective.goals import reported_goals, smooth_goals
from evomerge.objective.item_sampling import Sample
from evomerge.planning.layer_digests import depth_digests
from evomerge.planning.plan import Plan, make_plan
from evomerge.recipe import Recipe, parse_recipe
from evomerge.recipe.parse import single_model
from evomerge.space.build import build_space
from evomerge.space.space import SearchSpace
from evomerge.spec.schema import SearchSpec, Splits

STEER = "steer"
"""The search items that steer, where they are a part of the `search` split; that split itself otherwise."""

_DEPTHS = 256  # plans of which `Workbench.depths` is remembered


class Workbench:
    """What a specification names, ready to use.

    Attributes:
        spec: The specification.
        checkpoints: The base and the sources, by reference.
        evaluator: The tasks that steer and those that guard.
        selections: Split -> task -> positions of its items.
        space: The search space.
        goals: The goals on the raw scale, by the metrics that are reported.
        steering: The same goals by the metrics that steer: the smooth ones where the specification wants them.
        threads: Of the machine, for the run: what is rounded by their number is rounded by this one in every worker.

    Args:
        spec: The specification.
        threads: Of the run, where this process has only a share of them; None for all that torch has.
    """

    def __init__(self, spec: SearchSpec, threads: int | None = None) -> None:
        self.spec = spec
        self.threads = threads or torch.get_num_threads()
        with _Together() as found:  # a wrong model and a wrong metric are told in one go
            self.checkpoints: dict[str, Checkpoint] = found.of(open_compatible, spec.models.base, spec.models.sources)
            known: TaskSet = found.of(_find_tasks, spec)
            self.tasks: dict[str, Task] = found.of(lambda known: dict(known.tasks), known)
            self.goals: Fitness = found.of(_reported, spec, known)
            self.steering: Fitness = found.of(_steering, spec, self.tasks, self.goals)
            self.space: SearchSpace = found.of(make_space, spec, self.checkpoints)
        self.tokenizer = self.reference_model.load_tokenizer().loaded
        evaluation = spec.evaluation
        self.evaluator = Evaluator(
            self.tasks,
            self.tokenizer,
            self.reference_model.load_config(),
            batch_tokens=evaluation.batch_tokens,
            max_length=evaluation.max_length,
            apply_chat_template=evaluation.apply_chat_template,
            fewshot_as_multiturn=evaluation.fewshot_as_multiturn,
            system_instruction=evaluation.system_instruction,
            backend=evaluation.backend,
            reuse_prefixes=evaluation.reuse_prefixes,
            threads=self.threads,
        )
        self.selections = _selections(spec, self.evaluator, known)
        self.selections[STEER] = self.selections[SEARCH]
        self._resident: Resident | None = None
        self._depths: dict[str, tuple[str, ...]] = {}

    @property
    def reference_model(self) -> Checkpoint:
        """The model whose tokenizer and layout count: the base, or the first source."""
        models = self.spec.models
        return self.checkpoints[models.base or next(iter(models.sources.values()))]

    def look_at_items(self) -> list[str]:
        """Builds what the items of every split ask, so that what cannot be scored is found before a model is.

        Returns:
            What is worth a warning.

        Raises:
            TaskError: With every task that has an item that cannot be scored.
        """
        # What steers is some or all of the search items.
        chosen = [selection for split, selection in self.selections.items() if selection and split != STEER]
        tasks = dict.fromkeys(task for selection in chosen for task in selection)
        together = {task: tuple(k for selection in chosen for k in selection.get(task, ())) for task in tasks}
        return self.evaluator.check(together)

    def plan(self, recipe: Mapping[str, Any]) -> Plan:
        """Resolves a candidate's recipe."""
        return make_plan(self.recipe(recipe), self.checkpoints)

    def recipe(self, recipe: Mapping[str, Any]) -> Recipe:
        """A candidate's recipe as the engine reads it."""
        return parse_recipe(recipe, where="candidate")

    def sizes(self, plan: Plan) -> dict[str, int]:
        """How many layers and how many parameters a merged model has; a tied head counts once."""
        parameters = sum(math.prod(operation.shape) for operation in plan.operations)
        return {"layers": len(self.depths(plan)), "parameters": parameters}

    @cached_property
    def reference_sizes(self) -> dict[str, int]:
        """The same of the model that the sizes of merges are told in."""
        return self.sizes(self.plan(single_model(self.reference_model.reference)))

    def smallness(self, plan: Plan) -> dict[str, float]:
        """What is minimized beside the tasks, as objectives: how many times the size the reference model has."""
        sizes = self.sizes(plan)
        return {name: self.reference_sizes[name] / sizes[name] for name in self.spec.search.also_minimize}

    def steer_by(self, samples: Mapping[str, Sample]) -> None:
        """Lets a part of the search items steer."""
        places = {task: {item: k for k, item in enumerate(self.evaluator.items(task))} for task in samples}
        drawn = {task: tuple(places[task][item] for item in sample.items) for task, sample in samples.items()}
        self.selections[STEER] = {**self.selections[SEARCH], **drawn}

    def depths(self, plan: Plan) -> tuple[str, ...]:
        """For each layer the identity of the hidden states before it, worked out once for each of the latest plans."""
        if plan.digest not in self._depths:
            if len(self._depths) >= _DEPTHS:
                del self._depths[next(iter(self._depths))]
            self._depths[plan.digest] = depth_digests(plan)
        return self._depths[plan.digest]

    def measure(self, plan: Plan, selection: Selection) -> tuple[dict[str, ItemScores], dict[str, float]]:
        """Materialises a plan in memory and scores it on some items.

        Returns:
            Per-item scores by task, and the seconds that each stage took: materialise, score.

        Raises:
            CandidateError: When the merged model gives no finite scores.
        """
        started = time.perf_counter()
        model, _ = self.resident.write(plan)
        written = time.perf_counter()
        scores = self.evaluator.score(model, selection, self.depths(plan))
        return scores, {"materialise": written - started, "score": time.perf_counter() - written}

    def settle(self) -> None:
        """Has the reference model decide how models are scored, so that no candidate's turn does.

        Raises:
            CandidateError: When its logits are not finite.
        """
        model, _ = self.resident.write(self.plan(single_model(self.reference_model.reference)))
        self.evaluator.prepare(model)

    def release(self) -> None:
        """Gives back the live model's memory, until it is needed again."""
        self._resident = None

    @property
    def resident(self) -> Resident:
        """The live model, made on first use."""
        if self._resident is None:
            evaluation = self.spec.evaluation
            self._resident = Resident(self.checkpoints, torch_dtype(parse_dtype(evaluation.dtype)), evaluation.device)
        return self._resident

    def relative(self, fitness: Fitness, sources: Sequence[Mapping[str, ItemScores]]) -> Fitness:
        """The fitness on the scale that the specification asks for, given the sources' search scores."""
        return fitness.relative_to(sources) if self.spec.evaluation.scale == "relative" else fitness

    def environment(self) -> dict[str, Any]:
        """What the numbers depend on: content of models and data (may not change), versions and threads (may)."""
        packages = ("evomerge", "torch", "transformers", "lm_eval", "numpy", "optuna", "datasets", "tokenizers")
        return {
            "content": {
                "models": {reference: c.fingerprint for reference, c in self.checkpoints.items()},
                "items": {name: task.digest for name, task in self.tasks.items()},
            },
            "versions": {
                "python": platform.python_version(),
                "machine": platform.machine(),
                "threads": self.threads,
                **{package: importlib.metadata.version(package) for package in packages},
            },
        }


class _Together:
    """Carries out steps and raises what was wrong with any of them, once, at the end of a `with` block."""

    def __init__(self) -> None:
        self._errors: list[BadInput] = []

    def __enter__(self) -> _Together:
        return self

    def of(self, step: Callable[..., Any], *needs: Any) -> Any:
        """What a step returns; None when it fails, or when what it needs has failed."""
        if any(need is None for need in needs):
            return None
        try:
            return step(*needs)
        except BadInput as error:
            self._errors.append(error)
            return None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and len(self._errors) == 1:
            raise self._errors[0]
        if kind is None and self._errors:
            raise BadInput([problem for error in self._errors for problem in error.problems])


def make_space(spec: SearchSpec, checkpoints: Mapping[str, Checkpoint], *, outer: bool = True) -> SearchSpace:
    """The search space of a specification and its models' layout.

    Args:
        spec: The specification.
        checkpoints: The models, by reference.
        outer: Whether embeddings, final norm and head have genes of their own.

    Raises:
        SpecError: When a gene, a range or a layer group does not exist.
    """
    reference = checkpoints[spec.models.base or next(iter(spec.models.sources.values()))]
    layout = reference.layout
    if layout.main is None:
        found = ", ".join(stack.prefix for stack in layout.stacks) or "none"
        raise SpecError(f"models: a search needs one stack of layers; the models have: {found}")
    space = spec.space
    limits = {key: value for key, value in space.frankenmerge.model_dump().items() if value is not None}
    return build_space(
        base=spec.models.base,
        sources=spec.models.sources,
        layer_count=layout.layer_count,
        outer=layout.outer if outer else (),
        tensor_group_filters=tensor_group_filters(reference),
        methods=space.methods,
        method_scope=space.method_scope,
        layer_groups=space.layer_groups,
        tensor_groups=space.tensor_groups,
        gene_overrides={name: gene.model_dump() for name, gene in space.genes.items()},
        frankenmerge=limits,
        recipe_seed=spec.search.seed,
    )


def tensor_group_filters(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Substrings that pick the tensors of each group: a module's name where all its tensors are of one group."""
    layout = checkpoint.layout
    places = [layout.locate(name) for name in checkpoint.tensors]
    suffixes = {place.suffix: place.group for place in places if layout.main and place.stack == layout.main.prefix}
    groups_of: dict[str, set[str]] = {}
    for suffix, group in suffixes.items():
        groups_of.setdefault(suffix.split(".")[0], set()).add(group)
    filters: dict[str, list[str]] = {}
    for suffix, group in suffixes.items():
        module = suffix.split(".")[0]
        text = f".{module}." if len(groups_of[module]) == 1 else f".{suffix}"
        if text not in filters.setdefault(group, []):
            filters[group].append(text)
    return filters


def _find_tasks(spec: SearchSpec) -> TaskSet:
    """The tasks that steer and guard, as far as they can be loaded."""
    evaluation = spec.evaluation
    shots = {task.task: task.num_fewshot for task in evaluation.tasks}
    names = [task.task for task in evaluation.tasks] + evaluation.guard
    return find_tasks(names, include_path=evaluation.include_paths, num_fewshot=shots)


def _sizes(splits: Splits) -> dict[str, float | int]:
    return {name: int(size) if size > 1 else float(size) for name, size in splits.model_dump().items()}


def _selections(spec: SearchSpec, evaluator: Evaluator, known: TaskSet) -> dict[str, Selection]:
    """The items of each split. Guard tasks are read whole, as far as the test split's size goes."""
    evaluation = spec.evaluation
    names = [name for task in evaluation.tasks for name in known.members[task.task]]
    per_task = {name: _sizes(t.splits) for t in evaluation.tasks if t.splits for name in known.members[t.task]}
    items = {name: evaluator.items(name) for name in names}
    drawn: dict[str, Selection] = dict(split_items(items, _sizes(evaluation.splits), spec.search.seed, per_task))
    size = _sizes(evaluation.splits)[TEST]
    guarding = [name for guard in evaluation.guard for name in known.members[guard]]
    guards = {name: evaluator.items(name) for name in guarding}
    sized = {name: {GUARD: min(size, len(ids)) if isinstance(size, int) else size} for name, ids in guards.items()}
    drawn[GUARD] = split_items(guards, {GUARD: size}, spec.search.seed, sized).get(GUARD, {}) if guards else {}
    return drawn


def _reported(spec: SearchSpec, known: TaskSet) -> Fitness:
    return Fitness(reported_goals(spec.evaluation, known.tasks, known.members, known.problems))


def _steering(spec: SearchSpec, tasks: Mapping[str, Task], goals: Fitness) -> Fitness:
    """The goals by the metrics that steer."""
    return goals if spec.evaluation.fitness == "metric" else Fitness(smooth_goals(goals.goals, tasks))
