"""The HF backend: lm-eval's own HFLM around the resident model, for whatever the native one does not do."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance

from evomerge.errors import CandidateError
from evomerge.evaluation.backends.registry import Backend, BackendOptions
from evomerge.evaluation.tasks.requests import Requests
from evomerge.system.hashing import digest
from evomerge.system.quiet import quiet

PROBE = Requests("probe", ((Instance("loglikelihood", {}, ("1 2 3", " 4"), 0, ("probe", 0, 1)),),))
"""One log-likelihood of nothing in particular, which shows whether a model's numbers are finite."""


class HFBackend(Backend):
    """Answers requests with lm-eval's HFLM.

    Args:
        options: As for every backend. HFLM batches by rows; a batch has as many as would fill `batch_tokens` with 128
            tokens each (None: 32 rows).
    """

    def __init__(self, options: BackendOptions) -> None:
        self.tokenizer = options.encoder.tokenizer
        self.max_length = options.encoder.max_length
        self.think_end_token = options.think_end_token
        self.batch_size = max(1, (options.batch_tokens or 4096) // 128)

    def prepare(self, model: Any) -> None:
        """Asks for one log-likelihood: generated text does not show that it was drawn from NaN.

        Raises:
            CandidateError: It is not finite.
        """
        with quiet():
            ask_lm(self._lm(model), PROBE, [0])

    def respond(self, model: Any, requests: Requests, indices: Sequence[int]) -> list[list[list[Any]]]:
        """Returns the model's responses: for each item, for each instance, one per repeat.

        Raises:
            CandidateError: A log-likelihood is not finite.
        """
        with quiet():
            return ask_lm(self._lm(model), requests, indices)

    def _lm(self, model: Any) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(self.tokenizer),
            max_length=self.max_length,
            batch_size=self.batch_size,
            think_end_token=self.think_end_token,
        )

    def digest(self, requests: Requests, indices: Sequence[int]) -> str:
        """Returns the identity of the batches."""
        text = repr(("hf", self.batch_size, self.max_length, tuple(indices)))
        return digest(text)


def ask_lm(lm: Any, requests: Requests, indices: Sequence[int]) -> list[list[list[Any]]]:
    """Asks one of lm-eval's own models: returns for each item, for each instance, one per repeat.

    Raises:
        CandidateError: A log-likelihood is not finite.
    """
    asked = [instance for index in indices for instance in requests.by_item[index]]
    answers: dict[int, list[Any]] = {}
    for kind in dict.fromkeys(instance.request_type for instance in asked):
        rows = [k for k, instance in enumerate(asked) if instance.request_type == kind]
        rows = [k for k in rows for _ in range(asked[k].repeats)]
        given = getattr(lm, kind)([copy.deepcopy(asked[k]) for k in rows], disable_tqdm=True)
        for k, answer in zip(rows, given, strict=True):
            answers.setdefault(k, []).append(answer)
    _require_finite(answers)
    flat = iter(answers[k] for k in range(len(asked)))
    return [[next(flat) for _ in requests.by_item[index]] for index in indices]


def _require_finite(answers: dict[int, list[Any]]) -> None:
    for responses in answers.values():
        for answer in responses:
            value = answer[0] if isinstance(answer, tuple) else answer
            if isinstance(value, float) and not abs(value) < float("inf"):
                raise CandidateError("the model's log-likelihoods are not finite, so it has no score")
