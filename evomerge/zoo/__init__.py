"""The tiny zoo: models that need no network, trained on first use and kept in the user's cache.

A base and four experts fine-tuned from it, each for one skill (see `skills`), for the quickstart; and the same in
smaller, for tests. `zoo:NAME` stands for them wherever a model is asked for. Importing this does not import torch.
"""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import CheckpointError, suggest
from evomerge.zoo.sizes import FULL, SIZES, TINY, VERSION

SMALL = TINY.names
"""The models for tests: all of them train in seconds, and are worse."""

NAMES = (*FULL.names, *SMALL)
"""Every model of the zoo, each base before its experts."""


def folder_of(name: str) -> Path:
    """Returns where a model is kept, or will be."""
    from evomerge.system.files import cache_folder

    return cache_folder("zoo") / VERSION / name


def ensure(name: str) -> Path:
    """Returns the folder of a model of the zoo, training it (and first its base) when it is not there yet.

    Processes that want the same models wait for one of them to train; an interrupted training leaves nothing.

    Args:
        name: One of `NAMES`.

    Returns:
        A Hugging Face checkpoint's folder.

    Raises:
        CheckpointError: No such model.
        OutputError: The cache cannot be written.
    """
    size = next((size for size in SIZES if name in size.names), None)
    if size is None:
        raise CheckpointError(f"the zoo has no model '{name}'{suggest(name, NAMES)}; it has {', '.join(NAMES)}")
    folder = folder_of(name)
    if not folder.is_dir():
        from evomerge.zoo.models import build

        build(folder.parent, size, name)
    return folder
