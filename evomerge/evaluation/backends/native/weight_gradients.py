"""Differentiates a number with respect to a resident model's weights: one pass forward, one backward.

The number is a function of log-likelihoods. Items come in chunks of a bounded size; each is run forward, the function
is differentiated with respect to its log-likelihoods, and it is run backward. Like a score, a chunk is computed by one
thread alone, and chunks are added up in their order, so that the result does not depend on how many threads there are.
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
from evomerge.evaluation.backends.native.forward import Forward, forward_pass
from evomerge.evaluation.backends.native.logprobs import batch_inputs
from evomerge.evaluation.backends.native.prefix_trees import Batch, PackedTrees
from evomerge.system.arrays import FloatArray
from evomerge.system.memory import available
from evomerge.system.threads import run_all

CHUNK_STATES, MIN_TOKENS, MAX_TOKENS = 2**19, 128, 1024
"""Numbers in one layer's hidden state of a chunk, and the bounds of its tokens: all layers' states are held at once."""
_MAX_PARALLEL = 4
"""Chunks under way at a time: each holds gradients of the whole model."""
_MEMORY_SHARE = 0.7
"""Of the free memory that gradients may take; a chunk's own states take some as well."""


@dataclass(frozen=True)
class GradientChunk:
    """Some requests, and the derivative of the number with respect to their log-likelihoods.

    Attributes:
        packed: Their batches.
        derivative: (log-likelihoods [q]) -> derivative of the number with respect to each, [q].
    """

    packed: PackedTrees
    derivative: Callable[[FloatArray], FloatArray]


def chunk_tokens(model: Any) -> int:
    """Returns how many tokens a chunk has."""
    width = int(model.get_input_embeddings().weight.shape[-1])
    return min(MAX_TOKENS, max(MIN_TOKENS, CHUNK_STATES // width))


def weight_gradient(
    model: Any, chunks: Sequence[GradientChunk], names: Sequence[str], *, head_is_last: bool
) -> dict[str, Tensor]:
    """Differentiates the number with respect to some parameters.

    Args:
        model: A causal language model of transformers, in evaluation mode; as before afterwards.
        chunks: The requests.
        names: Names of the parameters.
        head_is_last: As in `Forward.logit_chunks`.

    Returns:
        Name to float32 tensor, in the parameter's shape; a parameter that the number does not depend on is left out.

    Raises:
        CandidateError: A log-likelihood or a derivative is not finite, or torch cannot go back through the model: for
            want of memory, or of a derivative of what it does.
    """
    by_name = dict(model.named_parameters())
    parameters = [by_name[name] for name in names]
    total: list[Tensor | None] = [None] * len(names)
    with _differentiable(parameters), forward_pass(model) as forward:
        jobs = [partial(_backward, forward, chunk, parameters, head_is_last) for chunk in chunks]
        parallel = _parallel_chunks(forward, parameters)
        for start in range(0, len(jobs), parallel):
            part = jobs[start : start + parallel]
            try:
                computed = run_all(part, forward.threads) if forward.threads else [job() for job in part]
            except RuntimeError as error:  # torch has no narrower one for either
                reason = " ".join(str(error).split())[:300]
                raise CandidateError(f"{type(model).__name__} cannot be differentiated: {reason}") from error
            for gradients in computed:
                _add(total, gradients)
    result = {name: part for name, part in zip(names, total, strict=True) if part is not None}
    if not all(bool(torch.isfinite(part).all()) for part in result.values()):
        raise CandidateError("the gradient of the model's weights is not finite")
    return result


def _parallel_chunks(forward: Forward, parameters: Sequence[Tensor]) -> int:
    """Returns how many chunks may be under way at a time.

    Raises:
        CandidateError: There is no memory for one. The kernel would end the process instead of saying so.
    """
    most = max(1, min(forward.threads, _MAX_PARALLEL))
    free = available() if forward.device.type == "cpu" else None
    if free is None:
        return most
    sums = sum(4 * parameter.numel() for parameter in parameters)
    each = sum(parameter.element_size() * parameter.numel() for parameter in parameters)
    parallel = min(most, int((_MEMORY_SHARE * free - sums) / max(each, 1)))
    if parallel < 1:
        raise CandidateError(f"a gradient takes {(sums + each) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    return parallel


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
        before = total[k]
        if gradient is None:
            continue
        if before is None:
            total[k] = gradient.float()
        else:
            before.add_(gradient)


def _backward(
    forward: Forward, chunk: GradientChunk, parameters: Sequence[Tensor], head_is_last: bool
) -> tuple[Tensor | None, ...]:
    """One chunk forward and backward."""
    sums = torch.zeros(chunk.packed.requests, dtype=torch.float64, device=forward.device)
    for batch in chunk.packed.batches:
        requests = torch.from_numpy(batch.requests).to(forward.device)
        sums = sums.index_add(0, requests, _log_probs(forward, batch, head_is_last).double())
    values = sums.detach().cpu().numpy()
    if not np.all(np.isfinite(values)):
        raise CandidateError("the model's logits are not finite, so its score has no gradient")
    derivative = torch.from_numpy(chunk.derivative(values)).to(forward.device)
    return torch.autograd.grad((sums * derivative).sum(), parameters, allow_unused=True)


def _log_probs(forward: Forward, batch: Batch, head_is_last: bool) -> Tensor:
    """Log-probability of every scored token of a batch, [p], float32.

    Logits are not kept: they are computed again on the way back, part by part.
    """
    positions = torch.from_numpy(batch.scored).to(forward.device)
    inputs = batch_inputs(batch, forward.model)
    whole = not head_is_last
    parts = [forward.logits(positions, **inputs)] if whole else forward.hidden_chunks(positions, **inputs)
    log_probs, start = [], 0
    for part in parts:
        span = slice(*np.searchsorted(batch.rows, (start, start + len(part))))
        rows = torch.from_numpy(batch.rows[span] - start).to(forward.device)
        targets = torch.from_numpy(batch.targets[span]).to(forward.device)
        if whole:
            log_probs.append(_target_log_probs(part, rows, targets))
        else:
            again = partial(_hidden_log_probs, forward.head)
            log_probs.append(checkpoint(again, part, rows, targets, use_reentrant=False, preserve_rng_state=False))
        start += len(part)
    return torch.cat(log_probs)


def _hidden_log_probs(head: Any, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    return _target_log_probs(head(hidden[None])[0], rows, targets)


def _target_log_probs(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities, in float32, of some targets in some rows of logits."""
    wide = logits.float()
    return wide[rows, targets] - torch.logsumexp(wide, dim=-1)[rows]
