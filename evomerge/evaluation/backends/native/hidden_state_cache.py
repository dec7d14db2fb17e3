"""Hidden states kept between candidates that share their first layers, so that scoring starts behind these.

A candidate comes with an opaque digest per depth: equal digests at depth k mean equal hidden states before layer k. The
model's own forward pass runs all the same, masks, rotary embeddings and final norm included; only the layers before the
entrance hand on what they are given. Numbers are the same bit for bit.
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

Depths = Sequence[str]
"""For each layer, the identity of the hidden states before it."""

BUDGET = 2**30
"""Bytes of hidden states kept."""


def common_depth(a: Depths, b: Depths) -> int:
    """The deepest layer before which both have the same hidden states; 0 where they share nothing worth keeping."""
    return max((k for k, (one, other) in enumerate(zip(a, b, strict=False)) if one == other), default=0)


def arrange(candidates: Sequence[Depths]) -> list[int]:
    """An order of candidates in which those that share their first layers follow each other.

    Args:
        candidates: The digests of each one.

    Returns:
        Positions: the tree of shared beginnings, depth first, branches in the order of their first candidate.
    """
    first: dict[tuple[int, str], int] = {}
    for number, depths in enumerate(candidates):
        for place in enumerate(depths):
            first.setdefault(place, number)
    keys = [[first[place] for place in enumerate(depths)] for depths in candidates]
    return sorted(range(len(candidates)), key=lambda number: (keys[number], number))


class Prefixes:
    """Hidden states within a budget.

    What is kept of a candidate is decided by its neighbours alone: the states at the depth that it shares with the one
    before it and with the one announced to come next.

    Args:
        budget: Bytes.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self.bytes = 0
        self._held: OrderedDict[tuple[str, str, int], Tensor] = OrderedDict()
        self._before: Depths = ()
        self._now: Depths = ()
        self._next: Depths = ()

    def expect(self, depths: Depths) -> None:
        """Announces the candidate that comes after the next call of `meet`."""
        self._next = tuple(depths)

    def meet(self, depths: Depths) -> frozenset[int]:
        """The depths worth keeping of a candidate, which is the present one from now on."""
        if tuple(depths) != self._now:
            self._before, self._now = self._now, tuple(depths)
            if self._now == self._next:  # it has come
                self._next = ()
        return frozenset({common_depth(depths, self._before), common_depth(depths, self._next)} - {0})

    def find(self, depths: Depths, layout: str, batch: int) -> tuple[int, Tensor | None]:
        """The deepest layer whose input is held for a batch, and that input; (0, None) if there is none."""
        for k in range(len(depths) - 1, 0, -1):
            held = self._held.get((depths[k], layout, batch))
            if held is not None:
                self._held.move_to_end((depths[k], layout, batch))
                return k, held
        return 0, None

    def keep(self, depths: Depths, layout: str, batch: int, states: Mapping[int, Tensor]) -> None:
        """Keeps inputs of layers, in place of what was used longest ago and does not belong to the same candidate."""
        for k, state in sorted(states.items()):
            key, size = (depths[k], layout, batch), state.nbytes
            if key in self._held or not self._make_room(size, frozenset(depths)):
                continue
            self._held[key] = state
            self.bytes += size

    def _make_room(self, size: int, spared: frozenset[str]) -> bool:
        while self.bytes + size > self.budget:
            old = next((key for key in self._held if key[0] not in spared), None)
            if old is None:
                return False
            self.bytes -= self._held.pop(old).nbytes
        return True


class _Layer(nn.Module):
    """A layer that can be passed over, entered, or looked into, differently in each thread."""

    def __init__(self, inner: nn.Module, number: int, mine: threading.local) -> None:
        super().__init__()
        self.inner = inner
        self.number = number
        self.mine = mine

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a model asks of its layers (their type of attention)
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's result; its input where the entrance is further on."""
        mine = self.mine
        if self.number < mine.start:
            return hidden_states
        if self.number == mine.start and mine.state is not None:
            hidden_states = mine.state
        if self.number in mine.wanted:
            mine.seen[self.number] = hidden_states
        return self.inner(hidden_states, *args, **kwargs)


class Entrance:
    """Where each thread enters a model's layers, and which inputs of layers it wants."""

    def __init__(self) -> None:
        self.mine = threading.local()

    @contextmanager
    def at(self, start: int, state: Tensor | None, wanted: frozenset[int]) -> Iterator[dict[int, Tensor]]:
        """This thread's passes start at a layer with a state; gives the inputs wanted of layers that are run."""
        self.mine.start, self.mine.state, self.mine.wanted, self.mine.seen = start, state, wanted, {}
        yield self.mine.seen


@contextmanager
def opened(model: Any) -> Iterator[Entrance]:
    """The model with an entrance at every layer, for as long as the block lasts."""
    decoder, name = _stack(model)
    layers, entrance = getattr(decoder, name), Entrance()
    setattr(decoder, name, nn.ModuleList(_Layer(layer, k, entrance.mine) for k, layer in enumerate(layers)))
    try:
        yield entrance
    finally:
        setattr(decoder, name, layers)


def score_from(
    prefixes: Prefixes, forward: Forward, depths: Depths, layout: str, pieces: Sequence[Callable[[], T]]
) -> list[T]:
    """Does the pieces of work of a layout's batches, each from the deepest layer whose input is held.

    Args:
        prefixes: What is held; takes what this candidate leaves.
        forward: The model's forward pass.
        depths: The candidate's digests.
        layout: Identity of the layout.
        pieces: One for each batch, always in the same order.
    """
    wanted = prefixes.meet(depths)
    found = [prefixes.find(depths, layout, k) for k in range(len(pieces))]
    if not wanted and not any(start for start, _ in found):
        return forward.spread(pieces)

    def enter(piece: Callable[[], T], start: int, state: Tensor | None) -> tuple[T, dict[int, Tensor]]:
        with entrance.at(start, state, wanted) as seen:
            return piece(), seen

    with opened(forward.model) as entrance:
        results = forward.spread([partial(enter, piece, *place) for piece, place in zip(pieces, found, strict=True)])
    for k, (_, seen) in enumerate(results):
        prefixes.keep(depths, layout, k, seen)
    return [result for result, _ in results]


def _stack(model: Any) -> tuple[nn.Module, str]:
    """The module that holds the layers, and the name of their list.

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


def can_be_entered(model: Any) -> bool:
    """Whether entering the layers half-way, with the hidden states of a whole pass, gives the logits of that pass."""
    vocabulary = model.get_input_embeddings().num_embeddings
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.arange(1, 17, device=device).reshape(2, 8) % vocabulary, "use_cache": False}
    try:
        with torch.inference_mode():
            plain = model(**inputs).logits
            with opened(model) as entrance:
                middle = model.config.get_text_config().num_hidden_layers // 2
                with entrance.at(0, None, frozenset({middle})) as seen:
                    whole = model(**inputs).logits
                with entrance.at(middle, seen[middle], frozenset()):
                    half = model(**inputs).logits
    except Exception as error:  # whatever a model does with a layer that it does not know
        log.info("no hidden states are kept: %s cannot be entered half-way (%s)", type(model).__name__, error)
        return False
    same = torch.equal(plain, whole) and torch.equal(plain, half)
    if not same:
        log.info("no hidden states are kept: %s gives other numbers when entered half-way", type(model).__name__)
    return same
