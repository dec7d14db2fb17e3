"""Everything that can be wrong with a search or a recipe, found in seconds; and what it will need."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from evomerge.checkpoints.checkpoint import open_checkpoints
from evomerge.checkpoints.compatible import not_finite
from evomerge.engine.plan import Plan, prepare
from evomerge.errors import BadInput, CheckpointError
from evomerge.models import single_model
from evomerge.recipe import load_recipe
from evomerge.spec import SearchSpec, load_spec
from evomerge.strict_yaml import read_yaml
from evomerge.tables import table
from evomerge.workbench import GUARD, SEARCH, SELECT, TEST, Workbench

_SEARCH_KEYS = {"name", "space", "evaluation", "search", "run"}  # a recipe has none of them


def check_file(path: Path) -> str:
    """Checks a search.yaml or a recipe.

    Returns:
        What was found and what it will need, as text.

    Raises:
        BadInput: With every problem found.
    """
    try:
        data = read_yaml(path.read_text(encoding="utf-8"), str(path), BadInput)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    if isinstance(data, dict) and not _SEARCH_KEYS & set(data):
        return check_recipe(path)
    return check_search(load_spec(path))


def check_recipe(path: Path) -> str:
    """Checks a recipe and the models it names."""
    recipe = load_recipe(path)
    plan, checkpoints, odd = prepare(recipe, open_checkpoints(recipe.models()))
    broken = [problem for checkpoint in checkpoints.values() for problem in not_finite(checkpoint)]
    if broken:
        raise CheckpointError(broken)
    size = output_bytes(plan)
    lines = [*(f"warning: {text}" for text in (*recipe.warnings, *odd))]
    lines.append(f"{path}: {recipe.merge_method} of {len(recipe.models())} models, {len(plan.operations)} tensors")
    lines.append(f"the checkpoint will take {_gigabytes(size)} on the disk ({_free(Path.cwd())} free here)")
    return "\n".join(lines)


def check_search(spec: SearchSpec) -> str:
    """Checks a search: models, tasks, splits, space; scores a few items to estimate the time."""
    bench = Workbench(spec)
    source = next(iter(spec.models.sources.values()))
    plan = bench.plan(single_model(source))
    size = output_bytes(plan)
    opened = sum(checkpoint.nbytes for checkpoint in bench.checkpoints.values())
    splits = [split for split in (SEARCH, SELECT, TEST, GUARD) if bench.selections[split]]
    rows = [
        [task, loaded.output_type, *(str(len(bench.selections[split].get(task, ()))) for split in splits)]
        for task, loaded in bench.tasks.items()
    ]
    seconds = _seconds_per_candidate(bench)
    budget = spec.search.candidates
    return "\n".join(
        [
            f"{spec.name}: {len(spec.models.sources)} sources, {bench.space.size} genes, {budget} candidates of "
            f"{spec.search.algorithm}",
            table(["task", "type", *splits], rows),
            f"memory: about {_gigabytes(2 * size + opened)}, of which {_gigabytes(opened)} are the models' files",
            f"disk: {_gigabytes(size * spec.run.keep)} for {spec.run.keep} kept checkpoints "
            f"({_free(spec.folder)} free there)",
            f"time: about {seconds:.1f} s a candidate, {seconds * budget / 3600:.1f} h for {budget}",
        ]
    )


def output_bytes(plan: Plan) -> int:
    """Size of a plan's result on the disk."""
    from evomerge.checkpoints.header import TensorSpec

    return sum(TensorSpec(op.output, op.shape, op.dtype).nbytes for op in plan.operations)


def _seconds_per_candidate(bench: Workbench) -> float:
    """From scoring a few of each task's search items once to warm up and once more."""
    few = {task: indices[:8] for task, indices in bench.selections[SEARCH].items()}
    source = next(iter(bench.spec.models.sources.values()))
    model, _ = bench.resident.write(bench.plan(single_model(source)))
    bench.evaluator.score(model, few)
    seconds = 0.0
    for task, indices in few.items():
        started = time.perf_counter()
        bench.evaluator.score(model, {task: indices})
        seconds += (time.perf_counter() - started) * len(bench.selections[SEARCH][task]) / len(indices)
    return seconds


def _free(path: Path) -> str:
    existing: Any = next(p for p in [path.resolve(), *path.resolve().parents] if p.exists())
    return _gigabytes(shutil.disk_usage(existing).free)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
