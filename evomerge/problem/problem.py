"""What a specification names, opened and checked: models, tasks, splits, goals and the search space."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoint, open_checkpoints
from evomerge.checkpoints.layout import Location
from evomerge.checkpoints.matching.compatible import check_compatible, not_finite
from evomerge.checkpoints.tokenizer import read_tokenizer, write_contents
from evomerge.errors import CheckpointError, ErrorCollector, SpecError, TaskError
from evomerge.evaluation.compute_dtype import fastest_dtype
from evomerge.evaluation.scorers.agreement import agreement_task
from evomerge.evaluation.scorers.chat_client import ChatClient, ChatOptions
from evomerge.evaluation.scorers.judge import Judge as JudgeScorer
from evomerge.evaluation.scorers.judge import JudgeOptions
from evomerge.evaluation.scorers.python_scorer import python_task, read_rows
from evomerge.evaluation.splits import GUARD, SEARCH, SELECT, TEST, Selection, split_items
from evomerge.evaluation.tasks.lm_eval_tasks import TaskSet, find_tasks, groups_as_tasks
from evomerge.evaluation.tasks.requests import read_template
from evomerge.evaluation.tasks.scorer_task import ScorerTask, item_digest
from evomerge.evaluation.tasks.task import Task
from evomerge.objective.constraints import Constraint, constraints_of, tokens_measure
from evomerge.objective.fitness import Fitness
from evomerge.objective.goals import reported_goals, smooth_goals
from evomerge.planning.vocabulary.align import Aligned, align_for_search, tokenizer_keys
from evomerge.planning.vocabulary.merged_tokenizer import WrittenTokenizer
from evomerge.problem.shuffled_sources import shuffled
from evomerge.space.build import build_space
from evomerge.space.genes import REST
from evomerge.space.space import SearchSpace
from evomerge.spec.schema import Evaluation, Judge, Measure, SearchSpec, Splits
from evomerge.system.files import cache_folder, read_text
from evomerge.system.hashing import digest

_PACKAGES = ("evomerge", "torch", "transformers", "lm_eval", "numpy", "optuna", "datasets", "tokenizers")


@dataclass(frozen=True, eq=False)
class Problem:
    """What a specification names, ready to use.

    Attributes:
        spec: The specification.
        checkpoints: The base and the sources, by reference.
        tasks: The tasks that count and those that guard, by name.
        splits: Split to its items.
        space: The search space.
        reported: The goals on the raw scale, by the metrics that are reported.
        steering: The same goals by the metrics that steer: the smooth ones where the specification wants them.
        constraints: What is limited.
        tokens: The tokens written an item, where they are minimized beside the tasks; None where not.
        tokenizer: Of every candidate: the reference model's, or the merged one.
        threads: Of the machine, for the run: what is rounded by their number is rounded by this one in every worker.
        merged_tokenizer: What is written beside the weights under `models.tokenizer`; None for the reference's files.
        notes: What was odd but possible about the models.
    """

    spec: SearchSpec
    checkpoints: Mapping[str, Checkpoint]
    tasks: Mapping[str, Task]
    splits: Mapping[str, Selection]
    space: SearchSpace
    reported: Fitness
    steering: Fitness
    constraints: tuple[Constraint, ...]
    tokens: Fitness | None
    tokenizer: Any
    threads: int
    merged_tokenizer: WrittenTokenizer | None = None
    notes: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The model whose tokenizer and layout count: the base, or the first source."""
        return reference_of(self.spec)

    def model(self, name: str) -> str:
        """The reference of a model by its name in the specification."""
        return self.reference if name == "base" else self.spec.models.sources[name]

    @property
    def models(self) -> dict[str, str]:
        """The references of the base, if there is one, and of the sources, by name."""
        base = self.spec.models.base
        return {**({"base": base} if base else {}), **self.spec.models.sources}

    @property
    def reference_model(self) -> Checkpoint:
        """That model, open."""
        return self.checkpoints[self.reference]


def open_problem(spec: SearchSpec, threads: int | None = None) -> Problem:
    """Opens what a specification names.

    Args:
        spec: The specification.
        threads: Of the run, where this process has only a share of them; None for all that torch has.

    Raises:
        BadInput: With everything that is wrong with models, tasks, goals and space.
    """
    return assemble(spec, _open_models, _find_tasks, _load_tokenizer, threads or torch.get_num_threads())


