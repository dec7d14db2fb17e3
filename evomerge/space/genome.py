"""A genome: one point of a search space. Frozen, hashable, and the same after a round trip through JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

DECIMALS = 4
Scalar = float | int | str


def canonical(value: Scalar) -> Scalar:
    """Rounds floats to four decimals (and -0.0 to 0.0), so that equal genomes are equal as text too."""
    return round(value, DECIMALS) + 0.0 if isinstance(value, float) else value


@dataclass(frozen=True)
class LayerGene:
    """One output layer of a frankenmerge: a copy of layer `layer` of `source`, its residual output times `scale`."""

    source: str
    layer: int
    scale: float = 1.0


@dataclass(frozen=True)
class Genome:
    """All genes of one candidate, active or not.

    Attributes:
        scalars: (name, value), sorted by name.
        layers: The output layers of a frankenmerge, in order; empty when the space copies no layers.
    """

    scalars: tuple[tuple[str, Scalar], ...] = ()
    layers: tuple[LayerGene, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Scalar], layers: Iterable[LayerGene] = ()) -> Genome:
        """Makes a genome in canonical form: names sorted, floats rounded to four decimals."""
        scalars = tuple((name, canonical(values[name])) for name in sorted(values))
        scaled = (LayerGene(g.source, g.layer, float(canonical(float(g.scale)))) for g in layers)
        return cls(scalars, tuple(scaled))

    @cached_property
    def values(self) -> Mapping[str, Scalar]:
        """The scalar genes by name."""
        return dict(self.scalars)

    def to_json(self) -> dict[str, Any]:
        """Returns the genome as JSON."""
        data: dict[str, Any] = {"genes": dict(self.scalars)}
        if self.layers:
            data["layers"] = [[gene.source, gene.layer, gene.scale] for gene in self.layers]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Genome:
        """Reads what `to_json` wrote."""
        layers = (LayerGene(source, int(layer), float(scale)) for source, layer, scale in data.get("layers", ()))
        return cls.of(data["genes"], layers)
