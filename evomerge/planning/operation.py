"""One tensor operation of a plan: what to compute, from what, and a hash of both."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import NamedTuple

from evomerge.methods.contract import Settings
from evomerge.planning.activations import Activations
from evomerge.system.hashing import digest

COPY = "copy"


class Input(NamedTuple):
    """A tensor of a checkpoint: the model's reference, the tensor's name, and the model's content fingerprint.

    A tuple, because statistics are looked up by it tens of thousands of times for each candidate.
    """

    model: str
    tensor: str
    fingerprint: str


FamilyMember = tuple[Input | None, tuple[Input, ...]]
"""The base and the sources of one tensor."""

Family = tuple[FamilyMember, ...]
"""Those of every tensor that is merged: the whole model, for ``scope: model``."""


@dataclass(frozen=True)
class Operation:
    """How one output tensor is made.

    Attributes:
        output: Name in the merged checkpoint.
        shape: Shape of the output.
        dtype: safetensors dtype name of the output ("BF16").
        method: A method's name, or `COPY` for a layer that is copied.
        base: The base's tensor, if the method has a base.
        sources: The sources' tensors, in recipe order.
        settings: The method's parameters, resolved for this tensor.
        seed: The recipe's seed; matters to stochastic methods only.
        scale: Factor of a copy.
        after: Stages that follow the method, by name.
        activations: Mean magnitudes of a matrix's inputs, for the stages that ask for them.
        digest: Content hash: operations with the same digest write the same bytes.
        slice_index: The part of the recipe that decides it.
        t: Where in the slice it is, 0 for its first layer and 1 for its last.
    """

    output: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    base: Input | None
    sources: tuple[Input, ...]
    settings: Settings
    seed: int = 0
    scale: float = 1.0
    after: tuple[str, ...] = ()
    activations: Activations | None = None
    digest: str = ""
    slice_index: int = field(default=0, compare=False)
    t: float = field(default=0.0, compare=False)


def inputs_of(operation: Operation) -> tuple[Input, ...]:
    """Returns everything that an operation reads."""
    return operation.sources if operation.base is None else (*operation.sources, operation.base)


def operation_digest(operation: Operation, *, stochastic: bool, context: str = "") -> str:
    """Hashes everything that the operation's result depends on.

    The output's name is left out (a layer copied to two places has one digest), except where the method draws from
    the random field of that name.

    Args:
        operation: The operation; its own `digest` is ignored.
        stochastic: The method draws from the random field, so that the seed and the output's name matter.
        context: Content of the rest of the model where the result depends on it (`scope: model`).
    """

    def content(tensor: Input | None) -> list[str] | None:
        return None if tensor is None else [tensor.fingerprint, tensor.tensor]

    parts = [
        operation.shape,
        operation.dtype,
        operation.method,
        content(operation.base),
        [content(source) for source in operation.sources],
        dict(operation.settings.shared),
        [dict(source) for source in operation.settings.sources],
        [operation.seed, operation.output] if stochastic else None,
        operation.scale,
        context,
        *operation.after,
        *([operation.activations.digest] if operation.activations else []),
    ]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return digest(text)
