"""A task whose numbers come from a scorer: whatever values items with a live model, beside lm-eval's own tasks."""

from __future__ import annotations

import copy
import json
import logging
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from evomerge.errors import BadInput, CandidateError, TaskError, describe, suggest
from evomerge.evaluation.scores import ItemScores
from evomerge.evaluation.tasks.task import Task
from evomerge.system.arrays import FloatArray
from evomerge.system.hashing import digest

if TYPE_CHECKING:  # it loads lm-eval
    from evomerge.evaluation.tasks.requests import SoftTargets

log = logging.getLogger(__name__)

Item = Mapping[str, Any]
"""A row of data."""

Pair = tuple[float, float]
"""Numerator and denominator of an item, where scores are ratios of sums."""


class LiveModel(Protocol):
    """What a scorer may ask of the model that is being scored; every call is batched."""

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 256, stop: str | Sequence[str] = ()) -> list[str]:
        """Continues prompts greedily; texts end before a stop string, or with the model's own end."""
        ...

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
    ) -> list[str]:
        """Answers conversations, lists of ``{"role", "content"}``, in the tokenizer's chat template."""
        ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Gives the log-likelihood of the second text of every pair as the continuation of the first."""
        ...

    def top_tokens(self, texts: Sequence[str], most: int) -> list[SoftTargets]:
        """Finds what the model expects at every position of some texts; for scorers of ours."""
        ...


class Scorer(Protocol):
    """Values items with a live model.

    Attributes:
        kind: What it is, in a word.
        metric: What its numbers are called.
        higher_is_better: Their direction.
        ratio: Whether a score is the sum of numerators over the sum of denominators, and no mean.
        digest: Identity of all that decides its values beside model and items.
        files: What it was read from.
        python_files: Those of them that are Python of the user's.
        references: Names of models whose answers it reads before it scores any: "base", or a source's.
        noise: Standard deviation of an item's value, were it valued again; 0 for what is always the same.
        notes: What is worth knowing of it, once it has read these.
    """

    @property
    def kind(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def ratio(self) -> bool: ...
    @property
    def digest(self) -> str: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def python_files(self) -> tuple[Path, ...]: ...
    @property
    def references(self) -> tuple[str, ...]: ...
    @property
    def noise(self) -> float: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def read(self, name: str, model: LiveModel, items: Sequence[Item]) -> None:
        """Reads what one of its references answers."""
        ...

    def score(self, model: LiveModel, items: Sequence[Item]) -> Sequence[float] | Sequence[Pair]:
        """Returns one number for each item; with `ratio`, a numerator and a denominator."""
        ...


class LinearScorer(Scorer, Protocol):
    """A scorer that asks for one log-likelihood an item, the same of every model, and is linear in it."""

    def requests(self) -> Sequence[Any]:
        """Returns each item's request as lm-eval's instance, once the references are read."""
        ...

    def linear(self, indices: Sequence[int], loglikelihoods: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Returns numerators, denominators, and the derivatives of the numerators by the log-likelihoods."""
        ...


