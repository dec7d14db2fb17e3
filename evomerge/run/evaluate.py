"""Any checkpoint scored with the evaluator that a search uses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.dtypes import parse_dtype, torch_dtype
from evomerge.checkpoints.matching.reconcile import reconcile
from evomerge.checkpoints.reference import resolve_reference
from evomerge.engine.execute import find_device
from evomerge.engine.resident import Resident
from evomerge.errors import BadInput, TaskError
from evomerge.evaluation.backends.registry import BackendName
from evomerge.evaluation.compute_dtype import fastest_dtype
from evomerge.evaluation.evaluator import Evaluator, require_decoder
from evomerge.evaluation.scorers.lm_eval import item_scores, with_corpus_errors
from evomerge.evaluation.scorers.lm_eval_files import write_lm_eval_files
from evomerge.evaluation.scores import ScoreTable, score_table, table_to_json
from evomerge.evaluation.tasks.lm_eval_tasks import TaskSet, find_tasks, group_scores
from evomerge.evaluation.tasks.requests import read_template
from evomerge.planning.plan import make_plan
from evomerge.problem.problem import model_shapes
from evomerge.recipe import parse_recipe
from evomerge.recipe.parse import single_model
from evomerge.system.inputs import Inputs

BOOTSTRAP_ITERS = 200
"""Bootstrap samples for the errors of metrics of the corpus; lm-eval's 100,000 take a quarter of an hour."""


@dataclass(frozen=True)
class Evaluation:
    """What a model scored.

    Attributes:
        model: The model, as it was named.
        tasks: The scores of every task.
        groups: The scores of every group of tasks that has metrics of its own.
    """

    model: str
    tasks: ScoreTable
    groups: ScoreTable

    def to_json(self) -> dict[str, Any]:
        """Returns ``{"model", "tasks": {TASK: {METRIC: {"value", "stderr", "n"}}}}``, and "groups" where there are."""
        content: dict[str, Any] = {"model": self.model, "tasks": table_to_json(self.tasks)}
        return content | ({"groups": table_to_json(self.groups)} if self.groups else {})


def evaluate(
    model: str,
    tasks: Sequence[str],
    *,
    include_path: str | Path | Sequence[str | Path] | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: str | Mapping[str, Any] | None = None,
    max_length: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    batch_tokens: int | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
    chat_template: str | Path | None = None,
    chat_template_args: str | Mapping[str, Any] | None = None,
    think_end_token: str | int | None = None,
    backend: str = "native",
    bootstrap_iters: int = BOOTSTRAP_ITERS,
    output_path: str | Path | None = None,
    log_samples: bool = False,
    confirm_run_unsafe_code: bool = False,
    warn: Callable[[str], object] = warnings.warn,
) -> Evaluation:
    """Scores a model with the evaluator that a search uses.

    Args:
        model: A folder, a Hub id, `base+adapter`, or `zoo:NAME`.
        tasks: lm-eval tasks, groups or tags; patterns of such names; YAML files, or a folder of them.
        include_path: Folders with more task files.
        limit: Only the first items of each task; below 1, this part of them.
        num_fewshot: Examples before each question; None leaves it to the tasks.
        gen_kwargs: Settings of generation that replace those of the tasks: a mapping, JSON, or "key=value,key=value".
        max_length: Longest input in tokens; the model's context if None.
        dtype: What the model computes in; "auto" for the faster of float32 and bfloat16 here.
        device: Where it runs.
        batch_tokens: Tokens a batch; None for what suits the device.
        apply_chat_template: Render prompts as conversations.
        fewshot_as_multiturn: Each example a turn of its own; None for where a chat template is applied.
        system_instruction: What every prompt begins with.
        chat_template: A file with the chat template, in place of the model's own.
        chat_template_args: What the template is rendered with, as `gen_kwargs`.
        think_end_token: What ends the model's thinking; only what follows counts.
        backend: "native", "hf" for lm-eval's own HFLM, or "vllm" (with the extra of that name).
        bootstrap_iters: Samples for the errors of metrics of the corpus, as lm-eval has them; 0 for none.
        output_path: Where lm-eval's own files of results go.
        log_samples: Write every sample there as well.
        confirm_run_unsafe_code: Tasks may run programs that the model writes (`evaluation/programs`).
        warn: Called with what is odd but possible.

    Raises:
        BadInput: When the model or a task cannot be used.
        CandidateError: When the model's logits are not finite.
        OutputError: When the files cannot be written.
    """
    if log_samples and output_path is None:
        raise BadInput("--log_samples: say where they go, with --output_path")
    _check_options(limit, backend, dtype)
    generation = _parsed("--gen_kwargs", gen_kwargs)
    template_args = _parsed("--chat_template_args", chat_template_args)
    find_device(device)
    reference = resolve_reference(model, Path.cwd())
    checkpoint = reconcile({reference: open_checkpoint(reference)}).checkpoints[reference]
    config, chosen = checkpoint.load_config(), cast(BackendName, backend)
    require_decoder(model, config, chosen)
    task_set = _tasks(
        tasks,
        warn,
        include_path=include_path,
        num_fewshot=num_fewshot,
        gen_kwargs=generation,
        unsafe_code=confirm_run_unsafe_code,
    )
    inputs = Inputs([*checkpoint.inputs, *(file for task in task_set.tasks.values() for file in task.files)])
    tokenizer = checkpoint.load_tokenizer().loaded
    if chat_template is not None:
        tokenizer.chat_template = read_template(Path(chat_template))
    prompting: dict[str, Any] = {
        "apply_chat_template": apply_chat_template,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "system_instruction": system_instruction,
        "chat_template_args": template_args,
    }
    evaluator = Evaluator(
        task_set.tasks,
        tokenizer,
        config,
        batch_tokens=batch_tokens,
        max_length=max_length,
        think_end_token=think_end_token,
        backend=chosen,
        **prompting,
    )
    selection = {name: indices[: _count(limit, len(indices))] for name, indices in evaluator.all_items.items()}
    notes, problems = evaluator.examine(selection)
    task_set = _without(task_set, problems)
    selection = {name: indices for name, indices in selection.items() if name in task_set.tasks}
    for text in (*notes, *(f"left out: {text}" for of_task in problems.values() for text in of_task)):
        warn(text)
    if dtype == "auto":
        dtype = fastest_dtype(model_shapes(checkpoint), device)
        warn(f"--dtype auto: {dtype}, the faster one here")
    compute_dtype = torch_dtype(parse_dtype(dtype))
    plan = make_plan(parse_recipe(single_model(reference)), {reference: checkpoint})
    resident, _ = Resident({reference: checkpoint}, compute_dtype, device).write(plan)
    answered = evaluator.answer(resident, selection)
    parts = {
        name: with_corpus_errors(evaluator.tasks[name], item_scores(evaluator.tasks[name], *answer), bootstrap_iters)
        for name, answer in answered.items()
    }
    scores = score_table(parts)
    inputs.renew(sampled=True)
    if output_path is not None:
        settings = {
            "model_args": {"pretrained": model, "dtype": dtype, "backend": backend},
            **{
                "device": device,
                "limit": limit,
                "gen_kwargs": generation,
                "bootstrap_iters": bootstrap_iters,
                **prompting,
            },
            "chat_template": tokenizer.chat_template if apply_chat_template else None,
        }
        out = Path(output_path)
        write_lm_eval_files(
            out, model, task_set, answered, settings, samples=log_samples, bootstrap_iters=bootstrap_iters
        )
    return Evaluation(model, scores, group_scores(task_set, scores))


