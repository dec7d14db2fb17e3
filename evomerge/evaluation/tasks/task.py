"""What a task is: items to be scored, and metrics with a direction. Never loads lm-eval itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError, show, suggest
from evomerge.evaluation.programs.pass_at_k import runs_programs
from evomerge.evaluation.tasks.strangers import python_files
from evomerge.system.hashing import digest
from evomerge.system.quiet import quiet, seeded

FEWSHOT_SEED = 1234
"""What `lm_eval` draws few-shot examples with unless told otherwise."""

TOKENS = "tokens"
"""The metric of every task that generates text: how many tokens it was, an item."""

_SMOOTH_METRICS: Mapping[str, Mapping[str, bool]] = {
    "multiple_choice": {"prob": True, "loss": False, "prob_norm": True, "nll_byte": False},
    "loglikelihood": {"prob": True, "nll": False},
    "generate_until": {TOKENS: False},
}
"""Metrics of ours that every task of an output type has, and whether higher is better."""

_SMOOTH_VERSIONS: Mapping[str, Mapping[str, str]] = {
    "multiple_choice": {"acc": "prob", "acc_norm": "prob_norm", "acc_bytes": "prob_norm"},
    "loglikelihood": {"acc": "prob"},
}
"""What asks the same question of the same numbers, where lm-eval's own code computes the metric (docs/tasks.md)."""


_OF_LM_EVAL = (
    "acc",
    "acc_norm",
    "acc_bytes",
    "acc_mutual_info",
    "exact_match",
    "f1",
    "mcc",
    "brier_score",
    "perplexity",
)
"""Metrics that lm-eval computes where nothing is generated."""

