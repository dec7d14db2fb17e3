"""A base model with a PEFT LoRA adapter applied: W + scale · B·A, in float32, rounded once to the base's dtype.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685;
scale = alpha / r, or alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732). With
`use_dora` every output is then scaled to a length of its own (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from evomerge.checkpoints.dtypes import torch_dtype
from evomerge.checkpoints.fingerprint import derived_fingerprint
from evomerge.checkpoints.header import TensorInfo, TensorSpec, name_some, shape_text
from evomerge.checkpoints.layout import Layout, ties_head, vocabulary_tensors
from evomerge.checkpoints.module_names import head_name, matched_names
from evomerge.checkpoints.tensors import Weights, open_weights
from evomerge.checkpoints.weight_files import WeightFiles, read_json_object
from evomerge.errors import CheckpointError

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?!(weight|bias)$)[^.]+)?(\.weight)?"  # older files hold the adapter's name, too
)
_ROWS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.(?!weight$)[^.]+)?")
_WRAPPER = re.compile(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.[^.]+$)")
# Options that change the formula; what only changes training is fine. Of options that are newer than this list, those
# called `use_...` or `..._config` may change it too.
_REFUSED = ("layer_replication", "target_parameters", "lora_bias", "alora_invocation_tokens")
_HARMLESS = re.compile(r"use_rslora|use_dora|(megatron|eva|corda|lora_ga|loftq|runtime|velora)_config")
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
    ensure_weight_tying: bool = False
    trained_rows: Mapping[str, Sequence[int]] = field(default_factory=dict)

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
    """scale · B·A, transposed where the weight is stored as (in, out) or is an embedding; with the lengths of DoRA."""

    a: str
    b: str
    scale: float
    transpose: bool
    magnitude: str | None = None


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
        config: The base's config.json, which says what its tensors are called in memory, where adapters are trained.

    Raises:
        CheckpointError: The adapter does not fit the base; all reasons at once.
    """

    def __init__(
        self, base: Weights, layout: Layout, adapter: Adapter, config: Mapping[str, object] | None = None
    ) -> None:
        self._base = base
        self._adapter = adapter
        assigned = _assign(base.tensors, layout, adapter, config or {})
        self._deltas, self._replacements, self._rows, self._originals = assigned
        self._tied_to: dict[str, str] = {}
        self._unties_head = False
        if layout.embedding is not None:
            self._settle_head(layout.embedding, layout, config or {})
        heads = {name: replace(base.tensors[source], name=name) for name, source in self._tied_to.items()}
        resized = {name: self._originals[source] for name, source in self._tied_to.items() if source in self._originals}
        sizes = {n: adapter.weights.tensors[key].shape for n, key in (resized | self._replacements).items()}
        tensors = dict(base.tensors) | heads
        self._tensors = {name: _sized(info, sizes.get(name, info.shape)) for name, info in sorted(tensors.items())}
        self._refuse_other_rows(layout)

    @property
    def unties_head(self) -> bool:
        """Whether the adapter gives a tied base a head of its own."""
        return self._unties_head

    def _changes(self, name: str) -> bool:
        return name in self._deltas or name in self._replacements or name in self._rows

    def _settle_head(self, embedding: str, layout: Layout, config: Mapping[str, object]) -> None:
        """Finds what becomes of a tied head: it follows the embedding, or is a tensor of its own from now on.

        While training, a head goes on using the base's matrix where the embedding alone is adapted; PEFT ties the two
        where it is asked to, where it trains single rows, and saves both where both are trained as one.
        """
        if not layout.tied_head:
            head = layout.head
            stored_copy = head is not None and ties_head(config) and not self._changes(head)
            self._unties_head = stored_copy and self._changes(embedding)
            return
        new = sorted({*self._deltas, *self._replacements} - self._base.tensors.keys())
        follows = self._adapter.settings.ensure_weight_tying or embedding in self._rows
        for name in new:
            if follows or self._is_copy(name, embedding):
                self._deltas.pop(name, None)
                self._replacements.pop(name, None)
                follows = True
        own = [name for name in new if self._changes(name)]
        if not own and not follows and self._changes(embedding):
            own = [head_name(config)]
        self._tied_to = dict.fromkeys(own, embedding)
        self._unties_head = bool(own)

    def _is_copy(self, name: str, embedding: str) -> bool:
        """Says whether a saved head is the changed embedding: PEFT saves both under their names."""
        if name in self._deltas or embedding in self._deltas:
            return False
        return torch.equal(self._adapter.weights.read(self._replacements[name]), self._plain(embedding))

    def _plain(self, name: str) -> torch.Tensor:
        """A stored tensor of the adapter or, where it has none, of the base, without any product."""
        saved = self._replacements.get(name)
        return self._base.read(name) if saved is None else self._adapter.weights.read(saved)

    def _refuse_other_rows(self, layout: Layout) -> None:
        """Raises CheckpointError where an adapter gives one of the tables of tokens more rows than another has."""
        if layout.embedding is None:
            return
        tables = [*vocabulary_tensors(layout, self._base.tensors), *self._tied_to]
        rows = {name: self._tensors[name].shape[0] for name in tables}
        if len(set(rows.values())) > 1 and any(
            rows[n] != self._base.tensors[n].shape[0] for n in rows if n in self._base.tensors
        ):
            sizes = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise CheckpointError(
                f"{self._adapter.folder} does not fit its base: it changes the number of tokens in some tensors only "
                f"({sizes} rows)"
            )

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
        original = self._originals.get(self._tied_to.get(name, ""))
        if replacement is not None or original is not None:
            weight = self._adapter.weights.read(str(replacement or original))
        else:
            weight = self._base.read(self._tied_to.get(name, name))
        if rows := self._rows.get(name):
            weight = weight.clone()
            weight[torch.tensor(rows.indices)] = self._adapter.weights.read(rows.values).to(weight.dtype)
        if delta is None:
            return weight.to(dtype)
        a, b = (self._adapter.weights.read(factor).float() for factor in (delta.a, delta.b))
        product = (b @ a).mul_(delta.scale)
        changed = (product.T if delta.transpose else product).add_(weight)
        if delta.magnitude is not None:
            lengths = self._adapter.weights.read(delta.magnitude).float()
            across = 0 if delta.transpose else 1
            factors = lengths / torch.linalg.vector_norm(changed, dim=across)
            changed = changed * factors.unsqueeze(across)
        return changed.to(dtype).contiguous()

    def release(self, name: str) -> None:
        self._base.release(self._tied_to.get(name, name))

    def fingerprint(self, *, anew: bool = False) -> str:
        settings = json.dumps(asdict(self._adapter.settings), sort_keys=True)
        return derived_fingerprint(
            "lora", self._base.fingerprint(anew=anew), self._adapter.weights.fingerprint(anew=anew), settings
        )


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
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
        trained_rows=_trained_rows(config.get("trainable_token_indices")),
    )