def assemble(
    spec: SearchSpec,
    open_models: Callable[[SearchSpec], Aligned],
    find_tasks: Callable[[SearchSpec], TaskSet],
    load_tokenizer: Callable[[Aligned, str], Any],
    threads: int,
) -> Problem:
    """Makes a problem of a specification's models and tasks.

    Args:
        spec: The specification.
        open_models: Opens the models it names, with one vocabulary.
        find_tasks: Finds the tasks it names.
        load_tokenizer: Loads the tokenizer of the models, or of the one with a reference.
        threads: Of the run.

    Raises:
        BadInput: With everything that is wrong with models, tasks, goals and space.
    """
    with ErrorCollector() as steps:  # a wrong model and a wrong metric are reported in one go
        models: Aligned = steps.attempt(open_models, spec)
        task_set: TaskSet = steps.attempt(find_tasks, spec)
        reported: Fitness = steps.attempt(_reported, spec, task_set)
        steering: Fitness = steps.attempt(_steering, spec, task_set, reported)
        constraints: tuple[Constraint, ...] = steps.attempt(_constraints, spec, task_set)
        tokens: Fitness | None = steps.attempt(_tokens, spec, task_set)
        space: SearchSpace = steps.attempt(_space_of, spec, models)
    checkpoints = models.checkpoints
    return Problem(
        spec=_with_dtype(spec, checkpoints),
        checkpoints=checkpoints,
        tasks=dict(task_set.tasks),
        splits=_draw_splits(spec, task_set),
        space=space,
        reported=reported,
        steering=steering,
        constraints=constraints,
        tokens=tokens,
        tokenizer=_with_template(load_tokenizer(models, reference_of(spec)), spec, checkpoints),
        threads=threads,
        merged_tokenizer=models.tokenizer,
        notes=models.warnings,
    )


def _with_dtype(spec: SearchSpec, checkpoints: Mapping[str, Checkpoint]) -> SearchSpec:
    """The specification with the dtype that suits this machine, where it leaves that open."""
    evaluation = spec.evaluation
    if evaluation.dtype != "auto":
        return spec
    dtype = fastest_dtype(model_shapes(checkpoints[reference_of(spec)]), evaluation.device)
    return spec.model_copy(update={"evaluation": evaluation.model_copy(update={"dtype": dtype})})


