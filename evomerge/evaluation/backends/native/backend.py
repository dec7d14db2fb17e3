"""The native backend: log-likelihoods over prefix trees, batched generation with early stop."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.errors import TaskError
from evomerge.evaluation.backends.native.generation import Generator
from evomerge.evaluation.backends.native.jacobian import batch_tokens, jacobian
from evomerge.evaluation.backends.native.logprobs import TreeLogprobs
from evomerge.evaluation.backends.native.prefix_trees import PackedTrees
from evomerge.evaluation.backends.registry import Backend, BackendOptions, Directions
from evomerge.evaluation.scores import ResponseJacobian
from evomerge.evaluation.tasks.requests import MOST_KEPT, Pair, Requests, SoftTargets
from evomerge.system.arrays import FloatArray, IntArray
from evomerge.system.hashing import digest

log = logging.getLogger(__name__)

InstanceKey = tuple[int, int]
"""Position of an item, and of an instance in it."""

_MAX_PACKED = 512
"""Selections whose packed trees are kept: every task's blocks of items and its splits in a search of some 20 tasks."""


class NativeBackend(Backend):
    """Answers requests with the resident model itself.

    Args:
        options: As for every backend.
    """

    def __init__(self, options: BackendOptions) -> None:
        self.encoder = options.encoder
        self.logprobs = TreeLogprobs(options.vocabulary, self.encoder.max_length, options.batch_tokens)
        self.generator = Generator(self.encoder, options.batch_tokens, options.threads, options.think_end_token)
        self._pairs: dict[tuple[str, int], list[list[Pair | SoftTargets]]] = {}
        self._packed: OrderedDict[tuple[str, tuple[int, ...], bool | None], PackedTrees] = OrderedDict()

    def prepare(self, model: Any) -> None:
        """Finds out how log-likelihoods of the model can be computed.

        Raises:
            CandidateError: The model's logits are not finite.
        """
        self.logprobs.prepare(model)

    def respond(self, model: Any, requests: Requests, indices: Sequence[int]) -> list[list[list[Any]]]:
        """Returns the model's responses: for each item, for each instance, one per repeat.

        Raises:
            CandidateError: The model's logits are not finite.
            TaskError: A request that no model can answer.
        """
        keys = [(index, k) for index in indices for k in range(len(requests.by_item[index]))]
        responses = self._loglikelihoods(model, requests, indices)
        responses |= self._generations(model, requests, keys)
        return [[responses[index, k] for k in range(len(requests.by_item[index]))] for index in indices]

    def _loglikelihoods(self, model: Any, requests: Requests, indices: Sequence[int]) -> dict[InstanceKey, Any]:
        responses: dict[InstanceKey, Any] = {}
        if not any(_is_loglikelihood(instance) for index in indices for instance in requests.by_item[index]):
            return responses
        computed = self.logprobs.compute(model, self.packed(requests, indices))
        start = 0
        for index in indices:
            pairs = self._encoded(requests, index)
            for k, instance in enumerate(requests.by_item[index]):
                if not _is_loglikelihood(instance):
                    continue
                stop = start + len(pairs[k])
                total = float(computed.loglikelihoods[start:stop].sum())
                responses[index, k] = _response(instance, total, greedy=bool(computed.greedy[start]))
                start = stop
        return responses

    def _generations(self, model: Any, requests: Requests, keys: Sequence[InstanceKey]) -> dict[InstanceKey, Any]:
        keys = [(index, k) for index, k in keys if not _is_loglikelihood(requests.by_item[index][k])]
        if not keys:
            return {}
        instances = [requests.by_item[index][k] for index, k in keys]
        own_loop = self.logprobs.tree_masks is True and self.logprobs.attention_window is None
        return dict(zip(keys, self.generator.respond(model, instances, own_loop=own_loop), strict=True))

    def packed(self, requests: Requests, indices: Sequence[int]) -> PackedTrees:
        """Packs what some items ask into batches, the same every time."""
        key = (requests.task, tuple(indices), self.logprobs.tree_masks)
        if key not in self._packed:
            items = [[pair for pairs in self._encoded(requests, k) for pair in pairs] for k in indices]
            self._packed[key] = self.logprobs.pack(items)
            if len(self._packed) > _MAX_PACKED:
                self._packed.popitem(last=False)
        self._packed.move_to_end(key)
        return self._packed[key]

    def jacobian(
        self,
        model: Any,
        parts: Sequence[tuple[Requests, Sequence[int]]],
        directions: Mapping[str, Sequence[Directions]],
        columns: int,
    ) -> list[ResponseJacobian | None]:
        """Differentiates the log-likelihoods of some items' requests; as `Backend.jacobian`."""
        self.prepare(model)
        encoded = [self._all_encoded(requests, indices) for requests, indices in parts]
        tokens = batch_tokens(model)
        # Every sequence by itself: shared tokens would have the derivatives of several log-likelihoods.
        packed = [self.logprobs.pack([[pair] for pair in itertools.chain(*part)], tokens) for part in encoded if part]
        if not packed:
            return [None] * len(parts)
        computed = iter(jacobian(model, packed, directions, columns, head_is_last=self.logprobs.head_is_last))
        return [
            None if not pairs else _by_instance(requests, indices, pairs, *next(computed))
            for (requests, indices), pairs in zip(parts, encoded, strict=True)
        ]

    def top_tokens(self, model: Any, texts: Sequence[Sequence[int]], most: int) -> list[tuple[IntArray, FloatArray]]:
        """Finds what a model expects after every token of some texts; as `Backend.top_tokens`."""
        return self.logprobs.top_tokens(model, texts, most)

    def _all_encoded(self, requests: Requests, indices: Sequence[int]) -> list[list[Pair | SoftTargets]]:
        """For each instance of some items, the token pairs to score; empty where text is asked for."""
        if not all(_is_loglikelihood(instance) for index in indices for instance in requests.by_item[index]):
            return []
        return [pairs for index in indices for pairs in self._encoded(requests, index)]

    def digest(self, requests: Requests, indices: Sequence[int]) -> str:
        """Returns the identity of the batches."""
        instances = [instance for index in indices for instance in requests.by_item[index]]
        parts = [repr(tuple(indices))]
        if any(_is_loglikelihood(instance) for instance in instances):
            parts.append(self.packed(requests, indices).digest)
        if not instances:  # a scorer's, which may ask for anything
            parts.append(repr((self.logprobs.batch_tokens, self.logprobs.max_scored)))
        if not instances or not all(_is_loglikelihood(instance) for instance in instances):
            # Each thread decodes rows of its own.
            parts.append(repr((self.generator.batch_tokens, self.generator.threads)))
        return digest(*parts)

    def _encoded(self, requests: Requests, index: int) -> list[list[Pair | SoftTargets]]:
        """For each instance of an item, the token pairs to score."""
        key = (requests.task, index)
        if key not in self._pairs:
            instances = requests.by_item[index]
            pairs = [self.encoder.pairs(instance) if _is_loglikelihood(instance) else [] for instance in instances]
            if any(_is_loglikelihood(instance) for instance in instances) and not any(pairs):
                raise TaskError(
                    f"task {requests.task!r}, item {index}: its text is empty, so there is nothing to score"
                )
            if len(self._pairs) >= MOST_KEPT:
                self._pairs.clear()
            self._pairs[key] = pairs
        return self._pairs[key]


