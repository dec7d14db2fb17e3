"""Decodes rows that begin with the same tokens: these are read once, and one copy of their keys and values serves all.

A row's own keys and values stay where they are written. Rows come and go between steps. Where
the model calls its attention by transformers' interface, a step attends to the common tokens and to a row's own in two
parts, joined by their log-sum-exps; elsewhere each step puts them together, as transformers' own cache does.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evomerge.errors import CandidateError
from evomerge.evaluation.backends.native.forward import Forward

log = logging.getLogger(__name__)

Stem = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Keys and values, [1, heads, tokens, size] each, of what all rows begin with: a pair a layer; () of nothing."""

_ROOM = 64
"""Tokens that a store has room for behind the first prompts; when it is full, it doubles at least."""
_INTERFACE = "evomerge_in_parts"
_WHOLE = "sdpa"
"""The attention that is taken apart."""


def read_stem(forward: Forward, tokens: Sequence[int]) -> Stem:
    """Reads what all rows begin with."""
    if not tokens:
        return ()
    cache = DynamicCache(config=forward.model.config)
    last = torch.tensor([len(tokens) - 1], device=forward.device)
    ids = torch.tensor([list(tokens)], device=forward.device)
    forward.logits(last, input_ids=ids, use_cache=True, **{cache_name(forward.model): cache})
    return tuple((layer.keys, layer.values) for layer in cache.layers)


