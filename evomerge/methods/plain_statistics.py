"""Merging whole tensors: plain `Statistics`, for Python callers and as the reference for faster ones.

Everything is computed on demand from the tensors themselves, exactly, and remembered for the life of the object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Literal

from evomerge.errors import RecipeError
from evomerge.methods import arcee_fusion, della, sce
from evomerge.methods.contract import Block, Cutoff, Granularity, Method, Scope, Settings
from evomerge.methods.random_field import field_key, kept_elements, uniform16
from evomerge.methods.topk import band_counts, cutoff, cutoff_mask, keep_count
from evomerge.system.hashing import digest

if TYPE_CHECKING:
    from torch import Tensor


class PlainStatistics:
    """Statistics of one tensor, seen from one block of it. The "model" of scope "model" is this tensor alone.

    Args:
        base: The base's tensor in float32, or None.
        sources: The sources' tensors, float32 and of the same shape.
        keys: For each source the key of its random field; only stochastic methods need them.
        activations: Mean magnitudes of the matrix's inputs, for the stages that ask for them.
    """

    def __init__(
        self,
        base: Tensor | None,
        sources: Sequence[Tensor],
        keys: Sequence[tuple[int, int]] = (),
        activations: Tensor | None = None,
    ) -> None:
        self._base = base
        self._sources = list(sources)
        self._keys = list(keys)
        self._activations = activations
        self._deltas: dict[int, Tensor] = {}
        self._start = 0
        self._shape: tuple[int, ...] = tuple(self._sources[0].shape)

    def block(self, granularity: Granularity = "element", start: int = 0, count: int | None = None) -> Block:
        """Returns a block of the tensor with these statistics.

        Args:
            granularity: Gives the shape: [count], [rows, columns] (a tensor with no rows is one row), or the tensor's
                own.
            start: Flat index of the first element; for rows the start of one.
            count: Number of elements, whole rows for rows; to the end when None.
        """
        whole = self._sources[0]
        count = whole.numel() - start if count is None else count
        columns = self._columns()
        shapes: dict[str, tuple[int, ...]] = {
            "element": (count,),
            "row": (count // columns if columns else 0, columns),
            "tensor": tuple(whole.shape),
        }
        view = PlainStatistics(self._base, self._sources, self._keys, self._activations)
        view._deltas = self._deltas
        view._start, view._shape = start, shapes[granularity]

        def part(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1)[start : start + count].reshape(view._shape)

        base = None if self._base is None else part(self._base)
        return Block(base, [part(source) for source in self._sources], start, view)

    def trim(self, source: int, density: float, scope: Scope = "tensor") -> Cutoff:
        """See `Statistics.trim`."""
        sizes = self._delta(source).abs().reshape(-1)
        return cutoff(sizes, keep_count(sizes.numel(), density))

    def band(self, source: int, density: float, gamma: float) -> tuple[Cutoff, Cutoff]:
        """See `Statistics.band`."""
        sizes = self._delta(source).abs().reshape(-1)
        outliers, inside = band_counts(sizes.numel(), density, gamma)
        return cutoff(sizes, outliers), cutoff(sizes, inside)

    def masses(self, source: int, kept: Cutoff, outliers: Cutoff) -> tuple[float, float]:
        """See `Statistics.masses`."""
        sizes = self._delta(source).abs().reshape(-1).contiguous()
        inside = cutoff_mask(sizes, *kept) & ~cutoff_mask(sizes, *outliers)
        return float(sizes.double().sum()), float(sizes[inside].double().sum())

    def rank_levels(self, source: int) -> Tensor:
        """See `Statistics.rank_levels`."""
        return self._part(della.rank_levels(self._rows(self._delta(source).abs())))

    def field(self, source: int) -> Tensor:
        """See `Statistics.field`."""
        import torch

        numbers = uniform16(self._key(source), self._start, math.prod(self._shape)).astype("int32")
        return torch.from_numpy(numbers).to(self._sources[source].device).reshape(self._shape)

    def selection(self, fraction: float) -> tuple[Cutoff, list[float]]:
        """See `Statistics.selection`."""
        deltas = [self._delta(source).reshape(-1) for source in range(len(self._sources))]
        if fraction >= 1.0:
            return cutoff(deltas[0], deltas[0].numel()), [float(d.double().square().sum()) for d in deltas]
        variances = sce.element_variance(deltas)
        cut = cutoff(variances, keep_count(int((variances > 0).sum()), fraction))
        return cut, [float(delta[cutoff_mask(variances, *cut)].double().square().sum()) for delta in deltas]

    def activations(self) -> Tensor:
        """See `Statistics.activations`."""
        if self._activations is None:
            raise ValueError("there are no activations of this tensor")
        return self._activations

    def overlaps(self, epsilon: float) -> list[tuple[int, int]]:
        """See `Statistics.overlaps`."""
        moved = [self._delta(source).abs() > epsilon for source in range(len(self._sources))]
        together = sum(mask.int() for mask in moved) > 1
        return [(int((mask & together).sum()), int((mask & ~together).sum())) for mask in moved]

    def importance(self, source: int) -> tuple[Tensor, float]:
        """See `Statistics.importance`."""
        rows = self._rows(self._tensor(source))
        factors = arcee_fusion.relative(arcee_fusion.divergence(rows, self._rows(self._tensor(-1))))
        scores = self._rows(self._delta(source)).abs().mul_(factors).reshape(-1)
        size = scores.numel()
        quartiles = [float(scores.kthvalue(size - rank + 1).values) for rank in arcee_fusion.quartile_ranks(size)]
        return self._rows_here(factors), arcee_fusion.threshold(quartiles)

    def dot(self, left: int, right: int, of: Literal["weights", "deltas"], scope: Scope = "tensor") -> float:
        """See `Statistics.dot`."""
        if of == "deltas" and -1 in (left, right):
            return 0.0
        a, b = ((self._delta(i) if of == "deltas" else self._tensor(i)).reshape(-1).double() for i in (left, right))
        return float(a.dot(b))

    def products(
        self, left: int, right: int, of: Literal["weights", "deltas"], along: Literal["rows", "columns"]
    ) -> Tensor:
        """See `Statistics.products`."""
        if of == "deltas" and -1 in (left, right):
            raise ValueError("the base has no delta")
        a, b = ((self._delta(i) if of == "deltas" else self._tensor(i)).double() for i in (left, right))
        whole = self._sources[0].shape
        shape = whole if len(whole) > 1 else (1, whole.numel())
        if along == "columns" and len(whole) > 1:
            return (a * b).reshape(shape[0], -1).sum(0).view(1, -1, 1)
        products = (a * b).reshape(shape[0], math.prod(shape[1:-1]), shape[-1]).sum(2, keepdim=True)
        return self._rows_here(products)

    def variance(self, source: int, scope: Literal["tensor", "row"] = "tensor") -> Tensor:
        """See `Statistics.variance`; float64."""
        delta = self._delta(source).double()
        if scope == "tensor":
            return delta.reshape(1, -1).var(dim=1, correction=0)
        return self._rows_here(self._rows(delta).var(dim=1, keepdim=True, correction=0))

    def remember(self, key: Hashable, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """See `Statistics.remember`; nothing is kept."""
        return compute()

    def keep_mask(self, source: int, density: float) -> Tensor:
        """See `Statistics.keep_mask`."""
        import torch

        mask = kept_elements(self._key(source), self._start, math.prod(self._shape), density)
        return torch.from_numpy(mask).to(self._sources[source].device).reshape(self._shape)

    def _tensor(self, index: int) -> Tensor:
        if index >= 0:
            return self._sources[index]
        if self._base is None:
            raise ValueError("there is no base")
        return self._base

    def _delta(self, source: int) -> Tensor:
        if source not in self._deltas:
            self._deltas[source] = self._tensor(source) - self._tensor(-1)
        return self._deltas[source]

    def _key(self, source: int) -> tuple[int, int]:
        if not self._keys:
            raise ValueError("this method draws from the random field: give the sources' keys")
        return self._keys[source]

    def _rows(self, whole: Tensor) -> Tensor:
        """The whole tensor as [rows, columns]; a vector or a number is one row."""
        return whole.reshape(-1, max(1, self._columns()))

    def _rows_here(self, each: Tensor) -> Tensor:
        """Of values for each row of the whole tensor, those of this block's rows."""
        first = self._start // max(1, self._columns())
        return each[first : first + self._shape[0]]

    def _part(self, whole: Tensor) -> Tensor:
        """This block's part of a value for each element."""
        return whole.reshape(-1)[self._start : self._start + math.prod(self._shape)].reshape(self._shape)

    def _columns(self) -> int:
        shape = self._sources[0].shape
        return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def merge_tensors(
    method: Method,
    base: Tensor | None,
    sources: Sequence[Tensor],
    settings: Settings,
    *,
    seed: int = 0,
    name: str = "tensor",
    fingerprints: Sequence[str] = (),
) -> Tensor:
    """Merges whole tensors by one method.

    Args:
        method: Any but those that copy layers.
        base: The base's tensor, for the methods that need it.
        sources: The sources' tensors, of the base's shape and any floating dtype.
        settings: As completed by `Method.settings`.
        seed: For stochastic methods, as in a recipe.
        name: Name of the tensor, for stochastic methods and messages.
        fingerprints: The sources' content fingerprints, for stochastic methods; the tensors' own contents when empty.

    Returns:
        The merged tensor, float32.

    Raises:
        RecipeError: The settings or the tensors do not suit the method.
    """
    if method.merge is None:
        raise RecipeError(f"{method.name}: copies layers, so it has no result for a single tensor")
    if problems := _problems(method, base, sources, settings, name):
        raise RecipeError(problems)
    base = None if base is None else base.float()
    sources = [source.float() for source in sources]
    keys: list[tuple[int, int]] = []
    if method.stochastic:
        keys = [field_key(seed, name, print_) for print_ in fingerprints or map(tensor_fingerprint, sources)]
    block = PlainStatistics(base, sources, keys).block(method.granularity(settings))
    return method.merge(block, settings).reshape(sources[0].shape)


