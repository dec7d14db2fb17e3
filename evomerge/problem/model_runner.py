"""Recipes to per-item scores: one live model, the evaluator, and the user's cache of scores."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import parse_dtype, torch_dtype
from evomerge.checkpoints.tokenizer import tokenizer_digest
from evomerge.engine.device.memory import activation_bytes
from evomerge.engine.execute import find_device
from evomerge.engine.resident import Resident, generation_of
from evomerge.engine.setting_derivatives import ParameterKey, ParameterRange, setting_derivatives
from evomerge.errors import CandidateError
from evomerge.evaluation.backends.native.jacobian import shortened
from evomerge.evaluation.backends.registry import Directions
from evomerge.evaluation.evaluator import Evaluator, require_decoder
from evomerge.evaluation.score_store import ScoreCache, key_of
from evomerge.evaluation.scores import ItemScores, ResponseJacobian, SmoothMetric, concatenate
from evomerge.evaluation.splits import Selection
from evomerge.evaluation.tasks.scorer_task import ScorerTask
from evomerge.evaluation.tasks.task import Task
from evomerge.objective.fitness import Scores
from evomerge.objective.goals import Goal
from evomerge.objective.likelihood_model import Term
from evomerge.planning.operation import Operation
from evomerge.planning.plan import Plan, make_plan
from evomerge.problem.problem import Problem, versions
from evomerge.recipe import parse_recipe
from evomerge.recipe.parse import single_model
from evomerge.spec.schema import SearchSpec
from evomerge.system.arrays import FloatArray, IntArray
from evomerge.system.files import cache_folder
from evomerge.system.inputs import ChangedInput, Inputs
from evomerge.system.memory import available

log = logging.getLogger(__name__)

_AT_ONCE = 16
"""Operations whose derivatives are held whole at a time."""
_BATCH_TOKENS = 4096
"""Of a batch, for an estimate of what it takes, where a run leaves them to the scorer."""
_MEMORY_SHARE = 0.7
"""Of the free memory that they may take."""


class Runner(Protocol):
    """Turns recipes into per-item scores: a `ModelRunner`, or a formula in its place."""

    @property
    def reused(self) -> int:
        """Item evaluations that came from the user's cache."""
        ...

    def plan(self, recipe: Mapping[str, Any]) -> Plan:
        """Resolves a candidate's recipe."""
        ...

    def scores(self, plan: Plan, selection: Selection) -> tuple[Scores, dict[str, float]]:
        """Returns per-item scores of a plan by task, and the seconds that each stage took."""
        ...

    def sizes(self, plan: Plan) -> dict[str, int]:
        """Counts the layers and the parameters of a plan's result."""
        ...

    def jacobian(
        self, plan: Plan, work: Sequence[tuple[Operation, Mapping[ParameterKey, ParameterRange]]], selection: Selection
    ) -> tuple[dict[str, ResponseJacobian], list[tuple[str, ParameterKey]]]:
        """Differentiates log-likelihoods by the settings of a plan's operations; empty where that is not possible."""
        ...

    def smooth_metric(
        self, task: str, metric: str, indices: Sequence[int], loglikelihoods: FloatArray
    ) -> SmoothMetric | None:
        """Gives a metric as a function of its requests' log-likelihoods."""
        ...

    def release(self) -> None:
        """Gives back the memory of what runs, until it is needed again."""
        ...

    def check_inputs(self, *, whole: bool = False) -> None:
        """Checks that models and data are as they were when they were opened: some of them, or all."""
        ...


