"""Where a tensor sits in its model, from names, shapes and config.json alone: no table of architectures.

A stack is a run of numbered blocks, `model.layers.N`, `transformer.h.N`, `encoder.block.N`. Only the outermost number
of a name can count layers, so the experts of `model.layers.3.mlp.experts.7.w1` are part of their layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from evomerge.checkpoints.header import TensorSpec

Group = Literal["attention", "mlp", "rest", "outer"]
Kind = Literal["attention", "ssm", "mlp", "experts", "router", "shared_experts", "norm", "rest", "outer"]
Position = Literal["before", "after"]

_NORM = re.compile(r"norm|(^|_)(ln|rms)(_|\d|$)")
# Token mixing and channel mixing. The mixers of state-space models count as attention unless their part says otherwise.
_ATTENTION = re.compile(r"attn|attention|^(q|k|v|o|qkv|wq|wk|wv|wqkv|query|key|value|query_key_value)(_proj)?$")
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|expert|moe|denserelu|intermediate|^router"
    r"|^(ff|fc\d?|c_fc|fc_in|fc_out|lin\d|linear\d|w\d|wi(_\d)?|wo|gate|up|down|(gate|up|down|gate_up)_proj)$"
)
_MIXER = re.compile(r"mixer|mamba|ssm|rwkv|time_mix|recurrent|^(conv|rec)$")
# Finer kinds. A recurrent mixer may be called an attention, and a router a gate: that beside experts, see `_kind`.
_SSM = re.compile(r"mamba|ssm|rwkv|recurrent|linear_attn|delta_net|time_mix(er)?$|^rec$")
_SHARED = re.compile(r"shared_?(expert|mlp)")
_ROUTER = re.compile(r"^router|_correction_bias$|^expert_bias$")
_EXPERT = re.compile(r"expert|moe")
_OUTPUT = re.compile(r"^output$")  # BERT: `attention.output` is met as attention first, a bare `output` closes the MLP
_BRIDGE = re.compile(r"projector|merger|connector|aligner")
_BEFORE = re.compile(rf"emb|wte|wpe|shared|patch|cls_token|position|rotary|{_BRIDGE.pattern}|conv|(^|_)in$")
_HEAD = re.compile(r"^(lm_head|embed_out|proj_out|output|head|score|classifier|cls|pooler|qa_outputs)$")
_HEAD_CLASS = re.compile(r"LMHead|ForCausalLM|ForConditionalGeneration|ForMaskedLM|ForPreTraining")
_FURTHER = re.compile(r"(^|\.)(mtp|nextn)(_\w+)?\.")  # parts that predict further tokens, which transformers leaves out
_FURTHER_KEY = re.compile(r"(^|_)(mtp|nextn)(_|$)")
_NO_TOKENS = re.compile(r"pos|wpe|token_type|patch")  # tables of something else that may be as tall as the vocabulary
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_SEVERAL_TOWERS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")

# The last linear of a branch, as its own part of a name. A family that names it otherwise is found by shape.
_ATTENTION_OUT = re.compile(r"^((o|out|c)_proj|dense|wo|o|proj|out|to_out|out_lin|output)$")
_MLP_OUT = re.compile(r"^((down|c|out)_proj|fc2|dense_4h_to_h|wo|w2|lin2|linear2|fc_out|proj_out|down|dense|value)$")


@dataclass(frozen=True, slots=True)
class Stack:
    """Numbered blocks: `prefix` without the trailing dot ("model.layers"), and how many there are."""

    prefix: str
    length: int

    def holds(self, name: str) -> bool:
        """Tells whether a tensor of this name belongs to one of the blocks."""
        prefix, layer, _ = _split(name)
        return prefix == self.prefix and layer is not None and layer < self.length


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tensor sits.

    Attributes:
        stack: Prefix of its stack; None outside the stacks.
        layer: Its layer in that stack, from 0; None outside.
        suffix: The name within the layer ("self_attn.q_proj.weight"); the whole name outside.
        group: "attention", "mlp" or "rest" (norms, scales) within a layer; "outer" outside.
        kind: The same, but for what has a finer name: "ssm" of attention; "experts", "router", "shared_experts" of mlp;
            "norm" of rest.
        position: Outside, whether it is used before the layers (embeddings) or after (final norm, head).
    """

    stack: str | None
    layer: int | None
    suffix: str
    group: Group
    kind: Kind
    position: Position | None