@dataclass(frozen=True, eq=False)
class ScorerTask(Task):
    """A task that a scorer values.

    Attributes:
        lm_eval_task: None.
        scorer: Values the items.
        rows: The items.
        parts: What each item is a part of, so that every split has all parts in their proportion; None for no parts.
    """

    scorer: Scorer = field(kw_only=True)
    rows: tuple[Item, ...] = field(kw_only=True)
    parts: tuple[str, ...] | None = field(default=None, kw_only=True)

    @property
    def output_type(self) -> str:
        """The scorer's kind."""
        return self.scorer.kind

    @property
    def filters(self) -> tuple[str, ...]:
        """The one that takes answers as they are."""
        return ("none",)

    @cached_property
    def docs(self) -> tuple[Any, ...]:
        """The items."""
        return self.rows

    @cached_property
    def items(self) -> tuple[str, ...]:
        """Our own stable id of every item."""
        if self.parts is None:
            return tuple(f"{self.name}:{k}" for k in range(len(self.rows)))
        return tuple(f"{self.name}.{part}:{k}" for k, part in enumerate(self.parts))

    @property
    def linear(self) -> LinearScorer | None:
        """The scorer, if it is linear in log-likelihoods."""
        return cast(LinearScorer, self.scorer) if hasattr(self.scorer, "linear") else None

    @cached_property
    def higher_is_better(self) -> dict[str, bool]:
        """The scorer's metric and its direction."""
        return {self.scorer.metric: self.scorer.higher_is_better}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The scorer's metric."""
        return (self.scorer.metric,)

    @property
    def scores_itself(self) -> bool:
        """Only a model shows what it makes of an item."""
        return False

    def smooth_metric(self, metric: str) -> str:
        """Returns the metric: nobody knows of one that asks the same."""
        return metric

    def metric_name(self, metric: str) -> str:
        """Returns the name that scores have for a metric.

        Raises:
            TaskError: The scorer gives another one.
        """
        if metric != self.scorer.metric:
            own = self.scorer.metric
            raise TaskError(f"task {self.name!r} has no metric {metric!r}{suggest(metric, [own])}; it has {own}")
        return metric

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of scorer and data."""
        return self.scorer.files

    @cached_property
    def python_files(self) -> tuple[Path, ...]:
        """The scorer's Python."""
        return self.scorer.python_files

    def label_notes(self, indices: Iterable[int]) -> list[str]:
        """Nothing: items have no labels but what the scorer knows of."""
        return []

    @cached_property
    def digest(self) -> str:
        """Identity of the scorer and the items."""
        return digest(self.scorer.digest, *map(item_digest, self.rows))

    def scores(self, model: LiveModel, indices: Sequence[int]) -> ItemScores:
        """Has the scorer value some items.

        Raises:
            CandidateError: The scorer raises something, or what it gives is no finite number for each item.
        """
        rows = [copy.deepcopy(self.rows[k]) for k in indices]
        try:
            given = self.scorer.score(model, rows)
        except (MemoryError, CandidateError):
            raise
        except BadInput as error:
            if not isinstance(error, TaskError):  # the run's trouble, as a limit that is reached
                raise
            raise CandidateError(f"task {self.name!r}: {error}") from error
        except Exception as error:  # the user's code can raise anything
            log.warning("task %s: its scorer failed", self.name, exc_info=True)
            raise CandidateError(f"task {self.name!r}: its scorer raised {brief(error)}") from error
        return self.item_scores(indices, *self._columns(given, indices))

    def item_scores(self, indices: Sequence[int], numerators: FloatArray, denominators: FloatArray) -> ItemScores:
        """Makes scores of numerators and denominators."""
        metric = self.scorer.metric
        items = tuple(self.items[k] for k in indices)
        noise = {metric: self.scorer.noise} if self.scorer.noise else {}
        columns = {metric: (numerators, denominators)}
        return ItemScores(self.name, items, columns, self.higher_is_better, noise=noise)

    def _columns(self, given: Any, indices: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__len__"):
            raise CandidateError(f"task {self.name!r}: its scorer gave {describe(given)}; {self._expected}")
        if len(given) != len(indices):
            raise CandidateError(
                f"task {self.name!r}: its scorer gave {len(given)} values for {len(indices)} items; {self._expected}"
            )
        columns = np.ones((2, len(indices)))
        for row, (index, value) in enumerate(zip(indices, given, strict=True)):
            parts = tuple(value) if self.scorer.ratio and _is_pair(value) else (value,)
            numbers = [_number(part) for part in parts]
            if None in numbers or (len(numbers) == 2) != self.scorer.ratio:
                raise CandidateError(
                    f"task {self.name!r}, item {index}: its scorer gave {describe(value)}; {self._expected}"
                )
            columns[: len(numbers), row] = numbers
            if not np.isfinite(columns[:, row]).all():
                raise CandidateError(f"task {self.name!r}, item {index}: its scorer gave {value}, which is not finite")
            if columns[1, row] < 0:
                raise CandidateError(f"task {self.name!r}, item {index}: its scorer gave a negative denominator")
        return columns[0], columns[1]

    @property
    def _expected(self) -> str:
        return f"one {'(numerator, denominator)' if self.scorer.ratio else 'number'} an item, in their order, is right"


def item_digest(row: Item) -> str:
    """Returns the identity of an item's content."""
    return digest(json.dumps(row, sort_keys=True, default=str))


def brief(error: BaseException) -> str:
    """Says in a line what was raised, and where in the file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _is_pair(value: Any) -> bool:
    return not isinstance(value, str | bytes) and hasattr(value, "__len__") and len(value) == 2


def _number(value: Any) -> float | None:
    """A value as a number: Python's own, numpy's, or a tensor of one element; None for anything else."""
    if isinstance(value, int | float):
        return float(value)
    if getattr(value, "shape", None) == ():
        try:
            return float(value)
        except (TypeError, ValueError):
            return None
    return None
