"""What a task is: items to be scored, and metrics with a direction. Never loads lm-eval itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError, suggest
from evomerge.system.hashing import digest
from evomerge.system.quiet import quiet, seeded

FEWSHOT_SEED = 1234
"""What `lm_eval` draws few-shot examples with unless told otherwise."""

_SMOOTH_METRICS: Mapping[str, Mapping[str, bool]] = {
    "multiple_choice": {"prob": True, "loss": False, "prob_norm": True, "nll_byte": False},
    "loglikelihood": {"prob": True, "nll": False},
}

_SMOOTH_VERSIONS: Mapping[str, Mapping[str, str]] = {
    "multiple_choice": {"acc": "prob", "acc_norm": "prob_norm", "acc_bytes": "prob_norm", "exact_match": "prob"},
    "loglikelihood": {"acc": "prob"},
}


@dataclass(frozen=True, eq=False)
class Task:
    """A benchmark: its documents, which are the items, and its metrics.

    One object of lm-eval's with the documents numbered, and metrics that vary smoothly added to its own.

    Attributes:
        name: The task's name.
        lm_eval_task: lm-eval's own object.
        fewshot_seed: Draws the examples, anew every time the task's requests are built.
    """

    name: str
    lm_eval_task: Any
    fewshot_seed: int = FEWSHOT_SEED

    @property
    def output_type(self) -> str:
        """multiple_choice, loglikelihood, loglikelihood_rolling or generate_until."""
        return str(self.lm_eval_task.OUTPUT_TYPE)

    @property
    def filters(self) -> tuple[str, ...]:
        """The task's filters of responses; metrics are computed behind each."""
        return tuple(ensemble.name for ensemble in self.lm_eval_task._filters)

    @cached_property
    def docs(self) -> tuple[Any, ...]:
        """Every document, in the task's order."""
        with quiet(), seeded():
            return tuple(self.lm_eval_task.eval_docs)

    @cached_property
    def items(self) -> tuple[str, ...]:
        """Our own stable id of every document."""
        return tuple(f"{self.name}:{k}" for k in range(len(self.docs)))

    @cached_property
    def higher_is_better(self) -> dict[str, bool]:
        """Direction of every metric: the task's own, and the smooth ones added to them."""
        own = {name: bool(up) for name, up in self.lm_eval_task.higher_is_better().items()}
        return (
            {**_SMOOTH_METRICS.get(self.output_type, {}), **own}
            if own
            else dict(_SMOOTH_METRICS.get(self.output_type, {}))
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """The task's metrics, its own first."""
        own = tuple(self.lm_eval_task.higher_is_better())
        return (*own, *(name for name in self.higher_is_better if name not in own))

    def direction(self, metric: str) -> bool:
        """Returns whether a higher value of a metric, of any filter, is better."""
        return self.higher_is_better[metric.partition(",")[0]]

    def smooth_metric(self, metric: str) -> str:
        """Returns the metric that varies smoothly where `metric` jumps from wrong to right; else `metric` itself."""
        return _SMOOTH_VERSIONS.get(self.output_type, {}).get(metric.partition(",")[0], metric)

    def require_metric(self, metric: str) -> None:
        """Checks that the task has `metric`.

        Raises:
            TaskError: It has not; the message lists those it has.
        """
        plain, _, name = metric.partition(",")
        if plain not in self.metrics:
            near = suggest(plain, self.metrics)
            raise TaskError(f"task {self.name!r} has no metric {metric!r}{near}; it has {', '.join(self.metrics)}")
        if name and name not in self.filters:
            near = f"{suggest(name, self.filters)}; it has {', '.join(self.filters)}"
            raise TaskError(f"task {self.name!r} has no metric {metric!r}: no filter {name!r}{near}")

    @property
    def files(self) -> tuple[Path, ...]:
        """The local files that its documents were read from."""
        kwargs = self.lm_eval_task.dump_config().get("dataset_kwargs") or {}
        paths = [Path(text) for key in ("data_files", "data_dir") for text in _texts(kwargs.get(key))]
        inside = [sorted(path.rglob("*")) if path.is_dir() else [path] for path in paths]
        return tuple(path for several in inside for path in several if path.is_file())

    @cached_property
    def digest(self) -> str:
        """Identity of the task's settings and documents: changes when either does."""
        config = {key: value for key, value in self.lm_eval_task.dump_config().items() if key not in _PATHS}
        return digest(_json_bytes(config), *map(_json_bytes, self.docs))


_PATHS = frozenset({"metadata", "dataset_kwargs", "dataset_path"})
"""Settings that say where a task's files are, not what is in them."""


def _texts(value: Any) -> list[str]:
    """The texts in a value, however deep."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in _texts(part)]


def _json_bytes(value: Any) -> bytes:
    """JSON of a task's settings or document, the same in every process; functions by name."""
    return json.dumps(
        value, sort_keys=True, default=lambda other: getattr(other, "__qualname__", None) or str(other)
    ).encode()
