"""The canonical values of a genome's genes: those that change nothing are set to what does not depend on them.

A `Block` holds the genes that decide the tensors of one region together: for each parameter and its owner one value at
each of a few points of depth. Between points values are interpolated, so a point counts where it or a neighbour does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.methods.contract import Method, Parameter
from evomerge.space.genes import OUTER, gene_name, paper_value
from evomerge.space.genome import DECIMALS, Genome
from evomerge.space.space import SearchSpace

#: (parameter, its source or None for all sources).
Key = tuple[str, str | None]
Values = tuple[float, ...]


@dataclass(frozen=True)
class Block:
    """The genes that decide some tensors together.

    Attributes:
        method: What merges there.
        points: The layer group, the control points in order of depth, or ``outer``.
        tensors: The tensor group; None where there is one for all.
    """

    method: Method
    points: tuple[str, ...]
    tensors: str | None = None

    def gene_names(self, parameter: str, source: str | None) -> tuple[str, ...]:
        """Names the genes of a parameter at each point."""
        return _gene_names(parameter, source, self.points, self.tensors)


@functools.cache  # of a space there are few, and every decoded genome asks for all of them
def _gene_names(parameter: str, source: str | None, points: tuple[str, ...], tensors: str | None) -> tuple[str, ...]:
    return tuple(gene_name(parameter, source, point, tensors) for point in points)


def layer_blocks(space: SearchSpace, genome: Genome) -> list[list[Block]]:
    """Lists the blocks of each run of layers that is decided on its own, by tensor group, what is left over last."""
    methods = methods_of(space, genome)
    points = tuple(f"g{index}" for index in range(len(methods)))
    runs = [(methods[0], points)] if space.smooth else [(m, (p,)) for m, p in zip(methods, points, strict=True)]
    tensor_groups = space.tensor_groups or (None,)
    return [[Block(method, points, tensors) for tensors in tensor_groups] for method, points in runs]


def all_blocks(space: SearchSpace, genome: Genome) -> list[Block]:
    """Lists all blocks; the tensors outside the layers are merged as the first layers and the last are."""
    blocks = [block for run in layer_blocks(space, genome) for block in run]
    if space.outer:
        methods = methods_of(space, genome)
        blocks += [Block(methods[0], (OUTER,)), Block(methods[-1], (OUTER,))]
    return blocks


def methods_of(space: SearchSpace, genome: Genome) -> list[Method]:
    """Returns the method of each layer group."""
    return [space.method(genome, index) for index in range(len(space.groups))]


def literal_values(space: SearchSpace, block: Block, genome: Genome) -> dict[Key, Values]:
    """Returns the values of a block as the genome has them, whole numbers where the parameter is one.

    A source that is not chosen takes no part.
    """
    genes, members = genome.values, (None, *space.members(genome))
    values: dict[Key, Values] = {}
    for parameter, source in space.searched_by_owner[block.method.name]:
        away = parameter.takes_part and source not in members
        own = [0.0 if away else float(genes[name]) for name in block.gene_names(parameter.name, source)]
        values[parameter.name, source] = tuple([float(round(v)) for v in own] if parameter.kind == "int" else own)
    return values


def canonical_values(space: SearchSpace, block: Block, genome: Genome) -> dict[Key, Values]:
    """Returns the values of a block, the same for genomes that mean the same."""
    literal = literal_values(space, block, genome)
    counting = _counting(space, block.method, literal, space.members(genome))
    values: dict[Key, Values] = {}
    for parameter, source in space.searched_by_owner[block.method.name]:
        key = (parameter.name, source)
        counts = counting[key]
        neutral = 0.0 if parameter.takes_part else _neutral(parameter)
        values[key] = literal[key] if all(counts) else _filled(literal[key], counts, neutral)
    for parameter in space.searched[block.method.name]:
        if only_ratios(space, block.method, parameter):
            own = [(parameter.name, source) for source in space.sources]
            values.update(zip(own, shares([literal[key] for key in own]), strict=True))
    return values


def counting_genes(space: SearchSpace, block: Block, genome: Genome) -> set[str]:
    """Names the genes of a block that can change the merge as the others are."""
    counting = _counting(space, block.method, literal_values(space, block, genome), space.members(genome))
    return {
        name
        for (parameter, source), flags in counting.items()
        for name, counts in zip(block.gene_names(parameter, source), flags, strict=True)
        if counts
    }


def only_ratios(space: SearchSpace, method: Method, parameter: Parameter) -> bool:
    """Tells whether a factor on the parameter of all sources changes nothing in the space's recipes of the method."""
    if isinstance(parameter.only_ratios, bool):
        return parameter.only_ratios
    switch = method.parameter(parameter.only_ratios)
    return bool(switch is not None and space.constants[method.name].get(switch.name, switch.default))


