"""Whether the model that a merged config.json describes is the one that its plan writes: found without any weights.

transformers builds it on the meta device from the names, shapes and dtypes of the tensors to come, so that its own
renamings count; then each layer that has moved is compared with the layer that it was in its own model. What a layer
does may follow from its number in ways that no list of config keys can cover; what it is made of says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.config_values import transformers_config
from evomerge.checkpoints.dtypes import torch_dtype
from evomerge.checkpoints.header import TensorSpec, name_some
from evomerge.checkpoints.module_names import model_class
from evomerge.errors import RecipeError
from evomerge.planning.plan import Plan
from evomerge.system.quiet import quiet

_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_id", "block_idx", "idx", "num_hidden_layers")
_PLAIN = (bool, int, float, str, type(None))

Layer = dict[str, Any]
"""What a layer is made of: by name the class of each module, its plain attributes, and the shapes of its tensors."""


def refuse_moved_layers(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Refuses a plan whose output would not be, layer by layer, what its sources are.

    Where no layer has moved, or transformers has no class for the models, nothing is said.

    Raises:
        RecipeError: Tensors would be missing, left over or of another shape, or layers would be of another kind; with
            their names.
    """
    if all([layer for _, layer in layers] == list(range(_depth(plan, p))) for p, layers in plan.origins.items()):
        return
    sources: dict[str, tuple[nn.Module, set[str]]] = {}
    for model in {plan.reference, *(model for layers in plan.origins.values() for model, _ in layers)}:
        built = _built(checkpoints[model].config, checkpoints[model].tensors.values())
        if built is None:
            return
        sources[model] = built
    output = _built(plan.config, (TensorSpec(op.output, op.shape, op.dtype) for op in plan.operations))
    if output is None:
        raise RecipeError("slices: transformers cannot build the model that the merged config.json would describe")
    merged, problems = output
    usual = {_numberless(problem) for _, own in sources.values() for problem in own}
    if new := sorted(problem for problem in problems if _numberless(problem) not in usual):
        raise RecipeError(f"slices: with its layers moved, the model would have {name_some(new)}")
    if computed := sorted(name for name in _numbered_buffers(merged) if f"no {name}" in problems):
        raise RecipeError(f"slices: {name_some(computed)} follow from the number of their layer, and no file has them")
    for prefix, layers in plan.origins.items():
        _refuse_other_kinds(prefix, layers, merged, {model: built for model, (built, _) in sources.items()})


def _depth(plan: Plan, prefix: str) -> int:
    return len(plan.origins[prefix])


def _built(config: Mapping[str, Any], specs: Iterable[TensorSpec]) -> tuple[nn.Module, set[str]] | None:
    """A model on the meta device, and which tensors it misses, does not know or has in another shape.

    None where transformers has no such model, or cannot make it.
    """
    try:
        kind, resolved = model_class(config), transformers_config(config)
        state = {spec.name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="meta") for spec in specs}
        with quiet():
            model, report = kind.from_pretrained(
                None,
                config=resolved,
                state_dict=state,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # whatever the code of an architecture raises for a config that it does not take
        if isinstance(error, MemoryError):
            raise
        return None
    words = {"missing_keys": "no", "unexpected_keys": "a useless", "mismatched_keys": "another shape of"}
    problems = {
        f"{word} {key if isinstance(key, str) else key[0]}"
        for kind, word in words.items()
        for key in report.get(kind, ())
    }
    return model, problems


def _numberless(problem: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in problem.split("."))


def _numbered_buffers(model: nn.Module) -> Iterable[str]:
    """Names of buffers in modules that know the number of their layer, such as MiniMax's decays."""
    for name, module in model.named_modules():
        if any(key in vars(module) for key in _NUMBERS):
            yield from (f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False))


def _refuse_other_kinds(
    prefix: str, layers: Iterable[tuple[str, int]], merged: nn.Module, sources: Mapping[str, nn.Module]
) -> None:
    stacks = {model: _stack(built, prefix) for model, built in sources.items()}
    output = _stack(merged, prefix)
    if output is None:
        return
    for number, (model, layer) in enumerate(layers):
        source = stacks[model]
        if source is None or layer >= len(source) or number >= len(output):
            return
        was, is_ = _described(source[layer]), _described(output[number])
        different = [name for name in {**was, **is_} if was.get(name) != is_.get(name)]
        if different:
            name = different[0]
            raise RecipeError(
                f"slices: layer {number} of the output is layer {layer} of {model}, and would be of another kind: its "
                f"{name} was {was.get(name)} and would be {is_.get(name)}; that follows from its number, and "
                "config.json cannot say it otherwise"
            )


def _stack(model: nn.Module, prefix: str) -> nn.ModuleList | None:
    """The list of layers whose name ends most like a stack's; None where none does."""
    parts = prefix.split(".")
    best: tuple[int, nn.ModuleList | None] = (0, None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            common = _common_end(parts, name.split("."))
            if common > best[0]:
                best = (common, module)
    return best[1]


def _common_end(left: list[str], right: list[str]) -> int:
    count = 0
    for one, other in zip(reversed(left), reversed(right), strict=False):
        if one != other:
            break
        count += 1
    return count


def _described(layer: nn.Module) -> Layer:
    made_of: Layer = {}
    for name, module in layer.named_modules():
        dot = f"{name}." if name else ""
        made_of[f"{dot}kind"] = type(module).__name__
        for key, value in vars(module).items():
            if key.startswith("_") or key in _NUMBERS or key == "training":
                continue
            if isinstance(value, _PLAIN) or (
                isinstance(value, list | tuple) and all(isinstance(v, _PLAIN) for v in value)
            ):
                made_of[dot + key] = value
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return made_of | {f"{name} (shape)": tuple(tensor.shape) for name, tensor in tensors}
