"""A candidate, or any fine-tune, as a LoRA adapter over its base; a candidate's with the scores of base and adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from evomerge.checkpoints.matching.reconcile import reconcile
from evomerge.checkpoints.reference import is_hub_id, resolve_reference
from evomerge.checkpoints.writer import refuse_taken
from evomerge.engine.low_rank import LowRankAdapter, low_rank_adapter
from evomerge.engine.resident import Resident
from evomerge.errors import BadInput, RunError
from evomerge.evaluation.scores import score_table
from evomerge.planning.plan import make_plan
from evomerge.problem.model_runner import ModelRunner
from evomerge.recipe import parse_recipe
from evomerge.recipe.parse import single_model
from evomerge.report.lineage import whole_recipe
from evomerge.report.model_card import adapter_card
from evomerge.report.tables import table
from evomerge.run.export import find_candidate, measured_split, open_run
from evomerge.run.folder import RunFolder
from evomerge.system.files import expand_home, write_atomic


def export_adapter(run: Path, out: Path, *, rank: int, candidate: int | None = None, overwrite: bool = False) -> str:
    """Writes a candidate as an adapter over the base, scores the two together, and puts that beside the merge's scores.

    Args:
        run: The run folder.
        out: The adapter's folder.
        rank: Of the adapter.
        candidate: Its number; None for the winner.
        overwrite: Replace an adapter that is there.

    Returns:
        What was written, how much of the difference it has, and what it scores, as text.

    Raises:
        BadInput: When the run or the candidate does not serve, or no adapter can say it.
    """
    out = expand_home(out)
    refuse_taken(out, overwrite)
    folder = RunFolder.existing(run)
    base = folder.spec.models.base
    if base is None:
        raise RunError(f"{run}: has no base model that an adapter could be of")
    history = folder.candidates()
    chosen = find_candidate(folder, candidate, history)
    problem = open_run(folder)
    runner = ModelRunner(problem)
    plan = runner.plan(chosen.recipe)
    split = measured_split(folder, plan.digest)
    merge_scores = folder.scores.load(plan.digest, split)
    if merge_scores is None:
        raise RunError(f"{run}: candidate {chosen.number} has no scores ({chosen.state}: {chosen.failure})")
    merged = {name: value.clone() for name, value in runner.materialise(plan).state_dict().items()}
    model = runner.materialise(runner.plan(single_model(base)))
    adapter = low_rank_adapter(model, merged, rank)
    adapter.apply(model)
    now = runner.evaluator.score(model, problem.splits[split])
    scores = {"merge": _values(merge_scores), "base + adapter": _values(now)}
    adapter.write(out, base)
    recipe = whole_recipe(history, chosen)
    body = f"{_sentence(adapter)}\n\n## Scores on the {split} items\n\n{_score_table(scores)}\n"
    write_atomic(out / "README.md", adapter_card(recipe, problem.checkpoints, base, body))
    write_atomic(out / "recipe.yaml", recipe.to_yaml())
    write_atomic(out / "scores.json", json.dumps({"split": split, **scores}, indent=2))
    return "\n".join([f"candidate {chosen.number} is in {out}. {_sentence(adapter)}", _score_table(scores)])


def extract_adapter(model: str, base: str, out: Path, *, rank: int, overwrite: bool = False) -> str:
    """Writes what a model has beyond another one as an adapter.

    Args:
        model: The fine-tune.
        base: What it was tuned from.
        out: The adapter's folder.
        rank: Of the adapter.
        overwrite: Replace an adapter that is there.

    Returns:
        What was written, and how much of the difference it has.

    Raises:
        BadInput: A model cannot be opened, or no adapter can say the difference.
    """
    out = expand_home(out)
    refuse_taken(out, overwrite)
    references = [resolve_reference(name, Path.cwd()) for name in (base, model)]
    if references[0] == references[1]:
        raise BadInput(f"{model} is its own base")
    opened = reconcile({name: open_checkpoint(name) for name in references}).checkpoints
    merged = {name: value.clone() for name, value in _loaded(references[1], opened).state_dict().items()}
    adapter = low_rank_adapter(_loaded(references[0], opened), merged, rank)
    adapter.write(out, base if is_hub_id(base) else references[0])
    return f"{out}: {_sentence(adapter)}"


def _loaded(reference: str, opened: Mapping[str, Checkpoint]) -> Any:
    plan = make_plan(parse_recipe(single_model(reference)), opened, identify=False)
    return Resident(opened).write(plan)[0]


def _sentence(adapter: LowRankAdapter) -> str:
    sentence = (
        f"Of rank {adapter.rank} in {len(adapter.products)} matrices, it has {adapter.share:.1%} of their differences, "
        f"by squares; {len(adapter.whole)} norms are saved whole."
    )
    if adapter.left_out:
        some = ", ".join(adapter.left_out[:3]) + (", ..." if len(adapter.left_out) > 3 else "")
        sentence += f" {len(adapter.left_out)} tensors that differ are left out: {some}."
    return sentence


def _values(scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {task: {metric: score.value for metric, score in row.items()} for task, row in score_table(scores).items()}


def _score_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    first, second = scores.values()
    rows = [
        [task, metric, f"{value:.4f}", f"{second[task][metric]:.4f}"]
        for task, row in first.items()
        for metric, value in row.items()
    ]
    return table(["task", "metric", *scores], rows)
