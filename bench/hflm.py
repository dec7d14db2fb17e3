"""Shipped lm-eval tasks through lm-eval's own HFLM and through this evaluator, on models of every architecture.

    python bench/hflm.py [--models llama,gpt2] [--tasks hellaswag,gsm8k] [--rows 6]

Every task gets synthetic rows with the columns that it reads, in a folder that stands for its data set. HFLM has a
batch of one. What is compared: every log-likelihood, every text, every prompt, every metric behind every filter, and
the standard errors. The table says the largest difference of each model; anything else is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DISABLE_MULTIPROC", "1")

import datasets
import lm_eval.evaluator
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import evomerge.run.evaluate
from evomerge.evaluation.programs.pass_at_k import code_eval_here
from evomerge.report.tables import table
from evomerge.run.evaluate import evaluate
from evomerge.system.quiet import quiet
from tests.architectures import ARCHITECTURES, CAUSAL
from tests.models import byte_tokenizer
from tests.shipped_data import ROWS, write_shipped_data

RESULTS = Path(__file__).parent / "results" / "hflm.md"
GENERATION = {"max_gen_toks": 8}
CONTEXT = 1024
TASKS = [task for task in ROWS if task != "cruxeval_input"]
"""All but those whose texts are drawn at random."""


def write_model(name: str, folder: Path) -> Path:
    """A random model of an architecture, with byte tokens and room for prompts."""
    ARCHITECTURES[name].build_for_bytes(CONTEXT, 1).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)
    return folder


def by_hflm(folder: Path, tasks: list[str], manager: TaskManager) -> dict[str, Any]:
    """What lm_eval reports; programs are run by our `code_eval`, for its own comes from the Hub."""
    with quiet(), code_eval_here(allowed=True):
        lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
        results: dict[str, Any] = simple_evaluate(
            lm,
            tasks=list(tasks),
            task_manager=manager,
            gen_kwargs=dict(GENERATION),
            bootstrap_iters=2,
            confirm_run_unsafe_code=True,
        )
    return results


def by_evomerge(folder: Path, tasks: list[str], out: Path) -> dict[str, Any]:
    """The same from the files that `evomerge eval --log_samples` writes."""
    options: dict[str, Any] = {"gen_kwargs": GENERATION, "output_path": out, "log_samples": True}
    evaluate(str(folder), tasks, **options, confirm_run_unsafe_code=True, warn=lambda text: None)
    (file,) = out.rglob("results_*.json")
    results: dict[str, Any] = json.loads(file.read_text())
    results["samples"] = {
        task: [json.loads(line) for line in path.read_text().splitlines()]
        for task in tasks
        for path in out.rglob(f"samples_{task}_2*.jsonl")
    }
    return results


def differences(task: str, theirs: dict[str, Any], own: dict[str, Any]) -> tuple[float, list[str]]:
    """(the largest difference of two log-likelihoods, everything else that differs) on one task."""
    wrong, largest = [], 0.0
    samples = {(s["doc_id"], s["filter"]): s for s in own["samples"][task]}
    for sample in theirs["samples"][task]:
        other = samples.get((sample["doc_id"], sample["filter"]))
        where = f"{task}, item {sample['doc_id']}"
        if other is None or other["prompt_hash"] != sample["prompt_hash"] or other["doc_hash"] != sample["doc_hash"]:
            wrong.append(f"{where}: another document or prompt")
            continue
        for a, b in zip(flat(sample["resps"]), flat(other["resps"]), strict=True):
            try:
                largest = max(largest, abs(float(a) - float(b)))
            except ValueError:
                if str(a) != str(b):
                    wrong.append(f"{where}: {a!r}, not {b!r}")
    for key, value in theirs["results"][task].items():
        other = own["results"][task].get(key)
        bootstrapped = "_stderr" in key and key.partition("_stderr")[0] in ("f1", "mcc", "perplexity")
        if isinstance(value, float) and not bootstrapped and not abs(value - other) <= 1e-4 * max(1.0, abs(value)):
            wrong.append(f"{task}: {key} is {value}, not {other}")
    return largest, wrong


def flat(value: Any) -> Iterator[Any]:
    """The numbers and texts in nested lists."""
    for part in value if isinstance(value, list | tuple) else ():
        yield from flat(part) if isinstance(part, list | tuple) else [part]


def compare(name: str, tasks: list[str], manager: TaskManager, root: Path) -> tuple[list[str], list[str]]:
    """(the row of the table, what differs) of one architecture."""
    folder = write_model(name, root / "models" / name)
    theirs, own = by_hflm(folder, tasks, manager), by_evomerge(folder, tasks, root / "out" / name)
    each = [differences(task, theirs, own) for task in tasks]
    wrong = [text for _, texts in each for text in texts]
    items = sum(len(theirs["samples"][task]) for task in tasks)
    print(f"{name}: {max(largest for largest, _ in each):.1e}, {len(wrong)} differences", flush=True)
    return [name, str(len(tasks)), str(items), f"{max(n for n, _ in each):.1e}", str(len(wrong))], wrong


def main() -> None:
    """Compares, prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CAUSAL))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rows", type=int, default=6)
    options = parser.parse_args()
    tasks, names = options.tasks.split(","), options.models.split(",")
    torch.set_num_threads(1)
    lm_eval.evaluator.add_env_info = lambda results: None  # its inventory of the machine takes longer than all the rest
    evomerge.run.evaluate._DRAWS = 2  # errors that are drawn are not compared
    with quiet():
        manager = TaskManager()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"  # the user's may have rows of an earlier version
        write_shipped_data(Path(folder), {task: ROWS[task] for task in tasks}, options.rows)
        compared = [compare(name, tasks, manager, Path(folder)) for name in names]
    head = ["model", "tasks", "items and filters", "largest difference of log-likelihoods", "other differences"]
    lines = [table(head, [row for row, _ in compared])]
    lines += [f"* {row[0]}: {text}" for row, wrong in compared for text in wrong]
    print("\n".join(lines))
    if names == CAUSAL and tasks == TASKS:
        note = f"# lm-eval's HFLM and this evaluator\n\n`python bench/hflm.py`: {', '.join(tasks)}.\n"
        RESULTS.write_text("\n".join([note, *lines, ""]))


if __name__ == "__main__":
    main()
