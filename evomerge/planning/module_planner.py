"""The operations of one part of a model: the whole of it, or what one module of the recipe decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.dtypes import FLOATS, parse_dtype, widest
from evomerge.checkpoints.layout import Layout, Stack, residual_writers
from evomerge.errors import RecipeError
from evomerge.methods.contract import Settings
from evomerge.planning.activations import read_activations
from evomerge.planning.merged_config import says_kinds
from evomerge.planning.modules import stack_list
from evomerge.planning.operation import COPY, Input, Operation
from evomerge.recipe import LayerPlace, Recipe, expand_frankenmerge, layer_places, resolve, slice_inputs
from evomerge.recipe.resolve import Input as SliceInput
from evomerge.recipe.resolve import ResolvedTensor, SliceInputs


@dataclass(frozen=True)
class OutputTensor:
    """One output tensor: its name, where in the recipe it is decided, and what it is called in a model's own layer."""

    output: str
    layer: LayerPlace
    suffix: str | None = None  # within the layer; None outside the counted layers


class ModulePlanner:
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
        self._activations = read_activations(recipe.activations)
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

    def under(self, recipe: Recipe) -> ModulePlanner:
        """Returns the same tensors by another recipe."""
        return ModulePlanner(recipe, self._checkpoints, self._layout, self._identify, self.stack, self._owns)

    def output_tensors(self) -> Iterator[OutputTensor]:
        """Yields every output tensor.

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
                yield OutputTensor(name, LayerPlace(0, where.layer, t))
            elif where.position == "after":
                yield OutputTensor(
                    name, LayerPlace(last, 0, 0.0)
                )  # as in mergekit: the first value, behind the layers too
            else:
                yield OutputTensor(name, LayerPlace(0, 0, 0.0))

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
            stacks = stack_list(self._layout.stacks)
            raise RecipeError(f"slices need one stack of layers to count in{several}; the model has: {stacks}")
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
        if stack is None or says_kinds(reference.config, stack, self._layout):
            return
        kinds = [reference.layout.suffixes(stack.prefix, layer) for layer in range(_depth(reference, stack))]
        for output, (model, layer) in enumerate(self.origins()):
            expected = kinds[min(output, len(kinds) - 1)]
            if self._checkpoints[model].layout.suffixes(stack.prefix, layer) != expected:
                raise RecipeError(
                    f"slices: layer {output} of the output is layer {layer} of {model}, which is of another kind than "
                    f"layer {output} of {stack.prefix} (other tensors), and config.json has no list of the kinds"
                )

    def _counted_layers(self) -> Iterator[OutputTensor]:
        if self.stack is None:
            return
        for output, layer in enumerate(layer_places(self.recipe, self.stack.length)):
            origin = self._reference(layer.slice_index)
            checkpoint = self._checkpoints[origin.model]
            for suffix in checkpoint.layout.suffixes(self.stack.prefix, origin.start + layer.offset):
                name = self._layout.name(self.stack.prefix, output, suffix)
                if self._owns(name):
                    yield OutputTensor(name, layer, suffix)

    def operation(self, tensor: OutputTensor) -> Operation:
        """Plans the operation of one output tensor, without its digest.

        Raises:
            RecipeError: When the recipe does not say enough, or a model lacks the tensor.
        """
        inputs = self._inputs[tensor.layer.slice_index]
        identify = self._identify or inputs.method.stochastic
        sources = tuple(self._input(source, tensor, identify) for source in inputs.sources)
        names = [source.tensor for source in sources]
        resolved = resolve(self.recipe, tensor.layer.slice_index, tensor.output, tensor.layer.t, names)
        base = self._input(inputs.base, tensor, self._identify) if inputs.base else None
        origin = base or sources[0]
        info = self._checkpoints[origin.model].tensors[origin.tensor]
        copied = resolved.method.copies_layers or info.dtype not in FLOATS
        dtype = info.dtype
        if info.dtype in FLOATS:
            inputs_ = (origin,) if copied else (*sources, *([base] if base else []))
            dtype = self._dtype or self._widest(inputs_)
        if copied:
            scale = 1.0  # of what is no number, such as an index or a mask
            if info.dtype in FLOATS:
                scale = self._copy_scale(inputs, resolved.settings, resolved.residual_scale, origin)
            return Operation(tensor.output, info.shape, dtype, COPY, None, (origin,), Settings(), scale=scale)
        seen = self._activations.get(base.tensor) if base else None
        if seen is not None and len(info.shape) == 2 and seen.means.size != info.shape[1]:
            text = f"{seen.means.size} inputs in the recipe's activations, and {info.shape[1]} columns"
            raise RecipeError(f"{tensor.output}: {text}")
        stages = [stage for stage in resolved.method.after if stage.shapes(info.shape)]
        after = tuple(stage.name for stage in stages if seen is not None or not stage.activations)
        used = any(stage.activations and stage.name in after for stage in stages)
        return Operation(
            tensor.output,
            info.shape,
            dtype,
            resolved.method.name,
            base,
            sources,
            _settings_of(resolved, after),
            seed=self.recipe.seed,
            after=after,
            activations=seen if used else None,
            slice_index=tensor.layer.slice_index,
            t=tensor.layer.t,
        )

    def _widest(self, inputs: tuple[Input, ...]) -> str:
        stored = {self._checkpoints[one.model].tensors[one.tensor].dtype for one in inputs}
        return widest(dtype for dtype in stored if dtype in FLOATS)

    def _input(self, model: SliceInput, tensor: OutputTensor, identify: bool) -> Input:
        checkpoint = self._checkpoints[model.model]
        name = tensor.output
        if tensor.suffix is not None and self.stack is not None:
            name = checkpoint.layout.name(self.stack.prefix, model.start + tensor.layer.offset, tensor.suffix)
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
        """Lists the (model, layer) that each output layer mainly comes from, for what a config says by layer."""
        if self.stack is None:
            return ()
        origins = []
        for layer in layer_places(self.recipe, self.stack.length):
            origin = self._reference(layer.slice_index)
            origins.append((origin.model, origin.start + layer.offset))
        return tuple(origins)


def _settings_of(resolved: ResolvedTensor, after: tuple[str, ...]) -> Settings:
    """The settings of a tensor without those of stages that do nothing to it."""
    left_out = {p.name for stage in resolved.method.after if stage.name not in after for p in stage.parameters}
    shared = {name: value for name, value in resolved.settings.shared.items() if name not in left_out}
    return Settings(shared, resolved.settings.sources)


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
