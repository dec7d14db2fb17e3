"""The derivative of a number with respect to a resident model's weights: one pass forward, one backward.

The number is a function of log-likelihoods. Items come in pieces of a bounded size; each is run forward, the function
says what its log-likelihoods count, and it is run backward. Like a score, a piece is computed by one thread alone, and
pieces are added up in their order, so that the result does not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evomerge.errors import CandidateError
from evomerge.evaluation.backends.native.forward import Forward, forwarding
from evomerge.evaluation.backends.native.logprobs import batch_inputs
from evomerge.evaluation.backends.native.prefix_trees import Batch, Layout
from evomerge.evaluation.scores import Array
from evomerge.system.memory import available
from evomerge.system.threads import run_all

STATES, LEAST_TOKENS, MOST_TOKENS = 2**19, 128, 1024
"""Numbers in one layer's hidden state of a piece, and the bounds of its tokens: all layers' states are held at once."""
_LANES = 4
"""Pieces under way at a time: each holds gradients of the whole model."""
_SHARE = 0.7
"""Of the free memory that gradients may take; a piece's own states take some as well."""


@dataclass(frozen=True)
class Piece:
    """Some requests, and what they count.

    Attributes:
        layout: Their batches.
        counts: (log-likelihoods [q]) -> derivative of the number with respect to each, [q].
    """

    layout: Layout
    counts: Callable[[Array], Array]


def piece_tokens(model: Any) -> int:
    """How many tokens a piece has."""
    width = int(model.get_input_embeddings().weight.shape[-1])
    return min(MOST_TOKENS, max(LEAST_TOKENS, STATES // width))


def weight_gradient(
    model: Any, pieces: Sequence[Piece], names: Sequence[str], *, head_is_last: bool
) -> dict[str, Tensor]:
    """The derivative of the number with respect to some parameters.

    Args:
        model: A causal language model of transformers, in evaluation mode; as before afterwards.
        pieces: The requests.
        names: Names of the parameters.
        head_is_last: As in `Forward.chunks`.

    Returns:
        Name to float32 tensor, in the parameter's shape; a parameter that the number does not depend on is left out.

    Raises:
        CandidateError: A log-likelihood or a derivative is not finite, or torch cannot go back through the model: for
            want of memory, or of a derivative of what it does.
    """
    known = dict(model.named_parameters())
    parameters = [known[name] for name in names]
    total: list[Tensor | None] = [None] * len(names)
    with _differentiable(parameters), forwarding(model) as forward:
        work = [partial(_backward, forward, piece, parameters, head_is_last) for piece in pieces]
        lanes = _lanes(forward, parameters)
        for start in range(0, len(work), lanes):
            part = work[start : start + lanes]
            try:
                found = run_all(part, forward.threads) if forward.threads else [piece() for piece in part]
            except RuntimeError as error:  # torch has no narrower one for either
                reason = " ".join(str(error).split())[:300]
                raise CandidateError(f"{type(model).__name__} cannot be differentiated: {reason}") from error
            for gradients in found:
                _add(total, gradients)
    result = {name: held for name, held in zip(names, total, strict=True) if held is not None}
    if not all(bool(torch.isfinite(held).all()) for held in result.values()):
        raise CandidateError("the gradient of the model's weights is not finite")
    return result


def _lanes(forward: Forward, parameters: Sequence[Tensor]) -> int:
    """How many pieces may be under way at a time.

    Raises:
        CandidateError: There is no memory for one. The kernel would end the process instead of saying so.
    """
    wanted = max(1, min(forward.threads, _LANES))
    free = available() if forward.device.type == "cpu" else None
    if free is None:
        return wanted
    sums = sum(4 * parameter.numel() for parameter in parameters)
    each = sum(parameter.element_size() * parameter.numel() for parameter in parameters)
    lanes = min(wanted, int((_SHARE * free - sums) / max(each, 1)))
    if lanes < 1:
        raise CandidateError(f"a gradient takes {(sums + each) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    return lanes


@contextmanager
def _differentiable(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Parameters with gradients for as long as the block lasts."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _add(total: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    for k, gradient in enumerate(gradients):
        held = total[k]
        if gradient is None:
            continue
        if held is None:
            total[k] = gradient.float()
        else:
            held.add_(gradient)


def _backward(
    forward: Forward, piece: Piece, parameters: Sequence[Tensor], head_is_last: bool
) -> tuple[Tensor | None, ...]:
    """One piece forward and backward."""
    sums = torch.zeros(piece.layout.requests, dtype=torch.float64, device=forward.device)
    for batch in piece.layout.batches:
        requests = torch.from_numpy(batch.requests).to(forward.device)
        sums = sums.index_add(0, requests, _log_probs(forward, batch, head_is_last).double())
    values = sums.detach().cpu().numpy()
    if not np.all(np.isfinite(values)):
        raise CandidateError("the model's logits are not finite, so its score has no gradient")
    counts = torch.from_numpy(piece.counts(values)).to(forward.device)
    return torch.autograd.grad((sums * counts).sum(), parameters, allow_unused=True)


def _log_probs(forward: Forward, batch: Batch, head_is_last: bool) -> Tensor:
    """Log-probability of every scored token of a batch, [p], float32.

    Logits are not held: they are computed again on the way back, part by part.
    """
    positions = torch.from_numpy(batch.scored).to(forward.device)
    inputs = batch_inputs(batch, forward.model)
    whole = not head_is_last
    parts = [forward.logits(positions, **inputs)] if whole else forward.hidden(positions, **inputs)
    found, start = [], 0
    for part in parts:
        span = slice(*np.searchsorted(batch.rows, (start, start + len(part))))
        rows = torch.from_numpy(batch.rows[span] - start).to(forward.device)
        targets = torch.from_numpy(batch.targets[span]).to(forward.device)
        if whole:
            found.append(_of_targets(part, rows, targets))
        else:
            again = partial(_of_hidden, forward.head)
            found.append(checkpoint(again, part, rows, targets, use_reentrant=False, preserve_rng_state=False))
        start += len(part)
    return torch.cat(found)


def _of_hidden(head: Any, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    return _of_targets(head(hidden[None])[0], rows, targets)


def _of_targets(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities, in float32, of some targets in some rows of logits."""
    wide = logits.float()
    return wide[rows, targets] - torch.logsumexp(wide, dim=-1)[rows]
