"""Racing as pure statistics: blocks, and who is stopped."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.evaluation.scores import BITS, ItemScores
from evomerge.objective.fitness import Fitness, Scores
from evomerge.objective.goals import Goal
from evomerge.objective.racing import (
    MIN_BLOCK_ITEMS,
    InterimAnalysis,
    Race,
    block_order,
    blocks_at_analyses,
    draw_blocks,
)

ACC = Fitness((Goal("t", "acc", 1.0, True),))


def scored(values: np.ndarray, task: str = "t", metric: str = "acc", weights: np.ndarray | None = None) -> ItemScores:
    """Scores of some items, first to last."""
    ones = np.ones(len(values)) if weights is None else weights
    transforms = {metric: BITS} if metric == "bits_per_byte" else {}
    items = tuple(f"{task}:{k}" for k in range(len(values)))
    return ItemScores(task, items, {metric: (np.asarray(values, dtype=float), ones)}, {metric: True}, transforms)


def at(race: Race, number: int, scores: Scores) -> InterimAnalysis:
    """An interim analysis where there is one."""
    analysis = race.analyse(number, scores)
    assert analysis is not None
    return analysis


def at_analyses(values: np.ndarray, stops: list[int]) -> list[dict[str, ItemScores]]:
    return [{"t": scored(values[:stop])} for stop in stops]


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 200), min_size=1),
    st.integers(0, 3),
)
def test_blocks_are_disjoint_and_every_task_is_in_each(sizes: dict[str, int], seed: int) -> None:
    items = {task: range(7, 7 + n) for task, n in sizes.items()}
    blocks = draw_blocks(items, seed)
    for task, positions in items.items():
        assert sorted(k for block in blocks for k in block[task]) == list(positions)
        assert all(list(block[task]) == sorted(block[task]) for block in blocks)
        if len(blocks) > 1:
            assert all(len(block[task]) >= MIN_BLOCK_ITEMS for block in blocks)
    assert draw_blocks(items, seed) == blocks


def test_blocks_are_in_proportion_and_drawn_by_the_seed() -> None:
    """240 and 100 items make 24 blocks of 10, and of 100 / 24 = 4 and a sixth: four each but for every sixth, five."""
    items = {"a": range(240), "b": range(100)}
    blocks = draw_blocks(items, 0)
    assert [len(block["a"]) for block in blocks] == [10] * 24
    assert sorted(len(block["b"]) for block in blocks) == [4] * 20 + [5] * 4
    assert draw_blocks(items, 1) != blocks
    # The draw of a task does not depend on the others.
    assert [block["a"] for block in draw_blocks({"a": range(240)}, 0)] == [block["a"] for block in blocks]
    assert len(draw_blocks({"a": range(240), "c": range(33)}, 0)) == 8
    assert len(draw_blocks({"a": range(240), "c": range(7)}, 0)) == 1


def test_each_generation_has_its_own_order_of_blocks() -> None:
    orders = [block_order(24, 0, generation) for generation in range(1, 9)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len(set(orders)) == 8
    assert block_order(24, 0, 1) == orders[0] != block_order(24, 1, 1)
    assert blocks_at_analyses(24) == (1, 2, 3, 4, 6, 8, 12, 18, 24)
    assert blocks_at_analyses(6) == (1, 2, 3, 4, 6)
    assert blocks_at_analyses(1) == (1,)


def test_an_analysis_by_hand() -> None:
    """Eight items, of which four are seen; the cut-off is right on 1, 1, 0, 1 | 1, 1, 1, 0 and the candidate on
    0, 1, 0, 0: a paired difference of -2/4, so the estimate is 6/8 - 1/2 = 1/4.

    The influences' differences are the values' less their mean, (-1, 0, 0, -1) + 1/2: the squares add up to 1. A
    quarter of an item more, of which no other candidate says what to expect, adds 0: variance 1 / (4 - 1 + 1/4), of a
    mean of four items 1 / 13, and of what four of eight leave open 1 / 26.
    """
    cutoff = np.array([1, 1, 0, 1, 1, 1, 1, 0])
    race = Race.against(ACC, 3, {3: at_analyses(cutoff, [4, 8])})
    analysis = at(race, 0, {"t": scored(np.array([0, 1, 0, 0]))})
    assert (analysis.items, analysis.estimate, analysis.difference) == (4, 0.25, -0.5)
    assert analysis.stderr == pytest.approx(math.sqrt(1 / 26))
    assert analysis.stopped == (race.boundary[0] * analysis.stderr < 0.5)
    assert race.reason(analysis).startswith("raced out: after 4 of 8 items 0.5000 ± 0.1961 below candidate 3")


def test_items_that_stand_for_several_count_for_as_many() -> None:
    """As by hand above, but the first and the sixth item weigh 3. Of the four seen, with weights 3, 1, 1, 1, the
    cut-off is right on 5 of 6 and the candidate on 1; of all eight the cut-off on 3 + 1 + 1 + 1 + 3 + 1 = 10 of 12.

    Its estimate is 10/12 - 4/6 = 1/6. The influences' differences are 4/6 w (d + 4/6) of the differences d, (-1, 0, 0,
    -1): 2/3 (-1, 2/3, 2/3, -1/3), whose squares add up to 4/9 * 2 = 8/9; over 3 1/4, over 4, and halved, 4/117.
    """
    weights = {"t": {f"t:{k}": 3.0 if k in (0, 5) else 1.0 for k in range(8)}}
    cutoff = np.array([1, 1, 0, 1, 1, 1, 1, 0])
    race = Race.against(Fitness(ACC.goals, weights), 3, {3: at_analyses(cutoff, [4, 8])})
    analysis = at(race, 0, {"t": scored(np.array([0, 1, 0, 0]))})
    assert (analysis.items, analysis.estimate, analysis.difference) == (4, pytest.approx(1 / 6), pytest.approx(-2 / 3))
    assert analysis.stderr == pytest.approx(math.sqrt(4 / 117))


def test_the_nearest_known_candidate_is_the_control() -> None:
    """A candidate equal so far to one that is known in full is taken for as good as that one, almost surely."""
    rng = np.random.default_rng(1)
    best = (rng.random(400) < 0.8).astype(float)
    other = (rng.random(400) < 0.6).astype(float)
    race = Race.against(ACC, 0, {0: at_analyses(best, [40, 200, 400]), 1: at_analyses(other, [40, 200, 400])})
    analysis = at(race, 0, {"t": scored(other[:40])})
    assert analysis.estimate == pytest.approx(other.mean())
    assert analysis.stopped
    assert 0 < analysis.stderr < math.sqrt(0.4 / 40)  # the quarter of an item that differs, and no other
    assert not at(race, 0, {"t": scored(best[:40])}).stopped


def test_nobody_is_stopped_at_the_last_analysis() -> None:
    values = np.ones(40)
    race = Race.against(ACC, 0, {0: at_analyses(values, [20, 40])})
    last = at(race, 1, {"t": scored(np.zeros(40))})
    assert (last.estimate, last.stopped) == (0.0, False)


def test_ratios_and_relative_scales_race_too() -> None:
    """Bits per byte on the relative scale: the last analysis gives the fitness itself, and a worse model is stopped."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(20, 60, size=120).astype(float)
    fitness = Fitness((Goal("t", "bits_per_byte", 2.0, False, reference=1.0), Goal("u", "acc", 1.0, True, 0.5)))

    def model(rate: float, share: float) -> list[dict[str, ItemScores]]:
        noise = np.random.default_rng(3).normal(1, 0.1, size=120)
        lls, right = -rate * sizes * noise, (np.arange(60) % 10 < 10 * share).astype(float)
        return [
            {"t": scored(lls[:n], "t", "bits_per_byte", sizes[:n]), "u": scored(right[: n // 2], "u")}
            for n in (30, 60, 120)
        ]

    race = Race.against(fitness, 0, {0: model(0.70, 0.5), 1: model(0.75, 0.4)})
    worse, better = model(0.85, 0.3), model(0.68, 0.5)
    assert at(race, 0, worse[0]).stopped
    assert not any(at(race, k, better[k]).stopped for k in range(3))
    for candidate in (worse, better):
        assert at(race, 2, candidate[2]).estimate == pytest.approx(fitness(candidate[2]))


def test_items_without_a_value_are_no_reason_to_stop() -> None:
    """A metric that the first items have no value for: no analysis there, and one where they have."""
    there = np.array([0, 0, 0, 0, 1, 1, 1, 1.0])

    def model(values: list[int]) -> list[dict[str, ItemScores]]:
        return [{"t": scored(np.array(values)[:n], weights=there[:n])} for n in (4, 6, 8)]

    race = Race.against(ACC, 0, {0: model([0, 0, 0, 0, 1, 1, 1, 1])})
    worse = model([0, 0, 0, 0, 0, 0, 0, 0])
    assert race.analyse(0, worse[0]) is None
    assert at(race, 1, worse[1]).difference == -1