class Rows:
    """Rows that are decoded together.

    Args:
        forward: The model's forward pass.
        stem: From `read_stem`.
        most: How many rows there are at once, at most.
        in_parts: Whether a step attends in two parts; inside `attention_in_parts`.
    """

    def __init__(self, forward: Forward, stem: Stem, most: int, *, in_parts: bool) -> None:
        self._forward = forward
        self._stem = stem[0][0].shape[2] if stem else 0
        self._cache = _Cache(stem, most, in_parts=in_parts)
        self._options = {cache_name(forward.model): self._cache, "use_cache": True}
        self._in_parts = in_parts

    def add(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Reads texts, without the stem, as new rows behind those there are; returns the logits after each [n, V]."""
        lengths = [len(text) for text in texts]
        size = max(lengths)
        ids = torch.zeros((len(texts), size), dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        # Padding stands behind a text, where nothing of it looks, and what the row writes takes its place.
        at = torch.arange(size)
        allowed = torch.arange(self._stem + size)[None] <= self._stem + at[:, None]
        self._cache.begin(lengths)
        last = torch.arange(len(texts)) * size + torch.tensor(lengths) - 1
        return self._logits(last, ids, (self._stem + at)[None].expand(len(texts), -1), allowed[None, None])

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Reads one token for every row and returns the logits after it [rows, V]."""
        own = torch.tensor(self._cache.lengths)
        self._cache.begin_step(self._forward.device)
        allowed = torch.arange(int(own.max()) + 1)[None] <= own[:, None]
        if not self._in_parts:
            allowed = torch.cat([allowed.new_ones(len(tokens), self._stem), allowed], dim=1)
        ids, positions = torch.tensor(tokens)[:, None], (self._stem + own)[:, None]
        return self._logits(torch.arange(len(tokens)), ids, positions, allowed[:, None, None])

    def _logits(
        self, last: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        device, dtype = self._forward.device, self._forward.model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask.expand(len(ids), -1, -1, -1)}
        on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
        return self._forward.logits(last.to(device), **on_device, **self._options)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Lets all rows but some leave; returns where each row that is left stood, in their new order.

        Rows move only into the gaps that others leave.
        """
        gaps = [row for row in range(len(rows)) if row not in set(rows)]
        movers = [row for row in rows if row >= len(rows)]
        order = list(range(len(rows)))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        self._cache.move(movers, gaps, order)
        return order


class _Cache(DynamicCache):  # type: ignore[misc]
    """The stem's keys and values once, and those of the rows' own tokens, each row's from the start of its store."""

    def __init__(self, stem: Stem, most: int, *, in_parts: bool) -> None:
        super().__init__()
        self.stem = stem
        self.lengths: list[int] = []
        self._most = most
        self._in_parts = in_parts
        self._own: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._first = 0
        self._at: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(self, lengths: Sequence[int]) -> None:
        """Prepares for the tokens of new rows."""
        self._first, self._at = len(self.lengths), None
        self.lengths += lengths

    def begin_step(self, device: torch.device) -> None:
        """Prepares for a token of every row."""
        own = torch.tensor(self.lengths, device=device)
        self._at = torch.arange(len(own), device=device), own
        self.lengths = [length + 1 for length in self.lengths]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a layer's new keys and values; returns what the new tokens attend to."""
        if layer_idx >= len(self._own):
            self._own.append((self._store(key_states), self._store(value_states)))
        stores, new = self._own[layer_idx], (key_states, value_states)
        if stores[0].shape[2] < max(self.lengths):
            stores = self._own[layer_idx] = self._larger(stores[0]), self._larger(stores[1])
        keys, values = (self._written(store, states) for store, states in zip(stores, new, strict=True))
        stem = self.stem[layer_idx] if self.stem else None
        if self._in_parts and self._at is not None:
            keys.of_stem = stem  # type: ignore[attr-defined]
        elif stem is not None:
            keys, values = (
                torch.cat([common.expand(len(own), -1, -1, -1), own], dim=2)
                for common, own in zip(stem, (keys, values), strict=True)
            )
        return keys, values

    def _store(self, states: torch.Tensor) -> torch.Tensor:
        # Zeros, because no weight, not even 0, may meet a number that is not finite.
        return states.new_zeros(self._most, states.shape[1], max(self.lengths) + _ROOM, states.shape[3])

    def _larger(self, store: torch.Tensor) -> torch.Tensor:
        return F.pad(store, (0, 0, 0, max(self.lengths)))

    def _written(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The tokens of the rows of this pass, after the new ones are stored."""
        if self._at is None:
            store[self._first : len(self.lengths), :, : new.shape[2]] = new
            return new
        rows, columns = self._at
        store[rows, :, columns] = new[:, :, 0]
        return store[: len(rows), :, : max(self.lengths)]

    def move(self, sources: Sequence[int], targets: Sequence[int], order: Sequence[int]) -> None:
        """Moves rows, and forgets those that are not in the order."""
        size = max(self.lengths)
        self.lengths = [self.lengths[row] for row in order]
        for store in (store for pair in self._own for store in pair) if sources else ():
            store[list(targets), :, :size] = store[list(sources), :, :size]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns how many tokens of the longest row there are before a pass."""
        return (self.stem[layer_idx][0].shape[2] if self.stem else 0) + max(self.lengths, default=0)


def supports_parts(forward: Forward) -> bool:
    """Checks whether the model's attention can be taken apart, by the logits that both ways give.

    Raises:
        CandidateError: The model's logits are not finite.
    """
    model = forward.model
    if forward.device.type != "cpu" or model.config._attn_implementation != _WHOLE:
        return False
    vocabulary = model.get_input_embeddings().num_embeddings
    draw = [(7919 * k + 13) % vocabulary for k in range(48)]
    stem = read_stem(forward, draw[:32])
    logits = []
    try:
        for in_parts in (False, True):
            with attention_in_parts(model, on=in_parts):
                rows = Rows(forward, stem, 2, in_parts=in_parts)
                rows.add([draw[32:40], draw[40:45]])
                logits.append(rows.step(draw[45:47]))
    except Exception as error:  # whatever an attention does to keys that are not all of them
        log.info("no attention in parts: %s (%s)", type(model).__name__, error)
        return False
    whole, apart = logits
    if not bool(torch.isfinite(whole).all()):
        raise CandidateError("the model's logits are not finite, so it has no score")
    tolerance = torch.finfo(whole.dtype).eps ** 0.5 * (whole.max() - whole.min())
    return bool((whole - apart).abs().max() <= tolerance)


@contextmanager
def attention_in_parts(model: Any, *, on: bool) -> Iterator[None]:
    """Has the model's attention take a row's keys and the stem's apart, where it is on."""
    before = model.config._attn_implementation
    if on:
        model.config._attn_implementation = _INTERFACE
    try:
        yield
    finally:
        if on:
            model.config._attn_implementation = before


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention to the stem and to a row's own tokens, joined; to keys that know of no stem as the model has it."""
    if not hasattr(key, "of_stem"):
        whole = ALL_ATTENTION_FUNCTIONS[_WHOLE]
        attended: tuple[torch.Tensor, None] = whole(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return attended
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "sliding_window")):
        raise ValueError("an attention that is more than a softmax of products")
    rows, heads, _, size = query.shape
    groups = key.shape[1]
    grouped = query.reshape(rows, groups, heads // groups, size)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mask = None if attention_mask is None else attention_mask.expand(-1, -1, heads // groups, -1)
    output, weight = kernel(grouped, key, value, 0.0, False, attn_mask=mask, scale=scaling)
    if key.of_stem is not None:
        # The rows' queries side by side: one product of matrices for all of them.
        side_by_side = grouped.transpose(0, 1).reshape(1, groups, -1, size)
        common, of_common = kernel(side_by_side, *key.of_stem, 0.0, False, scale=scaling)
        common = common.view(groups, rows, heads // groups, -1).transpose(0, 1)
        of_common = of_common.view(groups, rows, heads // groups).transpose(0, 1)
        share = torch.sigmoid(of_common - weight.view(rows, groups, -1))[..., None]
        output = torch.lerp(output.float(), common.float(), share).to(query.dtype)
    return output.reshape(rows, 1, heads, -1), None


AttentionInterface.register(_INTERFACE, _attention)


def cache_name(model: Any) -> str:
    """What the model calls its cache: transformers renames it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
