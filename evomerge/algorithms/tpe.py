"""The tree-structured Parzen estimator, by Optuna.

Bergstra et al., 2011 (https://papers.nips.cc/paper/4443-algorithms-for-hyper-parameter-optimization).
A density of the good candidates' genes is set against one of the others'. Genes are modelled jointly with those that
are active together with them (Falkner et al., 2018, https://arxiv.org/abs/1807.01774), or each by itself with the
option ``multivariate: false``. Several objectives are ranked by dominance and hypervolume (Ozaki et al., 2022,
https://doi.org/10.1613/jair.1.13188).
"""

from __future__ import annotations

from typing import Any

from evomerge.algorithms import optuna_samplers as samplers
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.optuna_trials import params_of

#: `startup`: candidates, those of generation 0 among them, before the model is trusted.
OPTIONS: dict[str, Any] = {"multivariate": True, "startup": 10}


def tpe(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """The best of a few draws from the density of the good; those of one generation repel each other."""
    from optuna.samplers import TPESampler

    options = {**OPTIONS, **settings.options}

    def sampler(number: int) -> TPESampler:
        return TPESampler(
            seed=number,
            n_startup_trials=options["startup"],
            multivariate=options["multivariate"],
            group=options["multivariate"],
            constant_liar=True,
        )

    told = samplers.values_of(history)
    return samplers.propose(
        space,
        history,
        told,
        numbers,
        generation,
        seed,
        name="tpe",
        sampler=sampler,
        read=params_of,
        ask=samplers.ask_active,
    )
