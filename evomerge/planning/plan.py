"""A recipe resolved against real checkpoints: one operation per output tensor, each with a content hash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import config_word, main_dtype, widest
from evomerge.checkpoints.header import TensorSpec, name_some
from evomerge.checkpoints.layout import Layout, Stack, layout_of, vocabulary_tensors
from evomerge.checkpoints.matching.compatible import check_compatible
from evomerge.checkpoints.matching.configs import disagreements
from evomerge.checkpoints.matching.reconcile import selected
from evomerge.errors import CheckpointError, RecipeError
from evomerge.methods.registry import get_method
from evomerge.planning.merged_config import merged_config
from evomerge.planning.module_planner import ModulePlanner
from evomerge.planning.modules import Share, find_shares, owner
from evomerge.planning.operation import COPY, Family, Operation, operation_digest
from evomerge.planning.parts import taken
from evomerge.planning.vocabulary.align import align
from evomerge.planning.vocabulary.merged_tokenizer import WrittenTokenizer
from evomerge.recipe import (
    Recipe,
    Source,
    lookup,
    slice_inputs,
)
from evomerge.recipe.parameters import EMBED_SLERP
from evomerge.system.hashing import digest


@dataclass(frozen=True)
class Plan:
    """What to compute for every tensor of the merged model.

    Attributes:
        operations: One per output tensor, sorted by name.
        config: The merged model's config.json.
        digest: Content hash: plans with the same digest are the same model.
        family: The inputs that together make the model, for ``scope: model``.
        reference: The model whose files the merged model takes.
        tokenizer: The tokenizer to write instead of the reference's own; None where that one fits.
        origins: For each stack whose layers are counted, by its prefix: the (model, layer) of each output layer.
    """

    operations: tuple[Operation, ...]
    config: Mapping[str, Any]
    digest: str
    family: Family
    reference: str
    tokenizer: WrittenTokenizer | None = None
    origins: Mapping[str, Sequence[tuple[str, int]]] = field(default_factory=dict)

    @property
    def layer_count(self) -> int:
        """The layers of the merged model; 0 where it has no one stack of them."""
        specs = {op.output: TensorSpec(op.output, op.shape, op.dtype) for op in self.operations}
        layout = layout_of(specs, self.config)
        return layout.layer_count if layout.main is not None else 0


def align_and_plan(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    *,
    identify: bool = True,
    truncate_vocabulary: bool = False,
) -> tuple[Plan, Mapping[str, Checkpoint], tuple[str, ...]]:
    """Gives a recipe's models one vocabulary and plans the merge (not the steps before it).

    Args:
        recipe: The recipe.
        checkpoints: Its models, open, by reference.
        identify: As for `make_plan`.
        truncate_vocabulary: As for `align`.

    Returns:
        The plan, the checkpoints to carry it out with, and what is odd but possible.

    Raises:
        BadInput: As `align` and `make_plan`.
    """
    aligned = align(recipe, checkpoints, truncate_vocabulary=truncate_vocabulary)
    plan = make_plan(recipe, aligned.checkpoints, aligned.tokenizer, identify=identify)
    return plan, aligned.checkpoints, (*aligned.warnings, *_doubts(recipe, aligned.checkpoints))


def _doubts(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Where the models mean different things by equal tensors, or store them in different dtypes."""
    reference, *others = (checkpoints[model] for model in recipe.models())
    copied = any(get_method(part.merge_method or recipe.merge_method).copies_layers for part in recipe.parts)
    for model in others:
        if text := disagreements(reference, model, by_layer=not copied):
            yield text
    if recipe.modules:
        layout = reference.layout
        shares = find_shares([str(module.module) for module in recipe.modules], layout)
        if left := [name for name in layout.names if owner(name, layout, shares) is None]:
            yield f"modules: none of them decides {name_some(left)}: copied from {reference.reference}"
    stored = {
        model.reference: main_dtype(info.dtype for info in model.tensors.values()) for model in (reference, *others)
    }
    kinds = {dtype for dtype in stored.values() if dtype is not None}
    if len(kinds) > 1 and recipe.output_dtype is None:
        listed = ", ".join(f"{model} in {config_word(dtype)}" for model, dtype in stored.items() if dtype)
        written = "each layer is written as it is stored" if copied else f"written in {config_word(widest(kinds))}"
        yield f"the models are stored in different dtypes ({listed}): {written}; dtype: in the recipe says otherwise"


