"""Whether checkpoints can be merged, from their headers and configs alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.header import TensorInfo, name_some, shape_text
from evomerge.checkpoints.layout import vocabulary_tensors
from evomerge.checkpoints.matching.configs import other_heads
from evomerge.checkpoints.quantised import can_dequantise, quantised_tensors, said_quantised

_PARTS = 3  # of their own, that a message says what to do about

# What a class adds to a family's name: LlamaModel, LlamaForCausalLM, GPT2LMHeadModel, CLIPTextModel.
_TASK = re.compile(r"(For[A-Z]\w*|(LMHead|Encoder|Text|Vision)?Model)$")


def not_finite(checkpoint: Checkpoint) -> list[str]:
    """Says which of a checkpoint's weights are NaN or infinite; [] when none are. Reads the whole model."""
    broken = checkpoint.check_finite()
    return [f"{checkpoint.reference}: NaN or infinite weights in {name_some(broken)}"] if broken else []


def mixed_architectures(checkpoints: Mapping[str, Checkpoint]) -> str:
    """Says which architectures the models' configs name, where families differ; "" where they agree or say nothing."""
    named = {reference: _architecture(model) for reference, model in checkpoints.items() if model.config}
    if len({_TASK.sub("", name) for name in named.values()}) < 2:
        return ""
    return f"different architectures: {', '.join(f'{reference} is {kind}' for reference, kind in named.items())}"


def check_compatible(
    base: Checkpoint | None, sources: Mapping[str, Checkpoint], *, layers_may_differ: bool = False
) -> list[str]:
    """Compares every source with the base, or with the first source when there is no base.

    Args:
        base: The common ancestor; None for methods that need none.
        sources: The models to merge, by the names that messages use.
        layers_may_differ: Layers are copied whole, so that their number may differ.

    Returns:
        What makes a merge impossible: one message for each kind of difference and source, with names and shapes;
        [] when they fit.
    """
    named = {"base": base, **sources} if base is not None else dict(sources)
    problems = [problem for name, model in named.items() if model for problem in _quantised(name, model)]
    references = iter(named.items())
    reference_name, reference = next(references, ("", None))
    if reference is None:
        return problems
    for name, model in references:
        if model is not None and model is not reference:
            problems += _compare(reference_name, reference, name, model, layers_may_differ)
    return problems


def _quantised(name: str, model: Checkpoint) -> list[str]:
    method, tensors = said_quantised(model.config, None), quantised_tensors(model.tensors)
    if not method and not tensors:
        return []
    first = f"{tensors[0]} is stored as {model.tensors[tensors[0]].dtype}" if tensors else ""
    how = "; ".join(part for part in (method, first) if part)
    advice = "dequantise it first"
    if tensors and can_dequantise(model.tensors):
        advice += ", or read it with --dequantize"
    return [f"{name}: its weights are quantised ({how}) and cannot be merged: {advice}"]


def _compare(
    reference_name: str, reference: Checkpoint, name: str, model: Checkpoint, layers_may_differ: bool
) -> list[str]:
    shared = reference.tensors.keys() & model.tensors.keys()
    if not shared:
        kinds = f"{_architecture(model)} against {_architecture(reference)}"
        return [f"{name}: no tensor in common with {reference_name} ({kinds}): not a fine-tune of it"]
    problems: list[str] = []
    beyond: set[str] = set()
    depths = {stack.prefix: stack.length for stack in reference.layout.stacks}
    for stack in model.layout.stacks:
        depth = depths.get(stack.prefix, stack.length)
        if stack.length != depth:
            beyond |= _names_beyond(reference, model, stack.prefix, min(depth, stack.length))
            if not layers_may_differ:
                problems.append(f"{name}: {stack.length} layers in {stack.prefix}, {reference_name} has {depth}")
    missing = sorted(reference.tensors.keys() - shared - beyond)
    extra = sorted(model.tensors.keys() - shared - beyond)
    missing = [tensor for tensor in missing if not reference.layout.predicts_further(tensor)]
    if missing:
        way = _way_out(missing, reference_name, shared)
        problems.append(f"{name}: lacks {_some(missing, reference.tensors)} of {reference_name}{way}")
    if extra:
        way = _way_out(extra, name, shared)
        problems.append(f"{name}: has {_some(extra, model.tensors)}, which {reference_name} lacks{way}")
    shapes = _shapes(reference_name, reference, name, model, sorted(shared))
    return problems + (shapes or other_heads(reference_name, reference, name, model))


def _way_out(names: Sequence[str], owner: str, fitting: Iterable[str]) -> str:
    """Says what a recipe may do with parts that not every model has, where these are few: a head, a tower."""
    beginnings = {".".join(parts[:i]) for parts in (n.split(".") for n in fitting) for i in range(1, len(parts) + 1)}
    parts: dict[str, None] = {}
    for name in names:
        pieces = name.split(".")
        own = [".".join(pieces[:i]) for i in range(1, len(pieces) + 1)]
        part = next(part for part in own if part not in beginnings)
        parts[part.removesuffix(".weight")] = None
    if len(parts) > _PARTS:
        return ""
    listed = ", ".join(parts)
    taken = ", ".join(f"{part}: {owner}" for part in parts)
    return f"; a recipe may say 'ignore: [{listed}]' or 'take_from: {{{taken}}}'"


def _architecture(model: Checkpoint) -> str:
    names = model.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "no architecture given"


def _names_beyond(reference: Checkpoint, model: Checkpoint, stack: str, depth: int) -> set[str]:
    """Names the tensors of layers that only one of the two has: reported once, as a difference in depth."""
    beyond: set[str] = set()
    for one in (reference, model):
        for tensor in one.tensors:
            location = one.layout.locate(tensor)
            if location.stack == stack and location.layer is not None and location.layer >= depth:
                beyond.add(tensor)
    return beyond


def _some(names: list[str], tensors: Mapping[str, TensorInfo]) -> str:
    return name_some(f"{tensor} ({shape_text(tensors[tensor].shape)})" for tensor in names)


def _shapes(reference_name: str, reference: Checkpoint, name: str, model: Checkpoint, shared: list[str]) -> list[str]:
    different = [tensor for tensor in shared if reference.tensors[tensor].shape != model.tensors[tensor].shape]
    tables = vocabulary_tensors(reference.layout, reference.tensors)
    vocabulary = [t for t in different if t in tables and _only_rows_differ(t, reference, model)]
    others = [
        f"{tensor} ({shape_text(model.tensors[tensor].shape)} against {shape_text(reference.tensors[tensor].shape)})"
        for tensor in different
        if tensor not in vocabulary
    ]
    problems = []
    if vocabulary:
        rows = [one.tensors[vocabulary[0]].shape[0] for one in (reference, model)]
        problems.append(
            f"{name}: another vocabulary: {reference_name} {rows[0]} rows, {name} {rows[1]} ({', '.join(vocabulary)}); "
            "tokenizer_source: union in a recipe, models.tokenizer: union in a search, matches rows by token"
        )
    if others:
        fitting = set(shared) - set(different)
        way = _way_out([t for t in different if t not in vocabulary], reference_name, fitting) if fitting else ""
        problems.append(f"{name}: other shapes than {reference_name}: {name_some(others)}{way}")
    return problems


def _only_rows_differ(tensor: str, reference: Checkpoint, model: Checkpoint) -> bool:
    one, other = reference.tensors[tensor].shape, model.tensors[tensor].shape
    return len(one) == len(other) and one[1:] == other[1:]
