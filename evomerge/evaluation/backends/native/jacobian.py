"""Differentiates every log-likelihood with respect to some directions in weight space: one pass forward, one backward.

The backward pass goes to activations only; no gradient of a weight is formed. For a matrix W that moves by D, with a
token's input x and the derivative δ of its sequence's log-likelihood by the output W x, the log-likelihood moves by
Σ ⟨δ, D x⟩ over the sequence's tokens. Sequences share rows but no tokens, so one backward pass of the sum of their
log-likelihoods holds the δ of each. A matrix of low rank, D = A B, costs the products B x and Aᵀ δ.

Like a score, a batch is computed by one thread alone, so that no number depends on how many there are.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, jvp

from evomerge.errors import CandidateError
from evomerge.evaluation.backends.native.forward import Forward, forward_pass
from evomerge.evaluation.backends.native.logprobs import batch_inputs
from evomerge.evaluation.backends.native.prefix_trees import Batch, PackedTrees
from evomerge.evaluation.backends.registry import Directions
from evomerge.system.arrays import FloatArray, IntArray
from evomerge.system.threads import run_all

BATCH_STATES, MIN_TOKENS, MAX_TOKENS = 2**19, 128, 1024
"""Numbers in one layer's hidden state of a batch, and the bounds of its tokens: all layers' states are held at once."""
_GRADIENT_COST = 150
"""Tokens of a sequence at which its own gradient, contracted with all directions, costs as one more direction does."""
_SEQUENCES = 8
"""Sequences whose gradients are held at a time."""
RANKS, MAX_SHARE = (32, 96), 0.5
"""Of the factors that may stand for a matrix, and the share of its products that theirs may cost."""
MAX_LEFT_OUT = 0.1
"""The share of a direction's squared norm that they may leave out."""
_FORWARD_MODE = threading.Lock()
"""Torch counts the levels of forward derivatives for all threads together."""
_ROUNDING = 0.02
"""How far from linear in a parameter an output may be, as a share of its largest element, in a model of few bits."""
_DIFFERENCE = 1e-2
"""Step of a difference, as a share of the parameter's norm."""


