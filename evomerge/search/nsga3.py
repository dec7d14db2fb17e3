"""NSGA-III (Deb and Jain, 2014, https://doi.org/10.1109/TEVC.2013.2281534), by Optuna.

As NSGA-II, but of the last front those survive that are near reference directions spread over the objectives, which
keeps four and more objectives apart.
"""

from __future__ import annotations

from evomerge.search import samplers
from evomerge.search.candidate import Candidate, Proposal
from evomerge.search.propose import AlgorithmSettings
from evomerge.search.space import SearchSpace


def nsga3(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Children of the survivors; random genomes while there are fewer than two."""
    from optuna.samplers import NSGAIIISampler
    from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    class FromAll(NSGAIIISampler):
        """Takes all finished trials for one population, and whatever is asked for as of the next generation."""

        def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
            return 1

        def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
            return samplers.finished(study) if generation == 0 else []

    told = samplers.values_of(history)
    survivors = max(min(settings.population, len(told)), 2)
    if told and len(told[0][1]) == 1:
        told = samplers.best_of(told, survivors)  # who survives is known without a study of all

    def sampler(number: int) -> NSGAIIISampler:
        return FromAll(population_size=survivors, crossover=SBXCrossover(), mutation=PolynomialMutation(), seed=number)

    return samplers.propose(
        space, history, told if len(told) > 1 else [], numbers, generation, seed, name="nsga3", sampler=sampler
    )
