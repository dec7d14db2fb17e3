"""Annealing: change a candidate that is drawn by its fitness, the more surely a good one the later it is.

After Kirkpatrick et al., 1983, https://doi.org/10.1126/science.220.4598.671
"""

from __future__ import annotations

import numpy as np

from evomerge.algorithms.ga.layer_operators import change_layer, fit
from evomerge.algorithms.operators import gaussian
from evomerge.algorithms.proposals import Draw, distinct
from evomerge.algorithms.registry import RegisteredAlgorithm
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.ranking import best_first

OPTIONS = {"heat": 0.1, "cooling": 0.8}


def propose(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Proposes changed copies of the candidates so far."""
    options = {**OPTIONS, **settings.options}
    heat = max(options["heat"] * options["cooling"] ** generation, 1e-3)
    parents = best_first(history)
    fitness = np.array([parent.fitness for parent in parents], dtype=np.float64)
    odds = np.exp((fitness - fitness.max(initial=0.0)) / heat)

    def draw(rng: np.random.Generator) -> Draw:
        if not parents:
            return space.sample(rng), (), "random"
        parent = parents[rng.choice(len(parents), p=odds / odds.sum())]
        unit = gaussian(space.unit(parent.genome), rng.random(len(space.reals)) < 0.5, heat, rng)
        layers = parent.genome.layers
        if space.pattern is not None:
            layers = fit(change_layer(layers, space.pattern, rng), space.pattern, rng)
        choices = {choice.name: str(parent.genome.values[choice.name]) for choice in space.choices}
        return space.genome(unit, choices, layers), (parent.number,), "annealed"

    return distinct(space, history, numbers, generation, seed, draw)


annealing = RegisteredAlgorithm(propose, OPTIONS)
