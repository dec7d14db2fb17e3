"""Steps by a model of every item: which are tried, from whom, and that a search that has them is far ahead."""

from collections.abc import Sequence

import numpy as np
import pytest

from evomerge.algorithms.ga.jacobian_steps import AT_ONCE, FACTORS, FIRST_RADIUS, radius_of, resolutions
from evomerge.algorithms.registry import ALGORITHMS
from evomerge.executors.in_process import InProcess
from evomerge.space.space import SearchSpace
from evomerge.study.budget import StopConditions, spent_items
from evomerge.study.candidate import JACOBIAN_STEP, Candidate, Outcome, step_parent
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.loop import search
from evomerge.system.arrays import FloatArray, IntArray
from tests.algorithms.landscapes import Memory, make_space


class Quadratic:
    """A model of -Σ wᵢ (xᵢ - topᵢ)² around a point; its radius is in genes."""

    def __init__(self, point: FloatArray, top: FloatArray, weight: FloatArray, sign: float) -> None:
        self._gradient = -2 * sign * weight * (point - top)
        self._curvature = 2 * weight

    def resolution(self, labels: Sequence[IntArray], radius: float) -> tuple[int, float, float]:
        return len(labels) - 1, 0.02, 1.0 if np.any(self._gradient) else 0.0

    def step(self, labels: IntArray, ridge: float, radius: float) -> tuple[FloatArray, float]:
        move = np.where(labels >= 0, self._gradient / self._curvature, 0.0)
        length = float(np.sqrt(np.mean(move**2)))
        move = move * min(1.0, radius / max(length, 1e-12))
        return move, float(self._gradient @ move - 0.5 * self._curvature @ move**2)


def run(takes_steps: bool, budget: int = 60, sign: float = 1.0):
    """A search of a quadratic; returns its end, and the numbers of the candidates that were asked for a model."""
    space = make_space(methods=("task_arithmetic",))
    rng = np.random.default_rng(3)
    top, weight = rng.uniform(0.2, 0.8, len(space.reals)), rng.gamma(1.0, size=len(space.reals))
    asked: list[int] = []

    def model(candidate: Candidate) -> Quadratic:
        asked.append(candidate.number)
        return Quadratic(space.unit(candidate.genome), top, weight, sign)

    done = search(
        space,
        ALGORITHMS["ga"],
        InProcess(lambda p: Outcome(-float(weight @ (space.unit(p.genome) - top) ** 2), estimates={10: 0.0})),
        Memory(),
        StopConditions(budget),
        seed=1,
        settings=AlgorithmSettings(population=4, options={"jacobian_steps": takes_steps}, local_model=model),
    )
    return done, asked


def steps_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [c for c in candidates if JACOBIAN_STEP in c.operator]


def test_a_search_with_steps_is_far_ahead_and_its_lineage_says_how():
    with_steps, asked = run(True)
    without, unasked = run(False)
    assert with_steps.best.fitness > without.best.fitness / 10  # both below 0
    assert not unasked
    steps = steps_of(with_steps.candidates)
    assert {step_parent(c) for c in steps} <= set(asked)
    assert all(len(c.parents) == 1 for c in steps)


def test_several_radii_are_tried_from_one_candidate_and_the_best_goes_on():
    done, _ = run(True)
    by_number = {c.number: c for c in done.candidates}
    for parent in {step_parent(c) for c in steps_of(done.candidates)}:
        tried = [radius_of(c) for c in steps_of(done.candidates) if step_parent(c) == parent]
        first = radius_of(by_number[parent]) or FIRST_RADIUS
        assert tried == pytest.approx([first * factor for factor in FACTORS[: len(tried)]], rel=0.02)
    generations = [c.generation for c in steps_of(done.candidates)]
    assert 1 < max(generations.count(g) for g in generations) <= AT_ONCE  # the same genome is no second candidate


def test_where_steps_fail_they_end():
    """A model that leads astray: so many steps from one candidate and no more, while nothing better is found."""
    done, _ = run(True, 80, sign=-1.0)
    parents = [step_parent(c) for c in steps_of(done.candidates)]
    assert parents
    assert max(parents.count(parent) for parent in parents) <= len(FACTORS)
    assert len(done.candidates) == 80


def test_what_a_jacobian_costs_is_counted_once_a_candidate():
    done, _ = run(True, 40)
    parents = {step_parent(c) for c in steps_of(done.candidates)}
    spent = list(spent_items(done.candidates, jacobian_items=25))
    assert spent[-1] == 40 * 10 + 25 * len(parents)
    assert spent == sorted(spent)


@pytest.mark.parametrize("population", [1, 4, 8])
def test_candidates_without_a_model_are_bred_as_ever(population: int):
    done = search(
        make_space(methods=("task_arithmetic",)),
        ALGORITHMS["ga"],
        InProcess(lambda p: Outcome(int(p.recipe_hash[:6], 16) / 2**24)),
        Memory(),
        StopConditions(40),
        settings=AlgorithmSettings(population, local_model=lambda c: None),
    )
    assert not steps_of(done.candidates)
    assert len(done.candidates) == 40


def labels_by_name(space: SearchSpace, way: IntArray) -> dict[str, int]:
    return {gene.name: int(label) for gene, label in zip(space.reals, way, strict=True)}


def test_ways_to_move_genes_go_from_one_move_a_source_to_one_a_gene():
    space = make_space(methods=("task_arithmetic",))
    mask = np.ones(len(space.reals), dtype=np.bool_)
    ways = resolutions(space, mask)
    counts = [int(way.max()) + 1 for way in ways]
    assert counts == sorted(set(counts))
    assert counts[-1] == len(space.reals)
    coarse = labels_by_name(space, ways[0])
    for name, label in coarse.items():
        parameter, *rest = name.split(".")
        alike = {n for n, other in coarse.items() if other == label}
        assert all(n.split(".")[0] == parameter for n in alike)
        assert ("outer" in rest) == all("outer" in n.split(".") for n in alike)
    mask[0] = False
    assert all(way[0] == -1 for way in resolutions(space, mask))