def batch_tokens(model: Any) -> int:
    """Returns how many tokens a batch has."""
    width = int(model.get_input_embeddings().weight.shape[-1])
    return min(MAX_TOKENS, max(MIN_TOKENS, BATCH_STATES // width))


def jacobian(
    model: Any,
    packed: Sequence[PackedTrees],
    directions: Mapping[str, Sequence[Directions]],
    columns: int,
    *,
    head_is_last: bool,
) -> list[tuple[FloatArray, FloatArray]]:
    """Computes log-likelihoods, and their derivatives with respect to some numbers that weights depend on.

    Args:
        model: A causal language model of transformers, in evaluation mode; as before afterwards.
        packed: Requests that share no tokens: every tree is one sequence.
        directions: Name of a parameter to how it moves.
        columns: How many numbers there are.
        head_is_last: As in `Forward.logit_chunks`.

    Returns:
        For each of `packed` its log-likelihoods [requests] and derivatives [requests, columns].

    Raises:
        CandidateError: A number is not finite, or torch cannot go back through the model.
    """
    current = _Current()
    with forward_pass(model) as forward, _traced(model, forward.head if head_is_last else None, directions, current):
        head = directions.get(_name_of(model, forward.head), ()) if head_is_last else ()
        jobs = [
            partial(_batch, forward, batch, columns, head, current, head_is_last=head_is_last)
            for part in packed
            for batch in part.batches
        ]
        try:
            computed = iter(run_all(jobs, forward.threads) if forward.threads else [job() for job in jobs])
        except RuntimeError as error:  # torch has no narrower one for either
            reason = " ".join(str(error).split())[:300]
            raise CandidateError(f"{type(model).__name__} cannot be differentiated: {reason}") from error
    results: list[tuple[FloatArray, FloatArray]] = []
    for part in packed:
        values, derivatives = np.zeros(part.requests), np.zeros((part.requests, columns))
        for requests, sums, rows in itertools.islice(computed, len(part.batches)):
            values[requests] += sums
            derivatives[requests] += rows
        if not (np.isfinite(values).all() and np.isfinite(derivatives).all()):
            raise CandidateError("the model's log-likelihoods or their derivatives are not finite")
        results.append((values, derivatives))
    return results


class _Batch:
    """The derivatives that one batch's tokens add up to.

    Args:
        owners: Which of its sequences every token belongs to, -1 for padding, [tokens].
        shape: (rows, tokens of a row).
        sequences: How many there are.
        columns: Numbers to differentiate by.
        scored: Flat positions of the tokens whose logits are needed.
    """

    def __init__(
        self, owners: IntArray, shape: tuple[int, ...], sequences: int, columns: int, scored: IntArray
    ) -> None:
        self._sequences, self._shape = sequences, shape
        self._owners = {len(owners): owners, len(scored): owners[scored]}
        self._spans: dict[int, list[tuple[int, int, int]]] = {}
        self.derivatives = torch.zeros(sequences, columns, dtype=torch.float64)

    def linear(self, x: Tensor, delta: Tensor, directions: Directions) -> None:
        """Adds what a linear layer's tokens say: x [tokens, in], δ [tokens, out]."""
        right = directions.right
        if right is not None:
            count, _, rank = directions.tensors.shape
            of_output = delta @ directions.tensors.transpose(0, 1).reshape(-1, count * rank)
            of_input = x @ right.reshape(count * rank, -1).T
            self.by_token((_wide(of_output) * _wide(of_input)).view(-1, count, rank).sum(-1), directions.columns)
            return
        spans = self._spans_of(len(x))
        mean = len(x) / max(len(spans), 1)
        if 1 + _GRADIENT_COST / mean * min(1.0, len(directions.columns) / 4) < len(directions.columns):
            self._by_sequence(x, delta, directions, spans)
            return
        narrow_output = delta.shape[1] <= x.shape[1]
        terms = [
            (_wide(x @ d.T) * _wide(delta) if narrow_output else _wide(delta @ d) * _wide(x)).sum(-1)
            for d in directions.tensors
        ]
        self.by_token(torch.stack(terms, dim=1), directions.columns)

    def _by_sequence(
        self, x: Tensor, delta: Tensor, directions: Directions, spans: Sequence[tuple[int, int, int]]
    ) -> None:
        flat = directions.tensors.flatten(1)
        for start in range(0, len(spans), _SEQUENCES):
            part = spans[start : start + _SEQUENCES]
            gradients = torch.stack([(delta[a:b].T @ x[a:b]).flatten() for _, a, b in part])
            rows = (gradients @ flat.T).double().cpu()
            for (owner, _, _), row in zip(part, rows, strict=True):
                self.derivatives[owner, directions.columns] += row

    def by_token(self, values: Tensor, columns: IntArray) -> None:
        """Adds what every token says, [tokens, k]."""
        owners = self._owners_of(len(values))
        kept = torch.from_numpy(np.flatnonzero(owners >= 0))
        rows = torch.zeros(self._sequences, len(columns), dtype=torch.float64)
        rows.index_add_(0, torch.from_numpy(owners)[kept], values.double().cpu()[kept])
        self.derivatives[:, columns] += rows

    def over_tokens(self, values: Tensor) -> Tensor:
        """Sums what lies within a token, wherever a module's output has its tokens: [tokens]."""
        rows, length = self._shape
        if values.shape[:2] == (rows, length):
            return values.reshape(rows * length, -1).sum(-1)
        if values.dim() > 2 and (values.shape[0], values.shape[2]) == (rows, length):
            return values.transpose(1, 2).reshape(rows * length, -1).sum(-1)
        flat = values if len(values) > 1 else values[0]  # without rows, or one row of all
        return flat.reshape(len(flat), -1).sum(-1)

    def _owners_of(self, tokens: int) -> IntArray:
        if tokens not in self._owners:
            raise CandidateError("a module of the model has its tokens in an order of its own: no derivatives")
        return self._owners[tokens]

    def _spans_of(self, tokens: int) -> list[tuple[int, int, int]]:
        """(sequence, start, stop) of every run of tokens of one sequence."""
        if tokens not in self._spans:
            owners = self._owners_of(tokens)
            edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), tokens]
            runs = [(int(owners[a]), a, b) for a, b in itertools.pairwise(edges)]
            self._spans[tokens] = [run for run in runs if run[0] >= 0]
        return self._spans[tokens]


