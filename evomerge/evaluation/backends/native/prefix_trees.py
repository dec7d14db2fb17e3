"""Builds prefix trees of token sequences and packs them into batches.

The inputs of one question share their context, and often part of their continuations: each shared token is computed
once. A tree lies in a row in depth-first order; ``end[k]`` is the position after the last descendant of position k, so
that position q may attend to position k exactly when ``k <= q < end[k]``. A causal sequence is a tree without branches,
for which that is the causal mask. Several small trees lie in one row, none seeing another, so hardly anything is
padding. Which batch a tree lies in depends only on the trees given, so it is the same for every candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evomerge.system.arrays import FloatArray
from evomerge.system.hashing import digest

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PrefixTree:
    """The prefix tree of some inputs, in depth-first order.

    Attributes:
        tokens: [n] token ids.
        position_ids: [n] position of each token in its own sequence.
        ends: [n] position after the last descendant.
        positions: [p] positions whose next token is scored, one entry for each scored token.
        targets: [p] the scored tokens.
        requests: [p] which request each scored token belongs to.
        weights: [p] what each counts in its request's log-likelihood; None for 1.
    """

    tokens: Ints
    position_ids: Ints
    ends: Ints
    positions: Ints
    targets: Ints
    requests: Ints
    weights: FloatArray | None = None

    @property
    def size(self) -> int:
        """Tokens to compute."""
        return len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """Rows of trees, padded to one length L.

    Attributes:
        input_ids: [B, L]
        position_ids: [B, L]
        ends: [B, L] as in `PrefixTree`, in row positions. Padding sees itself only.
        scored: [r] flat positions (row * L + column) at which the head is needed, ascending.
        rows: [p] index into `scored` of each scored token, ascending.
        targets: [p] scored tokens.
        requests: [p] their requests.
        causal: Whether every row is one sequence without branches, so that ordinary causal attention is right.
        weights: [p] what each scored token counts; None for 1.
    """

    input_ids: Ints
    position_ids: Ints
    ends: Ints
    scored: Ints
    rows: Ints
    targets: Ints
    requests: Ints
    causal: bool
    weights: FloatArray | None = None


@dataclass(frozen=True)
class PackedTrees:
    """The prefix trees of some requests in batches, fixed for the whole run.

    Attributes:
        batches: In the order in which they run, the largest rows first.
        requests: Number of requests.
        tokens: Tokens to compute, padding not counted.
        unshared: Tokens that one sequence per request would take.
    """

    batches: tuple[Batch, ...]
    requests: int
    tokens: int
    unshared: int

    @property
    def padded(self) -> int:
        """Tokens to compute, padding counted."""
        return sum(batch.input_ids.size for batch in self.batches)

    @cached_property
    def digest(self) -> str:
        """Identity of the batches: equal digests give equal rounding."""
        parts: list[str | bytes] = []
        for batch in self.batches:
            parts.append(repr(batch.input_ids.shape))
            for array in (batch.input_ids, batch.position_ids, batch.ends, batch.scored, batch.rows, batch.targets):
                parts.append(array.tobytes())
            parts += [] if batch.weights is None else [batch.weights.tobytes()]
        return digest(*parts)


def build_tree(
    inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], requests: Sequence[int]
) -> PrefixTree:
    """Builds the prefix tree of some inputs.

    Args:
        inputs: Token sequences.
        targets: For each input, the tokens that its last ``len(targets)`` positions should predict.
        requests: For each input, the request it belongs to.

    Returns:
        The tree: every distinct prefix once.
    """
    arrays = [np.asarray(tokens, dtype=np.int64) for tokens in inputs]
    # In lexicographic order, what a sequence shares with any earlier one it shares with the one just before it.
    order = sorted(range(len(arrays)), key=lambda k: tuple(inputs[k]))
    tokens, position_ids, ends = [], [], np.zeros(sum(map(len, arrays)), dtype=np.int64)
    paths: dict[int, Ints] = {}
    path, previous, size = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 0
    for k in order:
        shared = _common_prefix(previous, arrays[k])
        new = len(arrays[k]) - shared
        ends[path[shared:]] = size
        path = np.concatenate([path[:shared], np.arange(size, size + new)])
        tokens.append(arrays[k][shared:])
        position_ids.append(np.arange(shared, shared + new))
        size += new
        paths[k], previous = path, arrays[k]
    ends[path] = size
    inputs_in_order = range(len(arrays))
    return PrefixTree(
        np.concatenate(tokens),
        np.concatenate(position_ids),
        ends[:size],
        np.concatenate([paths[k][len(paths[k]) - len(targets[k]) :] for k in inputs_in_order]),
        np.concatenate([np.asarray(targets[k], dtype=np.int64) for k in inputs_in_order]),
        np.repeat(np.asarray(requests, dtype=np.int64), [len(targets[k]) for k in inputs_in_order]),
    )


def soft_tree(tokens: Sequence[int], targets: npt.NDArray[np.int64], weights: FloatArray, request: int) -> PrefixTree:
    """Builds the tree of one text that predicts several tokens, each of a weight, at every position.

    Args:
        tokens: [n].
        targets: [n, k].
        weights: [n, k].
        request: The request it belongs to.
    """
    n, k = targets.shape
    positions = np.arange(n)
    return PrefixTree(
        np.asarray(tokens, dtype=np.int64),
        positions,
        np.full(n, n),
        np.repeat(positions, k),
        targets.reshape(-1),
        np.full(n * k, request),
        weights.reshape(-1),
    )


def _common_prefix(a: Ints, b: Ints) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


ROW_TOKENS = (32, 64, 96, 128, 192, 256)
"""Lengths of shared rows to choose from."""
_ATTENTION_COST = 1 / 800
"""Cost of attention in a row of L tokens, per token and unit of L, against all else a token costs (a small model)."""
_BATCH_COST = 24
"""Cost of starting a batch, in tokens."""


def pack_trees(
    trees: Sequence[PrefixTree], *, share_rows: bool, batch_tokens: int, max_scored: int, pad: int = 0
) -> PackedTrees:
    """Packs trees into rows and rows into batches.

    Args:
        trees: At least one.
        share_rows: Whether small trees are put together into rows, of the length that makes the whole cheapest;
            otherwise every tree gets its own row.
        batch_tokens: Upper bound of B * L, unless a single row is longer.
        max_scored: Upper bound of scored positions in a batch, unless a single row has more.
        pad: Token for padding.
    """
    scored = [len(np.unique(tree.positions)) for tree in trees]
    plans = []
    for capacity in ROW_TOKENS if share_rows else (0,):
        rows = _fill_rows([tree.size for tree in trees], capacity)
        rows.sort(key=lambda row: (-sum(trees[k].size for k in row), row))
        lengths = [sum(trees[k].size for k in row) for row in rows]
        cost, cuts = _cut_batches(lengths, [sum(scored[k] for k in row) for row in rows], batch_tokens, max_scored)
        plans.append((cost, capacity, rows, cuts))
    _, _, rows, cuts = min(plans, key=lambda plan: plan[:2])
    return PackedTrees(
        tuple(_batch([[trees[k] for k in row] for row in rows[start:stop]], pad) for start, stop in cuts),
        1 + max(int(tree.requests.max()) for tree in trees),
        sum(tree.size for tree in trees),
        sum(_unshared_tokens(tree) for tree in trees),
    )


def _unshared_tokens(tree: PrefixTree) -> int:
    """Tokens of the tree's inputs, each counted in full: the depth of each request's last position."""
    last: dict[int, int] = {}
    for position, request in zip(tree.positions.tolist(), tree.requests.tolist(), strict=True):
        last[request] = max(last.get(request, 0), int(tree.position_ids[position]) + 1)
    return sum(last.values())


def _branches(tree: PrefixTree) -> bool:
    return bool(np.any(tree.ends != tree.size))


def _fill_rows(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: every tree goes to the fullest row that still has room for it."""
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}
    for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
        size = sizes[k]
        left = next((free for free in range(size, capacity + 1) if room.get(free)), None)
        if left is None:
            rows.append([k])
            row, left = len(rows) - 1, max(capacity, size)
        else:
            row = room[left].pop(0)
            rows[row].append(k)
        room.setdefault(left - size, []).append(row)
    return rows


