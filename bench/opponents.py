"""Bayesian optimisers of today as search algorithms, to compare the default with: `pip install "evomerge[bench]"`.

* ``turbo``: TuRBO-1 (Eriksson et al., 2019, https://arxiv.org/abs/1910.01739): Thompson sampling in a trust region
  whose sides follow the length scales, of a Gaussian process whose prior on these is scaled with the dimension
  (Hvarfner et al., 2024, https://arxiv.org/abs/2402.02229).
* ``qlognei``: the same process over the whole space, noisy expected improvement of a batch (Ament et al., 2023,
  https://arxiv.org/abs/2310.20708).

Both search real genes only, and take the estimate that a race stopped a candidate at for its value. All state is read
off the history, generation by generation.
"""

from __future__ import annotations

import numpy as np
import torch

from evomerge.algorithms.history_index import HistoryIndex
from evomerge.algorithms.proposals import Draw, distinct
from evomerge.algorithms.registry import ALGORITHMS, RegisteredAlgorithm
from evomerge.space.space import SearchSpace
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.system.quiet import torch_seeded

FIRST, SHORTEST, LONGEST = 0.8, 0.5**7, 1.6
"""Length of the trust region, as in the paper."""
SUCCESSES = 3
MOST = 256
"""Candidates that the process is fitted to: the latest."""
CANDIDATES = 2000


def _observed(space: SearchSpace, history: tuple[Candidate, ...]) -> tuple[list[Candidate], torch.Tensor, torch.Tensor]:
    """The scored candidates, their genes in [0, 1] and their fitness, standardised."""
    index = HistoryIndex.of(space, history)
    scored = [c for c in history if c.fitness is not None][-MOST:]
    x = torch.tensor(np.stack([index.unit(c) for c in scored]), dtype=torch.float64)
    y = torch.tensor([[c.fitness] for c in scored], dtype=torch.float64)
    return scored, x, (y - y.mean()) / y.std().clamp_min(1e-9)


def _fitted(x: torch.Tensor, y: torch.Tensor):  # a SingleTaskGP, whose default prior is scaled with the dimension
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    model = SingleTaskGP(x, y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def _proposals(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    points: np.ndarray,
    parent: Candidate,
    operator: str,
) -> list[Proposal]:
    choices = {choice.name: str(parent.genome.values[choice.name]) for choice in space.choices}
    planned = {number: space.genome(unit, choices, ()) for number, unit in zip(numbers, points, strict=True)}

    def draw(rng: np.random.Generator) -> Draw:
        return space.sample(rng), (), "random"

    return distinct(space, history, numbers, generation, seed, draw, lambda n: (planned[n], (parent.number,), operator))


def turbo(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Proposes by Thompson sampling in a trust region."""
    scored, x, y = _observed(space, history)
    best = int(y.argmax())
    with torch_seeded(seed + generation):
        model = _fitted(x, y)
        scales = model.covar_module.lengthscale.detach().squeeze()
        scales = scales / scales.mean()
        scales = scales / scales.prod().pow(1.0 / len(scales))
        half = scales * _length(history, settings.population) / 2
        low, high = (x[best] - half).clamp(0, 1), (x[best] + half).clamp(0, 1)
        points = low + (high - low) * torch.quasirandom.SobolEngine(x.shape[1], scramble=True).draw(CANDIDATES).double()
        moved = torch.rand_like(points) <= min(20.0 / x.shape[1], 1.0)  # few genes at a time, where there are many
        moved[~moved.any(dim=1), 0] = True
        points = torch.where(moved, points, x[best])
        draws = model.posterior(points).rsample(torch.Size([len(numbers)])).squeeze(-1)
        chosen = points[draws.argmax(dim=-1)].detach().numpy()
    return _proposals(space, history, numbers, generation, seed, chosen, scored[best], "turbo")


def _length(history: tuple[Candidate, ...], population: int) -> float:
    """The trust region's length after these generations."""
    length, successes, failures, best = FIRST, 0, 0, -np.inf
    patience = max(4.0 / population, 1.0) * 4
    for generation in range(1 + max(c.generation for c in history)):
        values = [c.fitness for c in history if c.generation == generation and c.fitness is not None]
        latest = max(values, default=-np.inf)
        improved = latest > best + 1e-3 * abs(best) if np.isfinite(best) else True
        best = max(best, latest)
        if generation == 0:
            continue
        successes, failures = (successes + 1, 0) if improved else (0, failures + 1)
        if successes == SUCCESSES:
            length, successes = min(2 * length, LONGEST), 0
        elif failures >= patience:
            length, failures = length / 2, 0
        if length < SHORTEST:
            length, successes, failures = FIRST, 0, 0
    return length


def qlognei(
    space: SearchSpace,
    history: tuple[Candidate, ...],
    numbers: range,
    generation: int,
    seed: int,
    settings: AlgorithmSettings,
) -> list[Proposal]:
    """Proposes the batch of the largest expected improvement."""
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.optim import optimize_acqf

    scored, x, y = _observed(space, history)
    with torch_seeded(seed + generation):
        improvement = qLogNoisyExpectedImprovement(_fitted(x, y), x, prune_baseline=True)
        bounds = torch.stack([torch.zeros(x.shape[1]), torch.ones(x.shape[1])]).double()
        points, _ = optimize_acqf(improvement, bounds, q=len(numbers), num_restarts=4, raw_samples=128)
    parent = scored[int(y.argmax())]
    return _proposals(space, history, numbers, generation, seed, points.numpy(), parent, "qlognei")


ALGORITHMS["turbo"] = RegisteredAlgorithm(turbo, asynchronous=False)
ALGORITHMS["qlognei"] = RegisteredAlgorithm(qlognei, asynchronous=False)
