"""Both keep what EvoMerge promises of methods and of algorithms."""

from evomerge_example.annealing import annealing
from evomerge_example.median import median

from evomerge.testing.algorithms import check_algorithm
from evomerge.testing.methods import check_method


def test_the_method() -> None:
    check_method(median)


def test_the_algorithm() -> None:
    check_algorithm(annealing)
