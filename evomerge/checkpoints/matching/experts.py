"""Experts in one tensor beside experts of their own: the stacked ones are read as single ones, which are views of them.

transformers writes either, as the model was loaded; what it makes one tensor of when it loads single experts says which
rows of the stack each of them is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import DTYPE_BYTES
from evomerge.checkpoints.fingerprint import derived_fingerprint
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.module_names import stacked_experts
from evomerge.checkpoints.tensors import Weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of one matrix in a stored stack of them."""

    stored: str
    matrix: int
    first: int
    stop: int


class SplitWeights:
    """A checkpoint whose stacks of matrices, such as experts, are read as matrices of their own.

    Args:
        weights: The tensors as they are stored.
        rows: Name of a matrix -> which rows it is.
    """

    def __init__(self, weights: Weights, rows: Mapping[str, Rows]) -> None:
        self._weights = weights
        self._rows = rows
        split = {part.stored for part in rows.values()}
        whole = {name: info for name, info in weights.tensors.items() if name not in split}
        self._tensors = dict(sorted({**whole, **{name: self._info(name) for name in rows}}.items()))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        return self._weights.files

    def read(self, name: str) -> torch.Tensor:
        part = self._rows.get(name)
        if part is None:
            return self._weights.read(name)
        return self._weights.read(part.stored)[part.matrix, part.first : part.stop]

    def release(self, name: str) -> None:
        self._weights.release(self._rows[name].stored if name in self._rows else name)

    def fingerprint(self, *, anew: bool = False) -> str:
        rows = json.dumps({name: astuple(part) for name, part in sorted(self._rows.items())})
        return derived_fingerprint("rows", self._weights.fingerprint(anew=anew), rows)

    def _info(self, name: str) -> TensorInfo:
        part = self._rows[name]
        stack = self._weights.tensors[part.stored]
        _, rows, columns = stack.shape
        row = columns * DTYPE_BYTES[stack.dtype]
        first = stack.start + (part.matrix * rows + part.first) * row
        shape = (part.stop - part.first, columns)
        return TensorInfo(name, shape, stack.dtype, first, first + shape[0] * row)


def with_single_experts(models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Returns the models with their experts one by one, where some store them so and others in one tensor."""
    first, *others = [model.tensors.keys() for model in models.values()]
    if all(names == first for names in others):
        return dict(models)
    single = max(models.values(), key=lambda model: sum(".experts." in name for name in model.tensors))
    if not any(".experts." in name for name in single.tensors):
        return dict(models)
    stacks, rename = stacked_experts(single.tensors, single.config)
    return {m: _split(model, single, stacks, {rename(n): n for n in model.tensors}) for m, model in models.items()}


def _split(
    model: Checkpoint, single: Checkpoint, stacks: Mapping[str, list[list[str]]], stored: Mapping[str, str]
) -> Checkpoint:
    rows: dict[str, Rows] = {}
    for whole, parts in stacks.items():
        name = stored.get(whole)
        if name is None:
            continue
        heights = [single.tensors[part[0]].shape[0] for part in parts]
        if model.tensors[name].shape != (len(parts[0]), sum(heights), single.tensors[parts[0][0]].shape[-1]):
            continue
        for k, part in enumerate(parts):
            start = sum(heights[:k])
            rows |= {expert: Rows(name, number, start, start + heights[k]) for number, expert in enumerate(part)}
    return model.changed(weights=SplitWeights(model.weights, rows)) if rows else model