def _check_options(limit: float | None, backend: str, dtype: str) -> None:
    if limit is not None and limit <= 0:
        raise BadInput(f"limit: a number of items, or a part of them below 1; got {limit:g}")
    if backend not in get_args(BackendName):
        raise BadInput(f"--backend: '{backend}' is not one of {', '.join(get_args(BackendName))}")
    if dtype not in _DTYPES:
        raise BadInput(f"--dtype: '{dtype}' is not one of {', '.join(_DTYPES)}")


_DTYPES = ("float32", "bfloat16", "float16", "auto")


def _tasks(names: Sequence[str], warn: Callable[[str], object], **options: Any) -> TaskSet:
    """The tasks that can be had, where each name stands for one at least; the others are told."""
    task_set = find_tasks(names, **options)
    if task_set.problems:
        raise TaskError((*task_set.problems, *task_set.missing))
    for text in (*(f"left out: {text}" for text in task_set.missing), *task_set.twice):
        warn(text)
    return task_set


def _without(task_set: TaskSet, problems: Mapping[str, tuple[str, ...]]) -> TaskSet:
    """The tasks without those that cannot be scored, where each name still stands for one; groups that hold all theirs.

    Raises:
        TaskError: A name stands for no task any more; with all that is wrong.
    """
    if any(own and problems.keys() >= {*own} for own in task_set.members.values()):
        raise TaskError([problem for of_task in problems.values() for problem in of_task])
    return replace(
        task_set,
        tasks={name: task for name, task in task_set.tasks.items() if name not in problems},
        groups=tuple(group for group in task_set.groups if not problems.keys() & {*_tasks_of(group)}),
    )


def _tasks_of(group: Any) -> list[str]:
    return [task.task_name for task in group.get_all_tasks()]


def _count(limit: float | None, items: int) -> int | None:
    """The items of a limit, as lm-eval counts them."""
    if limit is None:
        return None
    return math.ceil(items * limit) if limit < 1 else int(limit)


def _parsed(option: str, given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings as lm-eval's command line takes them: JSON, or "key=value,key=value" with values as Python has them.

    Raises:
        BadInput: It is neither.
    """
    if not isinstance(given, str):
        return dict(given or {})
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json

    try:
        parsed = try_parse_json(given)
        return dict(parsed if isinstance(parsed, dict) else key_val_to_dict(given))
    except ValueError as error:
        raise BadInput(f"{option}: {error}") from None
