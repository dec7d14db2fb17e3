"""A candidate as a checkpoint: weights, card, samples, and one more scoring of what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.dtypes import parse_dtype, torch_dtype
from evomerge.checkpoints.layout import Layout
from evomerge.engine.to_disk import refuse_inputs, write_checkpoint
from evomerge.errors import BadInput, RunError
from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.lm_eval_command import items_by_task, lm_eval_commands
from evomerge.evaluation.scores import ItemScores, score_table
from evomerge.evaluation.splits import SEARCH, TEST, Selection
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import Problem, environment, open_problem
from evomerge.recipe import Recipe, expand_frankenmerge
from evomerge.recipe.flatten import flattened
from evomerge.recipe.mergekit import to_mergekit_yaml
from evomerge.recipe.parse import single_model
from evomerge.report.lineage import whole_recipe
from evomerge.report.model_card import (
    ReportedScores,
    Rescored,
    again_section,
    licence_verdict,
    licences,
    lineage_section,
    merge_card,
    samples_section,
    scores_section,
)
from evomerge.report.result import RunResult
from evomerge.report.run_data import SAMPLES
from evomerge.report.tables import comparison_text
from evomerge.run.folder import RunFolder
from evomerge.study.candidate import Candidate, find
from evomerge.system.files import expand_home, write_atomic
from evomerge.system.text import without_html

if TYPE_CHECKING:
    from evomerge.study.interfaces import Tracker

ITEMS = "items.json"
"""The numbers of the scored items by task, in an export."""

_SAMPLES = 3
_SAMPLE_TOKENS = 48


def export_recipe(run: Path, out: Path, *, candidate: int | None = None, overwrite: bool = False) -> None:
    """Writes a candidate's recipe: mergekit's YAML where that can express it, EvoMerge's otherwise.

    Winners of rounds that it merges are steps of it, or where all of it is sums, one sum over the first models.

    Raises:
        BadInput: When the run, the candidate or the place does not serve.
    """
    from evomerge.checkpoints.checkpoint import open_checkpoint, open_checkpoints

    out = expand_home(out)
    if out.exists() and not overwrite:
        raise BadInput(f"{out}: exists already; --overwrite replaces it")
    folder = RunFolder.existing(run)
    history = folder.candidates()
    recipe = whole_recipe(history, find_candidate(folder, candidate, history))
    layout = open_checkpoint(recipe.external_models()[0]).layout
    if layout.main is not None:
        recipe = expand_frankenmerge(_flattened(recipe, layout), layout.layer_count)
    refuse_inputs(out, open_checkpoints(recipe.external_models()))
    write_atomic(out, to_mergekit_yaml(recipe) or recipe.to_yaml())


def _flattened(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe over the first models alone, where one sum says it; of models with one stack of layers."""
    return flattened(recipe, tensor_layers(layout), layout.layer_count) if len(layout.stacks) == 1 else recipe


def tensor_layers(layout: Layout) -> list[tuple[str, int]]:
    """Lists the tensors of a model with one stack, each with its layer: -1 before them, their number after."""
    outside = {"before": -1, "after": layout.layer_count}
    located = ((name, layout.locate(name)) for name in layout.names)
    return [(n, outside.get(str(at.position), -1) if at.layer is None else at.layer) for n, at in located]


def export_candidate(
    run: Path, out: Path, *, candidate: int | None = None, overwrite: bool = False, max_shard_size: str = "5GB"
) -> str:
    """Writes a candidate as a Hugging Face checkpoint and scores what was written.

    Args:
        run: The run folder.
        out: The checkpoint's folder.
        candidate: Its number; None for the winner.
        overwrite: Replace a folder that is there.
        max_shard_size: Largest file of the checkpoint.

    Returns:
        What was written and whether its scores agree with the search's, as text.

    Raises:
        BadInput: When the run or the candidate does not serve.
        OutputError: When writing fails; what was there before is intact.
    """
    folder = RunFolder.existing(run)
    chosen = find_candidate(folder, candidate)
    if chosen.state != "done":
        raise RunError(f"{run}: candidate {chosen.number} has no scores ({chosen.state}: {chosen.failure})")
    problem = open_run(folder)
    runner = ModelRunner(problem)
    return write_export(
        problem, runner, folder, chosen, expand_home(out), overwrite=overwrite, max_shard_size=max_shard_size
    )


