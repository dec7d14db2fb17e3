"""Steps along the gradient: what a surface makes of values and slopes, and that a search which has slopes uses them."""

import numpy as np
import pytest

from evomerge.algorithms.ga.gaussian_process import GaussianProcess, Observations
from evomerge.algorithms.registry import ALGORITHMS
from evomerge.executors.in_process import InProcess
from evomerge.study.budget import StopConditions, spent_items
from evomerge.study.candidate import GRADIENT, Candidate, Outcome
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.loop import search
from tests.algorithms.landscapes import Memory, make_space

CURVATURE = np.diag([1.0, 4.0, 9.0])
TOP = np.array([0.5, 0.4, 0.6])


def values(points: np.ndarray) -> np.ndarray:
    """The concave quadratic -(x - top)ᵀ C (x - top) / 2."""
    return -0.5 * np.sum((points - TOP) @ CURVATURE * (points - TOP), axis=-1)


def slopes(points: np.ndarray) -> np.ndarray:
    """Its derivatives."""
    return -(points - TOP) @ CURVATURE


def process(points: np.ndarray, sloped: np.ndarray, noise: float = 0.0) -> GaussianProcess:
    """A process given values, and gradients with an error."""
    errors = noise * np.random.default_rng(0).normal(size=sloped.shape)
    return GaussianProcess(Observations(points, values(points), sloped, slopes(sloped) + errors))


def test_the_surface_goes_through_what_is_told():
    points = np.random.default_rng(1).uniform(size=(6, 3))
    found = process(points, points[:4])
    for point in points:
        np.testing.assert_allclose(found.predict(point)[0], values(point), atol=1e-3)
    for point in points[:4]:
        np.testing.assert_allclose(found.predict(point)[1], slopes(point), atol=1e-2)


def test_its_derivatives_are_its_differences():
    points = np.random.default_rng(2).uniform(size=(5, 3))
    found = process(points, points[1:4], noise=0.5)
    here, step = np.array([0.3, 0.6, 0.2]), 1e-5
    moved = [found.predict(here + step * axis)[0] - found.predict(here - step * axis)[0] for axis in np.eye(3)]
    np.testing.assert_allclose(found.predict(here)[1], np.array(moved) / (2 * step), rtol=1e-5, atol=1e-7)


def test_genes_that_change_nothing_make_no_difference():
    """A hundred more genes, the same in every point: steps are within the span of what is told."""
    points = np.random.default_rng(3).uniform(size=(4, 3))
    few = process(points, points)
    wide = np.hstack([points, np.full((4, 97), 0.5)])
    many = GaussianProcess(Observations(wide, values(points), wide, np.hstack([slopes(points), np.zeros((4, 97))])))
    there = many.maximum_within(0.2)
    np.testing.assert_array_equal(there[3:], wide[0, 3:])
    assert few.predict(there[:3])[0] > few.predict(points[0])[0]


def test_a_few_slopes_lead_to_the_top_and_no_step_is_too_long():
    points = np.array([[0.2, 0.2, 0.2], [0.3, 0.2, 0.2], [0.2, 0.3, 0.2], [0.2, 0.2, 0.3]])
    found = process(points, points)
    np.testing.assert_allclose(found.maximum_within(1.0), TOP, atol=0.1)  # from 0.3 to 0.4 away in every gene
    near = found.maximum_within(0.1)
    np.testing.assert_allclose(np.linalg.norm(near - points[0]), 0.1, rtol=1e-6)
    np.testing.assert_array_equal(process(points[:1], points[:1]).maximum_within(0.0), points[0])


def test_steps_stay_within_the_ranges():
    corner = np.array([[0.95, 0.5]])
    found = GaussianProcess(Observations(corner, np.zeros(1), corner, np.array([[3.0, 1.0]])))
    there = found.maximum_within(0.5)
    assert 0.99 < there[0] <= 1.0
    assert 0.5 < there[1] <= 1.0