def _trained_rows(indices: Any) -> dict[str, list[int]]:
    """The rows that are trained alone, by the end of their module's name: "" for the embedding, whatever its name."""
    by_module = indices if isinstance(indices, dict) else {"": indices} if indices else {}
    return {str(module): [int(row) for row in rows] for module, rows in by_module.items()}


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    if config.get("peft_type") != "LORA":
        return [f"peft_type is {config.get('peft_type')!r}: only LORA adapters can be applied"]
    problems = []
    for key, value in config.items():
        suspect = key in _REFUSED or (_SUSPECT.fullmatch(key) and not _HARMLESS.fullmatch(key))
        if value and suspect:
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
    indices = config.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    if not all(isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows) for rows in lists):
        problems.append(f"trainable_token_indices must list rows, got {indices!r}")
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


@dataclass(frozen=True)
class _Rows:
    """Rows of a table that are replaced: their numbers, and the tensor of the adapter that holds them."""

    indices: tuple[int, ...]
    values: str


def _assign(
    base: Mapping[str, TensorInfo], layout: Layout, adapter: Adapter, config: Mapping[str, object]
) -> tuple[dict[str, _Delta], dict[str, str], dict[str, _Rows], dict[str, str]]:
    """Finds the base tensor of every tensor of the adapter: products, tensors saved whole, rows, the base's own."""
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    whole: dict[str, str] = {}
    rows: dict[str, str] = {}
    originals: dict[str, str] = {}
    for key in adapter.weights.tensors:
        plain = key.removeprefix("base_model.model.")
        if match := _FACTOR.fullmatch(plain):
            factors[match["module"]][match["kind"]] = key
        elif match := _ROWS.fullmatch(plain):
            rows[f"{match['module']}.weight"] = key
        elif ".original_module." in plain:
            originals[_WRAPPER.sub("", plain)] = key
        else:
            whole[_WRAPPER.sub("", plain)] = key
    originals |= {name: key for name, key in whole.items() if ".base_layer." in key}
    targets = _targets(_adapted(factors, whole, rows, adapter), base, layout, config)
    problems: list[str] = []
    unmatched = [key for name, key in (whole | rows).items() if name not in targets]
    replaced: dict[str, TensorInfo] = {}
    for name in whole.keys() & targets.keys():
        info, stored = base[_source(targets[name], base, layout)], adapter.weights.tensors[whole[name]]
        if misfit := _misfit(stored.shape, info, rows_may_differ=info.name in vocabulary_tensors(layout, base)):
            problems.append(f"{whole[name]} {misfit}")
        replaced[targets[name]] = _sized(info, stored.shape)
    deltas: dict[str, _Delta] = {}
    for module, kinds in sorted(factors.items()):
        target = targets.get(f"{module}.weight")
        if target is None:
            unmatched += kinds.values()
            continue
        delta = _delta(module, kinds, replaced.get(target, base[_source(target, base, layout)]), adapter)
        if isinstance(delta, str):
            problems.append(delta)
        else:
            deltas[target] = delta
    trained = {targets[name]: _rows(name, key, adapter) for name, key in rows.items() if name in targets}
    problems += [problem for problem in trained.values() if isinstance(problem, str)]
    if unmatched:
        problems.append(f"the base has no tensor for {name_some(unmatched)}")
    if problems:
        raise CheckpointError([f"{adapter.folder} does not fit its base: {problem}" for problem in problems])
    replacements = {targets[name]: key for name, key in whole.items()}
    unchanged = {targets[name]: key for name, key in originals.items() if name in targets}
    return deltas, replacements, {name: one for name, one in trained.items() if isinstance(one, _Rows)}, unchanged