@dataclass(frozen=True)
class Layout:
    """The structure of one model.

    Attributes:
        stacks: Every stack, sorted by prefix.
        names: Every stored tensor, sorted.
        main: The stack of decoder (or encoder) layers; None when there is none, or several and no way to choose.
        outer: Names of the tensors outside every stack, sorted.
        embedding: The token embedding, when one can be told.
        head: The output head stored as a tensor of its own, when there is one.
        tied_head: The head is the token embedding, and no tensor of its own is stored.
    """

    stacks: tuple[Stack, ...]
    main: Stack | None
    names: tuple[str, ...]
    outer: tuple[str, ...]
    embedding: str | None
    head: str | None
    tied_head: bool

    @property
    def layer_count(self) -> int:
        """Layers of the main stack; 0 without one."""
        return self.main.length if self.main else 0

    @cached_property
    def _lengths(self) -> dict[str, int]:
        return {stack.prefix: stack.length for stack in self.stacks}

    def locate(self, name: str) -> Location:
        """Finds where a tensor sits, by its name."""
        prefix, layer, suffix = _split(name)
        if layer is None or layer >= self._lengths.get(prefix, 0):
            return Location(None, None, name, "outer", "outer", _position(name))
        return Location(prefix, layer, suffix, _group(suffix), _kind(suffix, self._routed), None)

    @cached_property
    def _routed(self) -> frozenset[str]:
        """The modules of a layer that have experts, in lower case: "mlp"."""
        suffixes = {_split(name)[2].lower() for name in self.names if "experts" in name}
        return frozenset(suffix.partition(".experts")[0] for suffix in suffixes)

    def predicts_further(self, name: str) -> bool:
        """Tells whether a tensor belongs to the layers that predict further tokens, behind the others or beside."""
        prefix, layer, _ = _split(name)
        return bool(_FURTHER.search(name)) or (layer is not None and layer >= self._lengths.get(prefix, layer + 1))

    @cached_property
    def further(self) -> tuple[str, ...]:
        """Names of the tensors of such layers, sorted."""
        return tuple(name for name in self.names if self.predicts_further(name))

    def name(self, stack: str, layer: int, suffix: str) -> str:
        """Gives the full name of a layer's tensor: the inverse of `locate`."""
        return f"{stack}.{layer}.{suffix}" if stack else f"{layer}.{suffix}"

    def suffixes(self, stack: str, layer: int) -> tuple[str, ...]:
        """Lists the tensors of one layer, named within it, sorted; () where there is no such layer."""
        return self._suffixes.get((stack, layer), ())

    @cached_property
    def _suffixes(self) -> dict[tuple[str, int], tuple[str, ...]]:
        suffixes: dict[tuple[str, int], tuple[str, ...]] = {}
        for name in self.names:
            location = self.locate(name)
            if location.stack is not None and location.layer is not None:
                key = (location.stack, location.layer)
                suffixes[key] = (*suffixes.get(key, ()), location.suffix)
        return suffixes