def _cut_batches(
    lengths: Sequence[int], scored: Sequence[int], batch_tokens: int, max_scored: int
) -> tuple[float, list[tuple[int, int]]]:
    """Finds the cheapest way to cut rows, longest first, into batches within both bounds, and its cost in tokens.

    Every row of a batch is padded to its first. Dynamic programming: the best cut of the rows from k on.
    """
    best: list[tuple[float, int]] = [(0.0, len(lengths))] * (len(lengths) + 1)
    for start in range(len(lengths) - 1, -1, -1):
        length, total, stop = lengths[start], 0, start
        row = length * (1 + length * _ATTENTION_COST)
        options = []
        while stop < len(lengths):
            total += scored[stop]
            stop += 1
            if stop - start > 1 and ((stop - start) * length > batch_tokens or total > max_scored):
                break
            options.append((_BATCH_COST + (stop - start) * row + best[stop][0], stop))
        best[start] = min(options, key=lambda option: (option[0], -option[1]))
    cuts, start = [], 0
    while start < len(lengths):
        cuts.append((start, best[start][1]))
        start = best[start][1]
    return best[0][0], cuts


def _batch(rows: Sequence[Sequence[PrefixTree]], pad: int) -> Batch:
    length = max(sum(tree.size for tree in row) for row in rows)
    input_ids = np.full((len(rows), length), pad, dtype=np.int64)
    position_ids = np.zeros((len(rows), length), dtype=np.int64)
    ends = np.tile(np.arange(1, length + 1), (len(rows), 1))
    positions, targets, requests, weights = [], [], [], []
    for r, row in enumerate(rows):
        start = 0
        for tree in row:
            span = slice(start, start + tree.size)
            input_ids[r, span] = tree.tokens
            position_ids[r, span] = tree.position_ids
            ends[r, span] = tree.ends + start
            positions.append(r * length + start + tree.positions)
            targets.append(tree.targets)
            requests.append(tree.requests)
            weights.append(np.ones(len(tree.targets)) if tree.weights is None else tree.weights)
            start += tree.size
    flat = np.concatenate(positions)
    order = np.argsort(flat, kind="stable")
    scored, index = np.unique(flat[order], return_inverse=True)
    return Batch(
        input_ids,
        position_ids,
        ends,
        scored,
        index.astype(np.int64),
        np.concatenate(targets)[order],
        np.concatenate(requests)[order],
        causal=all(len(row) == 1 and not _branches(row[0]) for row in rows),
        weights=np.concatenate(weights)[order] if any(t.weights is not None for row in rows for t in row) else None,
    )
