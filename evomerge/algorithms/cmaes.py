"""CMA-ES (Hansen and Ostermeier, 2001, https://doi.org/10.1162/106365601750190398), by the package `cmaes`.

It searches the real genes. The methods, and a layer pattern, stay those of the start: the best candidate of generation
0 whose methods have real genes at all; genes that its methods do not use stay as well. A space without real genes is
searched at random. The distribution is unbounded; genes are in [0, 1], and a point outside is folded back into it
before it is scored. When the steps have become smaller than the scores can tell, the search starts anew at random.

With ``like_mergekit`` it searches as mergekit-evolve does: weights, densities and t in their own units, from 1 / number
of sources and 1, and what is scored of a point is its absolute values, cut to the ranges of the genes (give the weights
a wide one); what mergekit does not search is 1 where its range allows. mergekit's population is 4 + ⌊3 ln genes⌋.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.algorithms import replay
from evomerge.algorithms.operators import reflect
from evomerge.algorithms.proposals import generator
from evomerge.algorithms.random_search import random_search
from evomerge.space.decode import active_reals
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.ranking import best_first
from evomerge.system.arrays import FloatArray, Mask

if TYPE_CHECKING:
    from cmaes import CMA

#: `sigma`: the first standard deviation; `mean`: where to start, best (of generation 0), center or mergekit;
#: `separable`: a diagonal covariance (Ros and Hansen, 2008, https://doi.org/10.1007/978-3-540-87700-4_30).
OPTIONS: dict[str, Any] = {
    "sigma": 1 / 6,
    "mean": "best",
    "separable": False,
    "restarts": True,
    "like_mergekit": False,
}
MEANS = ("best", "center", "mergekit")
#: Steps below this are no longer seen in the recipes' four decimals, nor in any score.
SMALLEST_SPREAD = 1e-3
MERGEKIT_GENES = ("weight", "density", "t")


def check_options(options: Mapping[str, Any]) -> list[str]:
    """Lists what is wrong with options of the right kind."""
    given = {**OPTIONS, **options}
    problems = []
    if given["sigma"] <= 0:
        problems.append(f"search.options.sigma: a positive number; got {given['sigma']!r}")
    if given["mean"] not in MEANS:
        problems.append(f"search.options.mean: one of {', '.join(MEANS)}; got {given['mean']!r}")
    return problems


def cmaes(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Draws from the normal distribution that the generations so far have shaped."""
    options = {**OPTIONS, **settings.options}
    start = starting_genome(space, history)
    if options["like_mergekit"]:
        free, mean, genome, point = _like_mergekit(space, start)
    else:
        free, mean, genome, point = _folded(space, start, options["mean"])
    if not free.any():
        return random_search(space, history, numbers, generation, seed, settings)
    population = max(settings.population, replay.MIN_POPULATION)

    def begin(restart: int) -> CMA:
        import cmaes as package

        rng = generator(seed, 0, restart)
        first = mean if restart == 0 else rng.random(mean.shape)
        kind = package.SepCMA if options["separable"] and len(mean) > 1 else package.CMA
        return kind(mean=first.copy(), sigma=options["sigma"], population_size=population)

    def finished(optimizer: replay.Optimizer[FloatArray], points: Sequence[FloatArray]) -> bool:
        spread = float(np.std(np.stack(points), axis=0).max())
        return bool(options["restarts"]) and (spread < SMALLEST_SPREAD or optimizer.should_stop())

    bounds = tuple(space.low.tolist()), tuple(space.high.tolist())
    key = (tuple(sorted(options.items())), bounds, start, tuple(free.tolist()), tuple(mean.tolist()))
    strategy = replay.Strategy("cmaes", key, population, begin, genome, point, finished)
    return replay.propose(strategy, space, history, numbers, generation, seed)


def free_genes(space: SearchSpace, genome: Genome) -> Mask:
    """Returns the real genes that the genome's methods use and that have a width, shape [reals]."""
    return active_reals(space, genome) & (space.high > space.low)


def starting_genome(space: SearchSpace, history: Sequence[Candidate]) -> Genome:
    """Returns the best genome of generation 0, rather one with real genes; the default genome without a score."""
    starts = [candidate.genome for candidate in best_first(c for c in history if c.generation == 0)]
    starts.append(space.default())
    return next((genome for genome in starts if free_genes(space, genome).any()), starts[0])


def mergekit_mean(space: SearchSpace) -> FloatArray:
    """Returns mergekit-evolve's first point in the genes' units, shape [reals]: weights share 1, all else is 1."""
    share = 1.0 / len(space.sources)
    values = np.array([share if gene.parameter in ("weight", "t") else 1.0 for gene in space.reals], dtype=np.float64)
    return np.clip(values, space.low, space.high)


#: Which genes are searched, the first mean, and the way from a point to a genome and back.
_Coordinates = tuple[Mask, FloatArray, Callable[[FloatArray], Genome], Callable[[Genome], FloatArray]]


def _folded(space: SearchSpace, start: Genome, mean: str) -> _Coordinates:
    free = free_genes(space, start)
    unit = space.unit(start)
    choices = {choice.name: str(start.values[choice.name]) for choice in space.choices}
    first = {
        "best": lambda: unit,
        "center": lambda: np.full_like(unit, 0.5),
        "mergekit": lambda: space.unit(_with_reals(space, start, mergekit_mean(space))),
    }[mean]()

    def genome(point: FloatArray) -> Genome:
        moved = unit.copy()
        moved[free] = reflect(point)
        return space.genome(moved, choices, start.layers)

    return free, first[free], genome, lambda genome: space.unit(genome)[free]


def _like_mergekit(space: SearchSpace, start: Genome) -> _Coordinates:
    free = free_genes(space, start) & np.array([g.parameter in MERGEKIT_GENES for g in space.reals], dtype=np.bool_)
    mean = mergekit_mean(space)

    def genome(point: FloatArray) -> Genome:
        values = mean.copy()
        values[free] = np.abs(point)
        return _with_reals(space, start, np.clip(values, space.low, space.high))

    def back(genome: Genome) -> FloatArray:
        return np.array([float(genome.values[gene.name]) for gene in space.reals], dtype=np.float64)[free]

    return free, mean[free], genome, back


def _with_reals(space: SearchSpace, genome: Genome, values: FloatArray) -> Genome:
    """The genome with other real genes, in their own units, shape [reals]."""
    reals = {gene.name: float(value) for gene, value in zip(space.reals, values, strict=True)}
    return Genome.of({**genome.values, **reals}, genome.layers)
