"""Mean magnitudes of the inputs of a model's matrices: a file beside a recipe, by the matrices' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.weight_files import signature
from evomerge.errors import RecipeError
from evomerge.system.hashing import digest


@dataclass(frozen=True)
class Activations:
    """Of one matrix.

    Attributes:
        digest: Of the numbers.
        means: Mean magnitude of each input, float32 [in].
    """

    digest: str
    means: NDArray[np.float32] = field(compare=False)


def read_activations(path: str | None) -> Mapping[str, Activations]:
    """Reads the file that a recipe names: safetensors, for each matrix [out, in] a vector [in].

    Args:
        path: The file; None gives nothing.

    Raises:
        RecipeError: What it holds are no such vectors.
        CheckpointError: There is none, or it cannot be read.
    """
    return {} if path is None else _read(path, signature(Path(path)) if Path(path).is_file() else None)


@lru_cache(maxsize=2)  # every candidate of a search asks for the same one
def _read(path: str, signed: object) -> Mapping[str, Activations]:
    stored, problems = open_checkpoint(path), []
    activations: dict[str, Activations] = {}
    for name, info in stored.tensors.items():
        means = stored.tensor(name).float().numpy().copy() if len(info.shape) == 1 else np.full(1, np.nan, np.float32)
        if not (np.isfinite(means).all() and (means >= 0.0).all()):
            problems.append(f"activations: {path}: {name}: a vector of finite magnitudes; got {list(info.shape)}")
        activations[name] = Activations(digest(means.tobytes()), means)
    if problems:
        raise RecipeError(problems)
    return activations