class ModelRunner:
    """Turns recipes into plans, plans into a live model, and that into per-item scores.

    Args:
        problem: Models and tasks.

    Attributes:
        evaluator: Scores the live model.
        reused: Item evaluations that came from the user's cache.
    """

    def __init__(self, problem: Problem) -> None:
        evaluation = problem.spec.evaluation
        find_device(evaluation.device, "evaluation.device")
        self._evaluation = evaluation
        self._device_memory = memory_for_sources(problem.spec)
        self._checkpoints = problem.checkpoints
        self._merged_tokenizer = problem.merged_tokenizer
        self._tasks = problem.tasks
        self._tokenizer = problem.tokenizer
        self._threads = problem.threads
        self._reference = problem.reference_model
        config = problem.reference_model.load_config()
        require_decoder(problem.reference, config, evaluation.backend)
        self._activations = activation_bytes(self._reference.config, evaluation.batch_tokens or _BATCH_TOKENS)
        self.evaluator = Evaluator(
            problem.tasks,
            problem.tokenizer,
            config,
            batch_tokens=evaluation.batch_tokens,
            max_length=evaluation.max_length,
            apply_chat_template=evaluation.apply_chat_template,
            fewshot_as_multiturn=evaluation.fewshot_as_multiturn,
            system_instruction=evaluation.system_instruction,
            chat_template_args=evaluation.chat_template_args,
            think_end_token=evaluation.think_end_token,
            backend=evaluation.backend,
            threads=problem.threads,
            vllm=evaluation.vllm,
        )
        self._references = problem.models
        compared = {name for task in self._scorers for name in task.scorer.references}
        self._unread = [name for name in self._references if name in compared]
        self.reused = 0
        self._inputs = Inputs(
            [file for part in (problem.checkpoints, problem.tasks) for one in part.values() for file in _files(one)],
            {
                reference: (checkpoint.fingerprint, partial(checkpoint.weights.fingerprint, anew=True))
                for reference, checkpoint in problem.checkpoints.items()
            },
        )
        self._cache = ScoreCache(cache_folder("scores")) if evaluation.cache else None
        self._resident: Resident | None = None
        self._contents: dict[str, Mapping[str, Any]] = {}  # by digest of the batches

    def plan(self, recipe: Mapping[str, Any]) -> Plan:
        """Resolves a candidate's recipe.

        Raises:
            RecipeError: When it is not possible.
        """
        return make_plan(parse_recipe(recipe, where="candidate"), self._checkpoints, self._merged_tokenizer)

    def materialise(self, plan: Plan) -> Any:
        """Makes the live model be the plan's result, and returns it; it lasts until the next call.

        Raises:
            CandidateError: When it cannot be materialised.
        """
        self._read_references()
        model, _ = self._live.write(plan)
        return model

    def _read_references(self) -> None:
        """Has scorers read the models that they compare with, before the first model is scored."""
        while self._unread:
            reference = self.plan(single_model(self._references[self._unread[0]]))
            self.evaluator.read_reference(self._live.write(reference)[0], self._unread[0])
            del self._unread[0]

    def release(self) -> None:
        """Gives back the live model's memory, until it is needed again."""
        self._resident = None

    def check_inputs(self, *, whole: bool = False) -> None:
        """Checks that models and data are as they were when they were opened.

        Args:
            whole: Compare all of their content; else some pages of each file, and all where a signature has changed.

        Raises:
            ChangedInput: With every file that has changed.
        """
        try:
            if whole:
                self._inputs.verify()
            else:
                self._inputs.renew(sampled=True)
        except ChangedInput:
            if self._cache is not None:
                self._cache.withdraw()
            raise

    def scores(self, plan: Plan, selection: Selection) -> tuple[Scores, dict[str, float]]:
        """Scores a plan on some items, or reads its scores from the user's cache.

        Returns:
            Per-item scores by task, and the seconds that each stage took: none when they were in the cache.

        Raises:
            CandidateError: When the merged model gives no finite scores.
        """
        settings = self._score_settings  # also without a cache: numbers must not depend on there being one
        if self._cache is None or settings is None:
            return self.measure(plan, selection)
        generation = generation_of(plan, self._checkpoints)
        key = key_of(
            {"plan": plan.digest, "generation": generation, "settings": settings, "items": self._content(selection)}
        )
        cached = self._cache.get(key, item_ids(self._tasks, selection))
        if cached is not None:
            self.reused += selection_size(selection)
            return cached, {}
        scores, seconds = self.measure(plan, selection)
        self._cache.put(key, scores)
        return scores, seconds

    def measure(self, plan: Plan, selection: Selection) -> tuple[dict[str, ItemScores], dict[str, float]]:
        """Materialises a plan and scores it on some items, whatever the cache has. As `scores`.

        Raises:
            ChangedInput: A model or data have changed, so that nobody knows what was scored.
        """
        started = time.perf_counter()
        model = self.materialise(plan)
        written = time.perf_counter()
        scores = self.evaluator.score(model, selection)
        self._inputs.renew()
        return scores, {"materialise": written - started, "score": time.perf_counter() - written}

    def sizes(self, plan: Plan) -> dict[str, int]:
        """Counts the layers and the parameters of a merged model; a tied head counts once."""
        parameters = sum(math.prod(operation.shape) for operation in plan.operations)
        return {"layers": plan.layer_count, "parameters": parameters}

    def jacobian(
        self, plan: Plan, work: Sequence[tuple[Operation, Mapping[ParameterKey, ParameterRange]]], selection: Selection
    ) -> tuple[dict[str, ResponseJacobian], list[tuple[str, ParameterKey]]]:
        """Differentiates log-likelihoods with respect to the settings of a plan's operations.

        Args:
            plan: The plan.
            work: Operations, with the settings to differentiate by and the range of each.
            selection: Task to items.

        Returns:
            By task; and the settings that are the columns, as (output, setting): those that move anything. Empty where
            the model's parameters are not the plan's tensors.
        """
        model = self.materialise(plan)
        parameters = dict(model.named_parameters())
        if not parameters.keys() <= {op.output for op in plan.operations}:
            log.warning("no derivatives: the parameters of %s are not its checkpoints' tensors", type(model).__name__)
            return {}, []
        directions: dict[str, Sequence[Directions]] = {}
        settings: list[tuple[str, ParameterKey]] = []
        work = [(operation, ranges) for operation, ranges in work if operation.output in parameters]
        for start in range(0, len(work), _AT_ONCE):
            part = work[start : start + _AT_ONCE]
            _require_memory(part)
            for output, derivatives in setting_derivatives(part, self._live.store, plan.family):
                if derivatives:
                    columns = np.arange(len(settings), len(settings) + len(derivatives))
                    whole = torch.stack(list(derivatives.values())).to(parameters[output])
                    directions[output] = shortened(Directions(columns, whole))
                    settings += [(output, key) for key in derivatives]
        computed = self.evaluator.jacobian(model, selection, directions, len(settings))
        self._inputs.renew()
        return computed, settings

    def smooth_metric(
        self, task: str, metric: str, indices: Sequence[int], loglikelihoods: FloatArray
    ) -> SmoothMetric | None:
        """Gives a metric as a function of its requests' log-likelihoods."""
        return self.evaluator.smooth_metric(task, metric, indices, loglikelihoods)

    @property
    def _live(self) -> Resident:
        """The live model, made on first use."""
        if self._resident is None:
            self._resident = Resident(
                self._checkpoints,
                torch_dtype(parse_dtype(self._evaluation.dtype)),
                self._evaluation.device,
                device_memory=self._device_memory,
                activations=self._activations,
            )
        return self._resident

    @cached_property
    def _score_settings(self) -> Mapping[str, Any] | None:
        """What the scores depend on beside the model and the items; None when that cannot be said.

        The reference model decides how models are scored, so that no candidate's turn does.
        """
        try:
            self.evaluator.prepare(self.materialise(self.plan(single_model(self._reference.reference))))
        except CandidateError as error:
            log.warning("scores are not cached, because the reference model cannot be scored: %s", error)
            return None
        return {
            "format": 4,
            "settings": self._evaluation.model_dump(include={"device", "dtype", "backend", "think_end_token"}),
            "max_length": self.evaluator.max_length,
            "tokenizer": tokenizer_digest(self._tokenizer),
            "versions": versions(self._threads, self._evaluation),
        }

    @property
    def _scorers(self) -> list[ScorerTask]:
        return [task for task in self._tasks.values() if isinstance(task, ScorerTask)]

    def _compared(self, selection: Selection) -> Mapping[str, Any]:
        """The models that the tasks' scorers compare with; nothing where there are none."""
        by_task = {
            task.name: [self._checkpoints[self._references[name]].fingerprint for name in task.scorer.references]
            for task in self._scorers
            if task.name in selection and task.scorer.references
        }
        return {"compared": by_task} if by_task else {}

    def _content(self, selection: Selection) -> Mapping[str, Any]:
        """The items themselves, their tasks' settings, and the batches they come in."""
        batches = self.evaluator.batch_digest(selection)
        if batches not in self._contents:
            self._contents[batches] = {
                "layout": batches,
                "tasks": {task: self._tasks[task].digest for task in selection},
                **self._compared(selection),
                "items": {
                    task: [self.evaluator.item_hash(task, k) for k in positions]
                    for task, positions in selection.items()
                },
            }
        return self._contents[batches]


