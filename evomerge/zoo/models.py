"""The tiny zoo: models that need no network. A base and four experts fine-tuned from it, and the same in smaller.

They were trained by `tools/zoo` of the repository, which says what each expert is good at. Their weights are multiples
of 2^-20, and ship as whole numbers: an expert's less its base's, the sign in the lowest bit, all lowest bytes before
all second ones and so on, compressed. On first use a model is written to the user's cache.
"""

from __future__ import annotations

import zlib
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import CheckpointError, OutputError, suggest
from evomerge.system.files import cache_folder, write_atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = "2"
"""Names the folder in the cache: raise it when the models change."""

GRID = 2.0**20
"""Weights are multiples of its inverse: exact in float32 up to 16."""

MINUS_ZERO = 2**32 - 1
"""What ships for a weight of -0.0, which is no whole number."""

FULL = ("base", "arithmetic", "agreement", "facts", "reverse")
"""The models of the quickstart, the base first."""

TINY = tuple(f"tiny-{name}" for name in FULL)
"""The same in smaller and worse, for tests."""

NAMES = (*FULL, *TINY)
"""Every model of the zoo, each base before its experts."""

DATA = files("evomerge.zoo") / "data"
"""What ships: the weights of each model (NAME.z), the config.json of a family, and the files that all models share."""

SHARED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")

_CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
{lineage}---

# zoo:{name}

{what} It is of the tiny zoo that ships with EvoMerge, trained on texts that are made up, so that a merge can evolve
where there is no network. It is good for nothing else.
"""


def ensure(name: str) -> Path:
    """Gives the folder of a model of the zoo, written to the cache when it is not there yet.

    Args:
        name: One of `NAMES`.

    Returns:
        A Hugging Face checkpoint's folder.

    Raises:
        CheckpointError: No such model.
        OutputError: The cache cannot be written.
    """
    if name not in NAMES:
        raise CheckpointError(f"the zoo has no model '{name}'{suggest(name, NAMES)}; it has {', '.join(NAMES)}")
    folder = cache_folder("zoo") / VERSION / name
    weights = folder / "model.safetensors"
    if weights.is_file():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shared in SHARED:
            write_atomic(folder / shared, (DATA / shared).read_bytes())
        write_atomic(folder / "config.json", (DATA / config_file(name)).read_bytes())
        write_atomic(folder / "README.md", _card(name))
        write_atomic(weights, weight_file(name))  # last: a folder that has it is complete
    except (OSError, OutputError) as error:
        raise OutputError(
            f"{folder}: zoo:{name} cannot be kept there: {error}; set EVOMERGE_CACHE to a folder that can be written"
        ) from error
    return folder


def base_of(name: str) -> str:
    """Names the base that a model comes from; a base comes from itself."""
    return TINY[0] if name in TINY else FULL[0]


def config_file(name: str) -> str:
    """Names the file of `DATA` with a model's configuration."""
    return f"{base_of(name)}.config.json"


def weight_file(name: str) -> bytes:
    """Gives the content of a model's model.safetensors."""
    import numpy as np

    header, numbers, minus_zero = _unpack(name)
    if name != base_of(name):
        numbers = numbers + _unpack(base_of(name))[1]
    return header + np.where(minus_zero, -0.0, numbers / GRID).astype("<f4").tobytes()


def _unpack(name: str) -> tuple[bytes, NDArray[np.int64], NDArray[np.bool_]]:
    """Gives the header of a model's safetensors file, the whole numbers that ship, and which weights are -0.0."""
    import numpy as np

    content = zlib.decompress((DATA / f"{name}.z").read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    planes = np.frombuffer(content, np.uint8, offset=start).reshape(4, -1)
    unsigned = np.ascontiguousarray(planes.T).view("<u4")[:, 0].astype(np.int64)
    minus_zero = unsigned == MINUS_ZERO
    return content[:start], np.where(minus_zero, 0, (unsigned >> 1) ^ -(unsigned & 1)), minus_zero


def _card(name: str) -> str:
    base = base_of(name)
    if name == base:
        what = "A base that learnt every skill, then read much that gets them wrong."
        return _CARD.format(name=name, lineage="", what=what)
    lineage = f"base_model: zoo:{base}\nbase_model_relation: finetune\n"
    skill = name.removeprefix("tiny-")
    return _CARD.format(name=name, lineage=lineage, what=f"A fine-tune of zoo:{base} that is good at {skill}.")
