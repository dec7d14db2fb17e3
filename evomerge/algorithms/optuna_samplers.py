"""TPE, Gaussian-process optimisation, NSGA-II and NSGA-III: Optuna's samplers as algorithms of ours.

A sampler learns from a study in memory that is rebuilt from the history for every generation, and each candidate is
drawn by a new sampler with that candidate's own seed: nothing lives longer than a call. The candidates of a generation
that are drawn already are the study's running trials, from which TPE and GP keep their distance. Each trial has its
candidate's constraints, which these samplers take into account by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evomerge.algorithms.proposals import Draw, distinct
from evomerge.space.decode import active_genes, copies_layers
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, ConstraintValue, Proposal
from evomerge.study.interfaces import Algorithm, AlgorithmSettings
from evomerge.study.optuna_trials import (
    constraint_attributes,
    distributions_of,
    genome_of,
    layer_params,
    params_of,
)
from evomerge.system.quiet import quiet_optuna

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

#: `startup`: candidates, those of generation 0 among them, before the model is trusted.
TPE_OPTIONS: dict[str, Any] = {"multivariate": True, "startup": 10}
#: `most`: candidates to fit the surrogate to; `startup`: candidates before there is one.
GP_OPTIONS: dict[str, Any] = {"most": 150, "startup": 10}

Values = tuple[float, ...]
#: A candidate and its value for each objective, higher is better.
Evaluated = tuple[Candidate, Values]
#: The parameters of a genome, and the genome of a trial that was just asked for.
ParamsOf = Callable[[SearchSpace, Genome], dict[str, Any]]
Asker = Callable[[SearchSpace, "Study"], Genome]
NsgaName = Literal["nsga2", "nsga3"]


def tpe(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Proposes by the tree-structured Parzen estimator.

    Bergstra et al., 2011 (https://papers.nips.cc/paper/4443-algorithms-for-hyper-parameter-optimization). A density of
    the good candidates' genes is set against one of the others'; a proposal is the best of a few draws from the first.
    Genes are modelled jointly with those that are active together with them (Falkner et al., 2018,
    https://arxiv.org/abs/1807.01774), or each by itself with the option ``multivariate: false``. Several objectives are
    ranked by dominance and hypervolume (Ozaki et al., 2022, https://doi.org/10.1613/jair.1.13188).
    """
    from optuna.samplers import TPESampler

    options = {**TPE_OPTIONS, **settings.options}

    def sampler(number: int) -> TPESampler:
        return TPESampler(
            seed=number,
            n_startup_trials=options["startup"],
            multivariate=options["multivariate"],
            group=options["multivariate"],
            constant_liar=True,
        )

    return propose(
        space,
        history,
        values_of(history),
        numbers,
        generation,
        seed,
        name="tpe",
        sampler=sampler,
        params=params_of,
        ask=ask_active,
    )