class _Current(threading.local):
    """The batch that each thread has under way."""

    batch: _Batch | None = None

    @contextmanager
    def set(self, batch: _Batch | None) -> Iterator[None]:
        """Has another one for as long as the block lasts."""
        before, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = before


def _batch(
    forward: Forward,
    batch: Batch,
    columns: int,
    head: Sequence[Directions],
    current: _Current,
    *,
    head_is_last: bool,
) -> tuple[IntArray, FloatArray, FloatArray]:
    """One batch forward and backward: its requests, their log-likelihoods, their derivatives."""
    requests, local = np.unique(batch.requests, return_inverse=True)
    owners = _owners(batch, local)
    state = _Batch(owners, batch.input_ids.shape, len(requests), columns, batch.scored)
    positions = torch.from_numpy(batch.scored).to(forward.device)
    inputs = batch_inputs(batch, forward.model)
    sums = np.zeros(len(requests))
    with current.set(state):
        if not head_is_last:
            logits = forward.logits(positions, **inputs)
            rows, targets = (torch.from_numpy(part).to(forward.device) for part in (batch.rows, batch.targets))
            wide = _wide(logits)
            log_probs = wide[rows, targets] - torch.logsumexp(wide, dim=-1)[rows]
            if batch.weights is not None:
                log_probs = log_probs * torch.from_numpy(batch.weights).to(log_probs)
            log_probs.sum().backward()  # type: ignore[no-untyped-call]
            np.add.at(sums, local, log_probs.detach().double().cpu().numpy())
        else:
            parts, start = forward.hidden_chunks(positions, **inputs), 0
            deltas = []
            for part in parts:
                span = slice(*np.searchsorted(batch.rows, (start, start + len(part))))
                of_part, delta, moved = _head(forward, part.detach(), batch, span, start, head)
                np.add.at(sums, local[span], of_part)
                for columns_of, values_of in moved:
                    rows_of = torch.zeros(len(requests), len(columns_of), dtype=torch.float64)
                    state.derivatives[:, columns_of] += rows_of.index_add_(0, torch.from_numpy(local[span]), values_of)
                deltas.append(delta)
                start += len(part)
            torch.autograd.backward(list(parts), deltas)
    return requests, sums, state.derivatives.numpy()


def _head(
    forward: Forward, hidden: Tensor, batch: Batch, span: slice, start: int, directions: Sequence[Directions]
) -> tuple[FloatArray, Tensor, list[tuple[IntArray, Tensor]]]:
    """Applies the head to some rows.

    Returns:
        Log-probabilities of the span's targets, their sum's derivative by `hidden`, and what each target says of the
        head's own directions: columns, [targets, k].
    """
    with torch.no_grad():
        weight = forward.head.weight
        rows = torch.from_numpy(batch.rows[span] - start).to(forward.device)
        targets = torch.from_numpy(batch.targets[span]).to(forward.device)
        logits = _wide(forward.head(hidden[None])[0])
        normaliser = torch.logsumexp(logits, dim=-1)
        log_probs = logits[rows, targets] - normaliser[rows]
        counts = torch.bincount(rows, minlength=len(hidden)).to(logits.dtype)
        weights = None if batch.weights is None else torch.from_numpy(batch.weights[span]).to(log_probs)
        if weights is not None:
            log_probs = log_probs * weights
            counts = torch.zeros_like(counts).index_add_(0, rows, weights)
        shares = logits.sub_(normaliser[:, None]).exp_()
        moved = []
        for part in directions:
            terms = []
            for k, left in enumerate(part.tensors):
                change = _wide(hidden @ left.T if part.right is None else (hidden @ part.right[k].T) @ left.T)
                terms.append(change[rows, targets] - (shares * change).sum(-1)[rows])
            by_target = torch.stack(terms, dim=1) if weights is None else torch.stack(terms, dim=1) * weights[:, None]
            moved.append((part.columns, by_target.double().cpu()))
        delta = (shares.mul_(-counts[:, None])).to(weight.dtype) @ weight
        of_targets = weight[targets] if weights is None else weight[targets] * weights[:, None].to(weight.dtype)
        delta.index_add_(0, rows, of_targets)
    return log_probs.double().cpu().numpy(), delta, moved


