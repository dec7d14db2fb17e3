"""Spaces and landscapes that cost nothing: what the tests of the search run on instead of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from evomerge.algorithms.proposals import generator
from evomerge.algorithms.registry import ALGORITHMS
from evomerge.executors.in_process import InProcess
from evomerge.space.build import build_space
from evomerge.space.decode import active_genes, copies_layers
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.study.loop import search

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare", "dare_ties", "dfs")


#: Algorithms whose asks take a good part of a second: tested with few candidates.
COSTLY = ("gp",)


def every_algorithm(test: Any) -> Any:
    """Parametrises a test by every algorithm of the registry; the costly ones are marked slow."""
    import pytest  # here: processes of their own take landscapes from this module, and need no pytest

    names = [pytest.param(n, marks=pytest.mark.slow) if n in COSTLY else n for n in sorted(ALGORITHMS)]
    return pytest.mark.parametrize("algorithm", names)(test)


def make_space(**changes: Any) -> SearchSpace:
    """A space of three sources, twelve layers and four groups; any argument of `build_space` can be changed."""
    arguments: dict[str, Any] = {
        "base": "models/base",
        "sources": {"math": "models/math", "code": "models/code", "law": "models/law"},
        "layer_count": 12,
        "outer": ("model.embed_tokens.weight", "model.norm.weight"),
        "tensor_group_filters": {"attention": ("self_attn",), "mlp": ("mlp",)},
        "methods": METHODS,
        "layer_groups": 4,
    }
    return build_space(**{**arguments, **changes})


def pattern_space(**changes: Any) -> SearchSpace:
    """A space of layer patterns only."""
    settings = {"min_layers": 8, "max_layers": 16, "scale": True}
    return make_space(**{"methods": ("frankenmerge",), "frankenmerge": settings, **changes})


@dataclass(frozen=True)
class Bowl:
    """What a merge landscape looks like from afar: a flat-bottomed bowl in the weights, with scores like accuracies.

    Most of it is the share of each model over all its groups, some is each group's own, the methods differ a little,
    and densities matter little. Scores carry the noise of a benchmark of about a hundred items.
    """

    space: SearchSpace
    seed: int
    noise: float = 0.02

    @cached_property
    def _hidden(self) -> tuple[dict[str, Any], dict[str, float]]:
        """Per source (places of its weight genes, targets, importances), and per method its loss."""
        rng = generator(self.seed, 10**6)
        centre = {name: float(rng.uniform(0.2, 1.0)) for name in self.space.sources}
        own = rng.normal(0.0, 0.2, size=len(self.space.reals))
        importance = rng.gamma(0.5, size=len(self.space.reals))
        loss = {method.name: float(rng.uniform(0.0, 0.06)) for method in self.space.methods}
        weights = {}
        for name, value in centre.items():
            genes = self.space.reals
            places = [i for i, g in enumerate(genes) if g.source == name and g.parameter == "weight"]
            weights[name] = (places, value + own[places], importance[places] / importance[places].sum())
        return weights, loss

    def truth(self, genome: Genome) -> float:
        """The score without noise, at most 0.9."""
        values = np.array([float(genome.values[gene.name]) for gene in self.space.reals])
        weights, loss = self._hidden
        score = 0.9
        for places, targets, importance in weights.values():
            off = values[places] - targets
            score -= 0.5 * max(abs(float(off @ importance)) - 0.05, 0.0) ** 2
            score -= 0.15 * float(np.maximum(np.abs(off) - 0.1, 0.0) ** 2 @ importance)
        used = active_genes(self.space, genome)
        for gene, value in zip(self.space.reals, values, strict=True):
            if gene.parameter == "density" and gene.name in used:
                score -= 0.002 * max(0.4 - value, 0.0)
            if gene.parameter == "lambda" and gene.name in used:
                score -= 0.02 * (value - 1.0) ** 2
        methods = [self.space.method(genome, index).name for index in range(len(self.space.groups))]
        return score - float(np.mean([loss[name] for name in methods]))

    def __call__(self, proposal: Proposal) -> Outcome:
        """The score with noise that depends on the recipe, as a benchmark's does."""
        rng = generator(int(proposal.recipe_hash[:8], 16), self.seed)
        return Outcome(self.truth(proposal.genome) + float(rng.normal(0.0, self.noise)))


