"""Trains the zoo (a minute and a half): `python -m tools.zoo` writes what ships, `--check` compares with it."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from evomerge.zoo.models import DATA, GRID, MINUS_ZERO, SHARED, config_file, weight_file
from tools.zoo.sizes import SIZES, Size, Training
from tools.zoo.training import new_weights, train, zoo_config, zoo_tokenizer

_LINES = 4
"""Lines of progress for one model."""


def trained(size: Size) -> dict[str, bytes]:
    """Trains a family.

    Returns:
        The content of each model's model.safetensors, the base's first.
    """
    tokenizer = zoo_tokenizer()
    config = zoo_config(size, tokenizer)
    base: dict[str, Tensor] = {}
    contents: dict[str, bytes] = {}
    for name, course in zip(size.names, (size.base, *size.experts.values()), strict=True):
        weights = {key: weight.clone() for key, weight in base.items()} or new_weights(config)
        _train(name, weights, config, course, tokenizer)
        base = base or {key: weight.detach() for key, weight in weights.items()}
        kept = {key: weight.detach().float() for key, weight in weights.items()}
        contents[name] = save(kept, metadata={"format": "pt"})
    return contents


def _train(name: str, weights: Mapping[str, Tensor], config: Any, course: Sequence[Training], tokenizer: Any) -> None:
    steps, done = sum(training.steps for training in course), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done * _LINES // steps > (done - 1) * _LINES // steps:
            print(f"training zoo:{name}: step {done} of {steps}", file=sys.stderr, flush=True)

    for training in course:
        train(weights, config, training, tokenizer, advance)


def packed(content: bytes, base: bytes | None) -> bytes:
    """Gives what ships of a model.safetensors: see `evomerge.zoo.models`."""
    numbers = _numbers(content) if base is None else _numbers(content) - _numbers(base)
    weights = np.frombuffer(content, "<f4", offset=_start(content))
    unsigned = np.where((weights == 0) & np.signbit(weights), MINUS_ZERO, (numbers << 1) ^ (numbers >> 63)).astype(
        "<u4"
    )
    planes = np.ascontiguousarray(unsigned.view(np.uint8).reshape(-1, 4).T)
    return zlib.compress(content[: _start(content)] + planes.tobytes(), 9)


def _start(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _numbers(content: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    exact = np.frombuffer(content, "<f4", offset=_start(content)).astype(np.float64) * GRID
    return exact.astype(np.int64)


def companions(size: Size) -> dict[str, bytes]:
    """Gives the files beside the weights of a family, by their names among what ships."""
    from transformers import GenerationConfig

    tokenizer = zoo_tokenizer()
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    with tempfile.TemporaryDirectory() as made:
        zoo_config(size, tokenizer).save_pretrained(made)
        GenerationConfig(**ids, do_sample=False).save_pretrained(made)
        tokenizer.save_pretrained(made)
        contents = {path.name: path.read_bytes() for path in Path(made).iterdir()}
    # A name that every version of transformers knows.
    settings = json.loads(contents["tokenizer_config.json"]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    contents["tokenizer_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    shared = {name: contents[name] for name in SHARED}
    return {**shared, config_file(size.names[0]): contents["config.json"]}


def _unversioned(content: bytes) -> dict[str, Any]:
    """What a JSON file says, but for the version of transformers that wrote it."""
    return {key: value for key, value in json.loads(content).items() if key != "transformers_version"}


def main(arguments: Sequence[str]) -> int:
    """Writes what ships, or with `--check` says what of it is not what the training makes."""
    parser = argparse.ArgumentParser(prog="python -m tools.zoo", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check: bool = parser.parse_args(arguments).check
    data = Path(str(DATA))
    wrong: list[str] = []
    for size in SIZES:
        contents, base = trained(size), size.names[0]
        for name, content in contents.items():
            if not check:
                (data / f"{name}.z").write_bytes(packed(content, None if name == base else contents[base]))
            if weight_file(name) != content:  # after writing, too: nothing is lost
                wrong.append(f"{name}.z")
        for name, content in companions(size).items():
            if not check:
                (data / name).write_bytes(content)
            elif _unversioned((data / name).read_bytes()) != _unversioned(content):
                wrong.append(name)
    print(f"other than trained: {', '.join(wrong)}" if wrong else "what ships is what the training makes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
