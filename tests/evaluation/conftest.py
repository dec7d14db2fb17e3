"""A tiny model with opinions, and one local task of every kind."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.evaluation.evaluator import Evaluator
from evomerge.evaluation.tasks.lm_eval_tasks import load_tasks
from evomerge.evaluation.tasks.task import Task
from tests.models import write_tiny_llama

WORDS = ("red", "green", "blue", "seven", "eight", "river", "stone", "cloud", "is", "was", "the", "a", "under", "over")


def sentence(generator: np.random.Generator, low: int, high: int) -> str:
    """Some random words."""
    return " ".join(generator.choice(WORDS, size=int(generator.integers(low, high))))


def documents(count: int = 24) -> list[dict[str, Any]]:
    """Documents that serve every task below."""
    generator = np.random.default_rng(5)
    docs = []
    for k in range(count):
        # Choices that share a prefix with each other, and of several lengths.
        stem = str(generator.choice(WORDS))
        choices = [f"{stem} {sentence(generator, 1, 3)} {n}" for n in range(3 + k % 3)]
        docs.append(
            {
                "question": sentence(generator, 2, 9) + (" " if k % 4 == 0 else ""),
                "choices": choices,
                "label": int(generator.integers(len(choices))),
                "text": sentence(generator, 3, 60),
                "answer": sentence(generator, 1, 3),
            }
        )
    return docs


METRICS = {
    "mc": ["acc", "acc_norm", "exact_match"],
    "pairs": ["acc", "brier_score", "f1"],
    "ll": ["acc", "perplexity"],
    "rolling": ["bits_per_byte", "byte_perplexity", "word_perplexity"],
    "gen": ["exact_match"],
}
DOWN = {"perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity", "brier_score"}
AGGREGATION = {
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
    "byte_perplexity": "weighted_perplexity",
    "word_perplexity": "weighted_perplexity",
    "brier_score": "brier_score",
    "f1": "f1",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mc": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
    },
    "pairs": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": "{{label % 2}}",
        "doc_to_choice": "{{[text, question + answer]}}",
    },
    "ll": {"output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": " {{answer}}"},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    "gen": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        "filter_list": [
            {"name": "plain", "filter": [{"function": "take_first"}]},
            {"name": "low", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
        ],
    },
}


def write_task(folder: Path, name: str, data: str = "data/docs.jsonl", **changes: Any) -> Path:
    """Writes one of the tasks above; the path of its data is relative to the folder above `folder`."""
    kind = changes.pop("kind", name)
    metrics = [
        {"metric": m, "aggregation": AGGREGATION.get(m, "mean"), "higher_is_better": m not in DOWN}
        for m in METRICS[kind]
    ]
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        **CONFIGS[kind],
        "metric_list": metrics,
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_documents(path: Path, docs: list[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return path


@functools.cache
def tasks_of(folder: Path, names: tuple[str, ...], num_fewshot: int | None = None) -> dict[str, Task]:
    """Tasks of a folder, each choice of them loaded once: requests are built by every evaluator anew."""
    return load_tasks(names, include_path=folder, num_fewshot=num_fewshot)


@dataclass
class Bench:
    """A model, its tokenizer and the folder of the tasks."""

    model: Any
    tokenizer: Any
    folder: Path
    checkpoint: Path

    def evaluator(self, *names: str, **options: Any) -> Evaluator:
        """An evaluator of some of the tasks."""
        return Evaluator(tasks_of(self.folder, names or tuple(CONFIGS)), self.tokenizer, self.model.config, **options)


@pytest.fixture(scope="package", autouse=True)
def no_inventory() -> Iterator[None]:
    """Spares `simple_evaluate` its inventory of the machine (`pip list` and more), most of its time on tiny models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The tiny model with large random weights, so that what it attends to shows in its logits; and the tasks."""
    root = tmp_path_factory.mktemp("evaluation")
    write_documents(root / "data" / "docs.jsonl", documents())
    for name in CONFIGS:
        write_task(root / "tasks", name)
    checkpoint = write_tiny_llama(root / "model", 3, initializer_range=0.25)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return Bench(model, AutoTokenizer.from_pretrained(checkpoint), root / "tasks", checkpoint)
