"""A recipe resolved against real checkpoints: one operation per output tensor, each with a content hash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.compatible import check_compatible
from evomerge.checkpoints.dtypes import FLOATS, parse_dtype
from evomerge.checkpoints.layout import Layout, Stack, residual_writers, vocabulary_tensors
from evomerge.errors import CheckpointError, RecipeError
from evomerge.methods.contract import Settings
from evomerge.methods.registry import get_method
from evomerge.planning.merged_config import has_layer_list, merged_config
from evomerge.planning.modules import Share, find_shares, owner, stack_list
from evomerge.planning.operation import COPY, Family, Input, Operation, operation_digest
from evomerge.planning.vocabulary.align import align
from evomerge.planning.vocabulary.merged_tokenizer import WrittenTokenizer
from evomerge.recipe import (
    LayerPlace,
    Recipe,
    Source,
    expand_frankenmerge,
    layer_places,
    lookup,
    resolve,
    slice_inputs,
)
from evomerge.recipe.parameters import EMBED_SLERP
from evomerge.recipe.resolve import Input as SliceInput
from evomerge.recipe.resolve import SliceInputs
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
    """

    operations: tuple[Operation, ...]
    config: Mapping[str, Any]
    digest: str
    family: Family
    reference: str
    tokenizer: WrittenTokenizer | None = None


@dataclass(frozen=True)
class _Slot:
    """One output tensor: its name, where in the recipe it is decided, and what it is called in a model's own layer."""

    output: str
    place: LayerPlace
    suffix: str | None = None  # within the layer; None outside the counted layers


def prepare(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], *, identify: bool = True
) -> tuple[Plan, Mapping[str, Checkpoint], tuple[str, ...]]:
    """Gives a recipe's models one vocabulary and plans the merge (not the steps before it).

    Args:
        recipe: The recipe.
        checkpoints: Its models, open, by reference.
        identify: As for `make_plan`.

    Returns:
        The plan, the checkpoints to carry it out with, and what is odd but possible.

    Raises:
        BadInput: As `align` and `make_plan`.
    """
    aligned = align(recipe, checkpoints)
    plan = make_plan(recipe, aligned.checkpoints, aligned.tokenizer, identify=identify)
    return plan, aligned.checkpoints, aligned.warnings


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
    problems: list[str] = []
    origins: dict[Stack, tuple[tuple[str, int], ...]] = {}
    for planner in _planners(recipe, checkpoints, layout, identify):
        slerped = _slerped_tables(planner.recipe, checkpoints[reference])
        tables = planner.under(_slerp_of(planner.recipe)) if slerped else planner
        for slot in planner.slots():
            try:
                drafts.append((tables if slot.output in slerped else planner).operation(slot))
            except RecipeError as error:
                problems += [p for p in error.problems if p not in problems]
        if planner.stack is not None:
            origins[planner.stack] = planner.origins()
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
    if not identify:
        return Plan(operations, config, "", family, reference, tokenizer)
    content = [[(op.output, op.digest) for op in operations], config, *([tokenizer.digest()] if tokenizer else [])]
    text = json.dumps(content, sort_keys=True, default=str)
    return Plan(operations, config, digest(text), family, reference, tokenizer)


def _planners(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], layout: Layout, identify: bool
) -> Iterator[_Planner]:
    """One for the whole model, or one for each module and one that copies what no module decides from the reference."""
    modules = recipe.modules or ((recipe,) if recipe.module is not None else ())
    if not modules:
        yield _Planner(recipe, checkpoints, layout, identify, layout.main, lambda name: True)
        return
    shares = find_shares([str(module.module) for module in modules], layout)
    if len(layout.stacks) == len(shares) == 1:
        yield _Planner(modules[0], checkpoints, layout, identify, layout.main, lambda name: True)
        return

    def owned_by(share: Share | None) -> Callable[[str], bool]:
        return lambda name: owner(name, layout, shares) == share

    for module, share in zip(modules, shares, strict=True):
        yield _Planner(module, checkpoints, layout, identify, share.stack, owned_by(share))
    yield _Planner(_copy(recipe), checkpoints, layout, identify, None, owned_by(None))


def _copy(recipe: Recipe) -> Recipe:
    """The reference model as it is, in the recipe's dtype."""
    reference = Source(recipe.models()[0])
    return Recipe("frankenmerge", sources=(reference,), dtype=recipe.dtype, out_dtype=recipe.out_dtype)


