"""Values the responses to a task's requests by lm-eval's own code: per-item metrics."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lm_eval.api.metrics as lm
import numpy as np
import torch

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.scores import BITS, EXP, MEAN, ItemScores
from evomerge.evaluation.tasks.group_task import GroupTask
from evomerge.evaluation.tasks.task import TOKENS, Task
from evomerge.system.arrays import FloatArray
from evomerge.system.quiet import silent
from evomerge.system.threads import run_all

log = logging.getLogger(__name__)

Smooth = dict[str, tuple[FloatArray, FloatArray]]
"""Metric to (numerators, denominators)."""

Rows = list[Any]
"""One metric's value for every document, as the task's `process_results` gives it; None where it gives none."""


def item_scores(task: Task, indices: Sequence[int], instances: Sequence[Sequence[Any]]) -> ItemScores:
    """Scores some items of a task.

    Args:
        task: The task.
        indices: The documents that were asked about.
        instances: For each, its lm-eval instances, with responses.

    Raises:
        TaskError: The task's own code fails on a document.
        CandidateError: A value is not finite.
    """
    if isinstance(task, GroupTask):
        return _pooled(task, indices, instances)
    flat = [instance for group in instances for instance in group]
    names = []
    for ensemble in task.lm_eval_task._filters:
        ensemble.apply(flat)
        names.append(ensemble.name)
    values: dict[str, Rows] = {}
    for k, name in enumerate(names):
        answers = [[instance.filtered_resps[name] for instance in group] for group in instances]
        for position, item in enumerate(_process_all(task, indices, answers)):
            for metric, value in item.items():
                # The first filter's metrics go by their plain name; with several, each goes by "metric,filter" too.
                for full in [metric] * (k == 0) + [f"{metric},{name}"] * (len(names) > 1):
                    values.setdefault(full, [None] * len(indices))[position] = value
    return _collect(task, indices, values, _smooth_metrics(task, indices, instances))


def with_corpus_errors(task: Task, scores: ItemScores, bootstrap_iters: int) -> ItemScores:
    """Adds the standard errors that lm-eval gives for metrics of the corpus, most of them by its bootstrap.

    Args:
        task: The task.
        scores: Its scores.
        bootstrap_iters: Bootstrap samples, as lm-eval has them; 0 for no errors.
    """
    errors = {}
    for name, rows in scores.corpus_rows.items():
        metric = name.partition(",")[0]
        iters = min(bootstrap_iters, 100) if metric in _FEWER_ITERS else bootstrap_iters
        error = lm.stderr_for_metric(task.lm_eval_task.aggregation().get(metric), iters)
        given = [row for row in rows if row is not None]
        if error is not None and len(given) > 1:
            os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else lm-eval's bootstrap forks a pool
            with silent():  # it prints; and of samples with one label alone, scikit-learn warns
                errors[name] = float(error(given))
    return replace(scores, corpus_errors=errors) if errors else scores


_FEWER_ITERS = ("bleu", "chrf", "chrf++", "ter")
"""Metrics for which lm-eval draws 100 samples at most."""


def _pooled(task: GroupTask, indices: Sequence[int], instances: Sequence[Sequence[Any]]) -> ItemScores:
    by_part: dict[int, tuple[list[int], list[Sequence[Any]]]] = {}
    for index, group in zip(indices, instances, strict=True):
        part, item = task.locate(index)
        chosen, asked = by_part.setdefault(part, ([], []))
        chosen.append(item)
        asked.append(group)
    return task.pool(indices, {part: item_scores(task.parts[part], *both) for part, both in by_part.items()})


def _process_all(task: Task, indices: Sequence[int], answers: Sequence[list[Any]]) -> list[dict[str, Any]]:
    """What the task gives for each item; where it runs programs, as many at once as this process has cores."""
    work = [partial(_process, task, index, results) for index, results in zip(indices, answers, strict=True)]
    return run_all(work, torch.get_num_threads()) if task.runs_programs else [item() for item in work]


def _process(task: Task, index: int, results: list[Any]) -> dict[str, Any]:
    try:
        return dict(task.lm_eval_task.process_results(task.docs[index], results))
    except Exception as error:  # a task's own code can raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise TaskError(f"task {task.name!r}, item {index}: its own scoring fails: {reason}") from error


def _collect(task: Task, indices: Sequence[int], values: dict[str, Rows], smooth: Smooth) -> ItemScores:
    metrics: dict[str, tuple[FloatArray, FloatArray]] = {}
    transforms: dict[str, str] = {}
    corpus: dict[str, float] = {}
    corpus_rows: dict[str, Rows] = {}
    directions = task.higher_is_better
    for name, rows in values.items():
        aggregate = task.lm_eval_task.aggregation().get(name.partition(",")[0], lm.mean)
        columns = _columns(rows, aggregate)
        if columns is None:
            corpus[name] = _aggregate(task, name, aggregate, rows)
            if lm.stderr_for_metric(aggregate, 1) is not None and (plain := _as_json(rows)) is not None:
                corpus_rows[name] = plain
            continue
        metrics[name] = columns[0], columns[1]
        if columns[2] != MEAN:
            transforms[name] = columns[2]
    metrics |= {name: columns for name, columns in smooth.items() if name not in values}
    for name, (numerators, _) in metrics.items():
        wrong = np.flatnonzero(~np.isfinite(numerators))
        if len(wrong):
            where = f"task {task.name!r}, item {indices[int(wrong[0])]}"
            raise CandidateError(f"{where}: {name} is not finite, so the candidate has no score")
    up = {name: directions.get(name.partition(",")[0], True) for name in (*metrics, *corpus)}
    return ItemScores(task.name, tuple(task.items[k] for k in indices), metrics, up, transforms, corpus, corpus_rows)


def _columns(rows: Rows, aggregate: Callable[[Any], Any]) -> tuple[FloatArray, FloatArray, str] | None:
    """(numerators, denominators, transform) of a metric that is a mean or ratio of items; None for any other."""
    if aggregate in (lm.mean, lm.nanmean, lm.perplexity):
        if not all(row is None or np.isscalar(row) for row in rows):
            return None
        column = np.array([math.nan if row is None else float(row) for row in rows])
        absent = np.array([row is None for row in rows])
        if aggregate is lm.nanmean:
            absent |= np.isnan(column)
        measured = (~absent).astype(np.float64)
        return np.where(absent, 0.0, column), measured, EXP if aggregate is lm.perplexity else MEAN
    if aggregate in (lm.weighted_perplexity, lm.bits_per_byte):
        pairs = np.array([(0.0, 0.0) if row is None else row for row in rows], dtype=np.float64)
        return pairs[:, 0].copy(), pairs[:, 1].copy(), BITS if aggregate is lm.bits_per_byte else EXP
    if aggregate is lm.brier_score:
        column = np.array([0.0 if row is None else float(lm.brier_score([row])) for row in rows])
        return column, np.array([float(row is not None) for row in rows]), MEAN
    return None


def _aggregate(task: Task, name: str, aggregate: Callable[[Any], Any], rows: Rows) -> float:
    """A corpus metric's value on exactly these items."""
    try:
        return float(aggregate([row for row in rows if row is not None]))
    except Exception as error:  # a task's own aggregation can raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise TaskError(f"task {task.name!r}: {name} cannot be aggregated: {reason}") from error


