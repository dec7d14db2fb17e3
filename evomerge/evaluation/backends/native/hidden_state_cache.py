"""Keeps hidden states of candidates that share their first layers, so that a pass resumes behind these.

A candidate comes with one opaque digest a layer: equal digests of layer k mean equal hidden states before it. The
model's own forward pass runs all the same, masks, rotary embeddings and final norm included; only the layers before the
one that is resumed at hand on what they are given. Numbers are the same bit for bit.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from evomerge.evaluation.backends.native.forward import Forward

T = TypeVar("T")

log = logging.getLogger(__name__)

LayerDigests = Sequence[str]
"""For each layer, the identity of the hidden states before it."""

MAX_BYTES = 2**30
"""Bytes of hidden states kept."""


def shared_layers(a: LayerDigests, b: LayerDigests) -> int:
    """Counts the first layers that both share: the hidden states behind them, before the next one, are equal."""
    return max((k for k, (one, other) in enumerate(zip(a, b, strict=False)) if one == other), default=0)


def order_by_shared_layers(candidates: Sequence[LayerDigests]) -> list[int]:
    """Orders candidates so that those that share their first layers follow each other.

    Args:
        candidates: The digests of each one.

    Returns:
        Positions: the tree of shared beginnings, depth first, branches in the order of their first candidate.
    """
    first: dict[tuple[int, str], int] = {}
    for number, layer_digests in enumerate(candidates):
        for node in enumerate(layer_digests):
            first.setdefault(node, number)
    keys = [[first[node] for node in enumerate(layer_digests)] for layer_digests in candidates]
    return sorted(range(len(candidates)), key=lambda number: (keys[number], number))


class HiddenStateCache:
    """Keeps hidden states within a budget.

    What is kept of a candidate is decided by its neighbours alone: the states before the first layer that differs from
    the candidate before it, and from the one announced to come next.

    Args:
        max_bytes: Bytes of hidden states.

    Attributes:
        bytes: Of the states that are kept now.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._states: OrderedDict[tuple[str, str, int], Tensor] = OrderedDict()
        self._previous: LayerDigests = ()
        self._current: LayerDigests = ()
        self._next: LayerDigests = ()

    def announce_next(self, layer_digests: LayerDigests) -> None:
        """Announces the candidate that comes after the next call of `start_candidate`."""
        self._next = tuple(layer_digests)

    def start_candidate(self, layer_digests: LayerDigests) -> frozenset[int]:
        """Makes a candidate the current one and returns the layers whose inputs are worth keeping."""
        if tuple(layer_digests) != self._current:
            self._previous, self._current = self._current, tuple(layer_digests)
            if self._current == self._next:  # it has come
                self._next = ()
        neighbours = (self._previous, self._next)
        return frozenset({shared_layers(layer_digests, other) for other in neighbours} - {0})

    def get(self, layer_digests: LayerDigests, packed: str, batch: int) -> tuple[int, Tensor | None]:
        """Returns the last layer whose input is kept for a batch, and that input; (0, None) if there is none.

        Args:
            layer_digests: The candidate's.
            packed: The digest of the packed requests.
            batch: The number of the batch in them.
        """
        for k in range(len(layer_digests) - 1, 0, -1):
            state = self._states.get((layer_digests[k], packed, batch))
            if state is not None:
                self._states.move_to_end((layer_digests[k], packed, batch))
                return k, state
        return 0, None

    def put(self, layer_digests: LayerDigests, packed: str, batch: int, states: Mapping[int, Tensor]) -> None:
        """Keeps inputs of layers, in place of what was used longest ago and does not belong to the same candidate."""
        for k, state in sorted(states.items()):
            key, size = (layer_digests[k], packed, batch), state.nbytes
            if key in self._states or not self._make_room(size, frozenset(layer_digests)):
                continue
            self._states[key] = state
            self.bytes += size

    def _make_room(self, size: int, protected: frozenset[str]) -> bool:
        while self.bytes + size > self.max_bytes:
            old = next((key for key in self._states if key[0] not in protected), None)
            if old is None:
                return False
            self.bytes -= self._states.pop(old).nbytes
        return True


