"""A model of every item around one candidate: log-likelihoods linear in its genes, the fitness of them as it is.

What a metric makes of log-likelihoods (a softmax over choices, bits per byte) is known, so saturation and curvature are
in the model though it needs first derivatives only. It holds where log-likelihoods change little: a step may change
them by so many nats a token of the answers, as a root mean square. How many genes a step should tell apart is found by
cross-validation over the items, which costs no evaluation: where no step gains on items that it was not made for, the
items have nothing more to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.evaluation.scores import ItemScores, ResponseJacobian, SmoothMetric
from evomerge.objective.goals import Goal
from evomerge.system.arrays import FloatArray, IntArray, Mask

FOLDS = 4
RIDGES = (0.02, 0.3)
"""What the mean square of a step, in units of the genes' ranges, costs in fitness: those to choose from."""
PENALTY = 10.0
"""What being beyond a limit by as much as the limit costs in fitness."""
ITERATIONS, LEARNING_RATE = 50, 0.03
_DECAY, _DECAY_OF_SQUARES, _SMALL = 0.9, 0.99, 1e-12


@dataclass(frozen=True)
class Term:
    """One goal that moves with log-likelihoods.

    Attributes:
        goal: What it counts in the fitness.
        requests: Which of all requests are its task's.
        metric: Its numerators as a function of these.
        scores: The task's scores at the candidate itself.
        items: Each request's item.
        weights: What each item counts for.
    """

    goal: Goal
    requests: slice
    metric: SmoothMetric
    scores: ItemScores
    items: IntArray
    weights: FloatArray

    def value(self, loglikelihoods: FloatArray, kept: Mask) -> tuple[float, FloatArray]:
        """Returns the goal's value over the items that are kept, and its derivative by the task's log-likelihoods."""
        numerators, slopes = self.metric(loglikelihoods)
        weights, denominators = np.where(kept, self.weights, 0.0), self.scores.columns(self.goal.metric)[1]
        total = float(weights @ denominators)
        weights = weights if self.metric.weighted else weights * denominators
        if total <= 0:
            return 0.0, np.zeros_like(loglikelihoods)
        score, factor = self.scores.of_ratio(self.goal.metric, float(weights @ numerators) / total)
        value, slope = self.goal.value(score)
        return value, slope * factor / total * weights[self.items] * slopes


@dataclass(frozen=True)
class Limited:
    """A constraint whose metric moves with log-likelihoods.

    Attributes:
        term: The metric, or what varies smoothly in its place.
        violation: What is measured at the candidate itself.
        slope: What the violation is multiplied by for every unit of the metric.
    """

    term: Term
    violation: float
    slope: float


