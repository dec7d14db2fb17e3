"""Quantised weights: recognised by what the tensors are and by every file that says so; some are read as numbers.

float8 times its scale, and MXFP4 (gpt-oss), are plain arithmetic: such a checkpoint can be dequantised on reading.
Whatever else packs numbers is for the program that packed them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.tensors import Weights
from evomerge.checkpoints.weight_files import read_json_object
from evomerge.system.hashing import digest

CONFIG_KEYS = ("quantization_config", "quantization", "compression_config")
"""Where config.json speaks of it: transformers; MLX; older llm-compressor."""

_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
_SCALES = re.compile(r"scale|zeros|absmax|quant_state|SCB$|^biases$")
_PACKED = ("U8", "I8", "U16", "I16", "U32", "I32")
# Of activations and caches: of no use to weights that are numbers.
_ACTIVATIONS = re.compile(r"(^|[._])(input|output|act|activation|q|k|v|kv_cache)_(global_)?scale$")
_BLOCKS, _EXPONENTS = "_blocks", "_scales"
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and their negatives: FP4 E2M1
_RESULT = "BF16"


def said_quantised(config: Mapping[str, Any], folder: Path | None) -> str:
    """Names the method by which config.json, or a file beside it, says that weights are quantised; "" for none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in CONFIG_KEYS:
            if settings := part.get(key):
                method = settings.get("quant_method") if isinstance(settings, Mapping) else None
                return str(method or ("unknown" if key == CONFIG_KEYS[0] else key))
    for name, method in _FILES.items():
        if folder is not None and (folder / name).is_file() and read_json_object(folder / name):
            return f"{method}: {name}"
    return ""


def quantised_tensors(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Lists the matrices whose stored numbers are not the weights: float8, and integers beside scales."""
    scaled = {_module(name) for name in tensors if _SCALES.search(name.rpartition(".")[2])}
    exponents = {_exponents(name, tensors) for name in tensors}
    return [
        name
        for name, info in tensors.items()
        if len(info.shape) > 1
        and name not in exponents
        and (info.dtype.startswith("F8") or (info.dtype in _PACKED and {_module(name), name} & scaled))
    ]


def can_dequantise(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tells whether `DequantisedWeights` makes plain numbers of all quantised tensors."""
    return all(tensors[n].dtype.startswith("F8") or _exponents(n, tensors) for n in quantised_tensors(tensors))


class DequantisedWeights:
    """float8 and MXFP4 tensors as bfloat16, computed when they are read; all other tensors as they are.

    Args:
        stored: The quantised tensors with their scales.
        block: Rows and columns of a block that has one scale, where config.json says it.
    """

    def __init__(self, stored: Weights, block: Sequence[int] | None = None) -> None:
        self._stored = stored
        self._block = block
        self._scales: dict[str, str] = {}
        self._packed: dict[str, tuple[str, str]] = {}
        infos: dict[str, TensorInfo] = {}
        spent: set[str] = set()
        for name in quantised_tensors(stored.tensors):
            info, exponents = stored.tensors[name], _exponents(name, stored.tensors)
            if exponents:
                plain = name.removesuffix(_BLOCKS)
                *front, rows, groups, _ = info.shape
                self._packed[plain] = (name, exponents)
                infos[plain] = _plain_info(plain, (*front, groups * 32, rows))
                spent |= {name, exponents}
            elif name not in spent:
                scale = next((s for s in _scale_names(name) if s in stored.tensors), None)
                self._scales |= {name: scale} if scale else {}
                infos[name] = _plain_info(name, info.shape)
                spent |= {scale} if scale else set()
        for name, info in stored.tensors.items():
            if name not in spent and not _ACTIVATIONS.search(name):
                infos.setdefault(name, info)
        self._tensors = {name: infos[name] for name in sorted(infos) if name not in spent}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        return self._stored.files

    def read(self, name: str) -> Tensor:
        """Computes a quantised tensor anew."""
        if name in self._packed:
            blocks, exponents = (self._stored.read(stored) for stored in self._packed[name])
            return from_mxfp4(blocks, exponents)
        value = self._stored.read(name)
        if self._tensors[name] == self._stored.tensors[name]:
            return value
        scale = self._stored.read(self._scales[name]) if name in self._scales else torch.ones(())
        return from_float8(value, scale, self._block)

    def release(self, name: str) -> None:
        for stored in self._behind(name):
            self._stored.release(stored)

    def fingerprint(self, *, anew: bool = False) -> str:
        return digest("dequantised", self._stored.fingerprint(anew=anew), repr(self._block))

    def _behind(self, name: str) -> Iterator[str]:
        yield from self._packed.get(name, (name,))
        if name in self._scales:
            yield self._scales[name]


def from_float8(value: Tensor, scale: Tensor, block: Sequence[int] | None = None) -> Tensor:
    """Computes the weights of float8 numbers: times one scale, one for each row, or one for each block."""
    scale = scale.float()
    if scale.dim() == 1 and value.dim() > 1 and scale.numel() == value.shape[0]:
        scale = scale.view(-1, *[1] * (value.dim() - 1))
    for axis in range(-min(scale.dim(), value.dim()), 0):
        count, size = scale.shape[axis], value.shape[axis]
        if count not in (1, size):
            given = block[axis] if block is not None and len(block) == 2 and axis >= -2 else 0
            width = given if given and -(-size // given) == count else math.ceil(size / count)
            scale = scale.repeat_interleave(width, dim=axis).narrow(axis, 0, size)
    return value.float().mul_(scale).bfloat16()


def from_mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """Computes the weights of packed FP4 numbers: 32 with one exponent, two in a byte, as (in, out) like gpt-oss's."""
    values = torch.tensor([*_FP4, *(-number for number in _FP4)], dtype=torch.float32)
    pairs = torch.stack([values[(blocks & 0x0F).long()], values[(blocks >> 4).long()]], dim=-1)
    scaled = torch.ldexp(pairs.flatten(-2), exponents.int().unsqueeze(-1) - 127)
    return scaled.flatten(-2).transpose(-1, -2).bfloat16().contiguous()


def _plain_info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return replace(TensorInfo(name, shape, _RESULT), start=0, end=2 * math.prod(shape))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _exponents(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The exponents of a tensor of MXFP4 blocks; "" where it is none."""
    info, other = tensors[name], name.removesuffix(_BLOCKS) + _EXPONENTS
    fits = name.endswith(_BLOCKS) and info.dtype == "U8" and len(info.shape) > 2 and info.shape[-1] == 16
    return other if fits and other in tensors and tensors[other].shape == info.shape[:-1] else ""


def _scale_names(name: str) -> tuple[str, ...]:
    return (f"{name}_scale_inv", f"{name}_scale", f"{name}_scales", f"{_module(name)}.scale")
