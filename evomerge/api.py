"""The same in Python: `evomerge.merge(recipe, out)`, `evomerge.search(spec)`, `evomerge.evaluate(model, tasks)`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

if TYPE_CHECKING:
    from evomerge.recipe import Recipe
    from evomerge.spec.schema import SearchSpec


def merge(
    recipe: Recipe | Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | Path, out: str | Path, **options: Any
) -> Path:
    """Carries out one recipe.

    Args:
        recipe: A recipe, its mapping (or a list of them, for a merge in several steps), or the path of its YAML file.
        out: The checkpoint's folder.
        options: As for `evomerge.run.merge.merge_to_folder`.

    Returns:
        The checkpoint's folder.

    Raises:
        BadInput: When the recipe or a model cannot be used.
        OutputError: When writing fails.
    """
    from evomerge.recipe import load_recipe, parse_recipe
    from evomerge.run.merge import merge_to_folder

    if isinstance(recipe, str | Path):
        recipe = load_recipe(Path(recipe))
    elif isinstance(recipe, Mapping | Sequence):
        recipe = parse_recipe(recipe)
    for text in recipe.warnings:
        warnings.warn(text, stacklevel=2)
    return merge_to_folder(recipe, Path(out), **options)


def search(spec: SearchSpec | Mapping[str, Any] | str | Path, **options: Any) -> dict[str, Any]:
    """Runs a search, or goes on with it.

    Args:
        spec: A specification, its mapping, or the path of its YAML file.
        options: As for `evomerge.run.search.start`.

    Returns:
        The result, as in result.json.
    """
    from evomerge.run.preflight import load_search, parse_search
    from evomerge.run.search import start

    if isinstance(spec, str | Path):
        return start(load_search(Path(spec)), source=Path(spec), **options)
    if isinstance(spec, Mapping):
        spec = parse_search(spec, beside=Path.cwd())
    return start(spec, **options)


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
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
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
        tell: Gets what is worth a warning; Python's own warnings do unless given.

    Returns:
        `{"model", "tasks": {TASK: {METRIC: {"value", "stderr", "n"}}}}`, and under "groups" the same of every group
        that has metrics of its own.

    Raises:
        BadInput: When the model or a task cannot be used.
        CandidateError: When the model's logits are not finite.
    """
    from evomerge.checkpoints.checkpoint import open_checkpoint
    from evomerge.checkpoints.dtypes import torch_dtype
    from evomerge.checkpoints.models import load_config, load_tokenizer, single_model
    from evomerge.checkpoints.reference import resolve_reference
    from evomerge.engine.resident import Resident
    from evomerge.errors import BadInput, TaskError
    from evomerge.evaluation.backends.registry import BackendName
    from evomerge.evaluation.evaluator import Evaluator
    from evomerge.evaluation.scores import score_table, table_to_json
    from evomerge.evaluation.tasks.lm_eval_tasks import find_tasks, group_scores
    from evomerge.planning.plan import make_plan
    from evomerge.recipe import parse_recipe

    if limit is not None and limit < 1:
        raise BadInput(f"limit: at least 1 item, got {limit}")
    if backend not in get_args(BackendName):
        raise BadInput(f"--backend: '{backend}' is not one of {', '.join(get_args(BackendName))}")
    try:
        wanted = torch_dtype(dtype)
    except KeyError:
        raise BadInput(f"--dtype: '{dtype}' is not one of float32, bfloat16, float16") from None
    reference = resolve_reference(model, Path.cwd())
    checkpoint = open_checkpoint(reference)
    found = find_tasks(tasks, include_path=include_path, num_fewshot=num_fewshot)
    if found.problems:
        raise TaskError(found.problems)
    evaluator = Evaluator(
        found.tasks,
        load_tokenizer(checkpoint),
        load_config(checkpoint),
        batch_tokens=batch_tokens,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
        system_instruction=system_instruction,
        backend=cast(BackendName, backend),
    )
    selection = {name: indices[:limit] for name, indices in evaluator.everything.items()}
    for text in evaluator.check(selection):
        (tell or warnings.warn)(text)
    plan = make_plan(parse_recipe(single_model(reference)), {reference: checkpoint})
    resident, _ = Resident({reference: checkpoint}, wanted, device).write(plan)
    scores = score_table(evaluator.score(resident, selection))
    groups = group_scores(found, scores)
    result = {"model": model, "tasks": table_to_json(scores)}
    return result | ({"groups": table_to_json(groups)} if groups else {})