def absent_sources(
    space: SearchSpace, method: Method, blocks: Sequence[Mapping[Key, Values]], members: Sequence[str]
) -> set[str]:
    """Names the members that take no part in any of these blocks' values, short of what the method needs."""
    share = _share_parameter(space, method)
    if share is None:
        return set()
    names = list(members)
    away = [name for name in names if all(value == 0.0 for values in blocks for value in values[share, name])]
    return set(away[max(method.min_sources - (len(names) - len(away)), 0) :])


def _share_parameter(space: SearchSpace, method: Method) -> str | None:
    """The searched parameter that a source takes no part without, such as its weight."""
    return next((p.name for p in space.searched[method.name] if p.takes_part), None)


def _counting(
    space: SearchSpace, method: Method, literal: Mapping[Key, Values], members: Sequence[str]
) -> dict[Key, tuple[bool, ...]]:
    """For each value of a block whether it can change the merge."""
    share = _share_parameter(space, method)
    taking_part: dict[str | None, tuple[bool, ...]] = {}
    if share is not None:
        taking_part = {s: _or_neighbour([value != 0.0 for value in literal[share, s]]) for s in space.sources}
    counting: dict[Key, tuple[bool, ...]] = {}
    for parameter, source in space.searched_by_owner[method.name]:
        always = source not in taking_part or parameter.name == share
        key = (parameter.name, source)
        if source is not None and source not in members:
            counting[key] = (False,) * len(literal[key])
        else:
            counting[key] = (True,) * len(literal[key]) if always else taking_part[source]
    for parameter, source in space.searched_by_owner[method.name]:
        if parameter.idle_at is not None and (parameter.idle_at[0], source) in literal:
            # What counts is the other parameter as it is merged with: a point that does not count is not asked.
            other = (parameter.idle_at[0], source)
            merged = _filled(literal[other], counting[other], parameter.idle_at[1])
            moving = _or_neighbour([value != parameter.idle_at[1] for value in merged])
            own = counting[parameter.name, source]
            counting[parameter.name, source] = tuple(a and b for a, b in zip(own, moving, strict=True))
    return counting


def _or_neighbour(flags: Sequence[bool]) -> tuple[bool, ...]:
    """Whether a point or one beside it is flagged: as far as interpolation carries a point's value."""
    if len(flags) == 1:
        return tuple(flags)
    return tuple(any(flags[max(k - 1, 0) : k + 2]) for k in range(len(flags)))


def _filled(values: Values, counting: Sequence[bool], neutral: float) -> Values:
    """Values with those that do not count replaced by the nearest that does, the earlier one first."""
    if all(counting):
        return values
    nearest = [k for k, counts in enumerate(counting) if counts]
    if not nearest:
        return (neutral,) * len(values)
    return tuple(values[min(nearest, key=lambda k: (abs(k - point), k))] for point in range(len(values)))


def _neutral(parameter: Parameter) -> float:
    value = paper_value(parameter)
    return float(value) if isinstance(value, int | float) else 0.0


def shares(weights: Sequence[Values]) -> list[Values]:
    """Scales weights of which only the ratios count, so that their magnitudes sum to 1 on average over the points.

    Genes are whole multiples of 10^-4, so equal ratios are recognised exactly, and give exactly the same floats.
    Between two points at the same ratios nothing changes along the depth, whatever their scale; so each run of points
    that is bounded by such has a scale of its own.

    Args:
        weights: For each source its weight at every point.
    """
    whole = [[round(value * 10**DECIMALS) for value in values] for values in weights]
    points = list(zip(*whole, strict=True))
    cuts = [k + 1 for k, (a, b) in enumerate(itertools.pairwise(points)) if _proportional(a, b)]
    result: list[list[float]] = [[] for _ in weights]
    for start, stop in itertools.pairwise([0, *cuts, len(points)]):
        total = sum(abs(value) for point in points[start:stop] for value in point)
        for scaled, values in zip(result, whole, strict=True):
            scaled += [value * (stop - start) / total if total else 0.0 for value in values[start:stop]]
    return [tuple(values) for values in result]


def _proportional(left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether one is the other times something above 0."""
    if sum(a * b for a, b in zip(left, right, strict=True)) <= 0:
        return False
    k = next(k for k, value in enumerate(left) if value)
    return all(left[k] * b == right[k] * a for a, b in zip(left, right, strict=True))
