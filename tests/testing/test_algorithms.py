"""The checks of algorithms find what is broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evomerge.algorithms.registry import ALGORITHMS, RegisteredAlgorithm
from evomerge.testing.algorithms import check_algorithm

RANDOM = ALGORITHMS["random"]


def test_one_of_ours_keeps_it_all() -> None:
    check_algorithm(RANDOM)


def changed(**values: Any) -> RegisteredAlgorithm:
    """Random search whose proposals say something else."""

    def propose(*arguments: Any) -> Any:
        return [replace(proposal, **values) for proposal in RANDOM(*arguments)]

    return RegisteredAlgorithm(propose)


def with_memory() -> RegisteredAlgorithm:
    calls: list[int] = []

    def propose(space: Any, history: Any, numbers: Any, generation: int, seed: int, settings: Any) -> Any:
        calls.append(seed)
        return RANDOM(space, history, numbers, generation, len(calls), settings)

    return RegisteredAlgorithm(propose)


def always_one_seed(space: Any, history: Any, numbers: Any, generation: int, seed: int, settings: Any) -> Any:
    return RANDOM(space, history, numbers, generation, 0, settings)


def none(*arguments: Any) -> Any:
    return []


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (changed(generation=9), "generation 9"),
        (changed(parents=(5,)), "a parent has no score"),
        (changed(recipe_hash="0"), "its hash is not its genome's"),
        (with_memory(), "something is remembered between calls"),
        (RegisteredAlgorithm(always_one_seed), "another seed gives the same"),
        (RegisteredAlgorithm(none), "numbers: "),
        (replace(RANDOM, options={"a": 1}, check=lambda options: ["no"]), "its own default options are refused"),
    ],
)
def test_what_is_broken_is_said(algorithm: RegisteredAlgorithm, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_algorithm(algorithm)
