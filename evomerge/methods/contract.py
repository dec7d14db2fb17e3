"""What a merge method says about itself, and what it is given to work on.

A method is one file: a pure function and one `Method` that declares it. Everything else (recipe validation, the genes
of a search space, ``evomerge methods``, the documentation) is derived from the declaration. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from evomerge.errors import RecipeError, suggest

if TYPE_CHECKING:
    from torch import Tensor

Value = float | int | bool | str
Granularity = Literal["element", "row", "tensor"]
Scope = Literal["tensor", "model"]
Cutoff = tuple[float, int]
"""(threshold, last): scores above the threshold are kept, and those equal to it at a flat index of at most `last`."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: As written in a recipe.
        default: The recipe default (mergekit's); None when a recipe has to give it or may leave it out (`required`).
        per_source: True when every source has its own value; False when it is one for the tensor.
        kind: float, int, bool, choice or text.
        choices: The allowed words of a choice.
        low: Smallest allowed value (numbers only), None for unbounded.
        high: Largest allowed value.
        gene: Range to search, (low, high); None when a search leaves the parameter at its paper's value.
        paper: The paper's value, used by Python calls and generation 0; None: same as `default`.
        required: A recipe without it is refused.
        help: One line.
        instead_of: The parameter whose place this one takes where a recipe gives it. Where both are given, this one
            counts.
        when: (choice parameter, its value) without which this parameter has no effect; None when it always has.
        gene_sources: A search gives it a gene only for at most this many sources; None for any number.
        takes_part: A source where this is 0 takes no part in the merge: nothing else of it counts.
        only_ratios: Only the ratios of the sources' values count: always (True), or where the parameter of this name
            is true. A factor on all of them, above 0, changes nothing.
        idle_at: (parameter of the same source, its value) at which this one has no effect.
        remark: What a recipe that gives it is told, where mergekit takes it in another way.
    """

    name: str
    default: Value | None = None
    per_source: bool = False
    kind: Literal["float", "int", "bool", "choice", "text"] = "float"
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    gene: tuple[float, float] | None = None
    paper: Value | None = None
    required: bool = False
    help: str = ""
    instead_of: str | None = None
    when: tuple[str, str] | None = None
    gene_sources: int | None = None
    takes_part: bool = False
    only_ratios: bool | str = False
    idle_at: tuple[str, float] | None = None
    remark: str = ""


#: A number in the settings of a tensor: (parameter, index of the source that it is for; None where it is for all).
ParameterKey = tuple[str, int | None]


@dataclass(frozen=True)
class Settings:
    """The parameter values for one tensor, resolved: nothing is left to look up.

    Attributes:
        shared: Value of each parameter that is one for the tensor.
        sources: For each source, in recipe order, the values of the parameters that are per source.
    """

    shared: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Mapping[str, Any], ...] = ()

    def taking_part(self) -> list[int]:
        """Returns the indices of the sources that take part: all but those of weight 0."""
        return [i for i, source in enumerate(self.sources) if source.get("weight") != 0]

    def column(self, name: str) -> list[Any]:
        """The value of a per-source parameter for each source (None where a recipe left an optional one out)."""
        return [source.get(name) for source in self.sources]


class Statistics(Protocol):
    """Whole-tensor statistics that a method may need while it sees one block of a tensor at a time.

    Source i is counted as in `Block.sources`. `scope` "model" means the flattened whole model instead of this tensor.
    All sums are accumulated in float64. What is said element by element is on the block's device; inner products and
    variances, of which coefficients are made, are in memory.
    """

    def trim(self, source: int, density: float, scope: Scope = "tensor") -> Cutoff:
        """What keeps exactly the top floor(density · n) magnitudes of delta `source` (at least 1 when density > 0).

        A density of 0 gives (inf, -1).
        """
        ...

    def band(self, source: int, density: float, gamma: float) -> tuple[Cutoff, Cutoff]:
        """As `trim`, after the floor(gamma · n) largest have been left out: (what is left out, that and what is kept).

        Fewer are left out where the density does not leave so many.
        """
        ...

    def masses(self, source: int, kept: Cutoff, outliers: Cutoff) -> tuple[float, float]:
        """Sums of the magnitudes of delta `source`: of all of it, and of what is kept without the outliers."""
        ...

    def rank_levels(self, source: int) -> Tensor:
        """Rank of each magnitude of delta `source` within its row, as `evomerge.methods.della.rank_levels`: uint8."""
        ...

    def field(self, source: int) -> Tensor:
        """Returns the source's random numbers for this block, shaped like it: int32, uniform on 0 .. 65535."""
        ...

    def selection(self, fraction: float) -> tuple[Cutoff, list[float]]:
        """Returns what keeps the top `fraction` of the elements whose deltas vary across sources, by that variance.

        Returns:
            The cut, and for each source the sum of squares of its delta over what is kept.
        """
        ...

    def activations(self) -> Tensor:
        """Returns the mean magnitude of each input of a matrix, from the recipe's `activations:`: float32 [in]."""
        ...

    def overlaps(self, epsilon: float) -> list[tuple[int, int]]:
        """How many elements of each delta are above `epsilon`: (where another source's is too, where none is)."""
        ...

    def importance(self, source: int) -> tuple[Tensor, float]:
        """What `evomerge.methods.arcee_fusion` multiplies magnitudes by: float32 [rows of the block, 1]; threshold."""
        ...

    def dot(self, left: int, right: int, of: Literal["weights", "deltas"], scope: Scope = "tensor") -> float:
        """Returns the inner product of two flattened sources; index -1 is the base."""
        ...

    def products(
        self, left: int, right: int, of: Literal["weights", "deltas"], along: Literal["rows", "columns"]
    ) -> Tensor:
        """Returns the inner products of two sources vector by vector, float64; index -1 is the base.

        Along "rows" the vectors run along the tensor's last dimension: [rows of the block, vectors of a row, 1], a
        matrix having one in a row. Along "columns" they run along the first: [1, columns, 1]. A tensor of fewer than
        two dimensions is one vector, either way: [1, 1, 1].
        """
        ...

    def variance(self, source: int, scope: Literal["tensor", "row"] = "tensor") -> Tensor:
        """Returns the population variance of a delta: shape [1], or [rows of the block, 1] for scope "row"."""
        ...

    def remember(self, key: Hashable, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Returns what `compute` gives: something costly that follows from the tensors alone, not from the settings.

        A run may keep it for its next candidate, within bounds; `key` says what it is, and of which sources.
        """
        ...

    def keep_mask(self, source: int, density: float) -> Tensor:
        """DARE's mask for this block, shaped like it: True with probability `density`, nested in density."""
        ...


@dataclass(frozen=True)
class Block:
    """Part of one tensor, from the base and from every source: float32, same shape, same device.

    Attributes:
        base: The base's part, or None when the recipe has no base.
        sources: The sources' parts, in recipe order.
        start: Flat index of the block's first element within its tensor.
        statistics: Statistics of the whole tensor.

    The shape is [n] for methods that work by element, [rows, columns] for methods that work by row, and the tensor's
    own for methods that need the whole tensor.
    """

    base: Tensor | None
    sources: Sequence[Tensor]
    start: int
    statistics: Statistics

    @property
    def deltas(self) -> list[Tensor]:
        """Each source minus the base."""
        if self.base is None:
            raise ValueError("a block without a base has no deltas")
        return [source - self.base for source in self.sources]


@dataclass(frozen=True)
class Stage:
    """What may be done to a tensor after it was merged: a declaration like a method's.

    Attributes:
        name: As written under ``after:``.
        paper: Authors, year and link.
        summary: One line for ``evomerge methods``.
        parameters: One for the tensor each, their names begin with the stage's.
        apply: (whole tensors, what was merged of them, settings) -> result, shaped alike. Pure. The sources are those
            that take part in the merge; there is a base.
        shapes: Tells whether it does anything to tensors of a shape.
        idle: Tells whether it changes nothing with these settings.
        activations: It asks for `Statistics.activations`, and leaves tensors alone that have none.
    """

    name: str
    paper: str
    summary: str
    parameters: tuple[Parameter, ...]
    apply: Callable[[Block, Tensor, Settings], Tensor]
    shapes: Callable[[tuple[int, ...]], bool]
    idle: Callable[[Settings], bool]
    activations: bool = False


@dataclass(frozen=True)
class Method:
    """A merge method's declaration.

    Attributes:
        name: As written after ``merge_method:``.
        paper: Authors, year and link.
        summary: One line for ``evomerge methods``.
        parameters: All of them, in the order of the documentation.
        merge: (block, settings) -> merged block, float32. Pure. None for the methods that copy layers.
        needs_base: A recipe without ``base_model`` is refused; the base is no source. Ask `base_needed` instead, which
            also knows the methods where it depends.
        stochastic: Draws from the random field (`Statistics.keep_mask`).
        min_sources: Fewer are refused.
        max_sources: More are refused; None for any number.
        granularity: What the function has to see at once, given its settings.
        copies_layers: The output's layers are copies (frankenmerge): no arithmetic but `scale`.
        aliases: Other names for the same method.
        check: Extra rules on settings; returns messages, empty when fine.
        needs_base_when: Decides from the shared parameters, for the methods where it depends; overrides `needs_base`.
        takes_base: A ``base_model`` that a recipe gives is where the deltas start and no source, though none is needed.
        order_matters: The order of the sources changes the result.
        after: Stages that follow, whose parameters are among the method's (`evomerge.methods.registry.with_stages`).
        version: Tells apart what has one name but not one result: the code of an installed package, as a hash.
    """

    name: str
    paper: str
    summary: str
    parameters: tuple[Parameter, ...]
    merge: Callable[[Block, Settings], Tensor] | None
    needs_base: bool = True
    stochastic: bool = False
    min_sources: int = 1
    max_sources: int | None = None
    granularity: Callable[[Settings], Granularity] = lambda settings: "element"
    copies_layers: bool = False
    aliases: tuple[str, ...] = ()
    check: Callable[[Settings], list[str]] = lambda settings: []
    needs_base_when: Callable[[Mapping[str, Any]], bool] | None = None
    takes_base: bool = False
    order_matters: bool = False
    after: tuple[Stage, ...] = ()
    version: str = ""

    def parameter(self, name: str) -> Parameter | None:
        """Returns the declared parameter of that name, or None."""
        return next((p for p in self.parameters if p.name == name), None)

    def base_needed(self, shared: Mapping[str, Any]) -> bool:
        """Returns whether a recipe with these shared parameters needs ``base_model``.

        Where it does, the base is no source even if the recipe lists it. Where it does not, every listed model is one,
        except under a method that `takes_base`.
        """
        return self.needs_base if self.needs_base_when is None else self.needs_base_when(shared)

    def settings(
        self, sources: Sequence[Mapping[str, Any]], shared: Mapping[str, Any] | None = None, *, paper: bool = False
    ) -> Settings:
        """Settings for these sources, completed with the declared defaults.

        Args:
            sources: For each source, the values that are its own.
            shared: The other values; a per-source parameter given here holds for every source without its own.
            paper: Complete with the paper's values (Python calls, generation 0) instead of a recipe's defaults.

        Raises:
            RecipeError: A parameter that the method does not know, or a required one that is missing.
        """
        shared = dict(shared or {})
        declared = {p.name for p in self.parameters}
        own = {name for source in sources for name in source}
        problems = [
            f"{self.name}: unknown parameter '{n}'{suggest(n, declared)}"
            for n in sorted((own | set(shared)) - declared)
        ]
        problems += [
            f"{self.name}: '{p.name}' is one for all sources, not a source's own"
            for p in self.parameters
            if not p.per_source and p.name in own
        ]
        defaults = {p.name: p.paper if paper and p.paper is not None else p.default for p in self.parameters} | shared
        per_source = [p.name for p in self.parameters if p.per_source]
        columns = tuple({name: source.get(name, defaults[name]) for name in per_source} for source in sources)
        values = {p.name: defaults[p.name] for p in self.parameters if not p.per_source}
        for p in self.parameters:
            if p.required and any(row[p.name] is None for row in (columns if p.per_source else (values,))):
                problems.append(f"{self.name}: '{p.name}' is required{' for every source' if p.per_source else ''}")
        if problems:
            raise RecipeError(problems)
        return Settings(values, columns)


def merge_method(
    *parameters: Parameter, paper: str = "", **declaration: Any
) -> Callable[[Callable[[Block, Settings], Tensor]], Method]:
    """Declares the method that a function computes, by the function's name and the first line of its docstring.

        @merge_method(replace(WEIGHT, default=1.0, required=False), Parameter("reach", default=0.1, gene=(0.0, 1.0)))
        def clipped(block: Block, settings: Settings) -> Tensor:
            \"\"\"Add deltas that are clipped.\"\"\"

    Args:
        parameters: Its parameters.
        paper: Authors, year and link, where there is one.
        declaration: The other attributes of `Method`.
    """

    def declare(function: Callable[[Block, Settings], Tensor]) -> Method:
        summary = (function.__doc__ or "").strip().partition("\n")[0]
        named = {"name": function.__name__, "summary": summary, **declaration}
        return Method(paper=paper, parameters=parameters, merge=function, **named)

    return declare