def _owners(batch: Batch, local: IntArray) -> IntArray:
    """Which of the batch's requests every token belongs to: those of one sequence end at the same position of a row."""
    rows, length = batch.input_ids.shape
    labels = (np.arange(rows)[:, None] * (length + 1) + batch.ends).reshape(-1)
    by_label = np.full(rows * (length + 1) + length + 1, -1, dtype=np.int64)
    by_label[labels[batch.scored[batch.rows]]] = local
    owners: IntArray = by_label[labels]
    return owners


@contextmanager
def _traced(model: Any, head: Any, directions: Mapping[str, Sequence[Directions]], current: _Current) -> Iterator[None]:
    """Has each module with a parameter that moves tell the batch under way, `current.batch`, of its tokens.

    Args:
        model: The model.
        head: A head that is dealt with apart; None for none.
        directions: By name of parameter.
        current: Holds the batch of each thread.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    called = _called(model)
    watched: dict[str, dict[str, Sequence[Directions]]] = {path: {} for path in called if _is_embedding(model, path)}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if names[id(parameter)] in directions and module is not head:
                full = f"{path}.{name}" if path else name
                at = path
                while at and at not in called:  # its parameters are used without calling it
                    at = at.rpartition(".")[0]
                watched.setdefault(at, {})[full.removeprefix(f"{at}." if at else "")] = directions[names[id(parameter)]]
    hooks = [
        model.get_submodule(path).register_forward_hook(partial(_watch, own, current), with_kwargs=True)
        for path, own in watched.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watch(
    own: Mapping[str, Sequence[Directions]],
    current: _Current,
    module: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> Any:
    """Registers what is to be done once the derivative by a module's output is known."""
    batch = current.batch
    if batch is None:
        return None
    if isinstance(output, Tensor) and not output.requires_grad:  # embeddings: where the backward pass ends
        output = output.detach().requires_grad_(True)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    inputs = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
    named = {name: arg.detach() if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
    values = result.detach()  # a hook that has the tensor itself would keep it, and its graph, for ever

    def contract(delta: Tensor) -> None:
        delta = delta.detach()
        flat = delta.reshape(-1, delta.shape[-1])
        for name, directions in ((name, part) for name, parts in own.items() for part in parts):
            if name == "weight" and type(module).forward is torch.nn.Linear.forward:
                batch.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), flat, directions)
            elif name == "weight" and type(module).forward is torch.nn.Embedding.forward:
                _embedding(batch, inputs[0].reshape(-1), flat, directions)
            else:
                with current.set(None):  # what runs now is the derivative, not the batch
                    run, at = _function_of(module, name, inputs, named), module.get_parameter(name).detach()
                    if not _by_element(batch, run, at, values, delta, directions):
                        _by_tangent(batch, run, at, delta, directions)

    result.register_hook(contract)  # type: ignore[no-untyped-call]
    return output


def _embedding(batch: _Batch, ids: Tensor, delta: Tensor, directions: Directions) -> None:
    right = directions.right
    rows = [d[ids] if right is None else d[ids] @ right[k] for k, d in enumerate(directions.tensors)]
    batch.by_token(torch.stack([(_wide(row) * _wide(delta)).sum(-1) for row in rows], dim=1), directions.columns)


def _function_of(
    module: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[Tensor], Tensor]:
    """The module's output as a function of one of its parameters."""
    alone = _copy_path(module, name)  # other threads run the module meanwhile

    def run(parameter: Tensor) -> Tensor:
        output = functional_call(alone, {name: parameter}, args, dict(kwargs))
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    return run


def _by_element(
    batch: _Batch,
    run: Callable[[Tensor], Tensor],
    parameter: Tensor,
    output: Tensor,
    delta: Tensor,
    directions: Directions,
) -> bool:
    """Differentiates what scales or shifts each element of the last dimension: norms, biases. False for all else."""
    if parameter.dim() != 1 or output.shape[-1] != len(parameter) or directions.right is not None:
        return False
    with torch.no_grad():
        at_zero = _wide(run(torch.zeros_like(parameter)))
        scale = _wide(run(torch.ones_like(parameter))) - at_zero
        error = (at_zero + scale * _wide(parameter) - _wide(output)).abs().max()
        if error > _ROUNDING * _wide(output).abs().max():
            return False
        terms = (scale * _wide(delta)) @ _wide(directions.tensors).T
    tokens = torch.stack([batch.over_tokens(term[..., None]) for term in terms.unbind(-1)], dim=1)
    batch.by_token(tokens, directions.columns)
    return True