def gp(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Proposes the genomes of the greatest log expected improvement under a Gaussian process.

    The criterion is Ament et al.'s (2023, https://arxiv.org/abs/2310.20708), the surrogate has a Matérn 5/2 kernel with
    one length scale per gene. Its cost grows with the cube of the candidates that it is fitted to, so it learns from
    the best `most` of them only. The candidates of a generation are chosen one after another, each for what it adds to
    those before it.
    """
    from optuna.samplers import GPSampler

    options = {**GP_OPTIONS, **settings.options}

    def sampler(number: int) -> GPSampler:
        return GPSampler(seed=number, n_startup_trials=options["startup"], warn_independent_sampling=False)

    evaluated = values_of([replace(candidate, objectives=None) for candidate in history])
    evaluated = best_of(evaluated, options["most"])
    return propose(space, history, evaluated, numbers, generation, seed, name="gp", sampler=sampler)


def nsga(
    name: NsgaName,
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Proposes by NSGA-II or NSGA-III; random genomes while there are fewer than two candidates.

    NSGA-II: Deb et al., 2002, https://doi.org/10.1109/4235.996017. NSGA-III: Deb and Jain, 2014,
    https://doi.org/10.1109/TEVC.2013.2281534. The parents of a generation are the elite of all candidates so far: the
    fronts that the fewest dominate, and of the last one those with the most room around them (II), or those near
    reference directions that are spread over the objectives, which keeps four and more of them apart (III). Children
    are made by simulated binary crossover and polynomial mutation. With one objective this is a genetic algorithm on
    the best `population` candidates.
    """
    evaluated = values_of(history)
    population = max(min(settings.population, len(evaluated)), 2)
    if evaluated and len(evaluated[0][1]) == 1:
        evaluated = best_of(evaluated, population)  # the elite is clear without a study of all
    evaluated = evaluated if len(evaluated) > 1 else []

    def sampler(number: int) -> NSGAIISampler | NSGAIIISampler:
        return _nsga_sampler(name, population, number)

    return propose(space, history, evaluated, numbers, generation, seed, name=name, sampler=sampler)


nsga2: Algorithm = partial(nsga, "nsga2")
nsga3: Algorithm = partial(nsga, "nsga3")


def _nsga_sampler(name: NsgaName, population: int, seed: int) -> NSGAIISampler | NSGAIIISampler:
    from optuna.samplers import NSGAIIISampler, NSGAIISampler
    from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover

    base = NSGAIISampler if name == "nsga2" else NSGAIIISampler

    class FromAll(base):  # type: ignore[misc, valid-type]
        """Takes all finished trials for one population, and whatever is asked for as of the next generation."""

        def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
            return 1

        def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
            return finished_trials(study) if generation == 0 else []

    sampler: NSGAIISampler | NSGAIIISampler = FromAll(
        population_size=population, crossover=SBXCrossover(), mutation=PolynomialMutation(), seed=seed
    )
    return sampler


def values_of(history: Sequence[Candidate]) -> list[Evaluated]:
    """Returns the values that a sampler learns from; empty when no candidate has any.

    A pruned candidate counts with its estimate, as any other; a failed one with the worst value seen of each objective,
    so that its neighbourhood is left without the values getting out of scale.
    """
    count = next((len(c.objectives) for c in history if c.objectives is not None), 1)
    finished: list[tuple[Candidate, Values | None]] = []
    for candidate in (c for c in history if c.state != "pending"):
        values = candidate.objectives
        if values is None and candidate.fitness is not None:
            values = (candidate.fitness,) * count
        finished.append((candidate, None if candidate.state == "failed" else values))
    seen = [values for _, values in finished if values is not None]
    if not seen:
        return []
    worst = tuple(min(column) for column in zip(*seen, strict=True))
    return [(candidate, worst if values is None else values) for candidate, values in finished]


def best_of(evaluated: Sequence[Evaluated], count: int) -> list[Evaluated]:
    """Returns the best by their first value, the feasible before the others, in the order of their numbers."""
    best = sorted(evaluated, key=lambda one: (_violation(one[0]), -one[1][0], one[0].number))[:count]
    return sorted(best, key=lambda one: one[0].number)


def _violation(candidate: Candidate) -> float:
    return math.inf if candidate.state == "failed" else candidate.violation


def _constraints_of(evaluated: Sequence[Evaluated]) -> list[Mapping[str, ConstraintValue]]:
    """What each candidate has of every constraint; a failed one the worst that was seen."""
    seen = [candidate.constraints for candidate, _ in evaluated if candidate.constraints]
    names = seen[0] if seen else ()
    worst = {name: max((of[name] for of in seen), key=lambda value: value.violation) for name in names}
    return [candidate.constraints or worst for candidate, _ in evaluated]


def all_params(space: SearchSpace, genome: Genome) -> dict[str, Any]:
    """Returns every gene as a parameter, for a sampler that learns only of parameters that all trials have.

    A layer pattern is filled up to its greatest length with copies of its last layer, which do not count.
    """
    params: dict[str, Any] = dict(genome.scalars)
    if space.pattern is not None:
        missing = space.pattern.max_layers - len(genome.layers)
        params |= layer_params(space, (*genome.layers, *genome.layers[-1:] * missing))
        params["layers"] = len(genome.layers)
    return params


def ask_active(space: SearchSpace, study: Study) -> Genome:
    """Asks for the choices first, then for the genes that are active under them."""
    trial = study.ask()
    _suggest(space, trial, [choice.name for choice in space.choices])
    chosen = genome_of(space, trial.params)
    active = active_genes(space, chosen)
    _suggest(space, trial, [gene.name for gene in space.reals if gene.name in active])
    if space.pattern is not None and copies_layers(space, chosen):
        _suggest(space, trial, ["layers"])
        parts = ("source", "layer") if space.pattern.scale is None else ("source", "layer", "scale")
        count = trial.params["layers"]
        _suggest(space, trial, [f"layers.{index:02d}.{part}" for index in range(count) for part in parts])
    return genome_of(space, trial.params)


def ask_all(space: SearchSpace, study: Study) -> Genome:
    """Asks for every gene."""
    return genome_of(space, study.ask(dict(distributions_of(space))).params)


def _suggest(space: SearchSpace, trial: Trial, names: Sequence[str]) -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions = distributions_of(space)
    for name in names:
        distribution = distributions[name]
        if isinstance(distribution, CategoricalDistribution):
            trial.suggest_categorical(name, distribution.choices)
        elif isinstance(distribution, IntDistribution):
            trial.suggest_int(name, distribution.low, distribution.high)
        elif isinstance(distribution, FloatDistribution):
            trial.suggest_float(name, distribution.low, distribution.high)


def finished_trials(study: Study) -> list[FrozenTrial]:
    """Returns the study's candidates, without those that were only asked for."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def propose(
    space: SearchSpace,
    history: Sequence[Candidate],
    evaluated: Sequence[Evaluated],
    numbers: range,
    generation: int,
    seed: int,
    *,
    name: str,
    sampler: Callable[[int], BaseSampler],
    params: ParamsOf = all_params,
    ask: Asker = ask_all,
) -> list[Proposal]:
    """Proposes by an Optuna sampler, nothing twice.

    Args:
        space: The search space.
        history: The candidates of earlier generations.
        evaluated: Those to learn from, with their values.
        numbers: Numbers of the proposals.
        generation: Their generation.
        seed: Seed of the run.
        name: The operator, as the lineage shows it.
        sampler: Makes a sampler with a seed.
        params: The parameters of a candidate in the study.
        ask: Asks for one genome.
    """
    with quiet_optuna():
        study = _study(space, evaluated, params)

        def draw(rng: np.random.Generator) -> Draw:
            study.sampler = sampler(int(rng.integers(2**32)))
            return ask(space, study), (), name

        return distinct(space, history, numbers, generation, seed, draw)


def _study(space: SearchSpace, evaluated: Sequence[Evaluated], params: ParamsOf) -> Study:
    import optuna

    count = len(evaluated[0][1]) if evaluated else 1
    study = optuna.create_study(directions=["maximize"] * count)
    constraints = _constraints_of(evaluated)
    study.add_trials(
        [
            _trial(space, params(space, candidate.genome), values, of)
            for (candidate, values), of in zip(evaluated, constraints, strict=True)
        ]
    )
    return study


def _trial(
    space: SearchSpace, params: dict[str, Any], values: Values, constraints: Mapping[str, ConstraintValue]
) -> FrozenTrial:
    from optuna.trial import create_trial

    distributions = distributions_of(space)
    return create_trial(
        values=list(values),
        params=params,
        distributions={name: distributions[name] for name in params},
        system_attrs=dict(constraint_attributes(constraints)),
    )
