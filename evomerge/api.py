"""The same in Python: `evomerge.merge(recipe, out)`, `evomerge.search(spec)`, `evomerge.evaluate(model, tasks)`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
    from evomerge.trackers.console import ConsoleTracker
    from evomerge.trackers.registry import with_trackers

    source = Path(spec) if isinstance(spec, str | Path) else None
    if source is not None:
        opened = load_search(source)
    else:
        opened = parse_search(spec, beside=Path.cwd()) if isinstance(spec, Mapping) else cast("SearchSpec", spec)
    options.setdefault("tracker", with_trackers(ConsoleTracker(), opened.run.track))
    return start(opened, source=source, **options).to_json()


def evaluate(model: str, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """Scores a model with the evaluator that a search uses.

    Args:
        model: A folder, a Hub id, `base+adapter`, or `zoo:NAME`.
        tasks: lm-eval tasks, groups or tags.
        options: As for `evomerge.run.evaluate.evaluate`.

    Returns:
        `{"model", "tasks": {TASK: {METRIC: {"value", "stderr", "n"}}}}`, and under "groups" the same of every group
        that has metrics of its own.

    Raises:
        BadInput: When the model or a task cannot be used.
        CandidateError: When the model's logits are not finite.
    """
    from evomerge.run.evaluate import evaluate as evaluate_model

    return evaluate_model(model, tasks, **options).to_json()


def mean_inputs(model: str, texts: Sequence[str], out: str | Path, **options: Any) -> Path:
    """Writes the mean inputs of a model's matrices over texts, for the stages of a recipe that ask for `activations:`.

    Args:
        model: The base: a folder, a Hub id, `base+adapter`, or `zoo:NAME`.
        texts: 16 to 64 of what the merged model is for.
        out: The `.safetensors` file.
        options: As for `evomerge.problem.mean_inputs.write_mean_inputs`.

    Raises:
        BadInput: When the model cannot be run, or there is no text.
        OutputError: When writing fails.
    """
    from evomerge.problem.mean_inputs import write_mean_inputs

    return write_mean_inputs(model, texts, Path(out), **options)
