"""A model on disk: `open_checkpoint` reads headers only, so that opening costs milliseconds whatever its size."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from evomerge.checkpoints.config_values import (
    config_problems,
    depth_problems,
    dtype_problems,
    transformers_config,
)
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.layout import Layout, layout_of, sized_config, with_tied_flag
from evomerge.checkpoints.lora import LoraWeights, read_adapter
from evomerge.checkpoints.quantised import (
    CONFIG_KEYS,
    DequantisedWeights,
    can_dequantise,
    quantised_tensors,
    said_quantised,
)
from evomerge.checkpoints.reference import find_model, split_adapter
from evomerge.checkpoints.tensors import Weights, is_finite, open_weights
from evomerge.checkpoints.tokenizer import Tokenizer, read_tokenizer, tokenizer_files
from evomerge.checkpoints.weight_files import PICKLE_SUFFIXES, WeightFiles, find_weights, read_json_object
from evomerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch


_MOST_PROBLEMS = 5  # of one file


class Checkpoint:
    """An open model. Nothing of it is ever written to.

    Attributes:
        reference: The reference as the user gave it.
        folder: Where config.json lies; None for a lone file of weights. With an adapter, the base's.
        config: config.json; {} without one.
        tokenizer_folder: Where the tokenizer lies: the adapter's folder where it has one, else as `folder`.
    """

    def __init__(
        self,
        reference: str,
        folder: Path | None,
        config: Mapping[str, Any],
        weights: Weights,
        tokenizer_folder: Path | None = None,
    ) -> None:
        self.reference = reference
        self.folder = folder
        self.tokenizer_folder = tokenizer_folder or folder
        self.config: dict[str, Any] = dict(config)
        self.weights = weights

    def __repr__(self) -> str:
        return f"Checkpoint({self.reference!r})"

    def changed(
        self,
        *,
        config: Mapping[str, Any] | None = None,
        weights: Weights | None = None,
        reference: str | None = None,
    ) -> Checkpoint:
        """Returns the model with another config, other weights or another name, the files beside them as they are."""
        new = config if config is not None else self.config
        name = self.reference if reference is None else reference
        return Checkpoint(name, self.folder, new, weights or self.weights, self.tokenizer_folder)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor, sorted by name. A tied head is not stored."""
        return self.weights.tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of weights, an adapter's included."""
        return self.weights.files

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, in its stored dtype.

        Returns:
            A view of the memory-mapped file: read it, do not write to it. With an adapter, a changed tensor is
            computed anew at every call.

        Raises:
            CheckpointError: There is no such tensor, or the file has changed since it was opened.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.reference} has no tensor {name!r}")
        return self.weights.read(name)

    def release(self, name: str) -> None:
        """Lets go of the memory behind a tensor that is not needed for now; it can be read again."""
        self.weights.release(name)

    @cached_property
    def layout(self) -> Layout:
        """Stacks, layers, groups and the tied head."""
        return layout_of(self.tensors, self.config)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: names, dtypes, shapes, bytes. The first time ever reads the whole model."""
        return self.weights.fingerprint()

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Every file that was read of the model, or will be."""
        beside = ("config.json", "generation_config.json", "model.safetensors.index.json")
        return (*self.files, *self.tokenizer_files, *(self.folder / name for name in beside if self.folder))

    @cached_property
    def whole_config(self) -> Mapping[str, Any]:
        """config.json with what transformers derives from it; config.json alone where it knows no such model."""
        try:
            return {**self.config, **_with_sections(self.config, transformers_config(self.config).to_dict())}
        except (KeyError, TypeError, ValueError, AttributeError, StrictDataclassError):
            return self.config

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; {} without one."""
        return read_json_object(self.folder / "generation_config.json") if self.folder else {}

    @cached_property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer's files, chat template included; () without a tokenizer."""
        return () if self.tokenizer_folder is None else tokenizer_files(self.tokenizer_folder)

    @cached_property
    def has_chat_template(self) -> bool:
        """Whether a chat template lies beside the tokenizer: from names and one small file, no tokenizer is loaded."""
        folder = self.tokenizer_folder
        if folder is None:
            return False
        if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
            return True
        return bool(read_json_object(folder / "tokenizer_config.json").get("chat_template"))

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens at which generation stops, as transformers finds them."""
        return stop_ids(self.generation_config, self.config)

    def load_tokenizer(self) -> Tokenizer:
        """Reads the tokenizer beside the weights.

        Raises:
            CheckpointError: There is none, or it cannot be read.
        """
        if self.tokenizer_folder is None:
            raise CheckpointError(f"{self.reference}: a single file has no tokenizer; give a model's folder")
        return read_tokenizer(self.reference, self.tokenizer_folder)

    def load_config(self) -> Any:
        """Reads the configuration as transformers does.

        Raises:
            CheckpointError: config.json names no architecture that transformers knows.
        """
        main = self.layout.main
        layers = main.length if main is not None and len(self.layout.stacks) == 1 else None
        if problems := depth_problems(self.config, layers, self.tensors):
            raise CheckpointError([f"{self.reference}: config.json: {problem}" for problem in problems])
        try:
            return transformers_config(self.config)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, StrictDataclassError) as error:
            message = f"{self.reference}: config.json describes no model we can run: {error}"
            raise CheckpointError(message) from error

    def check_finite(self) -> list[str]:
        """Names the tensors with NaN or infinite elements, sorted. Reads the whole model."""
        names = sorted(self.tensors)
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            finite = list(pool.map(lambda name: is_finite(self.tensor(name)), names))
        return [name for name, fine in zip(names, finite, strict=True) if not fine]


def _with_sections(config: Mapping[str, Any], derived: Mapping[str, Any]) -> dict[str, Any]:
    """What is derived, but for what config.json itself says."""
    return {
        key: _with_sections(config[key], value)
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping)
        else config.get(key)
        if config.get(key) is not None
        else value
        for key, value in derived.items()
    }


def stop_ids(generation_config: Mapping[str, Any], config: Mapping[str, Any]) -> frozenset[int]:
    """Finds the tokens at which generation stops: what generation_config.json says, else config.json."""
    ends = generation_config.get("eos_token_id", config.get("eos_token_id"))
    return frozenset(end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int)


def generation_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Makes a generation_config.json from the special token ids of config.json."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


def open_checkpoint(
    reference: str, *, beside: Path | None = None, allow_pickle: bool = False, dequantize: bool = False
) -> Checkpoint:
    """Opens a model.

    Args:
        reference: A folder, a `.safetensors` file, a Hub id (`org/name@revision`), `zoo:NAME`, or one of these with an
            adapter (`base+adapter`).
        beside: The folder of the file that the reference stands in; relative paths are looked for from there first.
        allow_pickle: Also read pickled weights, without running code in them.
        dequantize: Read float8 weights with their scales, and MXFP4, as the numbers that they stand for.

    Raises:
        CheckpointError: There is no such model, or it is truncated, corrupt, incomplete or pickled.
    """
    base, adapter = split_adapter(reference, beside)
    if adapter is None:
        model = _open_model(reference, find_model(base, beside, allow_pickle=allow_pickle), allow_pickle)
        return _dequantised(model) if dequantize else model
    model = open_checkpoint(base, beside=beside, allow_pickle=allow_pickle, dequantize=dequantize)
    folder = find_model(adapter, beside, allow_pickle=allow_pickle)
    weights = LoraWeights(model.weights, model.layout, read_adapter(folder, allow_pickle=allow_pickle), model.config)
    config = with_tied_flag(model.config, False) if weights.unties_head else model.config
    embedding = model.layout.embedding
    if embedding is not None and weights.tensors[embedding].shape != model.tensors[embedding].shape:
        config = sized_config(config, weights.tensors[embedding].shape[0])
    own = folder if tokenizer_files(folder) else model.tokenizer_folder
    return Checkpoint(reference, model.folder, config, weights, own)


def open_checkpoints(
    references: Iterable[str],
    folders: Mapping[str, str] | None = None,
    *,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> dict[str, Checkpoint]:
    """Opens several models, each once.

    Args:
        references: As for `open_checkpoint`; a relative path is looked for from the working directory.
        folders: Where models are that are called by a name of their own.
        allow_pickle, dequantize: As for `open_checkpoint`.

    Raises:
        CheckpointError: With the problems of every model that cannot be opened.
    """
    opened: dict[str, Checkpoint] = {}
    problems: list[str] = []
    for reference in dict.fromkeys(references):
        try:
            where = (folders or {}).get(reference, reference)
            checkpoint = open_checkpoint(where, allow_pickle=allow_pickle, dequantize=dequantize)
            opened[reference] = checkpoint.changed(reference=reference)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    return opened


def _open_model(reference: str, path: Path, allow_pickle: bool) -> Checkpoint:
    if path.is_dir():
        weights = open_weights(find_weights(path), allow_pickle=allow_pickle)
        config = _read_config(path, weights)
        if (method := said_quantised(config, path)) and not said_quantised(config, None):
            config["quantization_config"] = {"quant_method": method}  # a file beside config.json says it
        return Checkpoint(reference, path, config, weights)
    # By the reference's suffix: a file of the Hub's cache is a link to one without any.
    weights = open_weights(_single_file(path, Path(reference).suffix), allow_pickle=allow_pickle)
    folder = path.parent if path.name == "model.safetensors" and (path.parent / "config.json").is_file() else None
    config = _read_config(folder, weights) if folder else {}
    return Checkpoint(reference, folder, config, weights)


def _dequantised(model: Checkpoint) -> Checkpoint:
    """The model with plain numbers where that is plain arithmetic; else as it is, which no merge takes."""
    if not quantised_tensors(model.tensors) or not can_dequantise(model.tensors):
        return model
    settings = model.config.get("quantization_config")
    block = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
    config = {key: value for key, value in model.config.items() if key not in CONFIG_KEYS}
    return model.changed(config=config, weights=DequantisedWeights(model.weights, block))


def _read_config(folder: Path, weights: Weights) -> dict[str, Any]:
    """Reads config.json; what in it cannot be, by itself or beside the weights' dtypes, is refused by its key."""
    path = folder / "config.json"
    config = read_json_object(path)
    problems = config_problems(config)
    if not (said_quantised(config, folder) or quantised_tensors(weights.tensors)):
        problems += dtype_problems(config, weights.tensors)
    if problems:
        raise CheckpointError([f"{path}: {problem}" for problem in problems[:_MOST_PROBLEMS]])
    return config


def _single_file(path: Path, suffix: str) -> WeightFiles:
    if suffix == ".safetensors":
        return WeightFiles("safetensors", (path,))
    if suffix in PICKLE_SUFFIXES:
        return WeightFiles("pickle", (path,))
    raise CheckpointError(f"{path} is not a model: give a folder or a .safetensors file")