def memory_for_sources(spec: SearchSpec) -> int | None:
    """Returns the bytes of the device that sources may take; None for what is free there when the live model is made.

    vLLM takes its share of a device when it starts, which is later: beside it nothing is kept that was not asked for.
    """
    given = spec.run.device_memory
    return 0 if given is None and spec.evaluation.backend == "vllm" else given


def _files(opened: Checkpoint | Task) -> tuple[Path, ...]:
    """The files that a model or a task was read from."""
    return opened.inputs if isinstance(opened, Checkpoint) else opened.files


def _require_memory(work: Sequence[tuple[Operation, Mapping[ParameterKey, ParameterRange]]]) -> None:
    """Checks that the derivatives of some operations can be held; the kernel would end the process without a word.

    Raises:
        CandidateError: They cannot.
    """
    free, needed = available(), sum(4 * len(ranges) * math.prod(operation.shape) for operation, ranges in work)
    if free is not None and needed > _MEMORY_SHARE * free:
        raise CandidateError(f"the derivatives take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


def likelihood_term(
    runner: Runner,
    task: Task,
    goal: Goal,
    positions: Sequence[int],
    loglikelihoods: FloatArray,
    items: IntArray,
    scores: ItemScores,
    *,
    start: int = 0,
    weights: FloatArray | None = None,
) -> Term | None:
    """Makes what a goal is of log-likelihoods, by the metric that varies smoothly; None where there is no such thing.

    Args:
        runner: Gives metrics as functions of log-likelihoods.
        task: The goal's task.
        goal: The goal.
        positions: The items.
        loglikelihoods: Of their requests, where the term is made.
        items: Each request's item.
        scores: The items' scores.
        start: The first of their requests among those of all goals.
        weights: What each item counts for; None for 1.
    """
    smooth = replace(goal, metric=task.smooth_metric(goal.metric))
    metric = runner.smooth_metric(goal.task, smooth.metric, positions, loglikelihoods)
    if metric is None:
        return None
    of_items = np.ones(len(scores.items)) if weights is None else weights
    return Term(smooth, slice(start, start + len(loglikelihoods)), metric, scores, items, of_items)


def selection_size(selection: Selection) -> int:
    """Counts the items of a selection."""
    return sum(map(len, selection.values()))


def item_ids(tasks: Mapping[str, Task], selection: Selection) -> dict[str, tuple[str, ...]]:
    """Returns the ids of a selection's items, by task."""
    return {task: tuple(tasks[task].items[k] for k in positions) for task, positions in selection.items()}


def take_items(scores: Scores, items: Mapping[str, tuple[str, ...]]) -> Scores | None:
    """Takes the scores on some of the items, in that order; None when some are not there."""
    taken: dict[str, ItemScores] = {}
    for task, ids in items.items():
        part = scores.get(task)
        if part is None:
            return None
        if part.items == ids:
            taken[task] = part
            continue
        positions = {item: k for k, item in enumerate(part.items)}
        if not all(item in positions for item in ids):
            return None
        taken[task] = part.take([positions[item] for item in ids])
    return taken


def join_items(before: Scores, more: Scores, positions: Mapping[str, Mapping[str, int]]) -> Scores:
    """Joins scores on two disjoint sets of items, in the order of the items' positions in their task."""
    if not before:
        return more
    both = {task: concatenate([before[task], part]) for task, part in more.items()}
    return {
        task: part.take(
            sorted(range(len(part.items)), key=lambda k, ids=part.items, of=positions[task]: of[ids[k]])  # type: ignore[misc]
        )
        for task, part in both.items()
    }
