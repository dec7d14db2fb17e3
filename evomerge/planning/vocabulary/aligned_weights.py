"""A model whose embedding, head and head bias have the rows of another vocabulary; computed when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import dtype_name, torch_dtype
from evomerge.checkpoints.fingerprint import derived_fingerprint
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.layout import sized_config, vocabulary_tensors
from evomerge.checkpoints.tensors import Weights
from evomerge.planning.vocabulary.row_maps import RowMaps
from evomerge.system.hashing import digest

_AT_ONCE = 1 << 22  # elements that are converted at a time


class AlignedWeights:
    """The tensors of a model with other rows.

    Args:
        model: Its reference.
        weights: The tensors of every model that gives rows, by reference.
        names: The tensors that have a row for each token.
        maps: Where the rows come from.
        exact: The result is rounded to a dtype of the recipe's anyway, so rows that are computed stay in float32.
        keep: Keep tables in memory once they are computed.
    """

    def __init__(
        self,
        model: str,
        weights: Mapping[str, Weights],
        names: tuple[str, ...],
        maps: RowMaps,
        *,
        exact: bool,
        keep: bool = False,
    ) -> None:
        self._kept: dict[str, torch.Tensor] | None = {} if keep else None
        self._model = model
        self._own = maps.own[model]
        lacking = np.flatnonzero(self._own < 0)
        self._defaults = {int(row): maps.defaults[row] for row in lacking.tolist() if row in maps.defaults}
        self._blank = maps.blank
        donors = {donor for rows in self._defaults.values() for donor, _ in rows}
        self._weights = {name: weights[name] for name in weights if name == model or name in donors}
        computed = len(self._blank) > 0 or any(len(rows) > 1 for rows in self._defaults.values())
        shapes = {name: self._info(name, exact and computed) for name in names}
        self._names = frozenset(names)
        self._tensors = dict(weights[model].tensors) | shapes

    def _info(self, name: str, widen: bool) -> TensorInfo:
        infos = [weights.tensors[name] for weights in self._weights.values() if name in weights.tensors]
        dtype = reduce(torch.promote_types, [torch_dtype(info.dtype) for info in infos])
        if widen:
            dtype = torch.promote_types(dtype, torch.float32)
        info = self._weights[self._model].tensors[name]
        shape = (len(self._own), *info.shape[1:])
        sized = replace(info, shape=shape, dtype=dtype_name(dtype), start=0)
        return replace(sized, end=sized.nbytes)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(path for weights in self._weights.values() for path in weights.files))

    def read(self, name: str) -> torch.Tensor:
        """Returns the model's own view where no row has moved, else a new tensor."""
        if self._kept is not None and name in self._names:
            if name not in self._kept:
                self._kept[name] = self._read(name)
            return self._kept[name]
        return self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        stored = self._weights[self._model].read(name)
        if name not in self._names:
            return stored
        dtype, count = torch_dtype(self._tensors[name].dtype), len(self._own)
        if stored.dtype == dtype and np.array_equal(self._own, np.arange(count)):
            return stored[:count]
        result = torch.zeros((count, *stored.shape[1:]), dtype=dtype)
        _copy(stored, self._own, np.arange(count), result)
        self._fill(name, result)
        if len(self._blank):
            result[torch.from_numpy(self._blank)] = _mean_row(result, self._blank).to(dtype)
        return result

    def release(self, name: str) -> None:
        for weights in self._weights.values() if name in self._names else [self._weights[self._model]]:
            weights.release(name)

    def _fill(self, name: str, result: torch.Tensor) -> None:
        """Puts the defaults into the rows that the model has nothing for; those without any stay zero."""
        single = {row: parts[0] for row, parts in self._defaults.items() if len(parts) == 1}
        for donor in sorted({model for model, _ in single.values() if name in self._weights[model].tensors}):
            targets = [target for target, (model, _) in single.items() if model == donor]
            rows = [single[target][1] for target in targets]
            _copy(self._weights[donor].read(name), np.array(rows), np.array(targets), result)
        several = {target: parts for target, parts in self._defaults.items() if len(parts) > 1}
        tables = {model: self._weights[model].read(name) for parts in several.values() for model, _ in parts}
        for target, parts in several.items():
            total = torch.stack([tables[model][row].float() for model, row in parts]).sum(0)
            result[target] = (total / len(parts)).to(result.dtype)

    def fingerprint(self, *, anew: bool = False) -> str:
        prints = {model: weights.fingerprint(anew=anew) for model, weights in self._weights.items()}
        rows = digest(self._own.tobytes(), self._blank.tobytes(), json.dumps(sorted(self._defaults.items())))
        shapes = [[name, self._tensors[name].dtype] for name in sorted(self._names)]
        return derived_fingerprint("vocabulary", prints[self._model], json.dumps([prints, shapes]), rows)


def aligned_checkpoint(
    model: str, checkpoints: Mapping[str, Checkpoint], maps: RowMaps, *, exact: bool = False, keep: bool = False
) -> Checkpoint:
    """Returns a model with the merged vocabulary's rows; the model itself where all of its rows stay where they are.

    Args:
        model: Its reference.
        checkpoints: Every model, by reference.
        maps: Where the rows come from.
        exact: As for `AlignedWeights`.
        keep: As for `AlignedWeights`.
    """
    checkpoint = checkpoints[model]
    names = vocabulary_tensors(checkpoint.layout, checkpoint.tensors)
    own = maps.own[model]
    same = np.array_equal(own, np.arange(len(own)))
    if same and all(checkpoint.tensors[name].shape[0] == len(own) for name in names):
        return checkpoint
    weights = {reference: other.weights for reference, other in checkpoints.items()}
    aligned = AlignedWeights(model, weights, names, maps, exact=exact, keep=keep)
    return checkpoint.changed(config=sized_config(checkpoint.config, len(own)), weights=aligned)


def _copy(stored: torch.Tensor, rows: NDArray[np.int64], targets: NDArray[np.int64], result: torch.Tensor) -> None:
    """result[places] = stored[rows], but for rows of -1, a few megabytes at a time."""
    there = rows >= 0
    step = max(1, _AT_ONCE // max(1, stored[0].numel()))
    source, target = torch.from_numpy(rows[there]), torch.from_numpy(targets[there])
    for start in range(0, len(source), step):
        result[target[start : start + step]] = stored[source[start : start + step]].to(result.dtype)


def _mean_row(table: torch.Tensor, blank: NDArray[np.int64]) -> torch.Tensor:
    """The mean of the rows that are not blank: what a language model expects of a token it knows nothing of.

    Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    """
    given = torch.ones(len(table), dtype=torch.bool)
    given[torch.from_numpy(blank)] = False
    total = torch.zeros(table.shape[1:], dtype=torch.float64)
    step = max(1, _AT_ONCE // max(1, table[0].numel()))
    for start in range(0, len(table), step):
        part = table[start : start + step]
        total += part[given[start : start + step]].double().sum(0)
    return total / max(1, int(given.sum()))
