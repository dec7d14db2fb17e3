"""Computes log-likelihoods with a resident model: HFLM's numbers, with as little computation as they need."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.backends.native.forward import Forward, forward_pass, head_is_last
from evomerge.evaluation.backends.native.prefix_trees import Batch, PackedTrees, build_tree, pack_trees, soft_tree
from evomerge.evaluation.tasks.requests import Pair, SoftTargets
from evomerge.system.arrays import FloatArray, IntArray

log = logging.getLogger(__name__)

MAX_LOGITS = 2**26
"""Upper bound of logits (positions times vocabulary) held at once."""
CPU_STATES, CPU_TOKENS, GPU_TOKENS = 2**18, (512, 4096), 8192
"""Where nobody says how many tokens a batch has: numbers in a hidden state of all of them, and the bounds; on a GPU."""
_CHUNK_LOGITS = 2**19
"""Logits turned to float32 at a time, so that they stay in the cache."""


@dataclass(frozen=True)
class RequestLogprobs:
    """Log-likelihoods of some requests.

    Attributes:
        loglikelihoods: [q], in float64.
        greedy: [q] whether greedy decoding would give every scored token.
    """

    loglikelihoods: FloatArray
    greedy: npt.NDArray[np.bool_]


class TreeLogprobs:
    """Computes log-likelihoods of token sequences as prefix trees, in batches that stay the same for every model.

    Args:
        vocabulary: Size of the model's vocabulary.
        max_length: The longest input; a longer one loses tokens on its left, as in HFLM.
        batch_tokens: Tokens in a batch, padding counted; None for what suits the device.
    """

    def __init__(self, vocabulary: int, max_length: int, batch_tokens: int | None) -> None:
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.max_scored = max(1, MAX_LOGITS // vocabulary)
        self.tree_masks: bool | None = None
        self.head_is_last = False
        self.default_tokens = CPU_TOKENS[0]
        self.attention_window: int | None = None

    def prepare(self, model: Any) -> None:
        """Finds out whether the model supports tree masks; afterwards batches are final. Cheap when already known.

        Raises:
            CandidateError: The model's logits are not finite.
        """
        if self.tree_masks is None:
            self.attention_window = _attention_window(model.config)
            self.default_tokens = _default_tokens(model)
            with forward_pass(model) as forward:
                probes = [partial(head_is_last, forward), partial(supports_tree_masks, forward)]
                self.head_is_last, self.tree_masks = forward.run_all(probes)

    def pack(self, items: Sequence[Sequence[Pair | SoftTargets]], batch_tokens: int | None = None) -> PackedTrees:
        """Packs the requests of some items into batches: one list of (context, continuation) tokens per item.

        Requests are numbered through all items, in order.

        Args:
            items: The requests of each item.
            batch_tokens: Tokens in a batch, padding counted; None for what suits log-likelihoods.
        """
        inputs: list[Sequence[int]] = []
        targets: list[list[int]] = []
        soft: dict[int, SoftTargets] = {}
        for pair in (pair for pairs in items for pair in pairs):
            if isinstance(pair, SoftTargets):
                soft[len(inputs)] = pair
                inputs.append(pair.tokens)
                targets.append([])
                continue
            context, continuation = pair
            inputs.append((context + continuation)[-(self.max_length + 1) :][:-1])
            targets.append(continuation)
        if not inputs:
            raise TaskError("no requests to score")
        share = self.tree_masks is not False and max(map(len, inputs)) <= (self.attention_window or self.max_length)
        groups: list[list[int]] = []
        if share:
            start = 0
            for pairs in items:
                own = range(start, start + len(pairs))
                groups += [[k] for k in own if k in soft] + _groups(inputs, [k for k in own if k not in soft])
                start += len(pairs)
        else:
            groups = [[k] for k in range(len(inputs))]
        trees = [
            soft_tree(soft[group[0]].tokens, soft[group[0]].targets, soft[group[0]].weights, group[0])
            if group[0] in soft
            else build_tree([inputs[k] for k in group], [targets[k] for k in group], group)
            for group in groups
        ]
        return pack_trees(
            trees,
            share_rows=share,
            batch_tokens=batch_tokens or self._batch_tokens(sum(tree.size for tree in trees)),
            max_scored=self.max_scored,
        )

    def _batch_tokens(self, tokens: int) -> int:
        """Tokens in a batch: as many as suit the device, but not so few batches that a core has none."""
        return self.batch_tokens or min(self.default_tokens, max(128, tokens // 4))

    def compute(self, model: Any, packed: PackedTrees) -> RequestLogprobs:
        """Runs the model over packed requests.

        Args:
            model: The model.
            packed: From `pack`.

        Raises:
            CandidateError: A logit that is needed is not finite.
        """
        sums = np.zeros(packed.requests)
        greedy = np.ones(packed.requests, dtype=np.bool_)
        with forward_pass(model) as forward:
            # The largest start first, so that the threads end together.
            batches = sorted(packed.batches, key=lambda batch: -batch.input_ids.size)
            jobs = [partial(batch_logprobs, forward, batch, head_is_last=self.head_is_last) for batch in batches]
            results = forward.run_all(jobs)
        for batch, (log_probs, best) in zip(batches, results, strict=True):
            weighted = log_probs if batch.weights is None else log_probs * batch.weights
            sums += np.bincount(batch.requests, weights=weighted, minlength=packed.requests)
            greedy[batch.requests[~best]] = False
        return RequestLogprobs(sums, greedy)

    def top_tokens(self, model: Any, texts: Sequence[Sequence[int]], most: int) -> list[tuple[IntArray, FloatArray]]:
        """Finds what a model expects after every token of some texts.

        Args:
            model: The model, prepared.
            texts: Token sequences, none longer than the context.
            most: How many tokens at each position.

        Returns:
            For each text the likeliest tokens, [n, k], and their probabilities, which are made to add up to 1.

        Raises:
            CandidateError: The model's logits are not finite.
        """
        with forward_pass(model) as forward:
            return forward.run_all([partial(_top_tokens, forward, text, most) for text in texts])


def _top_tokens(forward: Forward, text: Sequence[int], most: int) -> tuple[IntArray, FloatArray]:
    ids = torch.tensor([list(text)], device=forward.device)
    logits = forward.logits(torch.arange(len(text), device=forward.device), input_ids=ids, use_cache=False).float()
    if not bool(torch.isfinite(logits).all()):
        raise CandidateError("the model's logits are not finite, so nobody can agree with it")
    top = logits.topk(min(most, logits.shape[-1]), dim=-1)
    return top.indices.cpu().numpy(), torch.softmax(top.values.double(), dim=-1).cpu().numpy()


def _groups(inputs: Sequence[Sequence[int]], requests: Sequence[int]) -> list[list[int]]:
    """Requests of one item that share their first token form a tree; a lone one may go to any row."""
    by_first: dict[int, list[int]] = {}
    for k in requests:
        by_first.setdefault(inputs[k][0], []).append(k)
    return list(by_first.values())


def _default_tokens(model: Any) -> int:
    """Tokens in a batch.

    On a CPU every core computes a batch of its own: large enough for the products to be fast, small enough for their
    results to stay in the core's cache.
    """
    embeddings = model.get_input_embeddings()
    if embeddings.weight.device.type != "cpu":
        return GPU_TOKENS
    low, high = CPU_TOKENS
    return min(high, max(low, CPU_STATES // int(embeddings.weight.shape[-1])))


def _attention_window(config: Any) -> int | None:
    """The shortest attention window of any layer: beyond it, a mask of ours would show too much."""
    text = getattr(config, "text_config", None) or config
    if getattr(text, "use_sliding_window", None) is False:
        return None
    sizes = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "sliding_window_size"))
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def batch_inputs(batch: Batch, model: Any) -> dict[str, Any]:
    """Builds the inputs of the model for a batch."""
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(batch.input_ids).to(device), "use_cache": False}
    if not batch.causal:
        inputs["position_ids"] = torch.from_numpy(batch.position_ids).to(device)
        inputs["attention_mask"] = _mask(torch.from_numpy(batch.ends).to(device), model.dtype)
    return inputs


def _mask(ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask [B, 1, L, L] from `Batch.ends`: 0 where position q may attend to k, else the minimum."""
    q = torch.arange(ends.shape[1], device=ends.device)
    allowed = (q[None, :, None] >= q[None, None, :]) & (q[None, :, None] < ends[:, None, :])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def batch_logprobs(forward: Forward, batch: Batch, *, head_is_last: bool) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Computes the log-probability of every scored token of a batch, and whether greedy decoding would give it.

    Raises:
        CandidateError: A logit that is needed is not finite.
    """
    positions = torch.from_numpy(batch.scored).to(forward.device)
    log_probs, greedy, start = [], [], 0
    for logits in forward.logit_chunks(positions, head_is_last=head_is_last, **batch_inputs(batch, forward.model)):
        span = slice(*np.searchsorted(batch.rows, (start, start + len(logits))))
        rows = torch.from_numpy(batch.rows[span] - start).to(forward.device)
        targets = torch.from_numpy(batch.targets[span]).to(forward.device)
        part, best = _log_probs(logits, rows, targets)
        _break_ties(logits, rows, targets, best, batch.requests[span])
        log_probs.append(part)
        greedy.append(best)
        start += len(logits)
    return np.concatenate(log_probs), np.concatenate(greedy)


def _log_probs(
    logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Log-probability of each target, in float32, and whether no token is more likely.

    The softmax itself is never written: each row's maximum and the sum of exponentials are found a few rows at a time.
    """
    step = max(1, _CHUNK_LOGITS // logits.shape[1])
    tops, sums = [], []
    for part in torch.split(logits, step):
        wide = part.float()
        top = wide.amax(dim=-1, keepdim=True)
        sums.append(torch.sub(wide, top).exp_().sum(dim=-1))
        tops.append(top[:, 0])
    top, normaliser = torch.cat(tops), torch.cat(sums).log_()
    of_targets = logits[rows, targets].float()
    log_probs = (of_targets - top[rows]) - normaliser[rows]
    if not bool(torch.isfinite(log_probs).all()):
        raise CandidateError("the model's logits are not finite, so it has no score")
    return log_probs.double().cpu().numpy(), (of_targets == top[rows]).cpu().numpy()


def _break_ties(
    logits: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    best: npt.NDArray[np.bool_],
    requests: npt.NDArray[np.int64],
) -> None:
    """Of equally likely tokens, greedy decoding takes the first: checks where a request is still greedy."""
    undecided = torch.from_numpy(np.flatnonzero(best & ~np.isin(requests, requests[~best]))).to(logits.device)
    if len(undecided):
        best[undecided.cpu().numpy()] = (logits[rows[undecided]].argmax(dim=-1) == targets[undecided]).cpu().numpy()


def supports_tree_masks(forward: Forward) -> bool:
    """Checks whether the model gives a tree in a shared row the logits that its sequences have one by one.

    Models that have no attention mask (state-space models), that count positions themselves (ALiBi), or whose
    attention kernel takes no mask of ours do not; they are scored one sequence a row.

    Raises:
        CandidateError: The model's logits are not finite.
    """
    model = forward.model
    vocabulary = model.get_input_embeddings().num_embeddings
    draw = [(7919 * k + 13) % vocabulary for k in range(1, 65)]
    stem, long, short, other = draw[:8], draw[8:30], draw[30:41], draw[41:64]
    inputs = [stem + long, stem + short, other]
    targets = [tokens[1:] + tokens[:1] for tokens in inputs]
    tree = build_tree(inputs[:2], targets[:2], [0, 1])
    lone = [build_tree([inputs[k]], [targets[k]], [k]) for k in range(3)]
    bounds = {"batch_tokens": 1024, "max_scored": 1024}
    plain = _all_log_probs(forward, pack_trees(lone, share_rows=False, **bounds))
    try:
        shared = _all_log_probs(forward, pack_trees([lone[2], tree], share_rows=True, **bounds))
    except CandidateError:
        raise
    except Exception as error:  # whatever a model does to a mask it cannot take
        log.info("no shared prefixes: %s does not take tree masks (%s)", type(model).__name__, error)
        return False
    errors = np.abs(plain - shared)
    exact = model.dtype == torch.float32
    supported = bool(errors.max() < 1e-3) if exact else bool(errors.mean() < 0.05 and errors.max() < 0.5)
    if not supported:
        log.info("no shared prefixes: %s does not support tree masks (off by %.2g)", type(model).__name__, errors.max())
    return supported


def _all_log_probs(forward: Forward, packed: PackedTrees) -> FloatArray:
    """Log-probability of every target, by request and then by position in it."""
    rows: list[tuple[int, int, float]] = []
    for batch in packed.batches:
        log_probs, _ = batch_logprobs(forward, batch, head_is_last=False)
        positions = batch.position_ids.reshape(-1)[batch.scored[batch.rows]]
        rows += zip(batch.requests.tolist(), positions.tolist(), log_probs.tolist(), strict=True)
    return np.array([value for _, _, value in sorted(rows)])
