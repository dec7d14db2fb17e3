"""Everything that can be wrong with a search or a recipe, found in seconds; and what it will need."""

from __future__ import annotations

import math
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.checkpoint import open_checkpoints
from evomerge.checkpoints.dtypes import parse_dtype, torch_dtype
from evomerge.checkpoints.matching.compatible import not_finite
from evomerge.errors import BadInput, CheckpointError, SpecError
from evomerge.evaluation.splits import GUARD, SEARCH, SELECT, TEST, Selection
from evomerge.planning.plan import Plan
from evomerge.recipe import load_recipe
from evomerge.recipe.parse import single_model
from evomerge.report.tables import table
from evomerge.run.merge import plan_documents, refuse_crimes
from evomerge.run.preflight import check_models, load_search
from evomerge.space.baselines import baselines
from evomerge.spec.schema import SearchSpec
from evomerge.study.rounds import WINNERS
from evomerge.system.files import read_text
from evomerge.system.yaml import MOST_YAML, read_documents

if TYPE_CHECKING:  # it loads lm-eval, which a recipe does not need
    from evomerge.problem.model_runner import ModelRunner
    from evomerge.problem.problem import Problem

_SEARCH_KEYS = {"name", "space", "evaluation", "search", "run"}  # of these a recipe may have a name


@dataclass(frozen=True)
class PlanOnly:
    """Asks for a search's plan alone: where its models live and what that takes, from their headers.

    Attributes:
        host, device: Bytes of memory that the machine has; None for those of this one.
    """

    host: int | None = None
    device: int | None = None


def check_file(
    path: Path,
    *,
    allow_crimes: bool = False,
    truncate_vocabulary: bool = False,
    sources: bool = False,
    plan: PlanOnly | None = None,
) -> str:
    """Checks a search.yaml or a recipe; the options are those of `evomerge.run.merge.merge_to_folder`.

    Args:
        path: The file.
        allow_crimes: As there.
        truncate_vocabulary: As there.
        sources: Also survey a search's sources (`problem/source_survey.py`): a minute for models of 135M.
        plan: Only plan a search's memory.

    Returns:
        What was found and what it will need, as text.

    Raises:
        BadInput: With every problem found.
    """
    documents = read_documents(read_text(path, BadInput, limit=MOST_YAML), str(path), BadInput)
    if documents and not any(_is_search(document) for document in documents):
        if sources:
            raise BadInput(f"{path}: a recipe; --sources surveys those of a search, on the items of its tasks")
        if plan is not None:
            raise BadInput(f"{path}: a recipe; --plan is of the models that a search keeps in memory")
        return check_recipe(path, allow_crimes=allow_crimes, truncate_vocabulary=truncate_vocabulary)
    spec = load_search(path)
    return "\n".join(plan_search(spec, plan)) if plan is not None else check_search(spec, sources=sources)


def _is_search(document: Any) -> bool:
    """Anything but a recipe, or a list of them."""
    if isinstance(document, dict):
        return "merge_method" not in document and bool(_SEARCH_KEYS & set(document))
    return not isinstance(document, list)


def check_recipe(path: Path, *, allow_crimes: bool = False, truncate_vocabulary: bool = False) -> str:
    """Checks a recipe and the models it names."""
    recipe = load_recipe(path)
    checkpoints = open_checkpoints(recipe.external_models())
    if not allow_crimes:
        refuse_crimes(checkpoints)
    broken = [problem for checkpoint in checkpoints.values() for problem in not_finite(checkpoint)]
    if broken:
        raise CheckpointError(broken)
    warnings = list(recipe.warnings)
    plans = plan_documents(recipe, checkpoints, warnings.append, truncate_vocabulary=truncate_vocabulary)
    sizes = [output_bytes(plan) for plan in plans]
    lines = [*(f"warning: {text}" for text in warnings)]
    for document, plan, size in zip(recipe.documents, plans, sizes, strict=False):
        what = f"{document.merge_method} of {len(document.models())} models, {len(plan.operations)} tensors"
        lines.append(f"{path}: {what}" if document is recipe else f"step {document.name}: {what}, {_gigabytes(size)}")
    if len(plans) < len(recipe.documents):
        lines.append(f"{path}: what comes after step {recipe.steps[len(plans) - 1].name} shows when that is there")
    else:
        lines.append(f"the checkpoint will take {_gigabytes(sizes[-1])} on the disk ({_free(Path.cwd())} free here)")
    if recipe.steps:
        lines.append(f"its steps take {_gigabytes(sum(sizes[: len(recipe.steps)]))} beside it until it is there")
    return "\n".join(lines)


def check_search(spec: SearchSpec, *, sources: bool = False) -> str:
    """Checks a search: models, tasks, splits, space; scores a few items to estimate the time; surveys its sources."""
    if sources and spec.models.base is None:
        raise SpecError("models.base: none is named, and --sources surveys what sources have that a base has not")
    from evomerge.problem.model_runner import ModelRunner
    from evomerge.problem.problem import open_problem
    from evomerge.run.warm_start import warm_starts

    planned = plan_search(spec, PlanOnly())  # before anything is read that takes long
    problem = open_problem(spec)
    runner = ModelRunner(problem)
    space = problem.space
    starts = warm_starts(spec, space, problem.reference_model, runner.plan) if spec.search.warm_starts else ()
    seeds = max(0, len(starts) - len(baselines(space)))
    warnings = check_models(problem, runner)
    plan = runner.plan(single_model(next(iter(spec.models.sources.values()))))
    splits = [split for split in (SEARCH, SELECT, TEST, GUARD) if problem.splits[split]]
    rows = [
        [name, task.output_type, *(str(len(problem.splits[split].get(name, ()))) for split in splits)]
        for name, task in problem.tasks.items()
    ]
    return "\n".join(
        [
            *(f"warning: {text}" for text in warnings),
            f"{spec.name}: {len(spec.models.sources)} sources, {space.size} genes, "
            f"{spec.search.candidates} candidates of {spec.search.algorithm}",
            *([f"warm start: {seeds} of generation 0 from {', '.join(spec.search.warm_starts)}"] if seeds else []),
            table(["task", "type", *splits], rows),
            *planned,
            *_needs(problem, runner, plan, open_dtype=spec.evaluation.dtype == "auto"),
            *(_survey_lines(problem, runner) if sources else []),
        ]
    )