def model_shapes(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    """Returns the shapes of a model's tensors, without those of embedding and head."""
    outer = {checkpoint.layout.embedding, checkpoint.layout.head}
    return [info.shape for name, info in checkpoint.tensors.items() if name not in outer]


def _space_of(spec: SearchSpec, models: Aligned) -> SearchSpace:
    return make_space(spec, models.checkpoints)


def reference_of(spec: SearchSpec) -> str:
    """Returns the base, or the first source where there is none."""
    return spec.models.base or next(iter(spec.models.sources.values()))


def content_digests(checkpoints: Mapping[str, Checkpoint], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Returns the identity of models and tasks, which may not change under a run."""
    return {
        "models": {reference: checkpoint.fingerprint for reference, checkpoint in checkpoints.items()},
        "items": {name: task.digest for name, task in tasks.items()},
    }


def versions(threads: int, evaluation: Evaluation) -> dict[str, Any]:
    """Returns the versions and the number of threads that numbers depend on up to rounding; they may change."""
    own = {}
    if evaluation.backend == "vllm":
        from evomerge.evaluation.backends.vllm import vllm_versions

        own = vllm_versions(evaluation.device)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": threads,
        **{package: importlib.metadata.version(package) for package in _PACKAGES},
        **own,
    }


def environment(problem: Problem) -> dict[str, Any]:
    """Returns what the numbers of a run depend on: content (may not change), versions and threads (may)."""
    content = content_digests(problem.checkpoints, problem.tasks)
    if (activations := problem.spec.models.activations) is not None:
        content["models"] |= {activations: open_checkpoint(activations).fingerprint}
    return {
        "content": content,
        "versions": versions(problem.threads, problem.spec.evaluation),
    }


def make_space(spec: SearchSpec, checkpoints: Mapping[str, Checkpoint], *, outer: bool = True) -> SearchSpace:
    """Builds the search space of a specification and its models' layout.

    Args:
        spec: The specification.
        checkpoints: The models, by reference.
        outer: Whether embeddings, final norm and head have genes of their own.

    Raises:
        SpecError: When a gene, a range or a layer group does not exist.
    """
    reference = checkpoints[reference_of(spec)]
    layout = reference.layout
    if layout.main is None:
        stacks = ", ".join(stack.prefix for stack in layout.stacks) or "none"
        raise SpecError(f"models: a search needs one stack of layers; the models have: {stacks}")
    space = spec.space
    limits = {key: value for key, value in space.frankenmerge.model_dump().items() if value is not None}
    return build_space(
        base=spec.models.base,
        sources=spec.models.sources,
        layer_count=layout.layer_count,
        outer=layout.outer if outer else (),
        tensor_group_filters=tensor_group_filters(reference, space.tensor_groups or ()),
        methods=space.methods,
        after=space.after,
        activations=spec.models.activations,
        choose=space.choose,
        method_scope=space.method_scope,
        layer_groups=space.layer_groups,
        tensor_groups=space.tensor_groups,
        gene_overrides={name: gene.model_dump() for name, gene in space.genes.items()},
        frankenmerge=limits,
        recipe_seed=spec.search.seed,
        tokenizer=tokenizer_keys(source, checkpoints) if (source := spec.models.tokenizer_source) else None,
    )


def tensor_group_filters(checkpoint: Checkpoint, chosen: Collection[str]) -> dict[str, list[str]]:
    """Finds substrings of names that pick the tensors of each group that the model has.

    Args:
        checkpoint: The model.
        chosen: Groups with genes of their own. A tensor is in the finest of them that it belongs to, so that their
            substrings exclude each other: of experts and mlp, mlp has what is left.

    Returns:
        Group -> substrings, as short as they can be: a module's name where all its tensors are of one group.
    """
    layout = checkpoint.layout
    located = [layout.locate(name) for name in checkpoint.tensors]
    layers: dict[str, list[Location]] = {}
    for at in located:
        if layout.main and at.stack == layout.main.prefix:
            layers.setdefault(at.suffix, []).append(at)
    own = {suffix: every[0] for suffix, every in layers.items()}
    names = {suffix: next((g for g in (at.kind, at.group) if g in chosen), REST) for suffix, at in own.items()}
    groups = {group: [s for s in own if names[s] == group] for group in dict.fromkeys(names.values())}
    for at in own.values():  # the others, each as if it were chosen
        for group in (at.kind, at.group):
            if group not in chosen and group not in groups:
                groups[group] = [s for s, other in own.items() if group in (other.kind, other.group)]
    return {group: _substrings(picked, layers) for group, picked in groups.items()}


def _substrings(picked: Sequence[str], layers: Mapping[str, Sequence[Location]]) -> list[str]:
    """Substrings that some names within a layer have and the others have not; as a last resort with the layer."""
    others = [f".{suffix}" for suffix in set(layers).difference(picked)]
    texts: dict[str, bool] = {}  # substring -> whether no other name has it
    for suffix in picked:
        parts = suffix.split(".")
        for text in (*(f".{'.'.join(parts[:k])}." for k in range(1, len(parts))), f".{suffix}"):
            if text not in texts:
                texts[text] = not any(text in other for other in others)
            if texts[text]:
                break
        else:  # BERT's output.dense is another's attention.output.dense
            texts |= {f".{at.layer}.{suffix}": True for at in layers[suffix]}
    return [text for text, exact in texts.items() if exact]


def _open_models(spec: SearchSpec) -> Aligned:
    """The models with one naming and one vocabulary, every problem of every model collected."""
    models = spec.models
    opened = open_checkpoints([*([models.base] if models.base else []), *models.sources.values()], models.winners)
    problems = [problem for checkpoint in opened.values() for problem in not_finite(checkpoint)]
    aligned = align_for_search(models.base, models.sources.values(), opened, models.tokenizer_source)
    named = {name: aligned.checkpoints[reference] for name, reference in models.sources.items()}
    problems += check_compatible(aligned.checkpoints[models.base] if models.base else None, named)
    if problems:
        raise CheckpointError(problems)
    if models.shuffled and models.base is not None:
        originals = {name: one for name, one in aligned.checkpoints.items() if name not in models.winners}
        return replace(
            aligned, checkpoints={**aligned.checkpoints, **shuffled(originals, models.base, spec.search.seed)}
        )
    return aligned


def _load_tokenizer(models: Aligned, reference: str) -> Any:
    if models.tokenizer is None:
        return models.checkpoints[reference].load_tokenizer().loaded
    with tempfile.TemporaryDirectory(prefix="evomerge-") as name:
        write_contents(Path(name), models.tokenizer.files)
        return read_tokenizer(reference, Path(name)).loaded


def _with_template(tokenizer: Any, spec: SearchSpec, checkpoints: Mapping[str, Checkpoint]) -> Any:
    """The tokenizer, with the chat template that the specification names."""
    given, models = spec.evaluation.chat_template, {**spec.models.sources, "base": spec.models.base}
    if isinstance(given, str):
        template = read_template(Path(given))
    elif given is not None:
        owner = models[given.from_]
        own = None if owner is None else checkpoints[owner].load_tokenizer().chat_template
        if own is None:
            raise SpecError(f"evaluation.chat_template: {given.from_} has no chat template")
        template = own
    else:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def _find_tasks(spec: SearchSpec) -> TaskSet:
    """The tasks that count and guard, as far as they can be loaded; a group with metrics of its own is one task.

    A task that a guard has in common with what steers is loaded a second time, with the guard's own examples, under
    the name GUARD::TASK.
    """
    evaluation = spec.evaluation
    shots = {task.task: task.num_fewshot for task in evaluation.steering if not task.is_scorer}
    options: dict[str, Any] = {"include_path": evaluation.include_paths, "unsafe_code": evaluation.unsafe_code}
    scorers = _load_scorers(spec, [*evaluation.steering, *evaluation.guards])
    parts, problems = [scorers], [*scorers.problems]
    if shots:
        steering = find_tasks(list(shots), num_fewshot=shots, **options)
        problems += [*steering.problems, *steering.missing, *map(_once, steering.twice)]
        parts.append(groups_as_tasks(steering))
    if names := [guard.task for guard in evaluation.guards if not guard.is_scorer and guard.task not in shots]:
        guards = find_tasks(names, **options)
        problems += [*guards.problems, *guards.missing, *(f"guard: {text}" for text in map(_once, guards.twice))]
        parts.append(_apart(groups_as_tasks(guards), [name for part in parts for name in part.tasks]))
    tasks = {name: task for part in parts for name, task in part.tasks.items()}
    members = {name: own for part in parts for name, own in part.members.items()}
    members = {
        part.task: members[part.task] for part in [*evaluation.steering, *evaluation.guards] if part.task in members
    }
    return TaskSet(
        tasks={name: tasks[name] for own in members.values() for name in own},
        members=members,
        groups=(),
        problems=tuple(problems),
    )


def _load_scorers(spec: SearchSpec, measures: Sequence[Measure]) -> TaskSet:
    """The scorers among some tasks, as far as they can be loaded."""
    tasks: dict[str, Task] = {}
    problems: list[str] = []
    for measure in measures:
        try:
            if measure.python is not None:
                tasks[measure.task] = python_task(measure.task, measure.python, measure.data, measure.options)
            elif measure.judge is not None:
                tasks[measure.task] = _judge_task(spec, measure.task, measure.judge, str(measure.data))
            elif measure.agreement is not None:
                path = Path(measure.agreement)
                rows = read_rows(path, f"task {measure.task!r}")
                tasks[measure.task] = agreement_task(measure.task, rows, path, _model_names(spec))
        except TaskError as error:
            problems += error.problems
    return TaskSet(tasks, {name: (name,) for name in tasks}, (), tuple(problems))


def _model_names(spec: SearchSpec) -> list[str]:
    return [*(["base"] if spec.models.base else []), *spec.models.sources]


def _judge_task(spec: SearchSpec, name: str, judge: Judge, data: str) -> ScorerTask:
    """A judge with its items; what all searches of this name spend on it is counted together."""
    folder, where = cache_folder("judge"), f"task {name!r}"
    prompt_file = [Path(str(judge.prompt))] if judge.prompt_is_file else []
    options = JudgeOptions(
        **judge.model_dump(include={"ask", "pairwise", "max_new_tokens"}),
        prompt=read_text(prompt_file[0], TaskError) if prompt_file else judge.prompt,
        scale=(judge.scale[0], judge.scale[1]),
        stop=tuple(judge.stop),
        models=tuple(_model_names(spec)),
        chat=spec.evaluation.apply_chat_template,
        system_instruction=spec.evaluation.system_instruction,
    )
    spending = judge.model_dump(include={field.name for field in fields(ChatOptions)} - {"price"})
    chat = ChatOptions(**spending, price=(judge.price[0], judge.price[1]) if judge.price else (0.0, 0.0))
    rows = read_rows(Path(data), where)
    spent = folder / f"{spec.name}-{digest(chat.identity, repr(options), *map(item_digest, rows))}.spent"
    scorer = JudgeScorer(options, ChatClient(chat, folder, spent, where), rows, (Path(data), *prompt_file), where)
    return ScorerTask(name, None, scorer=scorer, rows=rows)


def _once(text: str) -> str:
    return f"{text.removesuffix('; it is counted once')}; name it once"


def _apart(guards: TaskSet, steering: Collection[str]) -> TaskSet:
    """The guards with other names for the tasks that steer too."""
    tasks: dict[str, Task] = {}
    members: dict[str, tuple[str, ...]] = {}
    for guard, own in guards.members.items():
        names = {name: f"{guard}::{name}" if name in steering else name for name in own}
        tasks |= {names[name]: replace(guards.tasks[name], name=names[name]) for name in own}
        members[guard] = tuple(names.values())
    return replace(guards, tasks=tasks, members=members)


def _sizes(splits: Splits) -> dict[str, float | int]:
    return {name: int(size) if size > 1 else float(size) for name, size in splits.model_dump().items()}


def _draw_splits(spec: SearchSpec, task_set: TaskSet) -> dict[str, Selection]:
    """The items of each split.

    Guard tasks are read whole, as far as the test split's size goes, but for the items that steer or choose.
    """
    evaluation, members, tasks = spec.evaluation, task_set.members, task_set.tasks
    per_task = {name: _sizes(t.splits) for t in evaluation.steering if t.splits for name in members[t.task]}
    items = {name: tasks[name].items for task in evaluation.steering for name in members[task.task]}
    drawn: dict[str, Selection] = dict(split_items(items, _sizes(evaluation.splits), spec.search.seed, per_task))
    choosing = {items[name][k] for split in (SEARCH, SELECT) for name, chosen in drawn[split].items() for k in chosen}
    guarded: dict[str, tuple[int, ...]] = {}
    for guard in (part.task for part in evaluation.guards):
        own = {name: tasks[name].items for name in members[guard]}
        free = {
            name: [k for k, item in enumerate(ids) if item.removeprefix(f"{guard}::") not in choosing]
            for name, ids in own.items()
        }
        guarded |= _draw_guard(own, free, _sizes(evaluation.splits)[TEST], spec.search.seed)
    return {**drawn, GUARD: guarded}


def _draw_guard(
    items: Mapping[str, Sequence[str]], free: Mapping[str, Sequence[int]], size: float, seed: int
) -> dict[str, tuple[int, ...]]:
    """The items of guard tasks, out of those at some positions."""
    ids = {name: [items[name][k] for k in chosen] for name, chosen in free.items()}
    sized = {name: {GUARD: min(size, len(own)) if size > 1 else size} for name, own in ids.items()}
    chosen = split_items(ids, {GUARD: size}, seed, sized)[GUARD]
    return {name: tuple(free[name][k] for k in positions) for name, positions in chosen.items()}


def _reported(spec: SearchSpec, task_set: TaskSet) -> Fitness:
    return Fitness(reported_goals(spec.evaluation, task_set.tasks, task_set.members, task_set.problems))


def _constraints(spec: SearchSpec, task_set: TaskSet) -> tuple[Constraint, ...]:
    return constraints_of(spec.evaluation, task_set.tasks, task_set.members)


def _tokens(spec: SearchSpec, task_set: TaskSet) -> Fitness | None:
    if "tokens" not in spec.search.also_minimize:
        return None
    try:
        return tokens_measure(spec.evaluation, task_set.tasks, task_set.members)
    except TaskError as error:
        raise TaskError([f"search.also_minimize: {problem}" for problem in error.problems]) from None


def _steering(spec: SearchSpec, task_set: TaskSet, reported: Fitness) -> Fitness:
    return reported if spec.evaluation.fitness == "metric" else Fitness(smooth_goals(reported.goals, task_set.tasks))
