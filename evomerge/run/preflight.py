"""Checks before anything is spent: names, items, whether each model reads text, whether a chat model knows its stop.

Weights that are not finite are refused when the models are opened, and a merged candidate whose logits are not finite
fails at its first batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.algorithms.registry import search_problems
from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.matching.configs import disagreements
from evomerge.errors import CheckpointError, TaskError
from evomerge.evaluation.splits import GUARD, SEARCH, SELECT, TEST, Selection
from evomerge.evaluation.tasks.group_task import GroupTask
from evomerge.evaluation.tasks.scorer_task import ScorerTask
from evomerge.recipe.parse import single_model
from evomerge.spec.load import load_spec, parse_spec
from evomerge.spec.schema import SearchSpec

if TYPE_CHECKING:  # they load lm-eval, which a wrong key in the file need not wait for
    from evomerge.evaluation.evaluator import Evaluator
    from evomerge.problem.model_runner import ModelRunner
    from evomerge.problem.problem import Problem

_TEXTS = 2  # of each task
_TOKENS = 64  # of each text
_ALL_TOKENS = 256  # for a model
_SLACK = 1.0  # nats that a model may be worse than guessing before there is a warning


def algorithm_problems(spec: SearchSpec) -> list[str]:
    """Says why the algorithm that a specification names cannot do its search."""
    search = spec.search
    problems = search_problems(
        search.algorithm,
        search.options,
        multi_objective=search.objectives == "pareto",
        asynchronous=search.mode == "asynchronous",
    )
    if search.baseline == search.algorithm:
        problems.append(f"search.baseline: {search.baseline} is the algorithm itself; leave one of the two out")
    if "lora" in search.controls and find_spec("peft") is None:
        problems.append('search.controls: lora: PEFT is not installed; `pip install "evomerge[lora]"` has it')
    if "shuffled" in search.controls and spec.models.base is None:
        problems.append("search.controls: shuffled: differences from a base are shuffled, and models.base names none")
    return problems


def load_search(path: Path) -> SearchSpec:
    """Reads a search.yaml and checks all of it that needs no model.

    Raises:
        SpecError: With every problem.
    """
    return load_spec(path, checks=[algorithm_problems])


def parse_search(data: Mapping[str, Any], *, where: str = "search.yaml", beside: Path | None = None) -> SearchSpec:
    """Checks a search specification as `load_search` does.

    Raises:
        SpecError: With every problem.
    """
    return parse_spec(data, where=where, beside=beside, checks=[algorithm_problems])


def check_models(problem: Problem, runner: ModelRunner) -> list[str]:
    """Looks at the items of every split, and at each model.

    Returns:
        Warnings.

    Raises:
        TaskError: With every task that has an item that cannot be scored, and every scorer that fails.
        CheckpointError: A model's logits are not finite.
    """
    models = problem.spec.models
    references = {**({"base": models.base} if models.base else {}), **models.sources}
    opened = {name: problem.checkpoints[reference] for name, reference in references.items()}
    warnings = check_items(runner.evaluator, problem.splits)
    check_metrics(problem, runner.evaluator)
    lost: list[str] = []
    if problem.merged_tokenizer is None:
        lost = [
            *lost_templates(opened, problem.reference_model),
            *stop_tokens(opened, problem.reference_model, _stop_strings(problem)),
        ]
    warnings += [
        *filter(None, (disagreements(problem.reference_model, model) for model in opened.values())),
        *lost,
        *read_texts(runner, references, problem.spec.evaluation.dtype),
    ]
    return [*problem.notes, *warnings, *try_scorers(problem, runner)]


def try_scorers(problem: Problem, runner: ModelRunner) -> list[str]:
    """Has every scorer value a few items with the reference model.

    Returns:
        What is worth knowing of them.

    Raises:
        TaskError: With every scorer that fails.
    """
    chosen = {**problem.splits[GUARD], **problem.splits[SEARCH]}
    chosen = {task: items for task, items in chosen.items() if isinstance(problem.tasks[task], ScorerTask)}
    if not chosen:
        return []
    return runner.evaluator.try_scorers(runner.materialise(runner.plan(single_model(problem.reference))), chosen)


def check_items(evaluator: Evaluator, splits: Mapping[str, Selection]) -> list[str]:
    """Builds what the items of every split ask, so that what cannot be scored shows before a model is.

    Returns:
        What is worth a warning.

    Raises:
        TaskError: With every task that has an item that cannot be scored.
    """
    selections = [selection for selection in splits.values() if selection]
    tasks = dict.fromkeys(task for selection in selections for task in selection)
    return evaluator.check(
        {task: tuple(k for selection in selections for k in selection.get(task, ())) for task in tasks}
    )


def check_metrics(problem: Problem, evaluator: Evaluator) -> None:
    """Checks that every goal has a value on the items of every split, where the task's own code says which have.

    Raises:
        TaskError: With every goal that has none.
    """
    measures = [problem.reported, problem.steering, *(constraint.measure for constraint in problem.constraints)]
    goals = {(goal.task, goal.metric) for measure in measures for goal in measure.goals}
    problems = []
    for task, metric in sorted(goals):
        for split in (SEARCH, SELECT, TEST):
            indices = problem.splits[split][task]
            given = evaluator.metrics_given(task, indices) if problem.tasks[task].scores_itself else None
            if given is not None and metric not in given:
                problems.append(
                    f"task {task!r}: none of its {len(indices)} {split} items has a value for {metric}; ask for more"
                    f" items, or for {', '.join(sorted(given)) or 'another task'}"
                )
    if problems:
        raise TaskError(problems)


def _stop_strings(problem: Problem) -> list[str]:
    """What generation stops at for every task that generates."""
    stops: list[set[str]] = []
    for task in problem.tasks.values():
        for part in task.parts if isinstance(task, GroupTask) else (task,):
            if part.output_type == "generate_until":
                until = (part.lm_eval_task.get_config("generation_kwargs") or {}).get("until") or []
                stops.append({until} if isinstance(until, str) else set(until))
    return sorted(set.intersection(*stops)) if stops else []


def read_texts(runner: ModelRunner, references: Mapping[str, str], dtype: str) -> list[str]:
    """Reads a few lines of the tasks with each model.

    Args:
        runner: Runs the models.
        references: Name to reference of the models to look at.
        dtype: What they run in.

    Returns:
        Warnings of models that predict worse than guessing.

    Raises:
        CheckpointError: Those whose logits are not finite.
    """
    evaluator = runner.evaluator
    counts = {task: min(_TEXTS, len(evaluator.items(task))) for task in evaluator.tasks}
    firsts = [(task, k) for k in range(_TEXTS) for task, count in counts.items() if k < count]
    rows = [evaluator.tokens(task, k)[:_TOKENS] for task, k in firsts]
    rows = [row for row in rows if len(row) > 1][: max(1, _ALL_TOKENS // _TOKENS)]
    warnings, broken = [], []
    for name, reference in references.items():
        loss, guessing = text_loss(runner.materialise(runner.plan(single_model(reference))), rows)
        if not math.isfinite(loss):
            broken.append(
                f"{name}: its logits are not finite on {len(rows)} lines of the tasks, though its weights are; "
                f"evaluation.dtype is {dtype}"
            )
        elif loss > guessing + _SLACK:
            warnings.append(
                f"{name}: {loss:.1f} nats a token on {len(rows)} lines of the tasks, where guessing costs "
                f"{guessing:.1f}: a broken model, or another tokenizer than it was trained with?"
            )
    if broken:
        raise CheckpointError(broken)
    return warnings


def text_loss(model: Any, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Measures the nats a token that a model needs for some token sequences.

    Returns:
        These, and what guessing evenly costs: log(vocabulary).

    Zero sequences cost zero nats.
    """
    import torch

    device = next(model.parameters()).device
    total, count, guessing = 0.0, 0, 0.0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            guessing = math.log(logits.shape[-1])
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += len(row) - 1
    return (total / count if count else 0.0), guessing


