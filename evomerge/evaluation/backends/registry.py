"""What answers the requests of tasks, by name. Light, because the command line needs the names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, Protocol

from evomerge.errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.evaluation.scores import ResponseJacobian
    from evomerge.evaluation.tasks.requests import Encoder, Requests, Responses
    from evomerge.system.arrays import FloatArray, IntArray

BackendName = Literal["native", "hf", "vllm"]
"""`native` is our own; `hf` is lm-eval's HFLM; `vllm` is lm-eval's VLLM on a live engine (an extra)."""


@dataclass(frozen=True)
class Directions:
    """How one parameter moves with some numbers.

    Attributes:
        columns: Index of each number among all, [k].
        tensors: The parameter's derivative by each, [k, *shape]; of a matrix of low rank its left factors [k, out, r].
        right: The right factors, [k, r, in]; None where `tensors` is the whole.
    """

    columns: IntArray
    tensors: Tensor
    right: Tensor | None = None


class Backend(Protocol):
    """Answers requests with a live model."""

    def prepare(self, model: Any) -> None:
        """Gets to know the model as it is now; called before every score.

        Raises:
            CandidateError: The model's logits are not finite.
        """

    def respond(self, model: Any, requests: Requests, indices: Sequence[int]) -> Responses:
        """Returns the responses of the model to what some items ask.

        Args:
            model: The model, prepared.
            requests: What the task asks.
            indices: The items.

        Raises:
            CandidateError: A log-likelihood is not finite.
            TaskError: A request that no model can answer.
        """
        raise NotImplementedError

    def digest(self, requests: Requests, indices: Sequence[int]) -> str:
        """Returns the identity of everything that decides how responses are rounded, apart from the model."""
        raise NotImplementedError

    def jacobian(
        self,
        model: Any,
        parts: Sequence[tuple[Requests, Sequence[int]]],
        directions: Mapping[str, Sequence[Directions]],
        columns: int,
    ) -> Sequence[ResponseJacobian | None]:
        """Differentiates the log-likelihoods that some items are scored by with respect to numbers behind the weights.

        Args:
            model: The model; as before afterwards.
            parts: For each task what it asks, and the items.
            directions: Name of a parameter to how it moves with the numbers.
            columns: How many numbers there are.

        Returns:
            One for each task; None where that cannot be done.

        Raises:
            CandidateError: A number is not finite, or the model cannot be differentiated.
        """
        return [None] * len(parts)

    def top_tokens(self, model: Any, texts: Sequence[Sequence[int]], most: int) -> list[tuple[IntArray, FloatArray]]:
        """Finds what a model expects after every token of some texts.

        Args:
            model: The model, prepared.
            texts: Token sequences, none longer than the context.
            most: How many tokens at each position.

        Returns:
            For each text the likeliest tokens, [n, k], and their probabilities, which are made to add up to 1.

        Raises:
            TaskError: The backend cannot.
        """
        raise TaskError("agreement: only backend native knows what a model expects")


@dataclass(frozen=True)
class BackendOptions:
    """What a backend is made from.

    Attributes:
        encoder: Turns texts into tokens; has the tokenizer and the longest input.
        vocabulary: Size of the models' vocabulary.
        batch_tokens: Tokens in a batch, padding counted; None for what suits the device.
        threads: How many threads of a CPU the batches of generated text are cut for; None for all that torch has.
        think_end_token: What ends the thinking of a model, as text or as a token's number; only what follows counts.
        vllm: Arguments of vLLM's engine, such as ``{"quantization": "fp8"}``; of no other backend.
    """

    encoder: Encoder
    vocabulary: int
    batch_tokens: int | None = None
    threads: int | None = None
    think_end_token: str | int | None = None
    vllm: Mapping[str, Any] = field(default_factory=dict)


_BACKENDS: dict[str, str] = {
    "native": "evomerge.evaluation.backends.native.backend:NativeBackend",
    "hf": "evomerge.evaluation.backends.hf:HFBackend",
    "vllm": "evomerge.evaluation.backends.vllm:VLLMBackend",
}
"""Name to the class, which takes `BackendOptions`."""


def make_backend(name: BackendName, options: BackendOptions) -> Backend:
    """Makes a backend.

    Raises:
        BadInput: What it needs is not installed.
    """
    backend: Backend = resolve_name(_BACKENDS[name])(options)
    return backend