class _Planner:
    """Walks the output's tensors that it owns; what slices share is looked up once.

    Attributes:
        recipe: The recipe, whole models copied layer by layer written out as slices.
        stack: The one whose layers the recipe's slices count; None where there is none, or several.
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoints: Mapping[str, Checkpoint],
        layout: Layout,
        identify: bool,
        stack: Stack | None,
        owns: Callable[[str], bool],
    ) -> None:
        recipe = recipe if stack is None else expand_frankenmerge(recipe, stack.length)
        self.recipe = recipe
        self.stack = stack
        self._owns = owns
        self._checkpoints = checkpoints
        self._layout = layout
        self._identify = identify
        self._inputs = [slice_inputs(recipe, index) for index in range(len(recipe.parts))]
        self._dtype = parse_dtype(recipe.output_dtype) if recipe.output_dtype else None
        self._writers: dict[str, frozenset[str]] = {}

    def under(self, recipe: Recipe) -> _Planner:
        """The same tensors by another recipe."""
        return _Planner(recipe, self._checkpoints, self._layout, self._identify, self.stack, self._owns)

    def slots(self) -> Iterator[_Slot]:
        """Every output tensor.

        Raises:
            RecipeError: When slices ask for layers that are not there, or there is no one stack to count them in.
        """
        if self.recipe.slices:
            self._check_ranges()
            yield from self._counted_layers()
        last = len(self.recipe.parts) - 1
        lengths = {stack.prefix: stack.length for stack in self._layout.stacks}
        counted = self.stack.prefix if self.stack and self.recipe.slices else None
        for name in self._names(self._checkpoints[self._reference(0).model]):
            where = self._layout.locate(name)
            if (where.stack is not None and where.stack == counted) or not self._owns(name):
                continue
            if where.stack is not None and where.layer is not None:
                length = lengths[where.stack]
                t = where.layer / (length - 1) if length > 1 else 1.0
                yield _Slot(name, LayerPlace(0, where.layer, t))
            elif where.position == "after":
                yield _Slot(name, LayerPlace(last, 0, 0.0))  # as in mergekit: the first value, behind the layers too
            else:
                yield _Slot(name, LayerPlace(0, 0, 0.0))

    def _names(self, first: Checkpoint) -> list[str]:
        """Names outside the counted layers: of the first slice's model, and a head that only the last one has."""
        last = self._checkpoints[self._reference(-1).model]
        tied = first.layout.tied_head
        extra = [] if tied else [n for n in last.layout.outer if n not in first.tensors]
        return [*first.tensors, *extra]

    def _reference(self, part: int) -> SliceInput:
        inputs = self._inputs[part]
        return inputs.base or inputs.sources[0]

    def _check_ranges(self) -> None:
        if self.stack is None:
            several = " (say which under 'modules:')" if len(self._layout.stacks) > 1 else ""
            found = stack_list(self._layout.stacks)
            raise RecipeError(f"slices need one stack of layers to count in{several}; the model has: {found}")
        problems = []
        for number, part in enumerate(self.recipe.slices):
            for source in part.sources:
                length = self._length(source.model)
                if source.layer_range is not None and source.layer_range[1] > length:
                    problems.append(
                        f"slices[{number}]: layer_range {list(source.layer_range)} of {source.model}, "
                        f"which has {length} layers"
                    )
        if problems:
            raise RecipeError(problems)
        self._check_kinds()

    def _length(self, model: str) -> int:
        """Layers of the counted stack in one model."""
        return 0 if self.stack is None else _depth(self._checkpoints[model], self.stack)

    def _check_kinds(self) -> None:
        """Refuses a layer of one kind in the place of another, where only its number tells a model which kind it is."""
        stack = self.stack
        reference = self._checkpoints[self._reference(0).model]
        if stack is None or has_layer_list(reference.config, stack, self._layout):
            return
        kinds = [reference.layout.suffixes(stack.prefix, layer) for layer in range(_depth(reference, stack))]
        for output, (model, layer) in enumerate(self.origins()):
            expected = kinds[min(output, len(kinds) - 1)]
            if self._checkpoints[model].layout.suffixes(stack.prefix, layer) != expected:
                raise RecipeError(
                    f"slices: layer {output} of the output is layer {layer} of {model}, which is of another kind than "
                    f"layer {output} of {stack.prefix} (other tensors), and config.json has no list of the kinds"
                )

    def _counted_layers(self) -> Iterator[_Slot]:
        if self.stack is None:
            return
        for output, place in enumerate(layer_places(self.recipe, self.stack.length)):
            origin = self._reference(place.slice_index)
            held = self._checkpoints[origin.model]
            for suffix in held.layout.suffixes(self.stack.prefix, origin.start + place.offset):
                yield _Slot(self._layout.name(self.stack.prefix, output, suffix), place, suffix)

    def operation(self, slot: _Slot) -> Operation:
        """The operation of one output tensor, without its digest.

        Raises:
            RecipeError: When the recipe does not say enough, or a model lacks the tensor.
        """
        inputs = self._inputs[slot.place.slice_index]
        identify = self._identify or inputs.method.stochastic
        sources = tuple(self._found(source, slot, identify) for source in inputs.sources)
        names = [source.tensor for source in sources]
        resolved = resolve(self.recipe, slot.place.slice_index, slot.output, slot.place.t, names)
        base = self._found(inputs.base, slot, self._identify) if inputs.base else None
        origin = base or sources[0]
        info = self._checkpoints[origin.model].tensors[origin.tensor]
        wanted = self._dtype if self._dtype and info.dtype in FLOATS else info.dtype
        if resolved.method.copies_layers or info.dtype not in FLOATS:
            scale = self._copy_scale(inputs, resolved.settings, resolved.residual_scale, origin)
            return Operation(slot.output, info.shape, wanted, COPY, None, (origin,), Settings(), scale=scale)
        return Operation(
            slot.output,
            info.shape,
            wanted,
            resolved.method.name,
            base,
            sources,
            resolved.settings,
            seed=self.recipe.seed,
            slice_index=slot.place.slice_index,
            t=slot.place.t,
        )

    def _found(self, model: SliceInput, slot: _Slot, identify: bool) -> Input:
        checkpoint = self._checkpoints[model.model]
        name = slot.output
        if slot.suffix is not None and self.stack is not None:
            name = checkpoint.layout.name(self.stack.prefix, model.start + slot.place.offset, slot.suffix)
        if name not in checkpoint.tensors:
            raise RecipeError(f"{model.model} has no tensor {name}")
        return Input(model.model, name, checkpoint.fingerprint if identify else "")

    def _copy_scale(self, inputs: SliceInputs, settings: Settings, residual: float, origin: Input) -> float:
        """`scale` multiplies every tensor of a slice, `residual_scale` only what a block last writes to the stream."""
        if not inputs.method.copies_layers:
            return 1.0
        given = settings.sources[0].get("scale")
        scale = 1.0 if given is None else float(given)
        if residual == 1.0:
            return scale
        if origin.model not in self._writers:
            self._writers[origin.model] = _writers(self._checkpoints[origin.model], self.stack)
        return scale * residual if origin.tensor in self._writers[origin.model] else scale

    def origins(self) -> tuple[tuple[str, int], ...]:
        """The (model, layer) that each output layer mainly comes from, for what the config says layer by layer."""
        if self.stack is None:
            return ()
        found = []
        for place in layer_places(self.recipe, self.stack.length):
            origin = self._reference(place.slice_index)
            found.append((origin.model, origin.start + place.offset))
        return tuple(found)


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
    found = []
    for name in vocabulary_tensors(reference.layout, reference.tensors):
        last = reference.layout.locate(name).position == "after"
        part = len(recipe.parts) - 1 if last else 0
        wanted = lookup(recipe, part, EMBED_SLERP, name, 0.0)
        if wanted and not slice_inputs(recipe, part).method.copies_layers:
            found.append(name)
    return frozenset(found)


