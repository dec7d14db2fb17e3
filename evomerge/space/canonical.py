"""The canonical values of a genome's genes: those that change nothing are set to what does not depend on them.

A `Column` is what a genome says about the tensors of one place: for each parameter and its owner the values at one or
more points of depth. Between points values are interpolated, so a point counts where it or a neighbour does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from evomerge.methods.contract import Method, Parameter
from evomerge.space.genes import paper_value
from evomerge.space.genome import DECIMALS, Genome

if TYPE_CHECKING:
    from evomerge.space.space import SearchSpace

#: (parameter, its source or None for all sources).
Key = tuple[str, str | None]
Values = tuple[float, ...]
Column = dict[Key, Values]


def keys(space: SearchSpace, method: Method) -> Iterator[tuple[Parameter, str | None]]:
    """The searched parameters of a method, each with every owner: a source, or None for all of them."""
    for parameter in space.searched[method.name]:
        for source in space.sources if parameter.per_source else (None,):
            yield parameter, source


def gene_name(parameter: str, source: str | None, point: str, tensors: str | None) -> str:
    """The name of a gene, as `evomerge.space.genes` says."""
    return ".".join(part for part in (parameter, source, point, tensors) if part is not None)


def column(
    space: SearchSpace, method: Method, genome: Genome, points: Sequence[str], tensors: str | None = None
) -> Column:
    """The canonical values of one place.

    Args:
        space: The space.
        method: What merges there.
        genome: The genome.
        points: The layer group, or the control points in order of depth.
        tensors: The tensor group, None where there is one for all.
    """
    raw = spelled(space, method, genome, points, tensors)
    counting = counts(space, method, raw)
    found: Column = {}
    for parameter, source in keys(space, method):
        key = (parameter.name, source)
        found[key] = _filled(raw[key], counting[key], _otherwise(parameter))
    for parameter in space.searched[method.name]:
        if only_ratios(space, method, parameter):
            own = [(parameter.name, source) for source in space.sources]
            found.update(zip(own, shares([raw[key] for key in own]), strict=True))
    return found


def idle(
    space: SearchSpace, method: Method, genome: Genome, points: Sequence[str], tensors: str | None = None
) -> set[str]:
    """The names of the genes of one place that change nothing as the others are."""
    counting = counts(space, method, spelled(space, method, genome, points, tensors))
    return {
        gene_name(name, source, point, tensors)
        for (name, source), flags in counting.items()
        for point, counted in zip(points, flags, strict=True)
        if not counted
    }


def spelled(
    space: SearchSpace, method: Method, genome: Genome, points: Sequence[str], tensors: str | None = None
) -> Column:
    """The values of one place as the genome has them, whole numbers where the parameter is one."""
    found: Column = {}
    for parameter, source in keys(space, method):
        values = (float(genome.values[gene_name(parameter.name, source, point, tensors)]) for point in points)
        found[parameter.name, source] = tuple(float(round(v)) if parameter.kind == "int" else v for v in values)
    return found


def only_ratios(space: SearchSpace, method: Method, parameter: Parameter) -> bool:
    """Whether a factor on the parameter of all sources changes nothing in the space's recipes of the method."""
    if isinstance(parameter.only_ratios, bool):
        return parameter.only_ratios
    switch = method.parameter(parameter.only_ratios)
    return bool(switch is not None and space.constants[method.name].get(switch.name, switch.default))


def counts(space: SearchSpace, method: Method, raw: Column) -> dict[Key, tuple[bool, ...]]:
    """For each value of a column whether it can change the merge."""
    taking = next((p.name for p in space.searched[method.name] if p.takes_part), None)
    found: dict[Key, tuple[bool, ...]] = {}
    for parameter, source in keys(space, method):
        values = raw[parameter.name, source]
        flags = (True,) * len(values)
        if source is not None and taking not in (None, parameter.name):
            flags = _near([value != 0.0 for value in raw[str(taking), source]])
        found[parameter.name, source] = flags
    for parameter, source in keys(space, method):
        if parameter.idle_at is not None and (parameter.idle_at[0], source) in raw:
            # What counts is the other parameter as it is merged with: a point that does not count is not asked.
            other = (parameter.idle_at[0], source)
            merged = _filled(raw[other], found[other], parameter.idle_at[1])
            moving = _near([value != parameter.idle_at[1] for value in merged])
            own = found[parameter.name, source]
            found[parameter.name, source] = tuple(a and b for a, b in zip(own, moving, strict=True))
    return found


def _near(flags: Sequence[bool]) -> tuple[bool, ...]:
    """Whether a point or one beside it is flagged: as far as interpolation carries a point's value."""
    return tuple(any(flags[max(k - 1, 0) : k + 2]) for k in range(len(flags)))


def _filled(values: Values, counted: Sequence[bool], otherwise: float) -> Values:
    """Values with those that do not count replaced by the nearest that does, the earlier one first."""
    known = [k for k, flag in enumerate(counted) if flag]
    if not known:
        return (otherwise,) * len(values)
    return tuple(values[min(known, key=lambda k: (abs(k - place), k))] for place in range(len(values)))


def _otherwise(parameter: Parameter) -> float:
    value = paper_value(parameter)
    return float(value) if isinstance(value, int | float) else 0.0


def shares(weights: Sequence[Values]) -> list[Values]:
    """Weights of which only the ratios count, scaled so that their magnitudes sum to 1 on average over the points.

    Genes are whole multiples of 10^-4, so equal ratios are found exactly, and give exactly the same floats. Between
    two points at the same ratios nothing changes along the depth, whatever their scale; so each run of points that
    is bounded by such has a scale of its own.

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


def absent(space: SearchSpace, method: Method, columns: Sequence[Mapping[Key, Values]]) -> set[str]:
    """The sources that take no part in any of these columns, short of what the method needs."""
    taking = next((p.name for p in space.searched[method.name] if p.takes_part), None)
    if taking is None:
        return set()
    names = list(space.sources)
    away = [name for name in names if all(value == 0.0 for c in columns for value in c[taking, name])]
    return set(away[max(method.min_sources - (len(names) - len(away)), 0) :])