def _as_json(rows: Rows) -> Rows | None:
    """Values as they are once written and read; None for those that JSON does not have."""
    try:
        plain: Rows = json.loads(json.dumps(rows, default=lambda value: value.item()))
    except (TypeError, ValueError, AttributeError):
        return None
    return plain


def _smooth_metrics(task: Task, indices: Sequence[int], instances: Sequence[Sequence[Any]]) -> Smooth:
    """Metrics that vary smoothly where accuracy jumps: their numerators and denominators.

    multiple_choice: `prob`, the right choice's share of the choices' total probability, and `loss`, minus its log;
    `prob_norm`, the same share by log-likelihoods per character (as `acc_norm` compares them) times the choices' mean
    length; `nll_byte`, minus the right choice's log-likelihood per byte. Where no choice is right, as where a label is
    out of range, the share is 0, and the others have no value.
    loglikelihood: `prob`, the probability of the continuation, and `nll`, minus its log.
    generate_until: `tokens`, how many were written, as a mean over repeats.
    """
    if not task.has_smooth_metrics:
        return {}
    ones = np.ones(len(indices))
    if task.output_type == "generate_until":
        return {TOKENS: (np.array([_tokens_written(group) for group in instances]), ones)}
    if task.output_type == "loglikelihood":
        column = np.array([float(group[0].resps[0][0]) for group in instances])
        return {"prob": (np.exp(column), ones), "nll": (-column, ones)}
    rows = []
    for index, group in zip(indices, instances, strict=True):
        right, choices = right_choices(task, index)
        if not right:
            rows.append((-math.inf, -math.inf, 0.0, 0.0))
            continue
        lls = np.array([float(instance.resps[0][0]) for instance in group[: len(choices)]])
        lengths = np.array([float(max(len(choice), 1)) for choice in choices])
        sizes = np.array([float(max(len(choice.encode()), 1)) for choice in choices])
        normed = lls / lengths * lengths.mean()
        rows.append((_log_share(lls, right), _log_share(normed, right), float((lls / sizes)[right].max()), 1.0))
    share, share_norm, per_byte, answered = np.array(rows, dtype=np.float64).T
    if task.scores_itself and not answered.any():  # its target is no choice, so nothing is known of what is right
        return {}
    loss = np.where(answered == 0, 0.0, -share)
    return {
        "prob": (np.exp(share), ones),
        "loss": (loss, answered),
        "prob_norm": (np.exp(share_norm), ones),
        "nll_byte": (-per_byte, answered),
    }


def _tokens_written(instances: Sequence[Any]) -> float:
    """The tokens of an item's answers; 0 where the responses are not a model's."""
    counts = [[float(getattr(answer, "tokens", 0)) for answer in instance.resps] for instance in instances]
    return sum(sum(of_repeats) / len(of_repeats) for of_repeats in counts if of_repeats)


def _log_share(lls: FloatArray, right: Sequence[int]) -> float:
    """Log of the right choices' share of the total probability."""
    return float(np.logaddexp.reduce(lls[list(right)]) - np.logaddexp.reduce(lls))


def right_choices(task: Task, index: int) -> tuple[list[int], list[str]]:
    """The right choices of a document, and all its choices; none where the label is not among them."""
    if isinstance(task, GroupTask):
        part, item = task.locate(index)
        return right_choices(task.parts[part], item)
    lm_task, doc = task.lm_eval_task, task.docs[index]
    choices = lm_task.doc_to_choice(doc)
    gold = lm_task.doc_to_text(doc) if getattr(lm_task, "multiple_input", 0) else lm_task.doc_to_target(doc)
    labels = gold if isinstance(gold, list) else [gold]
    numbers = [choices.index(label) if label in choices else label for label in labels]
    return [n for n in numbers if isinstance(n, int) and 0 <= n < len(choices)], [str(choice) for choice in choices]
