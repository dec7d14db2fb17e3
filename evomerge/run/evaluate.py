"""Any checkpoint scored with the evaluator that a search uses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.dtypes import parse_dtype, torch_dtype
from evomerge.checkpoints.matching.reconcile import reconcile
from evomerge.checkpoints.reference import resolve_reference
from evomerge.engine.resident import Resident
from evomerge.errors import BadInput, TaskError
from evomerge.evaluation.backends.registry import BackendName
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.scores import ScoreTable, score_table, table_to_json
from evomerge.evaluation.tasks.lm_eval_tasks import find_tasks, group_scores
from evomerge.planning.plan import make_plan
from evomerge.recipe import parse_recipe
from evomerge.recipe.parse import single_model
from evomerge.system.inputs import Inputs


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
    limit: int | None = None,
    num_fewshot: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    batch_tokens: int | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
    backend: str = "native",
    warn: Callable[[str], object] = warnings.warn,
) -> Evaluation:
    """Scores a model with the evaluator that a search uses.

    Args:
        model: A folder, a Hub id, `base+adapter`, or `zoo:NAME`.
        tasks: lm-eval tasks, groups or tags.
        include_path: Folders with more task files.
        limit: Only the first items of each task.
        num_fewshot: Examples before each question; None leaves it to the tasks.
        dtype: What the model computes in.
        device: Where it runs.
        batch_tokens: Tokens a batch; None for what suits the device.
        apply_chat_template: Render prompts as conversations.
        fewshot_as_multiturn: Each example a turn of its own; None for where a chat template is applied.
        system_instruction: What every prompt begins with.
        backend: "native", "hf" for lm-eval's own HFLM, or "vllm" (on a GPU, with the extra of that name).
        warn: Called with what is odd but possible.

    Raises:
        BadInput: When the model or a task cannot be used.
        CandidateError: When the model's logits are not finite.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"limit: at least 1 item, got {limit}")
    if backend not in get_args(BackendName):
        raise BadInput(f"--backend: '{backend}' is not one of {', '.join(get_args(BackendName))}")
    try:
        compute_dtype = torch_dtype(parse_dtype(dtype))
    except KeyError:
        raise BadInput(f"--dtype: '{dtype}' is not one of float32, bfloat16, float16") from None
    reference = resolve_reference(model, Path.cwd())
    checkpoint = reconcile({reference: open_checkpoint(reference)}).checkpoints[reference]
    task_set = find_tasks(tasks, include_path=include_path, num_fewshot=num_fewshot)
    if task_set.problems:
        raise TaskError((*task_set.problems, *task_set.missing))
    for text in (*(f"left out: {text}" for text in task_set.missing), *task_set.twice):
        warn(text)
    inputs = Inputs([*checkpoint.inputs, *(file for task in task_set.tasks.values() for file in task.files)])
    evaluator = Evaluator(
        task_set.tasks,
        checkpoint.load_tokenizer().loaded,
        checkpoint.load_config(),
        batch_tokens=batch_tokens,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
        system_instruction=system_instruction,
        backend=cast(BackendName, backend),
    )
    selection = {name: indices[:limit] for name, indices in evaluator.all_items.items()}
    for text in evaluator.check(selection):
        warn(text)
    plan = make_plan(parse_recipe(single_model(reference)), {reference: checkpoint})
    resident, _ = Resident({reference: checkpoint}, compute_dtype, device).write(plan)
    scores = score_table(evaluator.score(resident, selection))
    inputs.renew(sampled=True)
    return Evaluation(model, scores, group_scores(task_set, scores))
