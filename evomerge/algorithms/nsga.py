"""NSGA-II and NSGA-III, by Optuna.

NSGA-II: Deb et al., 2002, https://doi.org/10.1109/4235.996017. NSGA-III: Deb and Jain, 2014,
https://doi.org/10.1109/TEVC.2013.2281534.

The parents of a generation are the survivors of all candidates so far: the fronts that the fewest dominate, and of the
last one those with the most room around them (II), or those near reference directions that are spread over the
objectives, which keeps four and more of them apart (III). Children are made by simulated binary crossover and
polynomial mutation. With one objective this is a genetic algorithm on the best `population` candidates.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from evomerge.algorithms import optuna_samplers as samplers
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import Algorithm, AlgorithmSettings

if TYPE_CHECKING:
    from optuna.samplers import NSGAIIISampler, NSGAIISampler

Name = Literal["nsga2", "nsga3"]


def nsga(
    name: Name,
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Children of the survivors; random genomes while there are fewer than two."""
    told = samplers.values_of(history)
    survivors = max(min(settings.population, len(told)), 2)
    if told and len(told[0][1]) == 1:
        told = samplers.best_of(told, survivors)  # who survives is known without a study of all
    told = told if len(told) > 1 else []

    def sampler(number: int) -> NSGAIISampler | NSGAIIISampler:
        return _sampler(name, survivors, number)

    return samplers.propose(space, history, told, numbers, generation, seed, name=name, sampler=sampler)


nsga2: Algorithm = partial(nsga, "nsga2")
nsga3: Algorithm = partial(nsga, "nsga3")


def _sampler(name: Name, survivors: int, seed: int) -> NSGAIISampler | NSGAIIISampler:
    from optuna.samplers import NSGAIIISampler, NSGAIISampler
    from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    kind = NSGAIISampler if name == "nsga2" else NSGAIIISampler

    class FromAll(kind):  # type: ignore[misc, valid-type]
        """Takes all finished trials for one population, and whatever is asked for as of the next generation."""

        def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
            return 1

        def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
            return samplers.finished(study) if generation == 0 else []

    made: NSGAIISampler | NSGAIIISampler = FromAll(
        population_size=survivors, crossover=SBXCrossover(), mutation=PolynomialMutation(), seed=seed
    )
    return made