def _refuse_misfits(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Names the checkpoints that cannot be merged, before any tensor is looked at."""
    base = recipe.base_model
    sources = {model: checkpoints[model] for model in recipe.models() if model != base}
    sliced = any(part.length is not None for part in recipe.parts)
    problems = check_compatible(checkpoints[base] if base else None, sources, layers_may_differ=sliced)
    if problems:
        raise CheckpointError(problems)


def _depth(checkpoint: Checkpoint, stack: Stack) -> int:
    """How many layers a model has in what is called like another's stack."""
    return next((own.length for own in checkpoint.layout.stacks if own.prefix == stack.prefix), 0)


def _writers(checkpoint: Checkpoint, stack: Stack | None) -> frozenset[str]:
    """The tensors that `residual_scale` multiplies."""
    if stack is None:
        return frozenset()
    layout, tensors, depth = checkpoint.layout, checkpoint.tensors, _depth(checkpoint, stack)
    layers = (residual_writers(layout, tensors, layer, stack=stack.prefix) for layer in range(depth))
    return frozenset(name for layer in layers for name in layer)


def _digest(operation: Operation, family: Family) -> str:
    if operation.method == COPY:
        return operation_digest(operation, stochastic=False)
    stochastic = get_method(operation.method).stochastic
    context = repr(family) if operation.settings.shared.get("scope") == "model" else ""
    return operation_digest(operation, stochastic=stochastic, context=context)