def make_plan(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    tokenizer: WrittenTokenizer | None = None,
    *,
    identify: bool = True,
) -> Plan:
    """Resolves a recipe.

    Args:
        recipe: The recipe, its references as the keys of `checkpoints`.
        checkpoints: Open checkpoints by reference, with one vocabulary; see `evomerge.planning.vocabulary.align`.
        tokenizer: What `align` gives the merged model as its tokenizer.
        identify: Give every operation and the plan their content hashes, for which each model is read whole the first
            time ever. Without, only what a stochastic method draws from is read.

    Raises:
        RecipeError: When the recipe asks for layers or parameters that do not exist, with all problems found.
        CheckpointError: When the checkpoints do not fit each other.
    """
    if tokenizer is None:
        _refuse_tokenizer_work(recipe)
    reference = recipe.models()[0]
    layout = checkpoints[reference].layout
    _refuse_misfits(recipe, checkpoints)
    drafts: list[Operation] = []
    misfits: dict[str, list[str]] = {}  # what is wrong -> the tensors of which it is
    origins: dict[Stack, tuple[tuple[str, int], ...]] = {}
    for planner in _planners(recipe, checkpoints, layout, identify):
        slerped = _slerped_tables(planner.recipe, checkpoints[reference])
        tables = planner.under(_slerp_of(planner.recipe)) if slerped else planner
        for tensor in planner.output_tensors():
            try:
                drafts.append((tables if tensor.output in slerped else planner).operation(tensor))
            except RecipeError as error:
                for problem in error.problems:
                    text = problem.removeprefix(f"{tensor.output}: ")
                    misfits.setdefault(text, []).extend([tensor.output] if text != problem else [])
        if planner.stack is not None:
            origins[planner.stack] = planner.origins()
    problems = [f"{name_some(names, 3)}: {text}" if names else text for text, names in misfits.items()]
    if recipe.modules and any(draft.settings.shared.get("scope") == "model" for draft in drafts):
        problems.append("scope: 'model' is not possible beside 'modules', each of which is merged on its own")
    if problems:
        raise RecipeError(problems)
    drafts.sort(key=lambda operation: operation.output)
    family = tuple((operation.base, operation.sources) for operation in drafts if operation.method != COPY)
    operations = tuple(drafts)
    if identify:
        operations = tuple(replace(operation, digest=_digest(operation, family)) for operation in drafts)
    config = merged_config(checkpoints, reference, origins, layout, operations)
    sources = {stack.prefix: layers for stack, layers in origins.items()}
    if not identify:
        return Plan(operations, config, "", family, reference, tokenizer, sources)
    content = [[(op.output, op.digest) for op in operations], config, *([tokenizer.digest()] if tokenizer else [])]
    text = json.dumps(content, sort_keys=True, default=str)
    return Plan(operations, config, digest(text), family, reference, tokenizer, sources)


def _planners(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], layout: Layout, identify: bool
) -> Iterator[ModulePlanner]:
    """One for the whole model, or one for each module and one that copies what no module decides from the reference."""
    modules = recipe.modules or ((recipe,) if recipe.module is not None else ())
    alone = taken(recipe, checkpoints)
    for model in dict.fromkeys(alone.values()):
        yield ModulePlanner(_copy(recipe, model), checkpoints, layout, identify, None, _taken_from(model, alone))
    if not modules:
        yield ModulePlanner(recipe, checkpoints, layout, identify, layout.main, lambda name: name not in alone)
        return
    shares = find_shares([str(module.module) for module in modules], layout)
    if len(layout.stacks) == len(shares) == 1:
        yield ModulePlanner(modules[0], checkpoints, layout, identify, layout.main, lambda name: name not in alone)
        return

    def owned_by(share: Share | None) -> Callable[[str], bool]:
        return lambda name: name not in alone and owner(name, layout, shares) == share

    for module, share in zip(modules, shares, strict=True):
        yield ModulePlanner(module, checkpoints, layout, identify, share.stack, owned_by(share))
    yield ModulePlanner(_copy(recipe, recipe.models()[0]), checkpoints, layout, identify, None, owned_by(None))


def _taken_from(model: str, alone: Mapping[str, str]) -> Callable[[str], bool]:
    return lambda name: alone.get(name) == model


def _copy(recipe: Recipe, model: str) -> Recipe:
    """A model as it is, in the recipe's dtype."""
    return Recipe("frankenmerge", sources=(Source(model),), dtype=recipe.dtype, out_dtype=recipe.out_dtype)


def _refuse_tokenizer_work(recipe: Recipe) -> None:
    """Says what would otherwise be passed over in silence: the models' vocabularies were not aligned.

    Raises:
        RecipeError: When the recipe asks for a tokenizer.
    """
    if recipe.asks_for_tokenizer:
        key = "tokenizer" if recipe.tokenizer_source is None else "tokenizer_source"
        raise RecipeError(f"{key}: not carried out here: every candidate of a search has one and the same tokenizer")


def _slerp_of(recipe: Recipe) -> Recipe:
    """The recipe with every slice merged by SLERP."""
    slices = tuple(replace(part, merge_method=None) for part in recipe.slices)
    return replace(recipe, merge_method="slerp", slices=slices)


def _slerped_tables(recipe: Recipe, reference: Checkpoint) -> frozenset[str]:
    """The tensors of the vocabulary that ``embed_slerp`` takes out of the recipe's method.

    It does so under a tokenizer source, by ``t`` or else by the weights, and not where layers are copied.
    """
    if not recipe.asks_for_tokenizer:
        return frozenset()
    names = []
    for name in vocabulary_tensors(reference.layout, reference.tensors):
        last = reference.layout.locate(name).position == "after"
        part = len(recipe.parts) - 1 if last else 0
        by_slerp = lookup(recipe, part, EMBED_SLERP, name, 0.0)
        if by_slerp and not slice_inputs(recipe, part).method.copies_layers:
            names.append(name)
    return frozenset(names)


def _refuse_misfits(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Names the checkpoints that cannot be merged, before any tensor is looked at."""
    base = recipe.base_model
    alone = taken(recipe, checkpoints)
    if alone:
        checkpoints = {m: selected(checkpoints[m], lambda name: name not in alone) for m in recipe.models()}
    sources = {model: checkpoints[model] for model in recipe.models() if model != base}
    sliced = any(part.length is not None for part in recipe.parts)
    problems = check_compatible(checkpoints[base] if base else None, sources, layers_may_differ=sliced)
    if problems:
        raise CheckpointError(problems)


def _digest(operation: Operation, family: Family) -> str:
    if operation.method == COPY:
        return operation_digest(operation, stochastic=False)
    method = get_method(operation.method)
    context = repr(family) if operation.settings.shared.get("scope") == "model" else ""
    return operation_digest(operation, stochastic=method.stochastic, context=context + method.version)
