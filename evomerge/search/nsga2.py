"""NSGA-II (Deb et al., 2002, https://doi.org/10.1109/4235.996017), by Optuna.

The parents of a generation are the survivors of all candidates so far: the fronts that the fewest dominate, and of the
last one those with the most room around them. Children are made by simulated binary crossover and polynomial mutation.
With one objective this is a genetic algorithm on the best `population` candidates.
"""

from __future__ import annotations

from evomerge.search import samplers
from evomerge.search.candidate import Candidate, Proposal
from evomerge.search.propose import AlgorithmSettings
from evomerge.search.space import SearchSpace


def nsga2(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Children of the survivors; random genomes while there are fewer than two."""
    from optuna.samplers import NSGAIISampler
    from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    class FromAll(NSGAIISampler):
        """Takes all finished trials for one population, and whatever is asked for as of the next generation."""

        def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
            return 1

        def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
            return samplers.finished(study) if generation == 0 else []

    told = samplers.values_of(history)
    survivors = max(min(settings.population, len(told)), 2)
    if told and len(told[0][1]) == 1:
        told = samplers.best_of(told, survivors)  # who survives is known without a study of all

    def sampler(number: int) -> NSGAIISampler:
        return FromAll(population_size=survivors, crossover=SBXCrossover(), mutation=PolynomialMutation(), seed=number)

    return samplers.propose(
        space, history, told if len(told) > 1 else [], numbers, generation, seed, name="nsga2", sampler=sampler
    )
