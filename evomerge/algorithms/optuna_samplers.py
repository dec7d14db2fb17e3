"""Optuna's samplers behind the one interface of our algorithms.

A sampler learns from a study in memory that is rebuilt from the history for every generation, and each candidate is
drawn by a new sampler with that candidate's own seed: nothing lives longer than a call. The candidates of a generation
that are drawn already are the study's running trials, from which TPE and GP keep their distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.algorithms.proposals import Draw, distinct
from evomerge.space.decode import active_genes, copies_layers
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.optuna_trials import distributions_of, genome_of, layer_params
from evomerge.system.quiet_optuna import quiet_optuna

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

Values = tuple[float, ...]
#: The parameters of a genome, and the genome of a trial that was just asked for.
Reader = Callable[[SearchSpace, Genome], dict[str, Any]]
Asker = Callable[[SearchSpace, "Study"], Genome]


def values_of(history: Sequence[Candidate]) -> list[tuple[Candidate, Values]]:
    """What a sampler is told of each candidate, higher is better; empty when nothing has a value.

    A pruned candidate counts with its estimate, as any other; a failed one with the worst value seen of each objective,
    so that its neighbourhood is left without the values getting out of scale.
    """
    count = next((len(c.objectives) for c in history if c.objectives is not None), 1)
    told: list[tuple[Candidate, Values | None]] = []
    for candidate in (c for c in history if c.state != "pending"):
        values = candidate.objectives
        if values is None and candidate.fitness is not None:
            values = (candidate.fitness,) * count
        told.append((candidate, None if candidate.state == "failed" else values))
    known = [values for _, values in told if values is not None]
    if not known:
        return []
    worst = tuple(min(column) for column in zip(*known, strict=True))
    return [(candidate, worst if values is None else values) for candidate, values in told]


def best_of(told: Sequence[tuple[Candidate, Values]], count: int) -> list[tuple[Candidate, Values]]:
    """The best by their first value, in the order of their numbers."""
    best = sorted(told, key=lambda one: (-one[1][0], one[0].number))[:count]
    return sorted(best, key=lambda one: one[0].number)


def all_params(space: SearchSpace, genome: Genome) -> dict[str, Any]:
    """Every gene, for a sampler that learns only of parameters that all trials have.

    A layer pattern is filled up to its greatest length with copies of its last layer, which do not count.
    """
    params: dict[str, Any] = dict(genome.scalars)
    if space.pattern is not None:
        missing = space.pattern.max_layers - len(genome.layers)
        params |= layer_params(space, (*genome.layers, *genome.layers[-1:] * missing))
        params["layers"] = len(genome.layers)
    return params


def ask_active(space: SearchSpace, study: Study) -> Genome:
    """The choices first, then the genes that are active under them."""
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
    """Every gene."""
    return genome_of(space, study.ask(dict(distributions_of(space))).params)


def _suggest(space: SearchSpace, trial: Trial, names: Sequence[str]) -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    known = distributions_of(space)
    for name in names:
        distribution = known[name]
        if isinstance(distribution, CategoricalDistribution):
            trial.suggest_categorical(name, distribution.choices)
        elif isinstance(distribution, IntDistribution):
            trial.suggest_int(name, distribution.low, distribution.high)
        elif isinstance(distribution, FloatDistribution):
            trial.suggest_float(name, distribution.low, distribution.high)


def finished(study: Study) -> list[FrozenTrial]:
    """The study's candidates, without those that were only asked for."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def propose(
    space: SearchSpace,
    history: Sequence[Candidate],
    told: Sequence[tuple[Candidate, Values]],
    numbers: range,
    generation: int,
    seed: int,
    *,
    name: str,
    sampler: Callable[[int], BaseSampler],
    read: Reader = all_params,
    ask: Asker = ask_all,
) -> list[Proposal]:
    """Proposals of an Optuna sampler, all new.

    Args:
        space: The search space.
        history: The candidates of earlier generations.
        told: Those to learn from, with their values.
        numbers: Numbers of the proposals.
        generation: Their generation.
        seed: Seed of the run.
        name: The operator, as the lineage shows it.
        sampler: Makes a sampler with a seed.
        read: The parameters of a candidate in the study.
        ask: Asks for one genome.
    """
    with quiet_optuna():
        study = _study(space, told, read)

        def draw(rng: np.random.Generator) -> Draw:
            study.sampler = sampler(int(rng.integers(2**32)))
            return ask(space, study), (), name

        return distinct(space, history, numbers, generation, seed, draw)


def _study(space: SearchSpace, told: Sequence[tuple[Candidate, Values]], read: Reader) -> Study:
    import optuna

    count = len(told[0][1]) if told else 1
    study = optuna.create_study(directions=["maximize"] * count)
    study.add_trials([_trial(space, read(space, candidate.genome), values) for candidate, values in told])
    return study


def _trial(space: SearchSpace, params: dict[str, Any], values: Values) -> FrozenTrial:
    from optuna.trial import create_trial

    known = distributions_of(space)
    return create_trial(values=list(values), params=params, distributions={name: known[name] for name in params})