def test_many_noisy_slopes_are_better_than_one():
    rng = np.random.default_rng(4)
    points = 0.5 + 0.05 * rng.normal(size=(12, 8))
    true = rng.normal(size=8)
    noisy = true + 2.0 * np.linalg.norm(true) / np.sqrt(8) * rng.normal(size=(12, 8))
    found = GaussianProcess(Observations(points, points @ true, points, noisy))
    step = found.maximum_within(0.1) - points[0]
    assert step @ true / np.linalg.norm(step) > noisy[0] @ true / np.linalg.norm(noisy[0])
    assert step @ true / np.linalg.norm(step) / np.linalg.norm(true) > 0.8


def _sloped_run(takes_steps: bool, budget: int = 60, sign: float = 1.0):
    space = make_space(methods=("task_arithmetic",))
    rng = np.random.default_rng(3)
    top, weight = rng.uniform(0.2, 0.8, len(space.reals)), rng.gamma(1.0, size=len(space.reals))
    width = space.high - space.low

    def fitness(genome) -> float:
        return -float(weight @ (space.unit(genome) - top) ** 2)

    asked = []

    def told(candidate: Candidate):
        asked.append(candidate.number)
        return dict(
            zip(
                [g.name for g in space.reals],
                -2 * sign * weight * (space.unit(candidate.genome) - top) / width,
                strict=True,
            )
        )

    settings = AlgorithmSettings(population=8, options={"gradient_steps": takes_steps}, gradients=told)
    memory = Memory()
    done = search(
        space,
        ALGORITHMS["ga"],
        InProcess(lambda proposal: Outcome(fitness(proposal.genome), estimates={10: 0.0})),
        memory,
        StopConditions(budget),
        seed=1,
        settings=settings,
    )
    return done, asked, space


def test_a_search_with_slopes_is_far_ahead_and_its_lineage_says_how():
    with_slopes, asked, _ = _sloped_run(True)
    without, unasked, _ = _sloped_run(False)
    assert with_slopes.best.fitness > without.best.fitness / 10  # both below 0
    assert not unasked
    climbed = [c for c in with_slopes.candidates if GRADIENT in c.operator]
    assert climbed
    assert {c.parents[0] for c in climbed} <= set(asked)
    assert all(len(c.parents) == 1 for c in climbed)


def test_nobody_is_asked_whom_no_child_climbs_from():
    """Gradients that lead astray: every one that was asked for has led to a step."""
    done, asked, _ = _sloped_run(True, 80, sign=-1.0)
    assert set(asked) == {c.parents[0] for c in done.candidates if GRADIENT in c.operator}


def test_what_slopes_cost_is_counted_once_a_candidate():
    done, _, _ = _sloped_run(True, 40)
    parents = {c.parents[0] for c in done.candidates if GRADIENT in c.operator}
    spent = list(spent_items(done.candidates, gradient_items=25))
    assert spent[-1] == 40 * 10 + 25 * len(parents)
    assert spent == sorted(spent)


def test_a_budget_of_items_ends_a_search_that_asks_for_slopes_sooner():
    space = make_space(methods=("task_arithmetic",))
    ends = []
    for gradient_items in (0, 50):
        done = search(
            space,
            ALGORITHMS["ga"],
            InProcess(lambda p: Outcome(int(p.recipe_hash[:6], 16) / 2**24, estimates={10: 0.0})),
            Memory(),
            StopConditions(200, items=600, gradient_items=gradient_items),
            settings=AlgorithmSettings(8, gradients=lambda c: {g.name: 1.0 for g in space.reals}),
        )
        assert done.reason == "items"
        ends.append(len(done.candidates))
    assert ends[0] == 60 > ends[1]


@pytest.mark.parametrize("told", [None, {}], ids=["none", "all zero"])
def test_candidates_without_slopes_are_bred_as_ever(told):
    space = make_space(methods=("task_arithmetic",))
    settings = AlgorithmSettings(8, gradients=lambda c: told)
    done = search(
        space,
        ALGORITHMS["ga"],
        InProcess(lambda p: Outcome(int(p.recipe_hash[:6], 16) / 2**24)),
        Memory(),
        StopConditions(40),
        settings=settings,
    )
    assert not any(GRADIENT in c.operator for c in done.candidates)
    assert len(done.candidates) == 40
