"""Operations on tensors that live in memory, behind the interface of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.methods.contract import Settings
from evomerge.planning.operation import Input, Operation

PRINTS = ("f0", "f1", "f2", "f3", "f4")


@dataclass
class Held:
    """As much of a checkpoint as the engine's arithmetic looks at."""

    tensors: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


Tensors = Mapping[str, Mapping[str, Tensor]]
"""{model: {name: tensor}}."""


def checkpoints_of(models: Tensors) -> dict[str, Checkpoint]:
    """Tensors in the place of checkpoints."""
    return {name: cast(Checkpoint, Held(tensors)) for name, tensors in models.items()}


def store_of(models: Tensors, **more: Any) -> StatisticsStore:
    """A store over tensors."""
    return StatisticsStore(checkpoints_of(models), **more)


def inputs(count: int, tensor: str = "tensor") -> tuple[Input, tuple[Input, ...]]:
    """The base and `count` sources of one tensor."""
    return Input("base", tensor, "base"), tuple(Input(f"m{i}", tensor, PRINTS[i]) for i in range(count))


def models_of(base: Tensor, sources: Sequence[Tensor]) -> Tensors:
    """A base and sources of one tensor each."""
    return {"base": {"tensor": base}} | {f"m{i}": {"tensor": s} for i, s in enumerate(sources)}


def store_for(base: Tensor, sources: Sequence[Tensor], **more: Any) -> StatisticsStore:
    """A store over one tensor of a base and its sources."""
    return store_of(models_of(base, sources), **more)


def operation_for(method: str, settings: Settings, shape: Sequence[int], **more: Any) -> Operation:
    """The operation that merges that tensor."""
    base, sources = inputs(len(settings.sources))
    return Operation("tensor", tuple(shape), "F32", method, base, sources, settings, **more)
