"""The model that is being scored, as scorers see it: texts in, texts and log-likelihoods out, by any backend."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from evomerge.errors import TaskError, describe
from evomerge.evaluation.backends.registry import Backend
from evomerge.evaluation.tasks.requests import Encoder, Requests, SoftTargets
from evomerge.system.hashing import digest


class BackendModel:
    """Answers a scorer's questions by a backend; every call is one batch of requests.

    Args:
        task: The scorer's task, for messages.
        model: The model, prepared.
        backend: Answers requests.
        encoder: Has the tokenizer and the chat template.
    """

    def __init__(self, task: str, model: Any, backend: Backend, encoder: Encoder) -> None:
        self._task = task
        self._model = model
        self._backend = backend
        self._encoder = encoder

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 256, stop: str | Sequence[str] = ()) -> list[str]:
        """Continues prompts greedily.

        Args:
            prompts: The prompts; what is longer than the context loses its beginning.
            max_new_tokens: Tokens at most.
            stop: What a text ends before.

        Raises:
            TaskError: A prompt is empty or no text, or leaves no room for what is to follow.
            CandidateError: The model's logits are not finite.
        """
        until = [stop] if isinstance(stop, str) else list(stop)
        options = {"until": until, "max_gen_toks": max_new_tokens, "do_sample": False}
        return self._ask("generate_until", [[(text, options)] for text in _texts("generate", prompts)])

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
    ) -> list[str]:
        """Answers conversations.

        Args:
            conversations: Lists of ``{"role", "content"}``.
            max_new_tokens: Tokens of an answer at most.
            stop: What an answer ends before.

        Raises:
            TaskError: The tokenizer has no chat template; as `generate`.
            CandidateError: The model's logits are not finite.
        """
        if not getattr(self._encoder.tokenizer, "chat_template", None):
            raise TaskError("chat: the tokenizer has no chat template; evaluation.chat_template can give it one")
        prompts = [self._encoder.apply_chat_template(list(turns)) for turns in conversations]
        return self.generate(prompts, max_new_tokens, stop)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Gives the log-likelihood of every continuation after its context, in nats.

        Neighbours of one context are computed together, which takes less than one by one.

        Args:
            pairs: (context, continuation); an empty context is the tokenizer's BOS.

        Raises:
            TaskError: A continuation is empty, or longer than the context that the model has.
            CandidateError: The model's logits are not finite.
        """
        both = [tuple(_texts("loglikelihood", pair)) for pair in pairs]
        groups = [list(group) for _, group in itertools.groupby(both, key=lambda pair: pair[0])]
        return [float(value) for value, _ in self._ask("loglikelihood", groups)]

    def top_tokens(self, texts: Sequence[str], most: int) -> list[SoftTargets]:
        """Finds what the model expects at every position of some texts; for scorers of ours.

        Args:
            texts: The texts; what is longer than the context loses its end.
            most: How many tokens at each position.

        Raises:
            TaskError: The backend cannot.
            CandidateError: The model's logits are not finite.
        """
        encoder = self._encoder
        rows = [[encoder.prefix_token_id, *encoder.tok_encode(text, add_special_tokens=False)] for text in texts]
        rows = [row[: encoder.max_length] for row in rows]
        tops = self._backend.top_tokens(self._model, rows, most)
        return [SoftTargets(tuple(row), *top) for row, top in zip(rows, tops, strict=True)]

    def _ask(self, kind: str, groups: Sequence[Sequence[tuple[Any, ...]]]) -> list[Any]:
        """The responses to some requests, in groups that begin alike."""
        if not groups:
            return []
        # Backends keep what they made of a task's requests by its name.
        name = f"{self._task}, {digest(kind, *(repr(group) for group in groups))}"
        by_item = [
            tuple(Instance(kind, {}, args, number, (self._task, k, 1)) for number, args in enumerate(group))
            for k, group in enumerate(groups)
        ]
        answers = self._backend.respond(self._model, Requests(name, by_item), range(len(groups)))
        return [responses[0] for of_group in answers for responses in of_group]


def _texts(method: str, given: Sequence[Any]) -> list[str]:
    """What was handed over, if it is a list of texts."""
    if isinstance(given, str):
        raise TaskError(f"{method}: a list is expected, got {describe(given)}")
    texts = list(given)
    for text in texts:
        if not isinstance(text, str):
            raise TaskError(f"{method}: a text is expected, got {describe(text)}")
    return texts
