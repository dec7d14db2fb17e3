"""Competition and attraction over items, by hand."""

import numpy as np

from evomerge.search import ALGORITHMS, AlgorithmSettings, Outcome, Stop, search
from evomerge.search.sharing import attraction, shared_fitness

from .landscapes import Memory, make_space

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


def test_a_search_that_shares_keeps_who_alone_solves_an_item():
    space = make_space(methods=("task_arithmetic",))
    items = {}

    def score(proposal):
        unit = space.unit(proposal.genome)
        items[proposal.number] = np.array([unit[0], unit[1], 1 - unit[0]])
        return Outcome(float(unit[0] + unit[1]))

    def run(sharing):
        settings = AlgorithmSettings(6, {"sharing": sharing}, items=lambda c: items[c.number])
        done = search(space, ALGORITHMS["ga"], score, Memory(), Stop(80), seed=2, settings=settings)
        return [c for c in done.candidates if c.generation > 0]

    shared, plain = run(True), run(False)
    assert [c.genome for c in shared] != [c.genome for c in plain]
    spread = [np.std([space.unit(c.genome)[0] for c in found[-24:]]) for found in (shared, plain)]
    assert spread[0] > spread[1]
