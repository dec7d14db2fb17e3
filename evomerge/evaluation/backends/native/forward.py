"""Runs a model's forward pass with the head applied only where logits are needed, in threads that compute alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeVar

import torch

from evomerge.system.threads import run_all

T = TypeVar("T")

HEAD_LOGITS = 2**24
"""Logits (positions times vocabulary) computed at a time: products of a good size, without holding all the logits."""


class Forward:
    """One model's forward pass; made by `forward_pass`.

    Args:
        model: A causal language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        self.device: torch.device = next(model.parameters()).device
        self._local = threading.local()

    def select_positions(self, _: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Keeps only this thread's positions of the head's input, as one row [1, r], or their first (a pre-hook)."""
        positions = getattr(self._local, "positions", None)
        if positions is None:
            return None
        hidden = args[0].reshape(-1, args[0].shape[-1]).index_select(0, positions)
        self._local.hidden = hidden
        return hidden[None, : 1 if self._local.first_only else None], *args[1:]

    def _run(self, positions: torch.Tensor, inputs: dict[str, Any], *, first_only: bool) -> torch.Tensor:
        self._local.positions, self._local.first_only = positions, first_only
        try:
            logits: torch.Tensor = self.model(**inputs).logits
        finally:
            self._local.positions = None
        return logits.reshape(-1, logits.shape[-1])

    def logits(self, positions: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Computes logits [r, V] at some flat positions (row * L + column).

        Positions are selected from the head's input, so whatever a model does to its logits after the head (scaling,
        soft caps) is done to them as well. A model without an output embedding module computes all its logits.
        """
        logits = self._run(positions, inputs, first_only=False)
        return logits if self.head is not None else logits.index_select(0, positions)

    def logit_chunks(self, positions: torch.Tensor, *, head_is_last: bool, **inputs: Any) -> Iterator[torch.Tensor]:
        """Yields logits at some flat positions, a few rows at a time.

        Args:
            positions: [r] flat positions.
            head_is_last: The model returns what its head gives, so that the head can be called on its own.
            inputs: What the model is called with.
        """
        if not head_is_last:
            yield self.logits(positions, **inputs)
            return
        for part in self.hidden_chunks(positions, **inputs):
            logits: torch.Tensor = self.head(part[None])
            yield logits[0]

    def hidden_chunks(self, positions: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Computes the head's input at some flat positions, in chunks of a size for it: [rows, hidden] each."""
        self._run(positions, inputs, first_only=True)
        hidden: torch.Tensor = self._local.__dict__.pop("hidden")
        rows = max(1, HEAD_LOGITS // self.head.weight.shape[0])
        return hidden.tensor_split(max(1, -(-len(hidden) // rows)))

    def run_all(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Runs jobs without gradients and returns their results in order.

        On a CPU every job is done by one thread that computes alone, so that no number depends on how many there are.
        """
        jobs = [partial(_without_gradients, job) for job in jobs]
        return run_all(jobs, self.threads) if self.threads else [job() for job in jobs]

    @property
    def threads(self) -> int:
        """How many threads can run the model at once, each on inputs of its own; 0 on any other device than a CPU."""
        if self.device.type != "cpu":
            return 0
        return 1 if self._is_stateful else torch.get_num_threads()

    @cached_property
    def _is_stateful(self) -> bool:
        """Whether a forward pass writes to the model: rotary frequencies that follow the length of the input."""
        kinds = repr([module.rope_type for module in self.model.modules() if hasattr(module, "rope_type")])
        return "dynamic" in kinds or "longrope" in kinds


def _without_gradients(job: Callable[[], T]) -> T:
    """Runs a job in inference mode, which each thread has to enter by itself."""
    with torch.inference_mode():
        return job()


@contextmanager
def forward_pass(model: Any) -> Iterator[Forward]:
    """Opens the model's forward pass, with a hook on its head for as long as the block lasts."""
    forward = Forward(model)
    hook = None if forward.head is None else forward.head.register_forward_pre_hook(forward.select_positions)
    try:
        yield forward
    finally:
        if hook is not None:
            hook.remove()


def head_is_last(forward: Forward) -> bool:
    """Checks whether the model's logits are what its head gives, bit for bit: no scaling, no soft cap, no cast."""
    if forward.head is None or getattr(forward.head, "weight", None) is None:
        return False
    ids = torch.arange(1, 9, device=forward.device)[None] % forward.head.weight.shape[0]
    positions = torch.arange(8, device=forward.device)
    logits = forward.logits(positions, input_ids=ids, use_cache=False)
    (alone,) = forward.logit_chunks(positions, head_is_last=True, input_ids=ids, use_cache=False)
    return logits.dtype == alone.dtype and torch.equal(logits, alone)