def layout_of(tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Layout:
    """Derives the layout of a model.

    Args:
        tensors: Its tensors by name; only names and shapes are used.
        config: Its config.json, {} when there is none.
    """
    depths = _depths(config)
    stacks = tuple(_stacks(tensors.values(), depths, _further_layers(config)))
    names = tuple(sorted(tensors))
    layout = Layout(stacks, _main(stacks, config, depths), names, (), None, None, False)
    outer = [tensors[name] for name in names if layout.locate(name).group == "outer"]
    own = [info for info in outer if not layout.predicts_further(info.name)]
    embedding = _embedding(own, config)
    head = _head(own, embedding)
    return replace(
        layout,
        outer=tuple(info.name for info in outer),
        embedding=embedding.name if embedding else None,
        head=head,
        tied_head=head is None and embedding is not None and ties_head(config),
    )


def is_bridge(name: str) -> bool:
    """Tells by a name whether a part leads from one tower of a model to another, as an image's features to the text."""
    return bool(_BRIDGE.search(name))


def vocabulary_tensors(layout: Layout, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Lists the tensors that have one row for each token.

    They are the token embedding, what is stored beside it in its shape (a copy, a head), a head, and the head's bias.

    Returns:
        Names, sorted; () when no embedding can be told.
    """
    if layout.embedding is None:
        return ()
    rows, columns = tensors[layout.embedding].shape
    bias_of_head = layout.head and f"{layout.head.removesuffix('.weight')}.bias"
    names = {layout.embedding, *([layout.head] if layout.head else [])}
    for name in layout.outer:
        shape = tensors[name].shape
        table = shape == (rows, columns) and not _NO_TOKENS.search(name)
        bias = shape == (rows,) and rows != columns and name.endswith("bias")
        if table or bias or name == bias_of_head:
            names.add(name)
    return tuple(sorted(names))


def sized_config(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Returns config.json with another size of the vocabulary, wherever it says one."""
    sized = dict(config)
    if isinstance(sized.get("text_config"), Mapping):
        sized["text_config"] = sized_config(sized["text_config"], rows)
    if "vocab_size" in sized:
        sized["vocab_size"] = rows
    return sized


def with_tied_flag(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Returns config.json with what it says of the head, at the top and for the text."""
    changed = {**config, "tie_word_embeddings": tied}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": tied}
    return changed


def residual_writers(
    layout: Layout, tensors: Mapping[str, TensorSpec], layer: int, *, stack: str | None = None
) -> tuple[str, ...]:
    """Lists the tensors by which the branches of one block last write to the residual stream.

    They are the weight and bias of the attention's output projection and of the MLP's down projection (every expert's),
    or the norm behind a branch where the branch ends in one (Gemma 2, OLMo 2). Multiplying them multiplies what the
    block adds to the stream.

    Args:
        layout: The model's layout.
        tensors: The model's tensors by name.
        layer: Layer number, from 0.
        stack: Prefix of the stack; the main one by default.

    Returns:
        Names, sorted; empty when the layer or the main stack does not exist.
    """
    prefix = stack if stack is not None else layout.main.prefix if layout.main else None
    if prefix is None:
        return ()
    start = layout.name(prefix, layer, "")
    block = {name.removeprefix(start): info for name, info in tensors.items() if name.startswith(start)}
    norms = _post_norms(block)
    written: list[str] = []
    for group in ("attention", "mlp"):
        written += norms[group] or _branch_outputs(block, group)
    return tuple(sorted(start + suffix for suffix in written))


def _split(name: str) -> tuple[str, int | None, str]:
    """Cuts a name at its outermost number: ("model.layers", 3, "mlp.up_proj.weight"); the layer is None without one."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if parts[:i] == [""]:
            continue  # ".0.weight": not a layer of the stack without a name, as "0.weight" is
        if part.isascii() and part.isdecimal() and str(int(part[:9])) == part:
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return name, None, name


def _depths(config: Mapping[str, Any]) -> set[int]:
    towers = [config, *(config[key] for key in _SEVERAL_TOWERS if isinstance(config.get(key), Mapping))]
    return {tower[key] for tower in towers for key in _DEPTH_KEYS if isinstance(tower.get(key), int)}


def _further_layers(config: Mapping[str, Any]) -> int:
    """Counts the layers that predict further tokens, as config.json says it."""
    towers = [config, *(config[key] for key in _SEVERAL_TOWERS if isinstance(config.get(key), Mapping))]
    return max(
        (v for tower in towers for k, v in tower.items() if _FURTHER_KEY.search(k) and type(v) is int), default=0
    )


def _stacks(tensors: Iterable[TensorSpec], depths: set[int], further: int) -> list[Stack]:
    """Lists the numbered blocks that are layers: from 0, with few numbers missing, and more than one matrix in each.

    The last rule keeps out plain sequences of modules (a projector's `0.weight`, `2.weight`; convolutional stems),
    unless config.json names exactly that depth. Layers that predict further tokens are none of them, nor is what leads
    from one tower to another, however many parts it has.
    """
    suffixes: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    matrices: dict[str, int] = defaultdict(int)
    for info in tensors:
        prefix, layer, suffix = _split(info.name)
        if layer is not None and not _FURTHER.search(info.name):
            suffixes[prefix][layer].add(suffix)
            matrices[prefix] += len(info.shape) >= 2
    stacks = []
    for prefix, layers in sorted(suffixes.items()):
        length = max(layers) + 1
        numbered = 0 in layers and 2 * len(layers) > length
        several = matrices[prefix] >= 2 * len(layers)
        if numbered and (several or length in depths) and not is_bridge(prefix):
            stacks.append(Stack(prefix, _own_length(layers, depths, further)))
    return stacks


def _own_length(layers: Mapping[int, set[str]], depths: set[int], further: int) -> int:
    """Counts the layers of a stack up to those that predict further tokens.

    These follow the depth that config.json names: as many as it says, or with tensors that no layer before them has.
    """
    length = max(layers) + 1
    if length in depths:
        return length
    for depth in sorted((d for d in depths if 0 < d < length), reverse=True):
        own = set().union(*(suffixes for layer, suffixes in layers.items() if layer < depth))
        behind = [suffixes for layer, suffixes in layers.items() if layer >= depth]
        if length - depth == further or all(suffixes - own for suffixes in behind):
            return depth
    return length


def _main(stacks: tuple[Stack, ...], config: Mapping[str, Any], depths: set[int]) -> Stack | None:
    if len(stacks) <= 1:
        return stacks[0] if stacks else None
    # A config with one tower names one depth; what else is stacked (layers that predict further tokens) is a side part.
    if config.get("is_encoder_decoder") or any(key in config for key in _SEVERAL_TOWERS) or len(depths) != 1:
        return None
    fitting = [stack for stack in stacks if stack.length in depths]
    return fitting[0] if len(fitting) == 1 else None


def _group(suffix: str) -> Group:
    module, _ = _module_and_kind(suffix)
    if _NORM.search(module[-1].lower()):
        return "rest"
    for part in map(str.lower, module):
        if _ATTENTION.search(part):
            return "attention"
        if _MLP.search(part):
            return "mlp"
    if any(_OUTPUT.search(part) for part in module):
        return "mlp"
    return "attention" if any(_MIXER.search(part.lower()) for part in module) else "rest"


def _kind(suffix: str, routed: frozenset[str]) -> Kind:
    """The finest group of a layer's tensor; `routed` are the modules that have experts."""
    group, parts = _group(suffix), suffix.lower().split(".")
    if group == "attention":
        mixer = any(map(_MIXER.search, parts)) and not any(map(_ATTENTION.search, parts))
        short = parts[0] == "conv"  # LFM2's convolutions look back a few tokens and have no state
        return "ssm" if any(map(_SSM.search, parts)) or (mixer and not short) else "attention"
    if group == "mlp":
        if any(map(_SHARED.search, parts)):
            return "shared_experts"
        gate = "gate" in parts and ".".join(parts[: parts.index("gate")]) in routed
        if gate or any(map(_ROUTER.search, parts)):
            return "router"
        return "experts" if any(map(_EXPERT.search, parts)) else "mlp"
    return "norm" if _NORM.search(_module_and_kind(suffix)[0][-1].lower()) else "rest"


def _position(name: str) -> Position:
    module, _ = _module_and_kind(name)
    parts = [part.lower() for part in module]
    if any(map(_HEAD.search, parts)):
        return "after"
    return "before" if any(map(_BEFORE.search, parts)) else "after"


def _module_and_kind(suffix: str) -> tuple[list[str], str]:
    """Splits a name into its modules and "weight" or "bias": `experts.down_proj_bias` counts as a bias."""
    parts = suffix.split(".")
    if len(parts) > 1 and parts[-1] in ("weight", "bias"):
        return parts[:-1], parts[-1]
    for kind in ("weight", "bias"):
        if parts[-1].endswith(f"_{kind}"):
            return [*parts[:-1], parts[-1].removesuffix(f"_{kind}")], kind
    return parts, "weight"


def _embedding(outer: list[TensorSpec], config: Mapping[str, Any]) -> TensorSpec | None:
    """Finds the matrix of a row per token: as many rows as the vocabulary, else the tallest that holds no positions."""
    text = config.get("text_config")
    rows = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, Mapping) else None)
    tables = [
        info
        for info in outer
        if len(info.shape) == 2
        and _position(info.name) == "before"
        and re.search(r"emb|wte|shared", info.name)
        and not re.search(r"pos|token_type|patch", info.name)
    ]
    exact = [info for info in tables if info.shape[0] == rows] or tables
    return min(exact, key=lambda info: (-info.shape[0], len(info.name), info.name), default=None)


def _head(outer: list[TensorSpec], embedding: TensorSpec | None) -> str | None:
    """Finds the matrix after the layers with a row per token: by its shape, or by a name that says so."""
    for info in outer:
        if len(info.shape) != 2 or _position(info.name) == "before":
            continue
        named = _module_and_kind(info.name)[0][-1] in ("lm_head", "embed_out")
        if named or (embedding and info.shape == embedding.shape):
            return info.name
    return None


def ties_head(config: Mapping[str, Any]) -> bool:
    """Says whether the head is tied: what config.json says; where that is silent, whether the model class has a head.

    Older files leave defaults out. The answer counts where no head is stored: a model that has one then has nowhere
    else to take it from.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return any(isinstance(name, str) and _HEAD_CLASS.search(name) for name in names)


def _post_norms(block: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Lists the norms that close a branch. Llama's `post_attention_layernorm` opens the MLP instead.

    The name alone does not tell: it closes the attention only in a block that also has a norm behind its MLP and no
    other norm behind its attention (GLM-4 has both kinds).
    """
    post = [suffix for suffix in block if _NORM.search(suffix.lower()) and re.search(r"(^|[._])post_", suffix)]
    after_mlp = [suffix for suffix in post if re.search(r"mlp|ffn|feed_?forward|moe", suffix)]
    after_attention = [suffix for suffix in post if re.search(r"post_self_attn|post_self_attention", suffix)]
    if after_mlp and not after_attention:
        after_attention = [suffix for suffix in post if re.search(r"post_attn|post_attention", suffix)]
    return {"attention": after_attention, "mlp": after_mlp}


def _branch_outputs(block: Mapping[str, TensorSpec], group: str) -> list[str]:
    last = _ATTENTION_OUT if group == "attention" else _MLP_OUT
    members = {suffix: _module_and_kind(suffix)[0] for suffix in block if _group(suffix) == group}
    named = [s for s, module in members.items() if last.search(module[-1]) and "intermediate" not in module]
    if named or group == "attention":
        return named
    widths = {info.shape[0] for suffix, info in block.items() if len(info.shape) == 1 and _group(suffix) == "rest"}
    matrices = {suffix: block[suffix].shape for suffix in members if len(block[suffix].shape) == 2}
    narrowing = [members[s] for s, (rows, columns) in matrices.items() if rows in widths and columns not in widths]
    return [suffix for suffix, module in members.items() if module in narrowing]