SOME_ANSWERS: Mapping[str, Any] = {
    "loglikelihood": (-1.0, False),
    "loglikelihood_rolling": -1.0,
    "generate_until": "1",
}
"""What a model might answer."""


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
        return {**self._smooth_metrics, **self._own_metrics}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The task's metrics, its own first."""
        return (*self._own_metrics, *(name for name in self._smooth_metrics if name not in self._own_metrics))

    @property
    def _smooth_metrics(self) -> Mapping[str, bool]:
        """None where the choices are made by the task's own code: which of them is right, only that knows."""
        get_config = getattr(self.lm_eval_task, "get_config", None)
        if self.output_type == "multiple_choice" and get_config is not None and get_config("doc_to_choice") is None:
            return {}
        return _SMOOTH_METRICS.get(self.output_type, {})

    @property
    def has_smooth_metrics(self) -> bool:
        """Whether the task has metrics that vary smoothly."""
        return bool(self._smooth_metrics)

    @cached_property
    def _own_metrics(self) -> dict[str, bool]:
        """The metrics that the task's code gives for its documents, by what it gives for the first.

        What is declared need not be given: a function of several metrics has a name of its own. What a task's own code
        does not give for the first document, it may give for others.
        """
        declared = {name: bool(up) for name, up in self.lm_eval_task.higher_is_better().items()}
        try:
            with quiet(), seeded():
                given = self._metrics_of_first()
        except Exception:  # a task's own code can raise anything; where it matters, scoring says so
            return declared
        directions = self.lm_eval_task.higher_is_better()  # lm-eval adds what its metric functions give
        own = {name: up for name, up in declared.items() if name in given}
        own |= {name: bool(directions.get(name, True)) for name in given if name not in own}
        return own | (declared if self.scores_itself else {})

    def _metrics_of_first(self) -> list[str]:
        """The metrics of the first document, had a model answered it somehow."""
        task, doc = self.lm_eval_task, self.docs[0]
        context = task.fewshot_context(doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
        made = task.construct_requests(doc=doc, ctx=context, metadata=(self.name, 0, task.get_config("repeats") or 1))
        instances = made if isinstance(made, list) else [made]
        for instance in instances:
            instance.resps = [SOME_ANSWERS[instance.request_type]] * instance.repeats
        for ensemble in task._filters:
            ensemble.apply(instances)
        answers = [instance.filtered_resps[self.filters[0]] for instance in instances]
        return [str(name) for name in task.process_results(doc, answers)]

    @property
    def scores_itself(self) -> bool:
        """Whether code of the task's own values the responses, so that a metric need not be what its name says."""
        method = getattr(type(self.lm_eval_task), "process_results", None)
        inherited = method is None or method.__qualname__ == "ConfigurableTask.process_results"
        config = getattr(self.lm_eval_task, "config", None)
        return not inherited or callable(getattr(config, "process_results", None))

    @property
    def runs_programs(self) -> bool:
        """Whether what the model writes is run to be valued."""
        return runs_programs(self.lm_eval_task)

    def direction(self, metric: str) -> bool:
        """Returns whether a higher value of a metric, of any filter, is better."""
        return self.higher_is_better[metric.partition(",")[0]]

    def smooth_metric(self, metric: str) -> str:
        """Returns the metric that varies smoothly where `metric` jumps from wrong to right, and else asks the same.

        `metric` itself where there is none, or where the task's own code says what it means.
        """
        plain = metric.partition(",")[0]
        smooth = _SMOOTH_VERSIONS.get(self.output_type, {}).get(plain, metric)
        return smooth if smooth in self._smooth_metrics and not self.scores_itself else metric

    def metric_name(self, metric: str) -> str:
        """Returns the name that scores have for a metric, which lm-eval's "metric,filter" may say of any task.

        Raises:
            TaskError: The task has no such metric; the message lists those it has.
        """
        plain, _, name = metric.partition(",")
        if plain not in self.metrics:
            near = suggest(plain, self.metrics)
            raise TaskError(f"task {self.name!r} has no metric {metric!r}{near}; it has {', '.join(self.metrics)}")
        if name and name not in self.filters:
            near = f"{suggest(name, self.filters)}; it has {', '.join(map(repr, self.filters))}"
            raise TaskError(f"task {self.name!r} has no metric {metric!r}: no filter {name!r}{near}")
        return plain if len(self.filters) == 1 or plain not in self._own_metrics else metric

    @property
    def files(self) -> tuple[Path, ...]:
        """The local files that its documents were read from."""
        kwargs = self.lm_eval_task.dump_config().get("dataset_kwargs") or {}
        paths = [Path(text) for key in ("data_files", "data_dir") for text in _texts(kwargs.get(key))]
        inside = [sorted(path.rglob("*")) if path.is_dir() else [path] for path in paths]
        return tuple(path for several in inside for path in several if path.is_file())

    @cached_property
    def python_files(self) -> tuple[Path, ...]:
        """The files of Python that run when its items are made or scored, beside those of installed packages."""
        return python_files(self.lm_eval_task)

    def document_notes(self, indices: Sequence[int]) -> list[str]:
        """Says what is odd about some documents: labels that are none of their choices, fields that are not there.

        Raises:
            TaskError: One cannot be scored, or none has a label that counts.
        """
        return [*self.label_notes(indices), *self._gap_notes(indices), *self._metric_notes()]

    def _metric_notes(self) -> list[str]:
        """Says which metrics of the task's file lm-eval does not compute for tasks of its kind: it passes over them."""
        declared = self.lm_eval_task.higher_is_better() if hasattr(self.lm_eval_task, "higher_is_better") else {}
        if self.scores_itself or self.output_type == "generate_until":  # where a function gives names of its own
            return []
        return [
            f"task {self.name!r}: lm-eval computes no {name!r} for {self.output_type}{suggest(name, _OF_LM_EVAL)}"
            for name in declared
            if name not in self._own_metrics
        ]

    def _gap_notes(self, indices: Sequence[int]) -> list[str]:
        """Says which documents lack a field that a template writes out."""
        import jinja2

        get_config = getattr(self.lm_eval_task, "get_config", None)
        if get_config is None:
            return []
        names: dict[str, str] = {}
        for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            if isinstance(template := get_config(key), str) and "{{" in template:
                for output in jinja2.Environment().parse(template).find_all(jinja2.nodes.Output):
                    names |= {node.name: key for node in output.nodes if isinstance(node, jinja2.nodes.Name)}
        notes = []
        for name, key in names.items():
            lacking = [index for index in indices if _field(self.docs[index], name) is None]
            if lacking:
                notes.append(
                    f"task {self.name!r}, document {lacking[0]}: it has no {name!r}, so its {key} says None there, as "
                    f"in lm-eval ({len(lacking)} of {len(indices)} documents)"
                )
        return notes

    def label_notes(self, indices: Iterable[int]) -> list[str]:
        """Says which of some documents have a label that is none of their choices, or no choices at all.

        Raises:
            TaskError: No document has a label that counts, or one has no choices.
        """
        if self.output_type != "multiple_choice" or not hasattr(self.lm_eval_task, "doc_to_choice"):
            return []
        wrong: dict[int, Any] = {}
        chosen = list(indices)
        with quiet(), seeded():
            for index in chosen:
                wrong |= self._label_problem(index)
        if not wrong:
            return []
        first, label = next(iter(wrong.items()))
        text = f"task {self.name!r}, document {first}: its label {show(label)} (doc_to_target) is none of its choices"
        if len(wrong) == len(chosen):
            raise TaskError(f"{text} (doc_to_choice), and so it is with every document that is used")
        return [f"{text}; it counts as wrong, as in lm-eval ({len(wrong)} of {len(chosen)} documents)"]

    def _label_problem(self, index: int) -> dict[int, Any]:
        task, doc = self.lm_eval_task, self.docs[index]
        choices = task.doc_to_choice(doc)
        if not choices:
            raise TaskError(f"task {self.name!r}, document {index}: it has no choices (doc_to_choice)")
        label = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
        if label is None:
            raise TaskError(f"task {self.name!r}, document {index}: it has no label (doc_to_target)")
        labels = label if isinstance(label, list) else [label]
        numbers = [choices.index(one) if one in choices else -1 for one in labels if isinstance(one, str)]
        numbers += [one for one in labels if isinstance(one, int)]
        return {} if all(-len(choices) <= one < len(choices) and one != -1 for one in numbers) else {index: label}

    @cached_property
    def digest(self) -> str:
        """Identity of the task's settings and documents: changes when either does."""
        config = {key: value for key, value in self.lm_eval_task.dump_config().items() if key not in _PATHS}
        return digest(_json_bytes(config), *map(_json_bytes, self.docs))


_PATHS = frozenset({"metadata", "dataset_kwargs", "dataset_path"})
"""Settings that say where a task's files are, not what is in them."""


def _field(doc: Any, name: str) -> Any:
    return doc.get(name, "") if isinstance(doc, Mapping) else ""


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
