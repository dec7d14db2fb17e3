"""Draws near the best candidate: what they choose, where they look, what a search gains by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evomerge.algorithms.ga.trust_region import FIRST_SIZE, GROWTH, MIN_SIZE, SHRINKAGE, Posterior, TrustRegion
from evomerge.algorithms.history_index import HistoryIndex
from evomerge.algorithms.registry import ALGORITHMS
from evomerge.executors.in_process import InProcess
from evomerge.space.decode import active_genes, decode
from evomerge.space.space import SearchSpace
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import DRAW, Candidate, Outcome
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.loop import search
from tests.algorithms.landscapes import Memory, make_space

SPACE = make_space(methods=("task_arithmetic", "ties"))


def history_of(space: SearchSpace, values: list[float], generation: int = 1) -> tuple[Candidate, ...]:
    """Random genomes of one method with these fitnesses, all scored on 100 items."""
    rng, found = np.random.default_rng(0), []
    for number, value in enumerate(values):
        genome = space.genome(rng.random(len(space.reals)), {"method": "task_arithmetic"})
        recipe = decode(space, genome)
        made = Candidate(number, generation, genome, recipe, str(number), (), "x", "done", value)
        found.append(replace(made, estimates={100: value}))
    return tuple(found)


def drawn(history: tuple[Candidate, ...], numbers: Any = range(100, 108), seed: int = 0) -> list[Any]:
    draws = TrustRegion(SPACE, HistoryIndex.of(SPACE, history), seed)
    return [draws.draw(number) for number in numbers]


def test_what_is_known_well_is_chosen_right() -> None:
    """A parabola seen at two hundred points: its top is the best of all moves, whatever is drawn."""
    rng = np.random.default_rng(1)
    points, top = rng.random((200, 3)), np.array([0.4, 0.6, 0.5])
    process = Posterior(points, -((points - top) ** 2).sum(axis=1), np.zeros(200))
    moves = np.vstack([rng.random((100, 3)), top])
    best = -((moves - top) ** 2).sum(axis=1)
    for seed in range(5):
        chosen = moves[int(np.argmax(process.draw(moves, np.random.default_rng(seed))))]
        assert -((chosen - top) ** 2).sum() > np.sort(best)[-4]


def test_what_nobody_knows_is_drawn() -> None:
    """One value says nothing of the directions: every draw goes its own way."""
    process = Posterior(np.full((1, 4), 0.5), np.zeros(1), np.zeros(1))
    moves = np.random.default_rng(0).random((64, 4))
    chosen = {tuple(moves[int(np.argmax(process.draw(moves, np.random.default_rng(seed))))]) for seed in range(12)}
    assert len(chosen) > 8


def test_an_estimate_of_a_few_items_counts_for_less() -> None:
    """The same two values on one side; the one from few items is taken for luck."""
    points = np.array([[0.5, 0.5], [0.3, 0.5], [0.7, 0.5], [0.5, 0.3], [0.5, 0.7]])
    values = np.array([0.0, -0.01, 0.05, -0.01, -0.01])
    moves = np.array([[0.71, 0.5], [0.5, 0.5]])

    def share_to_the_right(error: float) -> float:
        process = Posterior(points, values, np.array([0.0, 0.0, error, 0.0, 0.0]))
        chosen = [
            moves[int(np.argmax(process.draw(moves, np.random.default_rng(seed))))][0] > 0.6 for seed in range(40)
        ]
        return float(np.mean(chosen))

    assert share_to_the_right(0.0) > 0.95
    assert share_to_the_right(20.0) < 0.8


def test_a_draw_is_a_child_of_the_best_that_differs_in_what_counts() -> None:
    history = history_of(SPACE, [0.1, 0.5, 0.3])
    best = history[1].genome
    names = active_genes(SPACE, best)
    for draw in drawn(history):
        assert draw is not None
        genome, parents, operator = draw
        assert (parents, operator) == ((1,), DRAW)
        moved = {name for name, value in genome.scalars if value != best.values[name]}
        assert moved
        assert moved <= names
    assert drawn(history) == drawn(history)
    assert len({draw[0] for draw in drawn(history)}) == 8
    assert drawn(history, seed=1) != drawn(history)


def test_nothing_is_drawn_of_nothing() -> None:
    assert drawn(()) == [None] * 8
    assert drawn(history_of(SPACE, [0.1])[:0]) == [None] * 8
    failed = replace(history_of(SPACE, [0.1])[0], state="failed", fitness=None)
    assert drawn((failed,)) == [None] * 8


@pytest.mark.parametrize(
    ("wins", "size"), [([], FIRST_SIZE), ([True], FIRST_SIZE * GROWTH), ([False, False], FIRST_SIZE * SHRINKAGE**2)]
)
def test_the_region_follows_what_draws_found(wins: list[bool], size: float) -> None:
    history = list(history_of(SPACE, [0.5]))
    for k, won in enumerate(wins):
        for place, value in enumerate([0.1, 0.6 + 0.1 * k if won else 0.2]):
            number = len(history)
            made = replace(history[0], number=number, generation=2 + k, operator=DRAW, fitness=value)
            history.append(replace(made, recipe_hash=str(number), parents=(place,)))
    draws = TrustRegion(SPACE, HistoryIndex.of(SPACE, tuple(history)), 0)
    assert draws._size == pytest.approx(size)
    assert HistoryIndex.of(SPACE, tuple(history)).draws == {2 + k: won for k, won in enumerate(wins)}


def test_the_region_does_not_vanish() -> None:
    history = history_of(SPACE, [0.5] + [0.1] * 60)
    later = [replace(c, generation=c.number + 1, operator=DRAW) for c in history[1:]]
    assert TrustRegion(SPACE, HistoryIndex.of(SPACE, (history[0], *later)), 0)._size == MIN_SIZE


def _best_of(options: dict[str, bool], seed: int) -> float:
    space = make_space(methods=("task_arithmetic",))
    rng = np.random.default_rng(3)
    top, weight = rng.uniform(0.2, 0.8, len(space.reals)), rng.gamma(1.0, size=len(space.reals))

    def evaluate(proposal: Any) -> Outcome:
        value = -float(weight @ (space.unit(proposal.genome) - top) ** 2)
        return Outcome(value, estimates={10: value})

    settings = AlgorithmSettings(population=8, options=options)
    done = search(
        space, ALGORITHMS["ga"], InProcess(evaluate), Memory(), StopConditions(120), seed=seed, settings=settings
    )
    assert any(c.operator == DRAW for c in done.candidates) == options["trust_region"]
    assert done.best is not None
    assert done.best.fitness is not None
    return done.best.fitness


def test_a_search_with_draws_is_ahead_where_nobody_knows_slopes() -> None:
    gains = [_best_of({"trust_region": True}, seed) - _best_of({"trust_region": False}, seed) for seed in range(3)]
    assert min(gains) > 0.0
