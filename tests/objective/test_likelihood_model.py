"""The model of every item: its value and derivative, its steps within a radius, and what cross-validation sees."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.evaluation.scorers.response_functions import _Probability, _Share
from evomerge.evaluation.scores import ItemScores, ResponseJacobian
from evomerge.objective.goals import Goal
from evomerge.objective.likelihood_model import FOLDS, LikelihoodModel, Limited, Term, joined

GENES = 6


def responses(items: int, seed: int, signal: np.ndarray) -> tuple[ResponseJacobian, ItemScores, _Share]:
    """Two choices an item, the first of them right; the genes move the right one by `signal`, and both by noise."""
    rng = np.random.default_rng(seed)
    starts = 2 * np.arange(items)
    owners = np.repeat(np.arange(items), 2)
    right = np.arange(2 * items) % 2 == 0
    jacobian = rng.normal(0.0, 0.3, (2 * items, GENES)) + right[:, None] * signal
    part = ResponseJacobian(rng.normal(-5.0, 1.0, 2 * items), jacobian, np.full(2 * items, 3.0), owners)
    metric = _Share(owners, starts, np.ones(2 * items), right, log=False)
    values = metric(part.loglikelihoods)[0]
    names = tuple(f"t:{k}" for k in range(items))
    return part, ItemScores("t", names, {"prob": (values, np.ones(items))}, {"prob": True}), metric


def model_of(items: int, signal: np.ndarray, seed: int = 0, reference: float | None = None) -> LikelihoodModel:
    part, scores, metric = responses(items, seed, signal)
    goal = Goal("t", "prob", 1.0, higher_is_better=True, reference=reference)
    term = Term(goal, slice(0, 2 * items), metric, scores, part.items, np.ones(items))
    return LikelihoodModel([term], 1.0, part, np.full(GENES, -0.5), np.full(GENES, 0.5))


def test_its_derivatives_are_its_differences() -> None:
    model = model_of(20, np.zeros(GENES), reference=0.4)
    change = np.random.default_rng(1).normal(0.0, 0.5, 40)
    kept = [np.arange(20) % 3 > 0]
    value, slopes = model._fitness(change, kept)
    for k in range(40):
        moved = [model._fitness(change + by * np.eye(40)[k], kept)[0] for by in (1e-5, -1e-5)]
        assert slopes[k] == pytest.approx((moved[0] - moved[1]) / 2e-5, abs=1e-8)
    assert value > 0


@pytest.mark.parametrize("radius", [0.01, 0.1])
def test_a_step_is_within_its_radius_and_the_ranges(radius: float) -> None:
    part, _, _ = responses(60, 0, np.full(GENES, 0.4))
    model = model_of(60, np.full(GENES, 0.4))
    move, gain = model.step(np.arange(GENES), 0.02, radius)
    assert gain > 0
    assert np.sqrt(np.mean((part.derivatives @ move / part.lengths) ** 2)) <= radius * (1 + 1e-9)
    wide, _ = model.step(np.arange(GENES), 0.0, 100.0)
    assert np.all(np.abs(wide) <= 0.5)


def test_genes_of_one_label_move_alike_and_others_stay() -> None:
    move, _ = model_of(60, np.linspace(-0.4, 0.4, GENES)).step(np.array([0, 0, 1, 1, -1, -1]), 0.02, 0.3)
    assert move[0] == move[1] != move[2] == move[3]
    assert not move[4:].any()


def test_cross_validation_sees_what_is_common_to_the_items_and_what_is_not() -> None:
    one_a_gene, all_alike = np.arange(GENES), np.zeros(GENES, dtype=np.int64)
    apart = np.array([0.5, -0.5, 0.5, -0.5, 0.5, -0.5])
    assert model_of(200, apart).resolution([all_alike, one_a_gene], 0.3)[0] == 1
    assert model_of(200, np.full(GENES, 0.3)).resolution([all_alike, one_a_gene], 0.3)[2] > 0
    # Nothing to learn: what is fitted to some items hardly gains on others, whatever it seems to gain on its own.
    models = [model_of(6 * FOLDS, np.zeros(GENES), seed) for seed in range(24)]
    unseen = np.mean([model.resolution([one_a_gene], 0.3)[2] for model in models])
    own = np.mean([model.step(one_a_gene, 0.02, 0.3)[1] for model in models])
    assert unseen < 0.2 * own


def test_requests_of_several_tasks_stand_one_after_another() -> None:
    first, _, _ = responses(3, 0, np.zeros(GENES))
    second, _, _ = responses(5, 1, np.zeros(GENES))
    both, requests = joined({"a": first, "b": second})
    assert requests == {"a": slice(0, 6), "b": slice(6, 16)}
    np.testing.assert_array_equal(both.derivatives[requests["b"]], second.derivatives)


def test_the_probability_of_one_answer() -> None:
    at = np.array([-0.5, -2.0])
    values, slopes = _Probability(np.array([0, 1]), log=False)(at)
    np.testing.assert_allclose(values, np.exp(at))
    np.testing.assert_allclose(slopes, values)


def test_a_step_keeps_to_a_limit_that_it_predicts_to_be_broken() -> None:
    """The probability may rise by 0.01 before it is beyond the limit; without one a step raises it by far more."""
    signal = np.full(GENES, 0.4)
    part, scores, metric = responses(60, 0, signal)
    term = Term(Goal("t", "prob", 1.0, higher_is_better=True), slice(0, 120), metric, scores, part.items, np.ones(60))
    bounds = np.full(GENES, -0.5), np.full(GENES, 0.5)
    limited = LikelihoodModel([term], 1.0, part, *bounds, [Limited(term, -0.01, 1.0)])
    _, free = LikelihoodModel([term], 1.0, part, *bounds).step(np.arange(GENES), 0.02, 0.3)
    _, gain = limited.step(np.arange(GENES), 0.02, 0.3)
    assert free > 0.05
    assert gain < 0.03
