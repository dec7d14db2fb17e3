"""A recipe as a table: what every number in it is, by parameter, source, tensors and layer; how two recipes differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evomerge.methods.contract import Method
from evomerge.recipe import expand_frankenmerge, parse_recipe
from evomerge.recipe.model import Recipe
from evomerge.recipe.parameters import LAYOUT_NAMES
from evomerge.recipe.resolve import SliceInputs, layer_places, lookup, slice_inputs
from evomerge.recipe.settings import Parameters, conditionals
from evomerge.system.text import one_line

OUTER = "embeddings, head"
"""How the tensors outside of the layers are called."""
REST, ALL = "rest", "all"
"""How the tensors of a layer are called that no filter picks: beside others, and where there is no filter."""
_LEAST = 5e-4  # a difference that shows in three decimals
_SHOWN_LAYERS = 3


@dataclass(frozen=True)
class Cell:
    """Which number it is.

    Attributes:
        parameter: As in a recipe.
        source: The source's name; "" for a parameter that is one for the tensor.
        tensors: Which tensors of the layer, as the recipe's filters say it.
        layer: The output's layer, from 0; None outside of the layers.
    """

    parameter: str
    source: str
    tensors: str
    layer: int | None


@dataclass(frozen=True)
class OutputLayer:
    """How a layer of the output is made.

    Attributes:
        method: The method.
        copied_from: The model and its layer, of a layer that is copied.
        scale: What its outputs are multiplied by.
    """

    method: str
    copied_from: tuple[str, int] | None
    scale: float


@dataclass(frozen=True)
class RecipeTable:
    """A recipe's layers from first to last, and its numbers."""

    layers: tuple[OutputLayer, ...]
    numbers: Mapping[Cell, float]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, without repeats."""
        return tuple(dict.fromkeys(layer.method for layer in self.layers))

    def number(self, cell: Cell) -> float | None:
        """Looks a number up; where this recipe does not tell these tensors apart, the one that they share."""
        layer = 0 if cell.layer is None else cell.layer
        cells = (cell, *(replace(cell, tensors=tensors, layer=layer) for tensors in (REST, ALL)))
        return next((self.numbers[one] for one in cells if one in self.numbers), None)


def recipe_table(recipe: Mapping[str, Any], names: Mapping[str, str], layer_count: int | None = None) -> RecipeTable:
    """Writes a recipe out as a table.

    Args:
        recipe: As in YAML.
        names: A model's reference to its name; those that are not there are called by their reference.
        layer_count: Layers of the models, for a recipe of whole models; None where that is not known: then one layer
            stands for all.
    """
    parsed = parse_recipe(recipe, where="candidate")
    if layer_count is not None:
        parsed = expand_frankenmerge(parsed, layer_count)
    layers: list[OutputLayer] = []
    numbers: dict[Cell, float] = {}
    for layer, position in enumerate(layer_places(parsed, layer_count or 1)):
        inputs = slice_inputs(parsed, position.slice_index)
        copied = None
        if inputs.method.copies_layers and inputs.sources:
            model = inputs.sources[0]
            copied = (_name(model.model, names), model.start + position.offset)
        layers.append(OutputLayer(inputs.method.name, copied, _scale(parsed, position.slice_index, position.t)))
        inner, outer = _probes(parsed, position.slice_index)
        for tensors, probe in inner.items():
            for parameter, source, value in _values(parsed, position.slice_index, inputs, probe, position.t, names):
                numbers[Cell(parameter, source, tensors, layer)] = value
        for probe in outer:
            for parameter, source, value in _values(parsed, position.slice_index, inputs, probe, 0.0, names):
                numbers.setdefault(Cell(parameter, source, OUTER, None), value)
    return RecipeTable(tuple(layers), numbers)


def changes(before: RecipeTable, after: RecipeTable) -> list[str]:
    """Says what differs between two recipes, what matters most first; empty where nothing does."""
    texts = [*_method_changes(before, after), *_layer_changes(before, after)]
    rows: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for cell in max(before.numbers, after.numbers, key=len):
        old, new = before.number(cell), after.number(cell)
        if old is not None and new is not None:
            rows[cell.parameter, cell.source].append((old, new))
    moved = []
    for (parameter, source), pairs in rows.items():
        different = sum(abs(new - old) > _LEAST for old, new in pairs)
        if different:
            first, last = (sum(pair[k] for pair in pairs) / len(pairs) for k in (0, 1))
            size = sum(abs(new - old) for old, new in pairs) / len(pairs)
            what = f"{parameter} of {source}" if source else parameter
            if abs(last - first) < 0.1 * size or f"{first:.3g}" == f"{last:.3g}":
                text = f"{what} by {size:.2g} up and down"
            else:
                text = f"{'mean ' if len(pairs) > 1 else ''}{what} {first:.3g} → {last:.3g}"
            moved.append((-size, text))
    texts += [text for _, text in sorted(moved)]
    if before.methods == after.methods:
        old_sources, new_sources = ({cell.source for cell in table.numbers} for table in (before, after))
        texts += [f"{source} joins" for source in sorted(new_sources - old_sources - {""})]
        texts += [f"{source} is left out" for source in sorted(old_sources - new_sources - {""})]
    return texts


def _method_changes(before: RecipeTable, after: RecipeTable) -> list[str]:
    if before.methods == after.methods:
        return []
    return [f"{' and '.join(before.methods)} → {' and '.join(after.methods)}"]


def _layer_changes(before: RecipeTable, after: RecipeTable) -> list[str]:
    """How the stack of copied layers differs: how many there are, and which come from elsewhere."""
    texts = []
    if len(before.layers) != len(after.layers):
        texts.append(f"{len(before.layers)} → {len(after.layers)} layers")
    pairs = [(k, a, b) for k, (a, b) in enumerate(zip(before.layers, after.layers, strict=False))]
    moved = [
        f"layer {k}: {' '.join(map(str, a.copied_from))} → {' '.join(map(str, b.copied_from))}"
        for k, a, b in pairs
        if a.copied_from and b.copied_from and a.copied_from != b.copied_from
    ]
    more = [f"{len(moved) - _SHOWN_LAYERS} more layers come from elsewhere"] if len(moved) > _SHOWN_LAYERS else []
    scaled = [f"layer {k} scaled {a.scale:.3g} → {b.scale:.3g}" for k, a, b in pairs if abs(a.scale - b.scale) > _LEAST]
    return [*texts, *moved[:_SHOWN_LAYERS], *more, *scaled]


def _name(reference: str, names: Mapping[str, str]) -> str:
    return one_line(names.get(reference, reference))


def _levels(recipe: Recipe, index: int) -> Iterator[Parameters]:
    part = recipe.parts[index]
    yield from (source.parameters for source in part.sources)
    yield part.parameters
    yield from (items for _, items in recipe.input_model_parameters)
    yield from (recipe.module_parameters, recipe.parameters)


def _probes(recipe: Recipe, index: int) -> tuple[dict[str, str], list[str]]:
    """Names that stand for the tensors of a layer, by what to call them, and for those outside of the layers.

    A filter is a part of the names it picks, so it is picked by itself.
    """
    settings = [setting for level in _levels(recipe, index) for setting in level.values()]
    entries = [entry for setting in settings for entry in conditionals(setting) or ()]
    filters = list(dict.fromkeys(entry.filter for entry in entries if entry.filter not in (None, "*")))
    texts = [text for text in filters if text is not None]
    outer = [text for text in texts if text.endswith((".weight", ".bias"))]
    inner = {text.strip("."): text for text in texts if text not in outer}
    return {**inner, (REST if inner else ALL): ""}, outer


def _values(
    recipe: Recipe, index: int, inputs: SliceInputs, probe: str, t: float, names: Mapping[str, str]
) -> Iterator[tuple[str, str, float]]:
    """The numbers that a recipe sets for some tensors: parameter, source and value."""
    given = {name for level in _levels(recipe, index) for name in level}
    for parameter in _numeric(inputs.method):
        if parameter.name not in given:
            continue
        for source in inputs.sources if parameter.per_source else (None,):
            value = lookup(recipe, index, parameter.name, probe, t, source)
            value = parameter.default if value is None else value
            if isinstance(value, int | float):
                yield parameter.name, "" if source is None else _name(source.model, names), float(value)


def _numeric(method: Method) -> Sequence[Any]:
    return [p for p in method.parameters if p.kind in ("float", "int") and p.name not in LAYOUT_NAMES]


def _scale(recipe: Recipe, index: int, t: float) -> float:
    scale = recipe.parts[index].residual_scale
    if isinstance(scale, tuple):
        return float(scale[round(t * (len(scale) - 1))])
    return 1.0 if scale is None else float(scale)
