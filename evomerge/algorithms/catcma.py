"""CatCMA with margin (Hamano et al., 2025, https://doi.org/10.1145/3712256.3726471), by the package `cmaes`.

A normal distribution over the real genes and the layers of a pattern, and a categorical one over the methods and the
models of the pattern's layers, learned together; a margin keeps every option alive. It starts around the best candidate
of generation 0. A pattern of variable length is one whole number more and as many positions as it can have: those past
its length have no effect. Genes that the drawn methods do not use have none either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.algorithms import replay
from evomerge.algorithms.optuna_samplers import all_params
from evomerge.algorithms.random_search import random_search
from evomerge.space.genes import Choice
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.optuna_trials import genome_of
from evomerge.study.ranking import best_first
from evomerge.system.arrays import FloatArray

if TYPE_CHECKING:
    from cmaes import CatCMAwM

#: `sigma`: the first standard deviation of a real gene, in units of its range.
OPTIONS: dict[str, Any] = {"sigma": 1 / 6}
#: Whole numbers start with a standard deviation of this many steps: one in ten is another number.
STEPS = 0.3
#: Of the first patterns' layers about this many are of another model than the start's; a choice keeps half its chance.
CHANGES = 2.0


def check_options(options: Mapping[str, Any]) -> list[str]:
    """Lists what is wrong with options of the right kind."""
    sigma = {**OPTIONS, **options}["sigma"]
    return [] if sigma > 0 else [f"search.options.sigma: a positive number; got {sigma!r}"]


@dataclass(frozen=True)
class Layout:
    """The genes by kind, as parameters of `all_params`; those with one value only are in none."""

    space: SearchSpace

    @cached_property
    def reals(self) -> tuple[tuple[str, float, float], ...]:
        """(name, low, high) of the real genes, and of the scales of a pattern."""
        reals = [(gene.name, gene.low, gene.high) for gene in self.space.reals]
        if self.space.pattern is not None and self.space.pattern.scale is not None:
            low, high = self.space.pattern.scale
            reals += [(f"layers.{i:02d}.scale", low, high) for i in range(self.space.pattern.max_layers)]
        return tuple(gene for gene in reals if gene[2] > gene[1])

    @cached_property
    def integers(self) -> tuple[tuple[str, int, int], ...]:
        """(name, low, high) of a pattern's length and layers."""
        if self.space.pattern is None:
            return ()
        integers = [("layers", self.space.pattern.min_layers, self.space.pattern.max_layers)]
        last = self.space.pattern.layer_count - 1
        integers += [(f"layers.{i:02d}.layer", 0, last) for i in range(self.space.pattern.max_layers)]
        return tuple(gene for gene in integers if gene[2] > gene[1])

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """The methods, and the models of a pattern."""
        choices = list(self.space.choices)
        if self.space.pattern is not None:
            models = self.space.pattern.models
            choices += [Choice(f"layers.{i:02d}.source", models) for i in range(self.space.pattern.max_layers)]
        return tuple(choice for choice in choices if len(choice.options) > 1)

    @cached_property
    def widest(self) -> int:
        """The most options that a choice has."""
        return max((len(choice.options) for choice in self.choices), default=0)

    def gaussian(self, genome: Genome) -> FloatArray:
        """Returns real genes, then whole numbers, scaled to [0, 1], shape [reals + integers]."""
        params = all_params(self.space, genome)
        return np.array(
            [(float(params[name]) - low) / (high - low) for name, low, high in (*self.reals, *self.integers)],
            dtype=np.float64,
        )

    def one_hot(self, genome: Genome) -> FloatArray:
        """Returns the chosen options, shape [choices, widest]."""
        params = all_params(self.space, genome)
        rows = np.zeros((len(self.choices), self.widest))
        for row, choice in enumerate(self.choices):
            rows[row, choice.options.index(params[choice.name])] = 1.0
        return rows

    def genome(self, solution: CatCMAwM.Solution, start: Mapping[str, Any]) -> Genome:
        """Makes the genome of a draw; genes with one value only are as in `start`."""
        params = dict(start)
        for (name, low, high), value in zip(self.reals, () if solution.x is None else solution.x, strict=True):
            params[name] = float(low + value * (high - low))
        for (name, low, high), value in zip(self.integers, () if solution.z is None else solution.z, strict=True):
            params[name] = round(low + value * (high - low))
        for choice, row in zip(self.choices, () if solution.c is None else solution.c, strict=True):
            params[choice.name] = choice.options[int(np.argmax(row))]
        return genome_of(self.space, params)


def catcma(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Draws from the joint distribution that the generations so far have shaped."""
    sigma = {**OPTIONS, **settings.options}["sigma"]
    layout = Layout(space)
    if not (layout.reals or layout.integers or layout.choices):
        return random_search(space, history, numbers, generation, seed, settings)
    baselines = best_first(candidate for candidate in history if candidate.generation == 0)
    start = baselines[0].genome if baselines else space.default()
    population = max(settings.population, replay.MIN_POPULATION)
    params = all_params(space, start)

    def begin(restart: int) -> CatCMAwM:
        return _optimizer(layout, start, sigma, population)

    def point(genome: Genome) -> CatCMAwM.Solution:
        from cmaes import CatCMAwM

        raw, count = layout.gaussian(genome), len(layout.reals)
        return CatCMAwM.Solution(raw[:count], raw[count:], layout.one_hot(genome), raw)

    def finished(optimizer: replay.Optimizer[CatCMAwM.Solution], points: Sequence[CatCMAwM.Solution]) -> bool:
        return False  # the margin keeps it from collapsing

    key = (sigma, layout.reals, layout.integers, layout.choices, start)
    strategy = replay.Strategy(
        "catcma", key, population, begin, lambda solution: layout.genome(solution, params), point, finished
    )
    return replay.propose(strategy, space, history, numbers, generation, seed)


def _optimizer(layout: Layout, start: Genome, sigma: float, population: int) -> CatCMAwM:
    from cmaes import CatCMAwM

    arguments: dict[str, Any] = {}
    if layout.reals:
        arguments["x_space"] = [[0.0, 1.0]] * len(layout.reals)
    if layout.integers:
        arguments["z_space"] = [[i / (high - low) for i in range(high - low + 1)] for _, low, high in layout.integers]
    if layout.reals or layout.integers:
        steps = [STEPS / (high - low) / sigma for _, low, high in layout.integers]
        arguments["mean"] = layout.gaussian(start)
        arguments["cov"] = np.diag(np.array([1.0] * len(layout.reals) + steps) ** 2)
    if layout.choices:
        arguments["c_space"] = [len(choice.options) for choice in layout.choices]
        arguments["cat_param"] = _first_chances(layout, start)
    return CatCMAwM(sigma=sigma, population_size=population, **arguments)


def _first_chances(layout: Layout, start: Genome) -> FloatArray:
    """The start's option and, with what is left, all options alike, shape [choices, widest]."""
    kept = max(0.5, 1.0 - CHANGES / len(layout.choices))
    counts = np.array([len(choice.options) for choice in layout.choices])
    alike: FloatArray = (np.arange(layout.widest) < counts[:, None]) / counts[:, None]
    chances: FloatArray = kept * layout.one_hot(start) + (1.0 - kept) * alike
    return chances
