"""Bayesian optimisation with a Gaussian process and log expected improvement, by Optuna.

The criterion is Ament et al.'s (2023, https://arxiv.org/abs/2310.20708), the surrogate has a Matérn 5/2 kernel with one
length per gene. Its cost grows with the cube of the candidates that it is fitted to, so it learns from the best `most`
of them only. The candidates of a generation are chosen one after another, each for what it adds to those before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from evomerge.algorithms import optuna_samplers as samplers
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings

#: `most`: candidates to fit the surrogate to; `startup`: candidates before there is one.
OPTIONS: dict[str, Any] = {"most": 150, "startup": 10}


def gp(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """The genomes of the greatest expected improvement over the best one."""
    from optuna.samplers import GPSampler

    options = {**OPTIONS, **settings.options}

    def sampler(number: int) -> GPSampler:
        return GPSampler(seed=number, n_startup_trials=options["startup"], warn_independent_sampling=False)

    told = samplers.values_of([replace(candidate, objectives=None) for candidate in history])
    told = samplers.best_of(told, options["most"])
    return samplers.propose(space, history, told, numbers, generation, seed, name="gp", sampler=sampler)
