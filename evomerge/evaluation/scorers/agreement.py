"""Agreement with experts on their own texts: a goal for people who have models and no benchmark.

Each text is of one source. What that source expects at every position, its likeliest tokens and how likely they are, is
found once a session; a merge is scored by the divergence of its own expectation from that, in nats a token:
Kullback-Leibler, over these tokens, from the source's probabilities made to add up to 1. With the source's side fixed
it is linear in one expected log-likelihood, so it can be differentiated as any log-likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance

from evomerge.errors import TaskError, describe, suggest
from evomerge.evaluation.tasks.requests import SOFT, SoftTargets
from evomerge.evaluation.tasks.scorer_task import Item, LiveModel, ScorerTask
from evomerge.system.arrays import FloatArray
from evomerge.system.hashing import digest

TOP_TOKENS = 32
"""Of what a source expects at a position, so many."""


class Agreement:
    """Scores by the divergence from the sources whose texts the items are.

    Args:
        name: The task's name.
        rows: The items: mappings with "source" and "text".
        path: What they were read from.
    """

    kind = "agreement"
    metric = "divergence"
    higher_is_better = False
    ratio = True
    noise = 0.0
    python_files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, name: str, rows: Sequence[Item], path: Path) -> None:
        self._name = name
        self._rows = rows
        self.files = (path,)
        self.digest = digest(f"agreement {TOP_TOKENS}")
        self.references = tuple(dict.fromkeys(str(row["source"]) for row in rows))
        self._expected: dict[int, SoftTargets] = {}

    def read(self, name: str, model: LiveModel, items: Sequence[Item]) -> None:
        """Keeps what a source expects on its own texts."""
        own = [k for k, row in enumerate(items) if row["source"] == name]
        expected = model.top_tokens([str(items[k]["text"]) for k in own], TOP_TOKENS)
        self._expected |= dict(zip(own, expected, strict=True))

    def requests(self) -> list[Any]:
        """Returns what is asked of every model."""
        kinds: Any = SOFT  # lm-eval has no such type
        return [
            Instance(kinds, dict(row), (self._expected[k],), 0, (self._name, k, 1)) for k, row in enumerate(self._rows)
        ]

    def linear(self, indices: Sequence[int], loglikelihoods: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Returns the divergences over all tokens of each text, the tokens, and the derivatives."""
        weights = [self._expected[k].weights for k in indices]
        least = np.array([float(np.sum(w * np.log(np.maximum(w, 1e-300)))) for w in weights])
        return least - loglikelihoods, np.array([float(len(w)) for w in weights]), np.full(len(indices), -1.0)

    def score(self, model: LiveModel, items: Sequence[Item]) -> list[float]:
        """Is not called: the evaluator asks what `requests` says."""
        raise NotImplementedError


def agreement_task(name: str, rows: Sequence[Item], path: Path, models: Sequence[str]) -> ScorerTask:
    """Makes a task of texts.

    Args:
        name: Its name.
        rows: The texts, and of which model each is.
        path: What they were read from.
        models: The names of the models that there are.

    Raises:
        TaskError: With everything that is wrong with the rows.
    """
    problems = []
    for k, row in enumerate(rows):
        text, source = row.get("text"), row.get("source")
        if not isinstance(text, str) or not text.strip():
            problems.append(f"task {name!r}, {path}, item {k}: a text is expected under 'text', got {describe(text)}")
        if source not in models:
            near = suggest(str(source), models) or f"; there are {', '.join(models)}"
            problems.append(f"task {name!r}, {path}, item {k}: no source is called {describe(source)}{near}")
    if problems:
        more = [f"task {name!r}: {len(problems) - 5} more such problems"] if len(problems) > 5 else []
        raise TaskError(problems[:5] + more)
    parts = tuple(str(row["source"]) for row in rows)
    return ScorerTask(name, None, scorer=Agreement(name, rows, path), rows=tuple(rows), parts=parts)