def lost_templates(models: Mapping[str, Checkpoint], reference: Checkpoint) -> list[str]:
    """Says whose chat templates merges do not take over, where the reference model has none."""
    others = [name for name, model in models.items() if model.has_chat_template]
    if reference.has_chat_template or not others:
        return []
    return [
        f"{', '.join(others)}: has a chat template, which merges do not get, because their files are those of "
        f"{reference.reference}, which has none: 'models.tokenizer: {others[0]}' keeps its template, tokens and stops"
    ]


def stop_tokens(models: Mapping[str, Checkpoint], reference: Checkpoint, until: Sequence[str] = ()) -> list[str]:
    """Finds chat models whose answers end with a token at which generation does not stop.

    It stops where scoring does: at the end tokens of generation_config.json, at the tokenizer's, and at what the tasks
    name.

    Args:
        models: Name to model.
        reference: The model whose tokenizer and generation_config.json a merge gets.
        until: Where the tasks stop.
    """
    warnings = []
    for name, model in models.items():
        if not model.has_chat_template:
            continue
        end = end_of_turn(model.load_tokenizer().loaded)
        if end is None or any(text in end[0] for text in until):
            continue
        token, number = end
        if number not in _stops(model):
            warnings.append(
                f"{name}: its chat template ends a turn with {token!r} ({number}), but generation stops at "
                f"{_listed(_stops(model))}: set eos_token_id in its generation_config.json"
            )
        elif number not in _stops(reference):
            warnings.append(
                f"{name}: ends a turn with {token!r} ({number}), but a merge gets the generation_config.json of "
                f"{reference.reference}, which stops at {_listed(_stops(reference))}"
            )
    return warnings


def end_of_turn(tokenizer: Any) -> tuple[str, int] | None:
    """Finds the special token that a chat template writes after an answer; None where it writes none."""
    import jinja2

    answer = "an answer"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except jinja2.exceptions.TemplateError:  # a template may want other roles
        return None
    special = {*tokenizer.all_special_ids, *(k for k, t in tokenizer.added_tokens_decoder.items() if t.special)}
    after = tokenizer.encode(text.rpartition(answer)[2], add_special_tokens=False)
    end = next((k for k in after if k in special), None)
    return None if end is None else (str(tokenizer.convert_ids_to_tokens(end)), end)


def _stops(model: Checkpoint) -> frozenset[int]:
    """The tokens at which generation stops: those that transformers finds, and the tokenizer's."""
    own = model.load_tokenizer().loaded.eos_token_id if model.tokenizer_files else None
    return model.stop_tokens if own is None else model.stop_tokens | {int(own)}


def _listed(tokens: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(tokens))) or "no token"