class LikelihoodModel:
    """The model around one candidate.

    What it predicts to be beyond a limit costs `PENALTY` times as much, so that a step keeps within the limits, or
    leads back to where they are met.

    Args:
        terms: The goals that move with log-likelihoods.
        total_weight: Of all goals.
        responses: The log-likelihoods of all tasks, one after another, and their derivatives by genes in units of
            their ranges.
        low: How far each gene may move down, in the same units, at most 0, [genes].
        high: And up.
        limits: The constraints that move with log-likelihoods.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        total_weight: float,
        responses: ResponseJacobian,
        low: FloatArray,
        high: FloatArray,
        limits: Sequence[Limited] = (),
    ) -> None:
        self._terms, self._total, self._limits = terms, total_weight, limits
        self._at, self._jacobian = responses.loglikelihoods, responses.derivatives
        self._per_token = 1.0 / np.maximum(responses.lengths, 1.0)
        self._low, self._high = low, high
        folds = [np.arange(len(t.scores.items)) % FOLDS for t in (*terms, *(limited.term for limited in limits))]
        self._folds = [([own != k for own in folds], [own == k for own in folds]) for k in range(FOLDS)]
        self._everything = [np.ones(len(own), dtype=np.bool_) for own in folds]
        self._resolutions: dict[tuple[bytes, float], tuple[int, float, float]] = {}

    def resolution(self, labels: Sequence[IntArray], radius: float) -> tuple[int, float, float]:
        """Chooses by cross-validation which genes to move together.

        Args:
            labels: For each choice a label of every gene, [genes]: genes of one label move alike, those of -1 stay.
            radius: Nats a token that a step may change.

        Returns:
            Index of the choice, the ridge, and the mean gain over items that a step was not made for.
        """
        key = np.stack(labels).tobytes(), radius  # a search asks every generation
        if key not in self._resolutions:
            self._resolutions[key] = self._cross_validated(labels, radius)
        return self._resolutions[key]

    def _cross_validated(self, labels: Sequence[IntArray], radius: float) -> tuple[int, float, float]:
        best = (0, RIDGES[0], -math.inf)
        unmoved = np.zeros_like(self._at)
        before = [self._fitness(unmoved, outside)[0] for _, outside in self._folds]
        for index, label in enumerate(labels):
            basis = _Basis(label, self._jacobian, self._low, self._high)
            for ridge in RIDGES:
                gains = []
                for (inside, outside), at_start in zip(self._folds, before, strict=True):
                    change = basis.jacobian @ self._maximum(basis, ridge, radius, inside)
                    gains.append(self._fitness(change, outside)[0] - at_start)
                if (gain := sum(gains) / FOLDS) > best[2]:
                    best = (index, ridge, gain)
        return best

    def step(self, labels: IntArray, ridge: float, radius: float) -> tuple[FloatArray, float]:
        """Finds the best point within a radius.

        Args:
            labels: As for `resolution`.
            ridge: As chosen there.
            radius: Nats a token.

        Returns:
            The move, in units of the genes' ranges, and the gain that is predicted of it.
        """
        basis = _Basis(labels, self._jacobian, self._low, self._high)
        move = basis.genes(self._maximum(basis, ridge, radius, self._everything))
        move = np.clip(move, self._low, self._high)
        change = self._jacobian @ move
        before = self._fitness(np.zeros_like(change), self._everything)[0]
        return move, self._fitness(change, self._everything)[0] - before

    def _fitness(self, change: FloatArray, kept: Sequence[Mask]) -> tuple[float, FloatArray]:
        """The part of the fitness that the terms make, less penalties, and its derivative by log-likelihoods."""
        loglikelihoods = self._at + change
        value, slopes = 0.0, np.zeros_like(loglikelihoods)
        for limited, items in zip(self._limits, kept[len(self._terms) :], strict=True):
            own, slope = limited.term.value(loglikelihoods[limited.term.requests], items)
            before, _ = limited.term.value(self._at[limited.term.requests], items)
            beyond = limited.violation + limited.slope * (own - before)
            if beyond > 0:
                value -= PENALTY * beyond
                slopes[limited.term.requests] -= PENALTY * limited.slope * slope
        for term, items in zip(self._terms, kept, strict=False):
            share = term.goal.weight / self._total
            own, slope = term.value(loglikelihoods[term.requests], items)
            value += share * own
            slopes[term.requests] += share * slope
        return value, slopes

    def _maximum(self, basis: _Basis, ridge: float, radius: float, kept: Sequence[Mask]) -> FloatArray:
        """Climbs by Adam (Kingma and Ba, 2015), back to the radius where a step leaves it."""
        x = np.zeros(basis.jacobian.shape[1])
        mean, square = np.zeros_like(x), np.zeros_like(x)
        change = basis.jacobian @ x
        for k in range(1, ITERATIONS + 1):
            _, slopes = self._fitness(change, kept)
            gradient = basis.jacobian.T @ slopes - 2.0 * ridge * basis.sizes * x
            mean = _DECAY * mean + (1 - _DECAY) * gradient
            square = _DECAY_OF_SQUARES * square + (1 - _DECAY_OF_SQUARES) * gradient**2
            corrected = np.sqrt(square / (1 - _DECAY_OF_SQUARES**k)) + _SMALL
            x = np.clip(x + LEARNING_RATE * mean / (1 - _DECAY**k) / corrected, basis.low, basis.high)
            change = basis.jacobian @ x
            length = math.sqrt(float(np.mean((change * self._per_token) ** 2)))
            if length > radius:
                x, change = x * (radius / length), change * (radius / length)
        return x


class _Basis:
    """Genes that move together.

    Attributes:
        jacobian: Derivatives by the common moves, [requests, moves].
        sizes: The share of the genes that each moves, [moves].
        low: How far each may go before one of its genes leaves its range.
        high: And up.
    """

    def __init__(self, labels: IntArray, jacobian: FloatArray, low: FloatArray, high: FloatArray) -> None:
        names, positions = np.unique(labels[labels >= 0], return_inverse=True)
        self._moved, self._positions = np.flatnonzero(labels >= 0), positions
        self._genes = len(labels)
        members = np.zeros((len(self._moved), len(names)))
        members[np.arange(len(self._moved)), positions] = 1.0
        self.jacobian = jacobian[:, self._moved] @ members
        self.sizes = members.sum(axis=0) / max(len(self._moved), 1)
        self.low, self.high = np.full(len(names), -np.inf), np.full(len(names), np.inf)
        np.maximum.at(self.low, positions, low[self._moved])
        np.minimum.at(self.high, positions, high[self._moved])

    def genes(self, x: FloatArray) -> FloatArray:
        """Returns the move of every gene, [genes]."""
        move = np.zeros(self._genes)
        move[self._moved] = x[self._positions]
        return move


def joined(parts: Mapping[str, ResponseJacobian]) -> tuple[ResponseJacobian, dict[str, slice]]:
    """Puts the requests of all tasks one after another, and says where each task's are."""
    slices, start = {}, 0
    for task, part in parts.items():
        slices[task] = slice(start, start + len(part.loglikelihoods))
        start += len(part.loglikelihoods)
    columns = zip(*((p.loglikelihoods, p.derivatives, p.lengths, p.items) for p in parts.values()), strict=True)
    return ResponseJacobian(*map(np.concatenate, columns)), slices
