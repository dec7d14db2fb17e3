"""A base model with a PEFT LoRA adapter applied: W + scale · B·A, in float32, rounded once to the base's dtype.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685;
scale = alpha / r, or alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints.dtypes import torch_dtype
from evomerge.checkpoints.fingerprint import derived_fingerprint
from evomerge.checkpoints.header import TensorInfo, name_some, shape_text
from evomerge.checkpoints.layout import Layout
from evomerge.checkpoints.tensors import Weights, open_weights
from evomerge.checkpoints.weight_files import WeightFiles, read_json_object
from evomerge.errors import CheckpointError

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B)"
    r"(\.(?!(weight|bias)$)[^.]+)?(\.weight)?"  # older files hold the adapter's name, too
)
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.[^.]+$)")
# Options that change the formula; what only changes training is fine. Of options that are newer than this list, those
# called `use_...` or `..._config` may change it too.
_REFUSED = ("layer_replication", "trainable_token_indices", "target_parameters", "lora_bias", "alora_invocation_tokens")
_HARMLESS = re.compile(r"use_rslora|(megatron|eva|corda|lora_ga|loftq|runtime|velora)_config")
_SUSPECT = re.compile(r"use_\w+|\w+_config")
# Other initialisations move a part of the base's weights into the adapter: it fits the moved base only.
_FITTING_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraSettings:
    """What adapter_config.json says that matters for the weights."""

    r: int
    alpha: float
    use_rslora: bool
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank(self, module: str) -> int:
        """Gives the rank of one module's factors."""
        return self.rank_pattern.get(_first_match(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """Gives what B·A is multiplied by."""
        alpha = self.alpha_pattern.get(_first_match(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(self.rank(module)) if self.use_rslora else self.rank(module))


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk."""

    folder: Path
    settings: LoraSettings
    weights: Weights


@dataclass(frozen=True)
class _Delta:
    """scale · B·A, transposed where the weight is stored as (in, out) or is an embedding."""

    a: str
    b: str
    scale: float
    transpose: bool


def read_adapter(folder: Path, *, allow_pickle: bool = False) -> Adapter:
    """Reads an adapter's settings and headers.

    Raises:
        CheckpointError: It is no LoRA adapter, or uses an option that this does not support.
    """
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} is not an adapter: it has no adapter_config.json")
    settings = _settings(folder / "adapter_config.json")
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not safe.is_file() and not pickled.is_file():
        raise CheckpointError(f"{folder} has no adapter_model.safetensors")
    files = WeightFiles("safetensors", (safe,)) if safe.is_file() else WeightFiles("pickle", (pickled,))
    return Adapter(folder, settings, open_weights(files, allow_pickle=allow_pickle))


class LoraWeights:
    """The tensors of a base with an adapter; a changed tensor is computed when it is read.

    Args:
        base: The base's tensors.
        layout: The base's layout, which says whether an adapted head is tied there.
        adapter: The adapter.

    Raises:
        CheckpointError: The adapter does not fit the base; all reasons at once.
    """

    def __init__(self, base: Weights, layout: Layout, adapter: Adapter) -> None:
        self._base = base
        self._adapter = adapter
        self._deltas, self._replacements = _assign(base.tensors, layout, adapter)
        self._tied_to: dict[str, str] = {}
        if layout.tied_head and layout.embedding is not None:
            self._drop_tied_copy(layout.embedding)
            new = (self._deltas.keys() | self._replacements.keys()) - base.tensors.keys()
            self._tied_to = dict.fromkeys(sorted(new), layout.embedding)
        heads = {name: replace(base.tensors[source], name=name) for name, source in self._tied_to.items()}
        self._tensors = dict(sorted((dict(base.tensors) | heads).items()))

    @property
    def unties_head(self) -> bool:
        """Whether the adapter gives a tied base a head of its own."""
        return bool(self._tied_to)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self._base.files, *self._adapter.weights.files)

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor: the base's own view where the adapter changes nothing, else a new one."""
        dtype = torch_dtype(self._tensors[name].dtype)
        replacement, delta = self._replacements.get(name), self._deltas.get(name)
        if replacement is not None:
            weight = self._adapter.weights.read(replacement)
        else:
            weight = self._base.read(self._tied_to.get(name, name))
        if delta is None:
            return weight.to(dtype)
        a, b = (self._adapter.weights.read(factor).float() for factor in (delta.a, delta.b))
        product = (b @ a).mul_(delta.scale)
        return (product.T if delta.transpose else product).add_(weight).to(dtype).contiguous()

    def release(self, name: str) -> None:
        self._base.release(self._tied_to.get(name, name))

    def fingerprint(self) -> str:
        settings = json.dumps(asdict(self._adapter.settings), sort_keys=True)
        return derived_fingerprint("lora", self._base.fingerprint(), self._adapter.weights.fingerprint(), settings)

    def _drop_tied_copy(self, embedding: str) -> None:
        """Forgets a saved head that equals the embedding it is tied to: PEFT saves both under their names."""
        for name in sorted(self._replacements.keys() - self._base.tensors.keys() - self._deltas.keys()):
            if torch.equal(self._adapter.weights.read(self._replacements[name]), self.read_plain(embedding)):
                del self._replacements[name]

    def read_plain(self, name: str) -> torch.Tensor:
        """Reads a stored tensor of the adapter or, where it has none, of the base, without any product."""
        saved = self._replacements.get(name)
        return self._base.read(name) if saved is None else self._adapter.weights.read(saved)


def _first_match(patterns: Iterable[str], module: str) -> str:
    """Finds, as PEFT does, the first key that matches the end of the name as a regular expression; else the name."""
    return next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module)), module)


