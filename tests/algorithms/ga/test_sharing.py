"""Competition and attraction over items, by hand."""

import numpy as np

from evomerge.algorithms.ga.sharing import attraction, shared_fitness
from evomerge.algorithms.registry import ALGORITHMS
from evomerge.study.candidate import Candidate
from evomerge.study.interfaces import AlgorithmSettings
from tests.algorithms.landscapes import make_space

# Two candidates that solve the first two items, one that alone solves the third, and one that solves none.
VALUES = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])


def test_an_item_is_shared_by_those_who_solve_it():
    # Items one and two are worth 1/2 to each of two; the third is worth 1 to the one that has it alone.
    np.testing.assert_allclose(shared_fitness(VALUES), [1.0, 1.0, 1.0, 0.0])


def test_a_partner_is_worth_what_one_lacks():
    np.testing.assert_allclose(attraction(VALUES, 0), [0.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(attraction(VALUES, 2), [1.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(attraction(VALUES, 3), [1.0, 1.0, 1.0, 0.0])


def test_losses_below_zero_and_items_that_all_solve_alike_are_no_trouble():
    values = np.array([[-3.0, 2.0], [-1.0, 2.0]])
    np.testing.assert_allclose(shared_fitness(values), [0.0, 1.0])


def test_a_search_that_shares_breeds_from_who_alone_solves_an_item():
    space = make_space(methods=("task_arithmetic",))
    solves = {n: np.array([1.0, 1.0, 0.0]) for n in range(19)} | {19: np.array([0.0, 0.0, 1.0])}
    rng = np.random.default_rng(4)
    history = tuple(
        Candidate(n, 0, space.sample(rng), {}, str(n), (), "random", "done", float(solved.mean()))
        for n, solved in solves.items()
    )

    def parents(sharing):
        settings = AlgorithmSettings(6, {"sharing": sharing}, item_scores=lambda c: solves[c.number])
        found = ALGORITHMS["ga"](space, history, range(20, 60), 1, 2, settings)
        return {number for proposal in found for number in proposal.parents}

    assert 19 in parents(True)  # the worst of all by its fitness
    assert 19 not in parents(False)