def plan_search(spec: SearchSpec, plan: PlanOnly) -> list[str]:
    """Plans what lives where, from the headers of the models.

    Raises:
        SpecError: The search does not fit, with the numbers.
    """
    import torch

    from evomerge.problem.needs import search_needs, this_machine
    from evomerge.problem.problem import reference_of

    models = [*spec.models.sources.values(), *([] if spec.models.base is None else [spec.models.base])]
    checkpoints = open_checkpoints(models)
    threads = torch.get_num_threads()
    machine = this_machine(spec.evaluation.device, threads, host=plan.host, device=plan.device)
    needs = search_needs(spec, checkpoints, checkpoints[reference_of(spec)], machine)
    needs.check()
    return needs.lines()


def _needs(problem: Problem, runner: ModelRunner, plan: Plan, *, open_dtype: bool) -> list[str]:
    """What a search will need: dtype, memory, disk, time."""
    spec, selection = problem.spec, problem.splits[SEARCH]
    opened = sum(checkpoint.nbytes for checkpoint in problem.checkpoints.values())
    dtype, processes, budget = spec.evaluation.dtype, spec.run.workers, spec.search.candidates
    seconds, sample = _seconds_per_candidate(runner, plan, selection)
    weights = sum(math.prod(op.shape) for op in plan.operations) * torch_dtype(parse_dtype(dtype)).itemsize
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + weights  # so far it has scored a source's own
    size, kept = output_bytes(plan), spec.run.keep
    winners = WINNERS * (spec.search.rounds - 1)
    more = f", up to {_gigabytes(size * winners)} for the {winners} sources of later rounds" if winners else ""
    all_of_it = f"{_duration(seconds * budget / processes)} for {budget}"
    return [
        f"dtype: {dtype}" + (", of float32 and bfloat16 the faster here; a run keeps its own" if open_dtype else ""),
        f"memory: about {_gigabytes(own * processes)}, of which {_gigabytes(weights * processes)} are a candidate's "
        f"weights and up to {_gigabytes(opened)} the models' memory-mapped files",
        f"disk: {_gigabytes(size * kept)} for {kept} kept checkpoints{more} ({_free(spec.folder)} free there)",
        f"time: about {_duration(seconds)} to score a candidate on all search items, {all_of_it}; an estimate from "
        f"{sample} of {sum(map(len, selection.values()))} items, without merging, races and what else runs here",
    ]


_BEST_LAYERS = 3


def _survey_lines(problem: Problem, runner: ModelRunner) -> list[str]:
    """What more of each source is worth, and each pair's agreement."""
    from evomerge.problem.source_survey import survey_sources

    survey = survey_sources(problem, runner)
    names, worth = survey.sources, survey.worth
    rows = []
    for k, name in enumerate(names):
        best = sorted(range(len(worth)), key=lambda row, k=k: -worth[row, k])[:_BEST_LAYERS]  # type: ignore[misc]
        layers = ", ".join(f"{'outside' if row == len(worth) - 1 else row} ({worth[row, k]:+.3f})" for row in best)
        rows.append([name, f"{survey.moved[k]:.1%}", f"{worth[:, k].sum():+.3f}", layers])
    pairs = [
        [f"{names[a]}, {names[b]}", f"{survey.agreement[a, b]:+.2f}", f"{survey.alike[a, b]:+.2f}"]
        for a in range(len(names))
        for b in range(a + 1, len(names))
    ]
    return [
        f"sources, at their average, on {survey.items} items:",
        table(["source", "moves hidden states by", "more of it is worth", "most in layers"], rows),
        *([table(["pair", "answers move alike", "hidden states move alike"], pairs)] if pairs else []),
        "worth: growth of the search's score, as a share, if a source's weight rose by 1, to first order.",
        "alike: cosines; below zero, one takes away what the other gives.",
    ]


def output_bytes(plan: Plan) -> int:
    """Computes the size of a plan's result on the disk."""
    from evomerge.checkpoints.header import TensorSpec

    return sum(TensorSpec(op.output, op.shape, op.dtype).nbytes for op in plan.operations)


_SAMPLE = 4  # items of each task


def _seconds_per_candidate(runner: ModelRunner, plan: Plan, selection: Selection) -> tuple[float, int]:
    """From scoring a few items of each task, and their share of the tokens; and how many they were."""
    evaluator = runner.evaluator
    few = {task: indices[:_SAMPLE] for task, indices in selection.items()}
    model = runner.materialise(plan)
    first = next(iter(few))
    evaluator.score(model, {first: few[first][:1]})  # what the first call does once
    seconds = 0.0
    for task, indices in few.items():
        started = time.perf_counter()
        evaluator.score(model, {task: indices})
        taken = time.perf_counter() - started
        of_all, of_few = (sum(1 + len(evaluator.tokens(task, k)) for k in part) for part in (selection[task], indices))
        seconds += taken * of_all / of_few
    return seconds, sum(map(len, few.values()))


def _duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _free(path: Path) -> str:
    existing: Any = next(p for p in [path.resolve(), *path.resolve().parents] if p.exists())
    return _gigabytes(shutil.disk_usage(existing).free)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