def _settings(path: Path) -> LoraSettings:
    config = read_json_object(path)
    problems = [f"{path}: {problem}" for problem in _unsupported(config)]
    if not problems:
        problems = [f"{path}: {problem}" for problem in _wrong_values(config)]
    if problems:
        raise CheckpointError(problems)
    return LoraSettings(
        r=config["r"],
        alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    if config.get("peft_type") != "LORA":
        return [f"peft_type is {config.get('peft_type')!r}: only LORA adapters can be applied"]
    problems = ["use_dora: DoRA adapters cannot be applied; merge it with PEFT first"] if config.get("use_dora") else []
    for key, value in config.items():
        suspect = key in _REFUSED or (_SUSPECT.fullmatch(key) and not _HARMLESS.fullmatch(key))
        if value and suspect and key != "use_dora":
            problems.append(f"{key} is not supported; merge the adapter with PEFT first")
    init = config.get("init_lora_weights", True)
    if init not in _FITTING_INITS:
        problems.append(f"init_lora_weights {init!r} changes the base too; convert the adapter to plain LoRA with PEFT")
    return problems


def _wrong_values(config: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    if type(config.get("r")) is not int or config["r"] < 1:
        problems.append(f"r must be a whole number of at least 1, got {config.get('r')!r}")
    if type(config.get("lora_alpha")) not in (int, float):
        problems.append(f"lora_alpha must be a number, got {config.get('lora_alpha')!r}")
    for key, least in (("rank_pattern", 1), ("alpha_pattern", -math.inf)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            problems.append(f"{key} must map module names to numbers, got {patterns!r}")
            continue
        for pattern, value in patterns.items():
            if type(value) not in (int, float) or value < least:
                problems.append(f"{key}: {pattern!r} has {value!r}, which is no number it can use")
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{key}: {pattern!r} is no regular expression: {error}")
    return problems


def _assign(
    base: Mapping[str, TensorInfo], layout: Layout, adapter: Adapter
) -> tuple[dict[str, _Delta], dict[str, str]]:
    """Finds the base tensor of every tensor of the adapter: name -> product, and name -> tensor saved whole."""
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    whole: dict[str, str] = {}
    problems: list[str] = []
    unmatched: list[str] = []
    for key in adapter.weights.tensors:
        plain = key.removeprefix("base_model.model.")
        if match := _FACTOR.fullmatch(plain):
            factors[match["module"]][match["kind"]] = key
            continue
        target = _target(_WRAPPER.sub("", plain), base, layout)
        if target is None:
            unmatched.append(key)
        elif misfit := _misfit(adapter.weights.tensors[key].shape, base[_source(target, base, layout)]):
            problems.append(f"{key} {misfit}")
        else:
            whole[target] = key
    deltas: dict[str, _Delta] = {}
    for module, kinds in sorted(factors.items()):
        target = _target(f"{module}.weight", base, layout)
        if target is None:
            unmatched += kinds.values()
            continue
        delta = _delta(module, kinds, base[_source(target, base, layout)], adapter)
        if isinstance(delta, str):
            problems.append(delta)
        else:
            deltas[target] = delta
    if unmatched:
        problems.append(f"the base has no tensor for {name_some(unmatched)}")
    if problems:
        raise CheckpointError([f"{adapter.folder} does not fit its base: {problem}" for problem in problems])
    return deltas, whole


def _target(name: str, base: Mapping[str, TensorInfo], layout: Layout) -> str | None:
    """Finds the base's name for a tensor: bare models lack the first part of it, wrapped ones put more before it."""
    if name in base:
        return name
    if layout.tied_head and name.rpartition(".weight")[0].rpartition(".")[2] in ("lm_head", "embed_out"):
        return name
    shorter = name.partition(".")[2]
    if shorter in base:
        return shorter
    longer = [other for other in base if other.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None


def _source(target: str, base: Mapping[str, TensorInfo], layout: Layout) -> str:
    """Names the stored tensor that an adapted one starts from: itself, or the embedding that a head is tied to."""
    return target if target in base or layout.embedding is None else layout.embedding


def _misfit(shape: tuple[int, ...], info: TensorInfo) -> str | None:
    if shape != info.shape:
        return f"has shape {shape_text(shape)}, {info.name} of the base has {shape_text(info.shape)}"
    return None


def _delta(module: str, kinds: Mapping[str, str], info: TensorInfo, adapter: Adapter) -> _Delta | str:
    """Gives the product for one module, or what is wrong with it."""
    embedding = "embedding_A" in kinds
    pair = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if set(kinds) != set(pair):
        return f"{module} has {' and '.join(f'lora_{kind}' for kind in sorted(kinds))} alone"
    a, b = (adapter.weights.tensors[kinds[kind]] for kind in pair)
    if len(a.shape) != 2 or len(b.shape) != 2:
        return f"{module} is no linear layer: lora_A has shape {shape_text(a.shape)}"
    rank = adapter.settings.rank(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        return f"{module} has rank {a.shape[0]}, adapter_config.json says {rank}"
    transpose = embedding or adapter.settings.fan_in_fan_out
    product = (a.shape[1], b.shape[0]) if transpose else (b.shape[0], a.shape[1])
    if misfit := _misfit(product, info):
        return f"{module}: B·A {misfit}"
    if info.dtype[0] not in "FB" or info.dtype == "BOOL":
        return f"{module}: {info.name} of the base is {info.dtype}, not a float type (quantised?)"
    return _Delta(a.name, b.name, adapter.settings.scale(module), transpose)
