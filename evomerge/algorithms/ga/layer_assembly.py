"""Assembly of a frankenmerge's layers from what all candidates say of every depth."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from evomerge.algorithms.ga.layer_operators import Layers, fit
from evomerge.space.genes import Pattern
from evomerge.space.genome import LayerGene
from evomerge.system.arrays import FloatArray

LENGTH = 6.0
"""Neighbouring depths of a model are worth much the same: correlation falls by 1/e over a sixth of the stack ..."""
OWN_SHARE = 0.5
"""... but for this share of the variance, which is each depth's own: single layers may be ruined."""
NOISE = 0.2
"""Variance that depths do not explain, of that of the fitness."""
SEAM, JUMP = -0.2, -0.5
"""What a change of model, and a jump of depth, cost by the prior (deviation: their size)."""
INTERCEPT = 2.0
"""Deviation of the constant."""


def assemble(
    evaluated: Sequence[tuple[Layers, float]], pattern: Pattern, scales: Mapping[int, float], rng: np.random.Generator
) -> Layers:
    """Assembles a whole stack of the model that is best at each depth, as all candidates together tell it.

    A pattern's fitness is taken for a sum: what the model of each depth is worth, and what a change of model or a jump
    of depth costs. One candidate says little about one depth, but every candidate says something about all of its
    depths, so a Bayesian regression over the history knows more than any two parents do; and of a sum the best pattern
    is found exactly, by dynamic programming over the depths. The coefficients are drawn from their posterior (Thompson
    sampling, as Baptista and Poloczek, 2018, https://arxiv.org/abs/1806.08838, do it for combinatorial structures):
    where little is known, draws differ.

    Args:
        evaluated: Patterns and their fitness, at least one.
        pattern: The bounds.
        scales: The scale of a depth, where it is not 1.
        rng: Draws the coefficients.
    """
    design_matrix = np.stack([_features(layers, pattern) for layers, _ in evaluated])
    fitness = np.array([value for _, value in evaluated])
    fitness = (fitness - fitness.mean()) / (float(fitness.std()) or 1.0)
    coefficients = _posterior_draw(design_matrix, fitness, *_prior(pattern), rng)
    size = pattern.layer_count * len(pattern.models)
    by_depth = coefficients[:size].reshape(pattern.layer_count, -1)
    models = _best_path(by_depth, min(float(coefficients[size]), 0.0))
    stack = [LayerGene(pattern.models[model], k, scales.get(k, 1.0)) for k, model in enumerate(models)]
    return fit(stack, pattern, rng)


def _features(layers: Layers, pattern: Pattern) -> FloatArray:
    """What a pattern's fitness is summed from: each depth's share of each model, seams, jumps, and a constant."""
    counts = np.zeros((pattern.layer_count, len(pattern.models)))
    for gene in layers:
        counts[gene.layer, pattern.models.index(gene.source)] += 1.0
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    pairs = list(itertools.pairwise(layers))
    seams = sum(a.source != b.source for a, b in pairs)
    jumps = sum(a.layer + 1 != b.layer for a, b in pairs)
    return np.concatenate([shares.ravel(), [seams, jumps, 1.0]])


def _prior(pattern: Pattern) -> tuple[FloatArray, FloatArray]:
    """Mean and covariance of the coefficients, for a fitness of deviation 1."""
    depths = np.arange(pattern.layer_count)
    near = np.exp(-np.abs(depths[:, None] - depths[None, :]) * LENGTH / pattern.layer_count)
    of_model = (1.0 - OWN_SHARE) * near / near.sum() + OWN_SHARE * np.eye(pattern.layer_count) / pattern.layer_count
    size = pattern.layer_count * len(pattern.models)
    covariance = np.diag([*np.zeros(size), SEAM**2, JUMP**2, INTERCEPT**2])
    covariance[:size, :size] = np.kron(of_model, np.eye(len(pattern.models)))
    return np.array([*np.zeros(size), SEAM, JUMP, 0.0]), covariance


def _posterior_draw(
    design_matrix: FloatArray, fitness: FloatArray, mean: FloatArray, covariance: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """Coefficients between their posterior mean and a draw from the posterior, somewhere at random.

    The draw is one from the prior, corrected by its residual (Matheron's rule). Of a tall stack a whole draw has
    something odd at so many depths that nothing is left of what is known; on the way to the mean there is less of it.
    """
    share = rng.random()
    deviation = share * (np.linalg.cholesky(covariance) @ rng.standard_normal(len(mean)))
    noise = share * np.sqrt(NOISE) * rng.standard_normal(len(design_matrix))
    marginal = design_matrix @ covariance @ design_matrix.T + NOISE * np.eye(len(design_matrix))
    residual = fitness - design_matrix @ (mean + deviation) - noise
    return mean + deviation + covariance @ design_matrix.T @ np.linalg.solve(marginal, residual)


def _best_path(coefficients: FloatArray, seam: float) -> list[int]:
    """The model of each depth for the largest sum, by dynamic programming.

    Args:
        coefficients: What each model is worth at each depth, shape [depths, models].
        seam: What a change of model is worth, at most 0.
    """
    total = coefficients[0]
    origins = []
    for row in coefficients[1:]:
        best = int(np.argmax(total))
        stays = total >= total[best] + seam
        origins.append(np.where(stays, np.arange(len(row)), best))
        total = row + np.where(stays, total, total[best] + seam)
    path = [int(np.argmax(total))]
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    return path[::-1]
