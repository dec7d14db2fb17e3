"""Writes what a model answered as `lm_eval --log_samples` writes it, so that its viewers open it."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import OutputError
from evomerge.evaluation.tasks.lm_eval_tasks import TaskSet
from evomerge.evaluation.tasks.task import Task
from evomerge.system.quiet import silent

Answered = Mapping[str, tuple[Sequence[int], Sequence[Sequence[Any]]]]
"""Task to the positions of items, and to their lm-eval instances with responses."""


def write_lm_eval_files(
    folder: Path,
    model: str,
    task_set: TaskSet,
    answered: Answered,
    config: Mapping[str, Any],
    *,
    samples: bool,
    bootstrap_iters: int,
) -> list[Path]:
    """Writes results and samples by lm-eval's own code.

    Args:
        folder: lm-eval's ``--output_path``: a folder, or a file that ends with .json.
        model: What the model is called.
        task_set: The tasks and groups.
        answered: What the model answered.
        config: lm-eval's "config": how it was asked.
        samples: Whether every sample is written too.
        bootstrap_iters: Bootstrap samples for standard errors.

    Returns:
        The files.

    Raises:
        OutputError: They cannot be written.
    """
    from lm_eval.evaluator_utils import _process_results
    from lm_eval.loggers import EvaluationTracker

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else lm-eval's bootstrap forks a pool
    with silent():
        values = {name: _values(task_set.tasks[name], *answer) for name, answer in answered.items()}
        whole = _process_results(values, {group.name: group for group in task_set.groups}, bootstrap_iters)
        logged = dict(whole.samples)
        results = whole._to_eval_results(samples=logged)
        results.pop("samples", None)
        results |= {"config": {"model": "hf", **config}, "date": time.time()}
        tracker = EvaluationTracker(output_path=str(folder))
        prompting = {key: config.get(key) for key in ("system_instruction", "chat_template", "fewshot_as_multiturn")}
        tracker.general_config_tracker.log_experiment_args(
            model_source="hf", model_args={"pretrained": model}, **prompting
        )
        before = set(_files(folder))
        tracker.save_results_aggregated(results=results, samples=logged)
        for name in logged if samples else ():
            tracker.save_results_samples(task_name=name, samples=logged[name])
    written = sorted(set(_files(folder)) - before)
    if len(written) != 1 + len(logged) * samples:  # lm-eval only logs why
        raise OutputError(f"{folder}: lm-eval's files cannot be written there")
    return written


def _files(folder: Path) -> list[Path]:
    inside = folder.parent if folder.suffix == ".json" else folder
    return [path for path in inside.rglob("*") if path.suffix in (".json", ".jsonl")]


def _values(task: Task, indices: Sequence[int], instances: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """lm-eval's accumulator of a task: the values of every metric and filter, and the samples."""
    from lm_eval.utils import handle_non_serializable, hash_string

    lm_task = task.lm_eval_task
    values: dict[tuple[str, str], list[Any]] = defaultdict(list)
    samples = []
    for ensemble in lm_task._filters:
        ensemble.apply([instance for group in instances for instance in group])
    for name in task.filters:
        for index, group in zip(indices, instances, strict=True):
            doc, target = task.docs[index], lm_task.doc_to_target(task.docs[index])
            filtered = [instance.filtered_resps[name] for instance in group]
            metrics = dict(lm_task.process_results(doc, filtered))
            for metric, value in metrics.items():
                values[metric, name].append(value)
            text = json.dumps(group[0].doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
            samples.append(
                {
                    "doc_id": index,
                    "doc": doc,
                    "target": target,
                    "arguments": [instance.args for instance in group],
                    "resps": [instance.resps for instance in group],
                    "filtered_resps": filtered,
                    "filter": name,
                    "metrics": list(metrics),
                    "doc_hash": hash_string(text),
                    "prompt_hash": hash_string(group[0].arguments[0]),
                    "target_hash": hash_string(str(target)),
                    **metrics,
                }
            )
    return {"task": lm_task, "raw_metrics": values, "logged_samples": samples}