def _adapted(
    factors: Mapping[str, Mapping[str, str]], whole: Mapping[str, str], rows: Mapping[str, str], adapter: Adapter
) -> dict[str, TensorSpec]:
    """What an adapter changes, as tensors of the model that it was trained on; sizes that it does not say are 0."""
    stored = adapter.weights.tensors
    adapted = {name: TensorSpec(name, stored[key].shape, "F32") for name, key in whole.items()}
    for name, key in rows.items():
        adapted[name] = TensorSpec(name, (0, *stored[key].shape[1:]), "F32")
    for module, kinds in factors.items():
        a, b = (kinds.get(f"embedding_{end}", kinds.get(end)) for end in "AB")
        shapes = [stored[key].shape for key in (a, b) if key is not None and len(stored[key].shape) == 2]
        if len(shapes) == 2:
            out, in_ = shapes[1][0], shapes[0][1]
            transpose = "embedding_A" in kinds or adapter.settings.fan_in_fan_out
            shape = (in_, out) if transpose else (out, in_)
            adapted[f"{module}.weight"] = TensorSpec(f"{module}.weight", shape, "F32")
        else:
            adapted[f"{module}.weight"] = TensorSpec(f"{module}.weight", (), "F32")
    return adapted


def _targets(
    adapted: Mapping[str, TensorSpec], base: Mapping[str, TensorInfo], layout: Layout, config: Mapping[str, object]
) -> dict[str, str]:
    """Finds the base's name of each tensor that an adapter changes; a tied head has the name that it is adapted by."""
    heads = ("lm_head", "embed_out")
    tied = {n for n in adapted if layout.tied_head and n.rpartition(".weight")[0].rpartition(".")[2] in heads}
    direct = {name: name for name in adapted if name in base or name in tied}
    rest = {name: info for name, info in adapted.items() if name not in direct}
    return direct | (matched_names(rest, base, config) if rest else {})


def _rows(name: str, key: str, adapter: Adapter) -> _Rows | str:
    """The rows that an adapter trains alone, or what is wrong with them."""
    module = name.removesuffix(".weight")
    trained = adapter.settings.trained_rows
    indices = next((tuple(rows) for end, rows in trained.items() if f".{module}".endswith(end)), ())
    info = adapter.weights.tensors[key]
    if info.shape[:1] != (len(indices),):
        return f"{key} has {shape_text(info.shape)}, trainable_token_indices names {len(indices)} rows"
    return _Rows(indices, key)


def _source(target: str, base: Mapping[str, TensorInfo], layout: Layout) -> str:
    """Names the stored tensor that an adapted one starts from: itself, or the embedding that a head is tied to."""
    return target if target in base or layout.embedding is None else layout.embedding


def _sized(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """A tensor that is computed, in the shape that it comes out in."""
    if shape == info.shape:
        return info
    sized = replace(info, shape=shape, start=0)
    return replace(sized, end=sized.nbytes)


def _misfit(shape: tuple[int, ...], info: TensorInfo, *, rows_may_differ: bool = False) -> str | None:
    if shape != info.shape and not (rows_may_differ and shape[1:] == info.shape[1:] and len(shape) == len(info.shape)):
        return f"has shape {shape_text(shape)}, {info.name} of the base has {shape_text(info.shape)}"
    return None


def _delta(module: str, kinds: Mapping[str, str], info: TensorInfo, adapter: Adapter) -> _Delta | str:
    """Gives the product for one module, or what is wrong with it."""
    embedding = "embedding_A" in kinds
    pair = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if set(kinds) - {"magnitude_vector"} != set(pair):
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
    magnitude = kinds.get("magnitude_vector")
    if magnitude is not None and adapter.weights.tensors[magnitude].shape != (b.shape[0],):
        return f"{magnitude} has shape {shape_text(adapter.weights.tensors[magnitude].shape)}, not {b.shape[0]}"
    return _Delta(a.name, b.name, adapter.settings.scale(module), transpose, magnitude)
