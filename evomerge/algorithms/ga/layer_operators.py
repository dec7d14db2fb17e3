"""Variation of a frankenmerge's layers: moves and crossover, always within the pattern's bounds.

A layer's depth is its number in the model it is copied from. Layers of the same depth do the same work in every
fine-tune of one base, so most moves keep depths in order: they change which model a depth comes from, close a gap, or
take a repeat out again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from evomerge.space.genes import Pattern
from evomerge.space.genome import LayerGene

Layers = tuple[LayerGene, ...]
Move = Callable[[Layers, Pattern, np.random.Generator], Layers]

_SCALE_STEP = 0.15
"""Standard deviation of a step of a scale, in the logarithm."""


def fit(layers: Sequence[LayerGene], pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Drops or doubles layers at random places until the length is allowed."""
    fitted = list(layers)
    while len(fitted) > pattern.max_layers:
        del fitted[int(rng.integers(len(fitted)))]
    while len(fitted) < pattern.min_layers:
        index = int(rng.integers(len(fitted)))
        fitted.insert(index, fitted[index])
    return tuple(fitted)


def _span(layers: Layers, rng: np.random.Generator) -> tuple[int, int]:
    """A run of positions [start, stop), at most half of the stack; its length is log-uniform, so mostly short."""
    longest = max(len(layers) // 2, 1)
    length = min(int(math.exp(rng.uniform(0.0, math.log(longest + 1)))), longest)
    start = int(rng.integers(0, len(layers) - length + 1))
    return start, start + length


def _other(pattern: Pattern, source: str, rng: np.random.Generator) -> str:
    """Another model; the same where there is one only."""
    others = [model for model in pattern.models if model != source] or [source]
    return others[int(rng.integers(len(others)))]


def _from_model(layers: Layers, start: int, stop: int, model: str) -> Layers:
    """The positions [start, stop) filled with the same depths of a model."""
    return layers[:start] + tuple(replace(gene, source=model) for gene in layers[start:stop]) + layers[stop:]


def insert(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Inserts a layer after another: the same depth or the next of any model."""
    index = int(rng.integers(len(layers)))
    layer = min(layers[index].layer + int(rng.integers(0, 2)), pattern.layer_count - 1)
    new = LayerGene(pattern.models[int(rng.integers(len(pattern.models)))], layer)
    return fit((*layers[: index + 1], new, *layers[index + 1 :]), pattern, rng)


def delete(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Deletes a short run of layers."""
    start, stop = _span(layers, rng)
    stop = min(stop, start + max(len(layers) - pattern.min_layers, 1))
    return fit(layers[:start] + layers[stop:] or layers, pattern, rng)


def duplicate(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Repeats a short run of layers, one after the other."""
    start, stop = _span(layers, rng)
    stop = min(stop, start + max(pattern.max_layers - len(layers), 1))
    return fit(layers[:stop] + layers[start:stop] + layers[stop:], pattern, rng)


def swap(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Exchanges two neighbouring layers."""
    if len(layers) < 2:
        return layers
    index = int(rng.integers(len(layers) - 1))
    return (*layers[:index], layers[index + 1], layers[index], *layers[index + 2 :])


def shift(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Moves a run of layers one up or down its model."""
    start, stop = _span(layers, rng)
    step = 1 if rng.random() < 0.5 else -1
    moved = tuple(replace(g, layer=min(max(g.layer + step, 0), pattern.layer_count - 1)) for g in layers[start:stop])
    return layers[:start] + moved + layers[stop:]


def change_model(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Takes a run of layers from another model, at the same depths."""
    start, stop = _span(layers, rng)
    return _from_model(layers, start, stop, _other(pattern, layers[start].source, rng))


def change_layer(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Takes one layer from another model, at the same depth."""
    index = int(rng.integers(len(layers)))
    return _from_model(layers, index, index + 1, _other(pattern, layers[index].source, rng))


def move_seam(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Extends a run into its neighbour of another model, at the same depths."""
    seams = [index for index in range(1, len(layers)) if layers[index].source != layers[index - 1].source]
    if not seams:
        return change_model(layers, pattern, rng)
    seam = seams[int(rng.integers(len(seams)))]
    start, stop = _span(layers, rng)
    if rng.random() < 0.5:
        return _from_model(layers, seam, min(seam + stop - start, len(layers)), layers[seam - 1].source)
    return _from_model(layers, max(seam - (stop - start), 0), seam, layers[seam].source)


def repeat_neighbour(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Replaces one layer by a second copy of a neighbour."""
    if len(layers) < 2:
        return layers
    index = int(rng.integers(len(layers) - 1))
    kept = layers[index] if rng.random() < 0.5 else layers[index + 1]
    return (*layers[:index], kept, kept, *layers[index + 2 :])


def straighten(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Fills in the layers that a jump of depth leaves out, from either side's model, or takes a repeat out."""
    jumps = [index for index in range(1, len(layers)) if layers[index].layer != layers[index - 1].layer + 1]
    if not jumps:
        return change_model(layers, pattern, rng)
    index = jumps[int(rng.integers(len(jumps)))]
    before, after = layers[index - 1], layers[index]
    model = (before if rng.random() < 0.5 else after).source
    missing = tuple(LayerGene(model, layer) for layer in range(before.layer + 1, after.layer))
    if missing:
        room = max(pattern.max_layers - len(layers), 1)
        return fit(layers[:index] + missing[:room] + layers[index:], pattern, rng)
    repeats = min(before.layer + 1 - after.layer, max(len(layers) - pattern.min_layers, 1))
    if rng.random() < 0.5:  # whose copies of the repeated depths are kept
        return fit(layers[:index] + layers[index + repeats :], pattern, rng)
    return fit(layers[: max(index - repeats, 0)] + layers[index:], pattern, rng)


def rescale(layers: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Moves the scales of a run by one factor, half of the way to 1, or to 1."""
    if pattern.scale is None:
        return change_layer(layers, pattern, rng)
    start, stop = _span(layers, rng)
    low, high = pattern.scale
    kind, factor = rng.random(), math.exp(rng.normal(0.0, _SCALE_STEP))

    def scaled(gene: LayerGene) -> LayerGene:
        if kind < 0.6 or gene.scale == 1.0:
            return replace(gene, scale=min(max(gene.scale * factor, low), high))
        return replace(gene, scale=1.0 if kind < 0.8 else min(max((gene.scale + 1.0) / 2.0, low), high))

    return layers[:start] + tuple(scaled(gene) for gene in layers[start:stop]) + layers[stop:]


#: By the name that the lineage shows.
MOVES: dict[str, Move] = {
    "insert": insert,
    "delete": delete,
    "duplicate": duplicate,
    "swap": swap,
    "shift": shift,
    "model": change_model,
    "layer": change_layer,
    "seam": move_seam,
    "repeat": repeat_neighbour,
    "straighten": straighten,
    "scale": rescale,
}


def crossover(first: Layers, second: Layers, pattern: Pattern, rng: np.random.Generator) -> Layers:
    """Takes a block of depths from the second parent: its layers there, or only the models that it has for them.

    The block lies between two depths, or reaches from one to the end. A parent crossed with itself is itself.
    """
    low, high = sorted(int(cut) for cut in rng.integers(0, pattern.layer_count + 1, size=2))
    if rng.random() < 0.5:
        high = pattern.layer_count
    if rng.random() < 0.5:
        return _models_of(first, second, low, high)
    start, stop = _position(second, low), _position(second, high)
    child = first[: _position(first, low)] + second[start:stop] + first[_position(first, high) :]
    return fit(child or first, pattern, rng)


def _position(layers: Layers, depth: int) -> int:
    """The first position that is at least so deep; the end when none is."""
    return next((index for index, gene in enumerate(layers) if gene.layer >= depth), len(layers))


def _models_of(first: Layers, second: Layers, low: int, high: int) -> Layers:
    """The first parent with the second's model (and scale) at each depth in [low, high) that both have.

    Copies of one depth are matched in order: the first's first with the second's first.
    """
    copies: dict[int, list[LayerGene]] = {}
    for gene in second:
        copies.setdefault(gene.layer, []).append(gene)
    child = []
    for gene in first:
        matching = copies.get(gene.layer, []) if low <= gene.layer < high else []
        child.append(matching.pop(0) if matching else gene)
    return tuple(child)