@dataclass(frozen=True)
class TwoBowls:
    """Two objectives: bowls of the same space with different centres, so that one is gained at the other's price."""

    space: SearchSpace
    seed: int
    noise: float = 0.02

    @cached_property
    def _bowls(self) -> tuple[Bowl, Bowl]:
        return Bowl(self.space, self.seed), Bowl(self.space, self.seed + 10**4)

    def truth(self, genome: Genome) -> tuple[float, float]:
        """Both scores without noise."""
        first, second = self._bowls
        return first.truth(genome), second.truth(genome)

    def __call__(self, proposal: Proposal) -> Outcome:
        """Both scores with noise, and their mean as the fitness."""
        noise = generator(int(proposal.recipe_hash[:8], 16), self.seed).normal(0.0, self.noise, size=2)
        objectives = tuple(float(value + off) for value, off in zip(self.truth(proposal.genome), noise, strict=True))
        return Outcome(sum(objectives) / 2, objectives=objectives)


@dataclass(frozen=True)
class Repair:
    """A pattern landscape: the nearer to a hidden stack of layers, the better."""

    space: SearchSpace
    seed: int
    noise: float = 0.01

    def hidden(self) -> list[tuple[str, int]]:
        """The best stack: one base in order, with a block of another model and a repeated block."""
        rng = generator(self.seed, 10**6)
        names = list(self.space.sources)
        stack = [(names[0], layer) for layer in range(self.space.layer_count)]
        start = int(rng.integers(0, self.space.layer_count - 3))
        stack[start : start + 3] = [(names[1], layer) for layer in range(start, start + 3)]
        again = int(rng.integers(0, self.space.layer_count - 2))
        return stack[: again + 2] + stack[again : again + 2] + stack[again + 2 :]

    def truth(self, genome: Genome) -> float:
        """One minus the edit distance to the hidden stack over its length; scales cost what they differ from 1."""
        wanted = self.hidden()
        got = [(gene.source, gene.layer) for gene in genome.layers]
        row = list(range(len(wanted) + 1))
        for i, layer in enumerate(got, start=1):
            previous, row[0] = row[0], i
            for j, other in enumerate(wanted, start=1):
                cost = 0.0 if layer == other else (0.5 if layer[1] == other[1] else 1.0)
                previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + cost)
        scale = float(np.mean([abs(gene.scale - 1.0) for gene in genome.layers]))
        return 1.0 - row[-1] / len(wanted) - 0.2 * scale

    def __call__(self, proposal: Proposal) -> Outcome:
        """The score with noise that depends on the recipe."""
        if not copies_layers(self.space, proposal.genome):
            return Outcome(0.0)
        rng = generator(int(proposal.recipe_hash[:8], 16), self.seed)
        return Outcome(self.truth(proposal.genome) + float(rng.normal(0.0, self.noise)))


class Memory:
    """A record that keeps candidates in memory, for searches that are only looked at."""

    def __init__(self) -> None:
        self.kept: list[Candidate] = []

    def candidates(self) -> tuple[Candidate, ...]:
        return tuple(sorted(self.kept, key=lambda c: c.number))

    def append(self, candidate: Candidate) -> None:
        self.kept.append(candidate)

    def __len__(self) -> int:
        return len(self.kept)


def best_truth(space: SearchSpace, landscape: Any, algorithm: str, seed: int, budget: int) -> float:
    """The noise-free score of the candidate that a search takes for the best."""
    record: Any = Memory()
    finished = search(space, ALGORITHMS[algorithm], InProcess(landscape), record, StopConditions(budget), seed=seed)
    assert finished.best is not None
    return float(landscape.truth(finished.best.genome))


def plain(candidates: Any) -> list[Mapping[str, Any]]:
    """Candidates without their timings, to compare runs."""
    return [{k: v for k, v in vars(c).items() if k != "seconds"} for c in candidates]
