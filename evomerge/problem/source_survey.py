"""What can be known of sources before a search: what more of each is worth, and whether they pull the same way.

Parameters say little: differences of weights at right angles merge well or badly. What a merge does shows in what the
model computes: how far hidden states move from the base's, and how every answer's log-likelihood moves with each layer
of each source, to first order at their average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evomerge.engine.setting_derivatives import ParameterKey, ParameterRange
from evomerge.errors import CandidateError
from evomerge.evaluation.scores import ResponseJacobian
from evomerge.evaluation.splits import SEARCH, Selection
from evomerge.objective.fitness import Fitness, Scores
from evomerge.planning.operation import Operation
from evomerge.problem.model_runner import ModelRunner, likelihood_term
from evomerge.problem.problem import Problem
from evomerge.recipe.parse import single_model
from evomerge.system.arrays import FloatArray, IntArray

ITEMS = 8
"""Of each task, where nobody says how many."""
_TEXTS, _TOKENS = 4, 64


@dataclass(frozen=True)
class SourceSurvey:
    """What was measured of some sources.

    Attributes:
        sources: Their names.
        items: How many items were looked at.
        moved: How far each moves the base's last hidden states, as a share of their length, [sources].
        alike: Cosines of these moves, [sources, sources].
        agreement: Cosines of how the log-likelihoods of all answers move with the whole of two sources' differences,
            nats a token, [sources, sources]; zeros where there are no derivatives.
        worth: By how much of its value at the sources' average the search score would grow if a layer of a source
            counted for 1 more, to first order, [layers + 1, sources]: the last row is what lies outside of layers.
    """

    sources: tuple[str, ...]
    items: int
    moved: FloatArray
    alike: FloatArray
    agreement: FloatArray
    worth: FloatArray


def survey_sources(problem: Problem, runner: ModelRunner, items: int = ITEMS) -> SourceSurvey:
    """Measures a search's sources on a few of its items.

    Args:
        problem: Models with a base, tasks and splits.
        runner: Runs models.
        items: Of each task.

    Raises:
        CandidateError: A model gives no finite numbers, or has no derivatives.
    """
    selection = {task: positions[:items] for task, positions in problem.splits[SEARCH].items()}
    moves = _hidden_moves(problem, runner, selection)
    lengths = np.linalg.norm(moves, axis=1)
    recipe, layers = _average(problem), problem.reference_model.layout.layer_count
    plan = runner.plan(recipe)
    scores, _ = runner.scores(plan, selection)
    work: list[tuple[Operation, Mapping[ParameterKey, ParameterRange]]] = [
        (op, {("weight", k): (0.0, 1.0) for k, source in enumerate(op.settings.sources) if "weight" in source})
        for op in plan.operations
        if any("weight" in source for source in op.settings.sources)
    ]
    by_task, settings = runner.jacobian(plan, work, selection)
    if not by_task:
        raise CandidateError(
            "the sources cannot be surveyed: no task has answers whose log-likelihoods have derivatives"
        )
    located = [problem.reference_model.layout.locate(output).layer for output, _ in settings]
    rows = np.array([layers if layer is None else layer for layer in located])
    columns = np.array([key[1] for _, key in settings])
    values = _value_gradient(problem, runner, problem.steering, by_task, scores, selection)
    count = len(problem.spec.models.sources)
    worth = np.zeros((layers + 1, count))
    np.add.at(worth, (rows, columns), values)
    whole = np.concatenate([_of_sources(part, columns, count) for part in by_task.values()])
    return SourceSurvey(
        sources=tuple(problem.spec.models.sources),
        items=sum(map(len, selection.values())),
        moved=lengths,
        alike=_cosines(moves),
        agreement=_cosines(whole.T),
        worth=worth,
    )


def _average(problem: Problem) -> dict[str, object]:
    """The base and the mean of the differences: where a search begins to be of use."""
    references = list(problem.spec.models.sources.values())
    recipe: dict[str, object] = {
        "merge_method": "task_arithmetic",
        "base_model": problem.spec.models.base,
        **problem.space.tokenizer,
        "models": [{"model": text, "parameters": {"weight": 1.0 / len(references)}} for text in references],
    }
    return recipe if problem.space.dtype is None else {**recipe, "dtype": problem.space.dtype}


def _of_sources(part: ResponseJacobian, columns: IntArray, count: int) -> FloatArray:
    """How each log-likelihood moves with the whole of every source, in nats a token, [requests, sources]."""
    by_source = np.zeros((count, len(part.loglikelihoods)))
    np.add.at(by_source, columns, part.derivatives.T)
    moved: FloatArray = by_source.T / np.maximum(part.lengths, 1.0)[:, None]
    return moved


def _value_gradient(
    problem: Problem,
    runner: ModelRunner,
    fitness: Fitness,
    by_task: Mapping[str, ResponseJacobian],
    scores: Scores,
    selection: Selection,
) -> FloatArray:
    """How what steers grows with each setting, as a share of its value, task by task, [settings]."""
    total = sum(goal.weight for goal in fitness.goals)
    gradient = np.zeros(next(iter(by_task.values())).derivatives.shape[1])
    for goal in (goal for goal in fitness.goals if goal.task in by_task):
        part, own = by_task[goal.task], scores[goal.task]
        task, positions = problem.tasks[goal.task], selection[goal.task]
        term = likelihood_term(runner, task, goal, positions, part.loglikelihoods, part.items, own)
        if term is None:
            continue
        value, slopes = term.value(part.loglikelihoods, np.ones(len(own.items), dtype=np.bool_))
        if value != 0.0:
            gradient += goal.weight / total * (slopes @ part.derivatives) / abs(value)
    return gradient


def _hidden_moves(problem: Problem, runner: ModelRunner, selection: Selection) -> FloatArray:
    """How each source moves the base's last hidden states on a few texts, in units of their length, [sources, ...]."""
    chosen = [(task, k) for task, positions in selection.items() for k in positions[:_TEXTS]]
    rows = [ids for ids in (runner.evaluator.tokens(task, k)[:_TOKENS] for task, k in chosen) if len(ids) > 1]
    models = problem.spec.models
    base, *others = (
        _hidden(runner, text, rows) for text in (models.base or problem.reference, *models.sources.values())
    )
    return np.stack([(states - base) / np.linalg.norm(base) for states in others])


def _hidden(runner: ModelRunner, reference: str, rows: Sequence[Sequence[int]]) -> FloatArray:
    model = runner.materialise(runner.plan(single_model(reference)))
    device = next(model.parameters()).device
    states = []
    with torch.inference_mode():
        for row in rows:
            output = model(input_ids=torch.tensor([row], device=device), use_cache=False, output_hidden_states=True)
            states.append(output.hidden_states[-1][0].flatten().double().cpu().numpy())
    joined: FloatArray = np.concatenate(states)
    if not np.isfinite(joined).all():
        raise CandidateError(f"{reference}: its hidden states are not finite")
    return joined


def _cosines(vectors: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(vectors, axis=1)
    unit = vectors / np.where(lengths > 0, lengths, 1.0)[:, None]
    cosines: FloatArray = unit @ unit.T
    return cosines