class _ResumableLayer(nn.Module):
    """A layer that each thread can skip, resume at, or capture the input of."""

    def __init__(self, inner: nn.Module, number: int, local: threading.local) -> None:
        super().__init__()
        self.inner = inner
        self.number = number
        self.local = local

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a model asks of its layers (their type of attention)
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer, or hands its input on where the pass resumes at a later one."""
        local = self.local
        if self.number < local.start:
            return hidden_states
        if self.number == local.start and local.state is not None:
            hidden_states = local.state
        if self.number in local.capture:
            local.captured[self.number] = hidden_states
        return self.inner(hidden_states, *args, **kwargs)


class ResumablePasses:
    """Where each thread's forward passes resume, and which inputs of layers they capture."""

    def __init__(self) -> None:
        self.local = threading.local()

    @contextmanager
    def from_layer(self, start: int, state: Tensor | None, capture: frozenset[int]) -> Iterator[dict[int, Tensor]]:
        """Resumes this thread's passes at a layer with a state; gives the captured inputs of layers that are run."""
        self.local.start, self.local.state, self.local.capture, self.local.captured = start, state, capture, {}
        yield self.local.captured


@contextmanager
def resumable(model: Any) -> Iterator[ResumablePasses]:
    """Makes the model's passes resumable at every layer, for as long as the block lasts."""
    decoder, name = _layer_list(model)
    layers, passes = getattr(decoder, name), ResumablePasses()
    setattr(decoder, name, nn.ModuleList(_ResumableLayer(layer, k, passes.local) for k, layer in enumerate(layers)))
    try:
        yield passes
    finally:
        setattr(decoder, name, layers)


def run_from_cache(
    cache: HiddenStateCache, forward: Forward, layer_digests: LayerDigests, packed: str, jobs: Sequence[Callable[[], T]]
) -> list[T]:
    """Runs the jobs of a candidate's batches, each from the last layer whose input is cached.

    Args:
        cache: The states that are kept; takes what this candidate leaves.
        forward: The model's forward pass.
        layer_digests: The candidate's digests.
        packed: The digest of the packed requests.
        jobs: One for each batch, always in the same order.
    """
    capture = cache.start_candidate(layer_digests)
    resumed = [cache.get(layer_digests, packed, k) for k in range(len(jobs))]
    if not capture and not any(start for start, _ in resumed):
        return forward.run_all(jobs)

    def resume(job: Callable[[], T], start: int, state: Tensor | None) -> tuple[T, dict[int, Tensor]]:
        with passes.from_layer(start, state, capture) as captured:
            return job(), captured

    with resumable(forward.model) as passes:
        results = forward.run_all([partial(resume, job, *at) for job, at in zip(jobs, resumed, strict=True)])
    for k, (_, captured) in enumerate(results):
        cache.put(layer_digests, packed, k, captured)
    return [result for result, _ in results]


def _layer_list(model: Any) -> tuple[nn.Module, str]:
    """The module that has the layers, and the name of their list.

    Raises:
        ValueError: There is not exactly one list with as many modules as the config has layers.
    """
    config = getattr(model.config, "text_config", None) or model.config
    decoder = model.get_decoder()
    lists = {name: part for name, part in decoder.named_children() if isinstance(part, nn.ModuleList)}
    names = [name for name, part in lists.items() if len(part) == config.num_hidden_layers]
    if len(names) != 1:
        raise ValueError(f"{type(decoder).__name__} has {len(names)} lists of {config.num_hidden_layers} layers")
    return decoder, names[0]


def can_be_resumed(model: Any) -> bool:
    """Checks whether resuming half-way, with the hidden states of a whole pass, gives the logits of that pass."""
    vocabulary = model.get_input_embeddings().num_embeddings
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.arange(1, 17, device=device).reshape(2, 8) % vocabulary, "use_cache": False}
    try:
        with torch.inference_mode():
            plain = model(**inputs).logits
            with resumable(model) as passes:
                middle = model.config.get_text_config().num_hidden_layers // 2
                with passes.from_layer(0, None, frozenset({middle})) as captured:
                    whole = model(**inputs).logits
                with passes.from_layer(middle, captured[middle], frozenset()):
                    half = model(**inputs).logits
    except Exception as error:  # whatever a model does with a layer that it does not know
        log.info("no hidden states are kept: %s cannot be resumed half-way (%s)", type(model).__name__, error)
        return False
    same = torch.equal(plain, whole) and torch.equal(plain, half)
    if not same:
        log.info("no hidden states are kept: %s gives other numbers when resumed half-way", type(model).__name__)
    return same
