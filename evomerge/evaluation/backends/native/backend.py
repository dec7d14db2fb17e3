"""The native backend: log-likelihoods over prefix trees, batched generation with early stop."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.errors import TaskError
from evomerge.evaluation.backends.native.generation import Generator
from evomerge.evaluation.backends.native.hidden_state_cache import Depths, Prefixes
from evomerge.evaluation.backends.native.logprobs import TreeScorer
from evomerge.evaluation.backends.native.prefix_trees import Layout
from evomerge.evaluation.backends.native.weight_gradients import Piece, piece_tokens
from evomerge.evaluation.scorers.derivatives import Answers
from evomerge.evaluation.tasks.requests import Encoder, Pair, Requests
from evomerge.system.hashing import digest

log = logging.getLogger(__name__)

Place = tuple[int, int]
"""Position of an item, and of an instance in it."""

Sensitivities = Callable[[Sequence[int], Answers], Sequence[Sequence[float]]]
"""(which items, their responses) -> for each item, what the log-likelihood of each of its instances counts."""

_LAYOUTS = 512
"""Layouts kept: enough for every task's blocks of items and its splits in a search of some twenty tasks."""


class NativeBackend:
    """Answers requests with the resident model itself.

    Args:
        encoder: Turns texts into tokens.
        vocabulary: Size of the models' vocabulary.
        batch_tokens: Tokens in a batch, padding counted; None for what suits the device.
        prefixes: Keeps hidden states between candidates; None to start from the tokens.
        threads: As for `Evaluator`.
    """

    def __init__(
        self,
        encoder: Encoder,
        vocabulary: int,
        batch_tokens: int | None,
        prefixes: Prefixes | None = None,
        threads: int | None = None,
    ) -> None:
        self.encoder = encoder
        self.scorer = TreeScorer(vocabulary, encoder.max_length, batch_tokens, prefixes)
        self.generator = Generator(encoder, batch_tokens, threads)
        self._pairs: dict[tuple[str, int], list[list[Pair]]] = {}
        self._layouts: OrderedDict[tuple[str, tuple[int, ...], bool | None], Layout] = OrderedDict()

    def prepare(self, model: Any) -> None:
        """Finds out how the model can be scored.

        Raises:
            CandidateError: The model's logits are not finite.
        """
        self.scorer.prepare(model)

    def respond(
        self, model: Any, requests: Requests, indices: Sequence[int], depths: Depths = ()
    ) -> list[list[list[Any]]]:
        """The model's responses: for each item, for each instance, one per repeat.

        Raises:
            CandidateError: The model's logits are not finite.
            TaskError: A request that no model can answer.
        """
        asked = [(index, k) for index in indices for k in range(len(requests.by_item[index]))]
        answers = self._loglikelihoods(model, requests, indices, depths) | self._generated(model, requests, asked)
        return [[answers[index, k] for k in range(len(requests.by_item[index]))] for index in indices]

    def _loglikelihoods(
        self, model: Any, requests: Requests, indices: Sequence[int], depths: Depths
    ) -> dict[Place, Any]:
        answers: dict[Place, Any] = {}
        if not any(_scores(instance) for index in indices for instance in requests.by_item[index]):
            return answers
        scored = self.scorer.score(model, self.layout(requests, indices), depths)
        start = 0
        for index in indices:
            pairs = self._encoded(requests, index)
            for k, instance in enumerate(requests.by_item[index]):
                if not _scores(instance):
                    continue
                stop = start + len(pairs[k])
                total = float(scored.loglikelihoods[start:stop].sum())
                answers[index, k] = _response(instance, total, greedy=bool(scored.greedy[start]))
                start = stop
        return answers

    def _generated(self, model: Any, requests: Requests, asked: Sequence[Place]) -> dict[Place, Any]:
        places = [(index, k) for index, k in asked if not _scores(requests.by_item[index][k])]
        if not places:
            return {}
        instances = [requests.by_item[index][k] for index, k in places]
        own_loop = self.scorer.trees is True and self.scorer.window is None
        return dict(zip(places, self.generator.respond(model, instances, own_loop=own_loop), strict=True))

    def layout(self, requests: Requests, indices: Sequence[int]) -> Layout:
        """The batches for some items, the same every time."""
        key = (requests.task, tuple(indices), self.scorer.trees)
        if key not in self._layouts:
            items = [[pair for pairs in self._encoded(requests, k) for pair in pairs] for k in indices]
            self._layouts[key] = self.scorer.layout(items)
            if len(self._layouts) > _LAYOUTS:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(key)
        return self._layouts[key]

    def pieces(
        self, model: Any, requests: Requests, indices: Sequence[int], sensitivities: Sensitivities
    ) -> list[Piece] | None:
        """The items in pieces to be run forward and backward, those of similar length together.

        Args:
            model: The model, prepared.
            requests: What the task asks.
            indices: The items.
            sensitivities: (positions in `indices`, their responses) -> what each response's log-likelihood counts.

        Returns:
            The pieces; None where items ask for generated text.
        """
        if not all(_scores(instance) for index in indices for instance in requests.by_item[index]):
            return None
        sizes = [self.layout(requests, [index]).tokens for index in indices]
        limit, total = piece_tokens(model), 0
        pieces: list[list[int]] = [[]]
        for place in sorted(range(len(indices)), key=lambda place: -sizes[place]):
            if pieces[-1] and total + sizes[place] > limit:
                pieces, total = [*pieces, []], 0
            pieces[-1].append(place)
            total += sizes[place]
        return [self._piece(requests, indices, places, limit, sensitivities) for places in pieces]

    def _piece(
        self,
        requests: Requests,
        indices: Sequence[int],
        places: Sequence[int],
        limit: int,
        sensitivities: Sensitivities,
    ) -> Piece:
        encoded = [self._encoded(requests, indices[place]) for place in places]

        def counts(loglikelihoods: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            rest = iter(loglikelihoods.tolist())
            answers = []
            for place, pairs in zip(places, encoded, strict=True):
                instances = requests.by_item[indices[place]]
                totals = [sum(next(rest) for _ in pair) for pair in pairs]
                answers.append([_response(i, t, greedy=False) for i, t in zip(instances, totals, strict=True)])
            found = sensitivities(places, answers)
            return np.array(
                [
                    slope
                    for slopes, pairs in zip(found, encoded, strict=True)
                    for slope, pair in zip(slopes, pairs, strict=True)
                    for _ in pair
                ]
            )

        layout = self.scorer.layout([[pair for pairs in item for pair in pairs] for item in encoded], limit)
        return Piece(layout, counts)

    def digest(self, requests: Requests, indices: Sequence[int]) -> str:
        """Identity of the batches."""
        instances = [instance for index in indices for instance in requests.by_item[index]]
        parts = [repr(tuple(indices))]
        if any(_scores(instance) for instance in instances):
            parts.append(self.layout(requests, indices).digest)
        if not all(_scores(instance) for instance in instances):  # each thread decodes rows of its own
            parts.append(repr((self.generator.batch_tokens, self.generator.threads)))
        return digest(*parts)

    def _encoded(self, requests: Requests, index: int) -> list[list[Pair]]:
        """For each instance of an item, the token pairs to score."""
        key = (requests.task, index)
        if key not in self._pairs:
            instances = requests.by_item[index]
            found = [self.encoder.pairs(instance) if _scores(instance) else [] for instance in instances]
            if any(_scores(instance) for instance in instances) and not any(found):
                raise TaskError(
                    f"task {requests.task!r}, item {index}: its text is empty, so there is nothing to score"
                )
            self._pairs[key] = found
        return self._pairs[key]


def _response(instance: Any, loglikelihood: float, *, greedy: bool) -> list[Any]:
    """What lm-eval takes for the answer to a request, once for each repeat."""
    rolling = instance.request_type == "loglikelihood_rolling"
    return [loglikelihood if rolling else (loglikelihood, greedy)] * int(instance.repeats)


def _scores(instance: Any) -> bool:
    """Whether a request asks for a log-likelihood rather than for text."""
    return bool(instance.request_type != "generate_until")
