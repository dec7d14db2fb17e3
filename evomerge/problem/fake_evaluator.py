"""A formula in the place of models: recipes to per-item scores, the same in every process. Nothing is read from a disk.

What rests on scores alone (budgets, races, resumption, failures, run folders, the command line) can be tried on it in
no time: `fake_problem` and `FakeRunner` stand in for what of a search touches models (`evomerge.run.search`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.tensors import UnwrittenWeights
from evomerge.engine.setting_derivatives import ParameterKey, ParameterRange
from evomerge.evaluation.scores import ItemScores, ResponseJacobian
from evomerge.evaluation.splits import Selection
from evomerge.evaluation.tasks.lm_eval_tasks import TaskSet
from evomerge.evaluation.tasks.task import Task
from evomerge.objective.fitness import Scores
from evomerge.planning.operation import Operation
from evomerge.planning.plan import Plan, make_plan
from evomerge.planning.vocabulary.align import Aligned
from evomerge.problem.problem import Problem, assemble
from evomerge.recipe import parse_recipe
from evomerge.spec.schema import SearchSpec
from evomerge.system.arrays import FloatArray
from evomerge.system.hashing import digest_bytes

LAYERS = 4
ITEMS = 40
"""Of every task."""

_LOSSES = ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity", "nll", "loss")
_WIDTH = 8


def fake_problem(spec: SearchSpec, threads: int | None = None) -> Problem:
    """Makes a problem of a specification without opening what it names.

    Every model is a small Llama whose weights do not exist; every task has `ITEMS` items and the metric asked for.
    """
    return assemble(spec, _models, _tasks, lambda aligned, reference: None, threads or 1)


class FakeRunner:
    """Scores recipes by a formula of their numbers: every number has a value that is best, every item a difficulty.

    Args:
        problem: Of `fake_problem`.
        fails: Raises for a recipe that is to fail; called before one is scored.
    """

    reused = 0

    def __init__(self, problem: Problem, fails: Callable[[Mapping[str, Any]], None] = lambda recipe: None) -> None:
        self._checkpoints = problem.checkpoints
        self._tasks = problem.tasks
        self._fails = fails
        self._recipes: dict[str, Mapping[str, Any]] = {}  # by plan

    def plan(self, recipe: Mapping[str, Any]) -> Plan:
        """Resolves a recipe, as models would."""
        plan = make_plan(parse_recipe(recipe, where="candidate"), self._checkpoints)
        self._recipes[plan.digest] = recipe
        return plan

    def scores(self, plan: Plan, selection: Selection) -> tuple[Scores, dict[str, float]]:
        """Computes the scores of a plan; those of an item do not depend on what it is scored with."""
        recipe = self._recipes[plan.digest]
        self._fails(recipe)
        level = quality(recipe)
        return {name: self._item_scores(name, plan.digest, level, part) for name, part in selection.items()}, {}

    def sizes(self, plan: Plan) -> dict[str, int]:
        """Counts the layers and the parameters of a plan's result."""
        return {"layers": plan.layer_count, "parameters": sum(int(np.prod(op.shape)) for op in plan.operations)}

    def jacobian(
        self, plan: Plan, work: Sequence[tuple[Operation, Mapping[ParameterKey, ParameterRange]]], selection: Selection
    ) -> tuple[dict[str, ResponseJacobian], list[tuple[str, ParameterKey]]]:
        """Has none: there are no weights."""
        return {}, []

    def smooth_metric(self, task: str, metric: str, indices: Sequence[int], loglikelihoods: FloatArray) -> None:
        """Has none: there are no requests."""

    def release(self) -> None:
        """Gives back nothing."""

    def check_inputs(self, *, whole: bool = False) -> None:
        """Has none."""

    def _item_scores(self, name: str, plan: str, level: float, positions: Sequence[int]) -> ItemScores:
        task = self._tasks[name]
        difficulty = _generator(name).normal(0.0, 0.2, len(task.items))
        own = _generator(name, plan).normal(0.0, 0.1, len(task.items))
        values = np.clip(level - difficulty + own, 0.01, 0.99)[list(positions)]
        metrics = {metric: (_values(metric, values), np.ones(len(values))) for metric in task.metrics}
        items = tuple(task.items[k] for k in positions)
        return ItemScores(name, items, metrics, {metric: task.direction(metric) for metric in task.metrics})


def quality(recipe: Mapping[str, Any]) -> float:
    """Computes how good a recipe is, about 0.3 to 0.8: how near its numbers are to what is best for each."""
    squares = [(value - float(_generator(path).uniform(0.2, 1.0))) ** 2 for path, value in _numbers(recipe)]
    return 0.8 - 0.5 * min(1.0, float(np.mean(squares))) if squares else 0.5


def _values(metric: str, values: FloatArray) -> FloatArray:
    if metric in _LOSSES:
        return 2.0 - values
    return (values > 0.5).astype(np.float64) if metric.startswith("acc") else values


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a recipe, named by the keys that lead to them."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _numbers(value[key], f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for k, entry in enumerate(value):
            yield from _numbers(entry, f"{path}.{k}")
    elif isinstance(value, float):
        yield path, value


def _generator(*names: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(digest_bytes("\0".join(names), size=8)))


def _models(spec: SearchSpec) -> Aligned:
    references = [*([spec.models.base] if spec.models.base else []), *spec.models.sources.values()]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS}
    return Aligned({reference: Checkpoint(reference, None, config, _weights(reference)) for reference in references})


def _weights(reference: str) -> UnwrittenWeights:
    """Names and shapes of a small Llama."""
    names = [f"model.layers.{k}.{name}.weight" for k in range(LAYERS) for name in ("self_attn.q_proj", "mlp.up_proj")]
    shapes = dict.fromkeys(["model.embed_tokens.weight", *names], (_WIDTH, _WIDTH)) | {"model.norm.weight": (_WIDTH,)}
    return UnwrittenWeights((TensorSpec(name, shape, "F32") for name, shape in sorted(shapes.items())), reference)


def _tasks(spec: SearchSpec) -> TaskSet:
    metrics = {task.task: task.metric or "acc" for task in spec.evaluation.steering}
    metrics |= {guard.task: "acc" for guard in spec.evaluation.guards if guard.task not in metrics}
    tasks = {name: Task(name, _LmEvalTask(name, metric)) for name, metric in metrics.items()}
    return TaskSet(tasks, {name: (name,) for name in tasks}, (), ())


class _LmEvalTask:
    """What `Task` asks of an object of lm-eval's."""

    _filters: tuple[Any, ...] = ()

    def __init__(self, name: str, metric: str) -> None:
        self.OUTPUT_TYPE = "loglikelihood_rolling" if metric in _LOSSES else "multiple_choice"
        self.eval_docs = [{"id": k} for k in range(ITEMS)]
        self._name = name
        self._metric = metric

    def higher_is_better(self) -> dict[str, bool]:
        return {self._metric: self._metric not in _LOSSES}

    def dump_config(self) -> dict[str, Any]:
        return {"task": self._name, "metric": self._metric}