def tensor_fingerprint(tensor: Tensor) -> str:
    """Returns a hash of a tensor's shape and float32 values, for sources that are no checkpoint."""
    values = tensor.detach().float().cpu().contiguous().numpy()
    return digest(repr(values.shape), values.tobytes())


def _problems(
    method: Method, base: Tensor | None, sources: Sequence[Tensor], settings: Settings, name: str
) -> list[str]:
    problems = []
    if len(sources) < method.min_sources or (method.max_sources is not None and len(sources) > method.max_sources):
        most = "or more" if method.max_sources is None else f"to {method.max_sources}"
        problems.append(f"{method.name}: takes {method.min_sources} {most} sources, got {len(sources)}")
    if len(settings.sources) != len(sources):
        problems.append(f"{method.name}: settings for {len(settings.sources)} sources, got {len(sources)} tensors")
    if base is None and method.base_needed(settings.shared):
        problems.append(f"{method.name}: needs a base")
    everyone = [("the base", base)] * (base is not None) + [(f"source {i}", s) for i, s in enumerate(sources)]
    shapes = {label: tuple(tensor.shape) for label, tensor in everyone if tensor is not None}
    if len(set(shapes.values())) > 1:
        problems.append(f"{name}: shapes differ: " + ", ".join(f"{label} {shape}" for label, shape in shapes.items()))
    return problems or method.check(settings)