def _by_instance(
    requests: Requests,
    indices: Sequence[int],
    encoded: Sequence[Sequence[Pair | SoftTargets]],
    values: FloatArray,
    derivatives: FloatArray,
) -> ResponseJacobian:
    """Adds up what the pairs of each instance have."""
    owners = np.repeat(np.arange(len(encoded)), [len(pairs) for pairs in encoded])
    total = np.zeros((len(encoded), derivatives.shape[1]))
    np.add.at(total, owners, derivatives)
    return ResponseJacobian(
        np.bincount(owners, weights=values, minlength=len(encoded)).astype(np.float64),
        total,
        np.array([sum(map(_scored_tokens, pairs)) for pairs in encoded], dtype=np.float64),
        np.repeat(np.arange(len(indices)), [len(requests.by_item[index]) for index in indices]),
    )


def _scored_tokens(pair: Pair | SoftTargets) -> int:
    return len(pair.tokens) if isinstance(pair, SoftTargets) else len(pair[1])


def _response(instance: Any, loglikelihood: float, *, greedy: bool) -> list[Any]:
    """What lm-eval takes for the response to a request, once for each repeat."""
    rolling = instance.request_type == "loglikelihood_rolling"
    return [loglikelihood if rolling else (loglikelihood, greedy)] * int(instance.repeats)


def _is_loglikelihood(instance: Any) -> bool:
    """Whether a request asks for a log-likelihood rather than for text."""
    return bool(instance.request_type != "generate_until")