def _by_tangent(
    batch: _Batch, run: Callable[[Tensor], Tensor], parameter: Tensor, delta: Tensor, directions: Directions
) -> None:
    """Differentiates the module's output in each direction, whatever it computes."""
    right = directions.right
    terms = []
    for k, direction in enumerate(directions.tensors):
        whole = direction if right is None else direction @ right[k]
        with torch.no_grad():
            moved = _tangent(run, parameter, whole.reshape(parameter.shape).to(parameter.dtype))
        terms.append(batch.over_tokens(_wide(moved) * _wide(delta)))
    batch.by_token(torch.stack(terms, dim=1), directions.columns)


def _called(model: Any) -> set[str]:
    """Names the modules that a forward pass calls."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, path=path: called.add(path)) for path, module in model.named_modules()
    ]
    try:
        with torch.inference_mode():
            model(input_ids=torch.arange(1, 5, device=next(model.parameters()).device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _is_embedding(model: Any, path: str) -> bool:
    return isinstance(model.get_submodule(path), torch.nn.Embedding)


def _copy_path(module: Any, name: str) -> Any:
    """Copies a module without its hooks, and the modules within it on the way to a parameter; all else is shared."""
    alone, modules = copy.copy(module), dict(module._modules)
    child, _, rest = name.partition(".")
    if rest:
        modules[child] = _copy_path(modules[child], rest)
    vars(alone).update(_parameters=dict(module._parameters), _modules=modules, _forward_hooks=OrderedDict())
    return alone


def _tangent(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor) -> Tensor:
    """Differentiates a function in one direction; by central differences where torch has no forward derivative."""
    try:
        with _FORWARD_MODE:
            moved: Tensor = jvp(function, (at,), (direction,))[1]
    except NotImplementedError:
        size = direction.float().norm()
        if not size > 0:
            return torch.zeros_like(function(at))
        step = float(_DIFFERENCE * at.float().norm().clamp_min(1e-6) / size)
        moved = (function(at + step * direction) - function(at - step * direction)) / (2 * step)
    return moved


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _name_of(model: Any, module: Any) -> str:
    weight = getattr(module, "weight", None)
    return next((name for name, parameter in model.named_parameters() if parameter is weight), "")


def shortened(directions: Directions) -> list[Directions]:
    """Replaces matrices by factors of a low rank, where hardly anything is left out by that and it saves time.

    The range of each is found by a random sketch (Halko et al. 2011). The differences of fine-tuned weights are low in
    rank where adapters made them, but for the rounding of what was saved.

    Returns:
        The same directions, in groups of one rank.
    """
    whole = directions.tensors
    if whole.dim() != 3:
        return [directions]
    groups, left = [], np.arange(len(whole))
    generator = torch.Generator().manual_seed(0)
    for rank in RANKS:
        if rank * sum(whole.shape[1:]) > MAX_SHARE * whole.shape[1] * whole.shape[2] or not len(left):
            break
        wide = _wide(whole[left])
        sketch = torch.randn(wide.shape[2], rank, generator=generator, dtype=wide.dtype).to(wide.device)
        basis = torch.linalg.qr(wide @ sketch)[0]
        right = basis.transpose(1, 2) @ wide
        kept = (right.square().sum(dim=(1, 2)) >= (1 - MAX_LEFT_OUT) * wide.square().sum(dim=(1, 2))).cpu().numpy()
        if kept.any():
            picked = torch.from_numpy(np.flatnonzero(kept))
            factors = (part[picked].to(whole.dtype) for part in (basis, right))
            groups.append(Directions(directions.columns[left[kept]], *factors))
        left = left[~kept]
    return [*groups, Directions(directions.columns[left], whole[left])] if len(left) else groups