def keep_best(problem: Problem, runner: ModelRunner, folder: RunFolder, result: RunResult, tracker: Tracker) -> None:
    """Keeps the best finalists as checkpoints in the run's `best/`, as many as the specification asks for."""
    rest = sorted(result.finalists, key=lambda finalist: (-finalist.pooled, finalist.candidate))
    in_order = [result.winner.candidate, *(row.candidate for row in result.front), *(row.candidate for row in rest)]
    numbers = list(dict.fromkeys(in_order))
    for number in numbers[: folder.spec.run.keep]:
        out = folder.root / "best" / f"candidate-{number}"
        if not out.exists():
            tracker.report(f"writing candidate {number} to {out}")
            out.parent.mkdir(exist_ok=True)
            tracker.report(write_export(problem, runner, folder, find_candidate(folder, number), out))


def write_export(
    problem: Problem,
    runner: ModelRunner,
    folder: RunFolder,
    candidate: Candidate,
    out: Path,
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> str:
    """Writes one candidate of an open run; see `export_candidate`."""
    plan = runner.plan(candidate.recipe)
    recipe = whole_recipe(folder.candidates(), candidate)
    sentences: list[str] = []

    def finish(partial: Path) -> None:
        """Reads the written weights back, scores them, and completes the card before the folder gets its name."""
        runner.check_inputs(whole=True)
        model = _load(partial, folder.spec.evaluation.dtype)
        split = measured_split(folder, plan.digest)
        rescored = _rescore(runner.evaluator, problem.splits[split], folder, model, plan.digest, split)
        samples = _samples(problem, runner, model)
        sentences.append(rescored.sentence())
        reported = reported_scores(problem, folder, plan.digest, split)
        body = _card_body(folder, candidate, reported, rescored, samples, _commands(problem, split))
        card = merge_card(recipe, problem.checkpoints, body, reported=reported)
        (partial / "README.md").write_text(card, encoding="utf-8")
        (partial / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        if folder.spec.evaluation.chat_template is not None:  # what was scored with it is used with it
            (partial / "chat_template.jinja").write_text(problem.tokenizer.chat_template, encoding="utf-8")
        scores = {"split": split, "measured": rescored.measured, "now": rescored.now}
        items = items_by_task(problem.tasks, problem.splits[split])
        (partial / ITEMS).write_text(json.dumps(items), encoding="utf-8")
        (partial / "scores.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")
        source = next(iter(folder.spec.models.sources))
        rows = [{"prompt": p, "merged": own, "source": source, "by_source": other} for p, own, other in samples]
        (partial / SAMPLES).write_text(json.dumps({"samples": rows}, indent=2), encoding="utf-8")

    write_checkpoint(
        plan, problem.checkpoints, out, card="", overwrite=overwrite, max_shard_size=max_shard_size, finish=finish
    )
    _, warning = licence_verdict(licences(problem.checkpoints))
    notes = [f"candidate {candidate.number} ({candidate.operator}) is in {out}", *sentences]
    return "\n".join(notes + ([f"warning: {warning}"] if warning else []))


def open_run(folder: RunFolder) -> Problem:
    """Opens what a run names, and the winners of its rounds, so that every candidate can be made.

    Raises:
        RunError: Models or data have changed since the run began.
        BadInput: Something cannot be opened any more.
    """
    opened = open_problem(folder.with_winners())
    for part in (folder, *map(RunFolder.existing, folder.rounds().values())):
        own = replace(opened, spec=part.spec)
        own = replace(own, checkpoints={reference: opened.checkpoints[reference] for reference in own.models.values()})
        part.check_environment(environment(own))
    return replace(opened, spec=folder.spec)


def find_candidate(folder: RunFolder, number: int | None, history: tuple[Candidate, ...] | None = None) -> Candidate:
    """Finds a candidate of a run by its number; None for the winner.

    Args:
        folder: The run.
        number: The number.
        history: The run's candidates, where they are read already.

    Raises:
        RunError: There is none of that number.
    """
    history = folder.candidates() if history is None else history
    number = folder.winner(history) if number is None else number
    candidate = find(history, number)
    if candidate is None:
        raise RunError(f"{folder.root}: no candidate {number}; there are {len(history)}, counted from 0")
    return candidate


def _load(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch_dtype(parse_dtype(dtype)), local_files_only=True
    ).eval()


def measured_split(folder: RunFolder, plan: str) -> str:
    """Chooses the items of an export's scores: test items where the run measured them, search items otherwise."""
    return TEST if folder.scores.load(plan, TEST) is not None else SEARCH


def reported_scores(problem: Problem, folder: RunFolder, plan: str, split: str) -> ReportedScores:
    """Reads what a plan scores on a split by the goals' own metrics."""
    scores = score_table(folder.scores.load(plan, split) or {})
    goals = [goal for goal in problem.reported.goals if goal.metric in scores.get(goal.task, {})]
    rows = tuple((goal.task, goal.metric, scores[goal.task][goal.metric]) for goal in goals)
    return ReportedScores(folder.spec.name, split, rows)


def _rescore(
    evaluator: Evaluator, selection: Selection, folder: RunFolder, model: Any, plan: str, split: str
) -> Rescored:
    now = evaluator.score(model, selection)
    measured = folder.scores.load(plan, split)
    if measured is None:
        raise RunError(f"{folder.root}: the candidate was never scored, so there is nothing to compare with")
    return Rescored(split, _values(measured), _values(now))


def _values(scores: Mapping[str, ItemScores]) -> dict[str, dict[str, float]]:
    return {task: {metric: score.value for metric, score in row.items()} for task, row in score_table(scores).items()}


def _samples(problem: Problem, runner: ModelRunner, model: Any) -> list[tuple[str, str, str]]:
    """(prompt, the merged model's continuation, the first source's), one for each of a few tasks."""
    source = next(iter(problem.spec.models.sources.values()))
    prompts = [prompt_of(runner.evaluator, task) for task in list(problem.tasks)[:_SAMPLES]]
    prompts = [prompt for prompt in prompts if prompt]  # a scorer's items need not have texts
    merged = [continuation(model, problem.tokenizer, prompt, _SAMPLE_TOKENS) for prompt in prompts]
    source_model = runner.materialise(runner.plan(single_model(source)))
    original = [continuation(source_model, problem.tokenizer, prompt, _SAMPLE_TOKENS) for prompt in prompts]
    return list(zip(prompts, merged, original, strict=True))


def _commands(problem: Problem, split: str) -> list[str]:
    """The command lines of lm-eval that give the scores on a split, in the folder of the export's parent."""
    settings = problem.spec.evaluation
    arguments: dict[str, Any] = {"dtype": settings.dtype, "max_length": settings.max_length}
    arguments |= {"think_end_token": settings.think_end_token, "chat_template_args": settings.chat_template_args}
    flags = ["--apply_chat_template"] if settings.apply_chat_template else []
    if settings.fewshot_as_multiturn is not None:
        flags += ["--fewshot_as_multiturn", str(settings.fewshot_as_multiturn)]
    if settings.system_instruction:
        flags += ["--system_instruction", settings.system_instruction]
    folders = [*settings.include_paths]
    folders += [str(Path(task.task).parent) for task in settings.tasks if task.task.endswith((".yaml", ".yml"))]
    return lm_eval_commands(
        problem.tasks,
        problem.splits[split],
        model="OUT",
        samples=f"OUT/{ITEMS}",
        include_path=list(dict.fromkeys(folders)),
        model_args={key: value for key, value in arguments.items() if value},
        flags=flags,
    )


def _card_body(
    folder: RunFolder,
    candidate: Candidate,
    reported: ReportedScores,
    rescored: Rescored,
    samples: Sequence[tuple[str, str, str]],
    commands: Sequence[str],
) -> str:
    """The part of the card between the heading and the recipe."""
    sections = [
        f"Candidate {candidate.number} of the search `{folder.spec.name}`, generation {candidate.generation}, "
        f"made by: {candidate.operator}.\n",
        scores_section(reported, rescored, folder.spec.evaluation.dtype),
        *_comparison(folder.result(), candidate),
        again_section(commands, ITEMS),
        lineage_section(folder.candidates(), candidate.number),
        samples_section(samples, source=next(iter(folder.spec.models.sources))),
    ]
    return "\n".join(section for section in sections if section)


def _comparison(result: RunResult | None, candidate: Candidate) -> list[str]:
    """How the winner compares with its sources; nothing for other candidates."""
    if result is None or result.winner.candidate != candidate.number:
        return []
    return [f"## Beside its sources\n\n{without_html(comparison_text(result))}\n"]


def prompt_of(evaluator: Evaluator, task: str) -> str:
    """Takes a prompt from a task's first item: its context, or the first words of its text where it has none."""
    context, text = evaluator.texts(task, 0)
    if context.strip():
        return context
    words = text.split()
    return " ".join(words[: max(2, len(words) // 2)])


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Generates what a model goes on to write after a prompt, greedily, at most this many tokens."""
    import torch

    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        output = model.generate(**encoded, do_sample=False, max_new_tokens=tokens, pad_token_id=pad)
    return str(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
