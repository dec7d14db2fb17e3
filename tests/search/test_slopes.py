"""Steps along the gradient: on a quadratic the memory finds the curvature, and a search that has slopes uses them."""

import numpy as np
import pytest

from evomerge.search import ALGORITHMS, AlgorithmSettings, Candidate, Outcome, Stop, search, spent_items
from evomerge.search.candidate import SLOPES
from evomerge.search.slopes import Known, direction

from .landscapes import Memory, make_space

CURVATURE = np.diag([1.0, 4.0, 9.0])
TOP = np.array([0.5, 0.4, 0.6])


def known(*unit: float) -> Known:
    """A point of the concave quadratic -(x - top)ᵀ C (x - top) / 2."""
    point = np.array(unit)
    return Known(point, -CURVATURE @ (point - TOP))


def test_without_other_points_the_gradient_is_followed():
    here = known(0.2, 0.2, 0.2)
    step, measured = direction(here, [])
    assert not measured
    np.testing.assert_array_equal(step, here.slopes)


def test_points_along_every_axis_give_the_newton_step():
    # Secant pairs along the axes of a quadratic that are its eigenvectors tell its curvature exactly: the step then
    # leads to the top, whatever the order of the pairs.
    here = known(0.2, 0.2, 0.2)
    others = [known(0.3, 0.2, 0.2), known(0.2, 0.3, 0.2), known(0.2, 0.2, 0.3)]
    step, measured = direction(here, others)
    assert measured
    np.testing.assert_allclose(here.unit + step, TOP, atol=1e-12)


def test_genes_held_by_a_bound_stay_and_convex_pairs_are_left_out():
    held = Known(np.array([0.0, 1.0, 0.5]), np.array([-1.0, 2.0, 3.0]))
    step, _ = direction(held, [Known(np.array([0.1, 0.9, 0.4]), np.array([-2.0, 1.0, 1.0]))])
    np.testing.assert_array_equal(step, [0.0, 0.0, 3.0])  # the gradient rises along the only pair: no curvature to use


def _sloped_run(slopes: bool, budget: int = 60, sign: float = 1.0):
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

    settings = AlgorithmSettings(population=8, options={"slopes": slopes}, slopes=told)
    memory = Memory()
    done = search(
        space,
        ALGORITHMS["ga"],
        lambda proposal: Outcome(fitness(proposal.genome), estimates={10: 0.0}),
        memory,
        Stop(budget),
        seed=1,
        settings=settings,
    )
    return done, asked, space


def test_a_search_with_slopes_is_far_ahead_and_its_lineage_says_how():
    with_slopes, asked, _ = _sloped_run(True)
    without, unasked, _ = _sloped_run(False)
    assert with_slopes.best.fitness > without.best.fitness / 10  # both below 0
    assert not unasked
    climbed = [c for c in with_slopes.candidates if SLOPES in c.operator]
    assert climbed
    assert {c.parents[0] for c in climbed} <= set(asked)
    assert all(len(c.parents) == 1 for c in climbed)


def test_nobody_is_asked_whom_no_child_climbs_from():
    """Slopes that lead astray: steps get rare, and then the second best has no place in a generation."""
    done, asked, _ = _sloped_run(True, 80, sign=-1.0)
    assert set(asked) == {c.parents[0] for c in done.candidates if SLOPES in c.operator}


def test_what_slopes_cost_is_counted_once_a_candidate():
    done, _, _ = _sloped_run(True, 40)
    parents = {c.parents[0] for c in done.candidates if SLOPES in c.operator}
    spent = list(spent_items(done.candidates, slope_items=25))
    assert spent[-1] == 40 * 10 + 25 * len(parents)
    assert spent == sorted(spent)


def test_a_budget_of_items_ends_a_search_that_asks_for_slopes_sooner():
    space = make_space(methods=("task_arithmetic",))
    ends = []
    for slope_items in (0, 50):
        done = search(
            space,
            ALGORITHMS["ga"],
            lambda p: Outcome(int(p.phenotype[:6], 16) / 2**24, estimates={10: 0.0}),
            Memory(),
            Stop(200, items=600, slope_items=slope_items),
            settings=AlgorithmSettings(8, slopes=lambda c: {g.name: 1.0 for g in space.reals}),
        )
        assert done.reason == "items"
        ends.append(len(done.candidates))
    assert ends[0] == 60 > ends[1]


@pytest.mark.parametrize("told", [None, {}], ids=["none", "all zero"])
def test_candidates_without_slopes_are_bred_as_ever(told):
    space = make_space(methods=("task_arithmetic",))
    settings = AlgorithmSettings(8, slopes=lambda c: told)
    done = search(
        space,
        ALGORITHMS["ga"],
        lambda p: Outcome(int(p.phenotype[:6], 16) / 2**24),
        Memory(),
        Stop(40),
        settings=settings,
    )
    assert not any(SLOPES in c.operator for c in done.candidates)
    assert len(done.candidates) == 40
