"""The front of a search's candidates: who is on it, how it grew, whom it sends to the finals, what a search does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.executors.in_process import InProcess
from evomerge.space.baselines import baselines
from evomerge.space.genome import Genome
from evomerge.study import pareto
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, ConstraintValue, Outcome, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.loop import SearchResult, search
from evomerge.study.ranking import (
    best,
    best_first,
    finalists,
    growth,
    latest_improvement,
    pareto_front,
    penalised,
    ranked,
    reference_point,
    unmet_constraints,
)
from evomerge.study.record import Record
from tests.algorithms.landscapes import Bowl, Memory, TwoBowls, plain
from tests.study.scripted_run import SPACE

SETTINGS = AlgorithmSettings(population=7)
STARTS = len(baselines(SPACE))
SEVERAL = sorted(name for name, algorithm in ALGORITHMS.items() if algorithm.multi_objective)
every_algorithm = pytest.mark.parametrize("algorithm", SEVERAL)


def candidate(number: int, objectives: Any, generation: int = 0, **changes: Any) -> Candidate:
    values = None if objectives is None else tuple(map(float, objectives))
    fitness = None if values is None else sum(values) / len(values)
    state: Any = "failed" if values is None else "done"
    made = Candidate(number, generation, Genome(), {}, str(number), (), "x", state, fitness, values)
    return replace(made, **changes)


def numbers(candidates: Any) -> list[int]:
    return [c.number for c in candidates]


values = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
rows = st.lists(st.none() | st.tuples(values, values, values), min_size=1, max_size=14)


def history_of(drawn: Any, size: int = 4) -> list[Candidate]:
    """Generations of `size` candidates, the first two of generation 0 parents."""
    return [
        candidate(k, objectives, k // size, operator="parent:a" if k < 2 else "x") for k, objectives in enumerate(drawn)
    ]


def test_promising_row() -> None:
    """Ends of the front first, then its middle ones by their room, then the second front, then one without objectives.

    The front is 0 to 4: (0, 8), (1, 7), (4, 4), (7, 0.5), (8, 0). Of the middle ones candidate 2 has 6/8 + 6.5/8 of
    room, 1 has 4/8 + 4/8, 3 has 4/8 + 4/8: equal, so the fitter, 1 (mean 4) before 3 (mean 3.75)."""
    history = [candidate(k, row) for k, row in enumerate([(0, 8), (1, 7), (4, 4), (7, 0.5), (8, 0), (3, 3)])]
    history += [candidate(6, None), replace(candidate(7, (9, 9)), state="pruned", objectives=None)]
    assert numbers(best_first(history)) == [0, 4, 2, 1, 3, 5, 7]
    assert numbers(best_first(history, 3)) == [0, 4, 2]
    assert numbers(best_first(history[5:])) == [5, 7]


def test_without_objectives_the_fittest_are_promising() -> None:
    history = [replace(candidate(k, (v,)), objectives=None) for k, v in enumerate([0.25, 0.75, 0.5, 0.75])]
    assert numbers(best_first(history)) == [1, 3, 2, 0]
    assert numbers(best_first(history, 2)) == [1, 3]
    assert best(history) == history[1]


@given(rows, st.integers(1, 6))
def test_enough_promising_ones_are_the_first_of_all(drawn: Any, enough: int) -> None:
    history = history_of(drawn)
    assert best_first(history, enough) == best_first(history)[:enough]


@given(rows)
def test_nothing_dominates_a_member_of_the_front(drawn: Any) -> None:
    history = history_of(drawn)
    front = pareto_front(history)
    done = [c for c in history if c.objectives is not None]
    assert bool(front) == bool(done)
    for member in front:
        for other in done:
            pair = list(zip(other.objectives or (), member.objectives or (), strict=True))
            assert not all(a >= b for a, b in pair) or all(a == b for a, b in pair)
            assert all(a == b for a, b in pair) <= (other.number >= member.number)
    assert best(history) in (front or [None])


@given(rows)
def test_the_front_only_grows_and_staleness_is_volume_that_did_not(drawn: Any) -> None:
    history = history_of(drawn)
    steps = growth(history)
    reference = reference_point(history)
    assert bool(steps) == (reference is not None)
    if reference is None:
        return
    for step in steps:
        until = [c for c in history if c.generation <= step.generation]
        front = pareto_front(until)
        assert (step.candidates, step.front) == (len(until), len(front))
        values = np.array([c.objectives for c in front])
        assert step.hypervolume == pytest.approx(pareto.hypervolume(values, reference))
    volumes = [0.0] + [step.hypervolume for step in steps]
    grew = [step.generation for step, before in zip(steps, volumes, strict=False) if step.hypervolume > before + 1e-12]
    latest = latest_improvement(history)
    assert latest is not None
    assert latest.generation == grew[-1]


def test_the_reference_point_lies_below_the_parents() -> None:
    """Their worst values are 1 and 2, their ranges 2 and 0; a baseline that is far worse does not count."""
    parents = [candidate(0, (1, 2), operator="parent:a"), candidate(1, (3, 2), operator="parent:b")]
    bad = candidate(2, (-50, -50))
    assert reference_point([*parents, bad]) == pytest.approx([0.8, 1.0])
    assert reference_point([bad, candidate(3, (0, 0))]) == pytest.approx([-55, -55])
    assert reference_point([candidate(4, (1, 1), 1), candidate(5, None)]) is None
    assert growth([candidate(4, (1, 1), 1)]) == []


def test_finalists_of_a_large_front_are_its_knee_its_ends_and_a_spread() -> None:
    """A front of 40 points on a quarter circle: the knee is in the middle of it."""
    angles = np.linspace(0, np.pi / 2, 41)
    history = [candidate(k, (np.sin(a), np.cos(a))) for k, a in enumerate(angles)]
    chosen = finalists(history, 5)
    assert best(history) == history[20]
    assert {0, 20, 40} <= set(numbers(chosen))
    gaps = np.diff(sorted(numbers(chosen)))
    assert gaps.max() <= 14
    assert chosen == ranked(chosen)
    assert numbers(finalists(history, 1)) == [20]


def test_finalists_of_a_small_front_come_from_behind_it_too() -> None:
    history = [candidate(k, row) for k, row in enumerate([(1, 1), (3, 3), (2, 2), (0, 2.5)])] + [candidate(4, None)]
    assert numbers(finalists(history, 3)) == [1, 2, 3]
    assert numbers(finalists(history, 9)) == [1, 2, 3, 0]
    assert finalists([], 3) == []


def go(record: Any, stop: StopConditions, algorithm: str = "ga", scorer: Any = None, **more: Any) -> SearchResult:
    scorer = scorer or TwoBowls(SPACE, 0)
    return search(SPACE, ALGORITHMS[algorithm], InProcess(scorer), record, stop, seed=5, settings=SETTINGS, **more)


@every_algorithm
def test_stopped_anywhere_and_resumed_it_is_the_same_run(algorithm: str, tmp_path: Path) -> None:
    """With failures in it; read back from the study each time."""
    budget = STARTS + 16
    landscape = TwoBowls(SPACE, 0)

    def scorer(proposal: Proposal) -> Outcome:
        if int(proposal.recipe_hash[0], 16) == 0:
            raise ValueError("no score")
        return landscape(proposal)

    whole = plain(go(Memory(), StopConditions(budget), algorithm, scorer).candidates)
    for stop_at in (STARTS - 1, STARTS + 9):

        def interrupted(proposal: Proposal, last: int = stop_at) -> Outcome:
            if proposal.number == last:
                raise KeyboardInterrupt
            return scorer(proposal)

        def record(last: int = stop_at) -> Record:
            return Record.open(tmp_path / f"{algorithm}-{last}.log", "run", space=SPACE, objectives=2)

        assert go(record(), StopConditions(budget), algorithm, interrupted).reason == "interrupted"
        assert plain(go(record(), StopConditions(budget), algorithm, scorer).candidates) == whole


def test_no_more_volume_is_stale_although_the_mean_rises() -> None:
    """Up to generation 2 the objectives of generation g are (g, 3 - g / 2), all of them on the front; then (1, 1)."""

    def scorer(proposal: Proposal) -> Outcome:
        step = proposal.generation
        objectives = (float(step), 3.0 - step / 2) if step <= 2 else (1.0, 1.0)
        return Outcome(float(step), objectives=objectives)

    finished = go(Memory(), StopConditions(300, stale_generations=2), scorer=scorer)
    assert finished.reason == "stale"
    assert max(c.generation for c in finished.candidates) == 4
    assert "2 generations without more hypervolume since candidate " in finished.message
    assert finished.best is not None
    assert finished.best.generation in (0, 1, 2)


def test_the_genetic_algorithm_finds_a_better_front_than_random_search() -> None:
    """Two bowls with different centres: the hypervolume of the noise-free front after 150 candidates, three seeds."""
    volumes: dict[str, list[float]] = {"ga": [], "random": []}
    for seed in range(3):
        landscape = TwoBowls(SPACE, seed, noise=0.005)
        for algorithm, found in volumes.items():
            record: Any = Memory()
            search(SPACE, ALGORITHMS[algorithm], InProcess(landscape), record, StopConditions(150), seed=seed)
            truth = np.array([landscape.truth(c.genome) for c in pareto_front(record.kept)])
            found.append(pareto.hypervolume(truth, np.array([0.5, 0.5])))
    assert np.mean(volumes["ga"]) > np.mean(volumes["random"])
    assert Bowl(SPACE, 0).truth(SPACE.default()) == TwoBowls(SPACE, 0).truth(SPACE.default())[0]


def limited(number: int, fitness: float, *violations: float, **changes: Any) -> Candidate:
    constraints = {f"c{k}": ConstraintValue(0.0, 0.0, violation) for k, violation in enumerate(violations)}
    return replace(candidate(number, [fitness, fitness]), constraints=constraints, **changes)


def test_the_feasible_come_first_then_the_least_far_beyond() -> None:
    """Deb's rules: 3 is the fittest that is feasible; 1 is nearer to the limits than 2, whatever their fitness."""
    history = [
        limited(0, 0.5, -0.1, 0.0),
        limited(1, 0.7, 0.1, -1.0),
        limited(2, 0.9, 0.1, 0.1),
        limited(3, 0.6, -0.2, -0.2),
    ]
    alone = [replace(c, objectives=None) for c in history]
    assert numbers(ranked(alone)) == numbers(best_first(alone)) == [3, 0, 1, 2]
    assert numbers(np.array(alone, dtype=object)[np.argsort(-penalised(alone))]) == [3, 0, 1, 2]
    assert numbers(pareto_front(history)) == [3]
    assert numbers(best_first(history)) == [3, 0, 1, 2]
    assert best(history) is history[3]
    assert numbers(pareto_front(history[1:3])) == [1]
    assert numbers(finalists(history, 3)) == [3, 0, 1]


def test_a_front_grows_by_what_is_feasible_only() -> None:
    history = [limited(0, 0.5, 0.0), limited(1, 0.9, 0.1, generation=1), limited(2, 0.6, 0.0, generation=2)]
    steps = growth(history)
    assert [step.front for step in steps] == [1, 1, 1]
    assert steps[0].hypervolume == steps[1].hypervolume < steps[2].hypervolume


def test_what_nobody_meets_is_said_with_how_far_off_each_is() -> None:
    history = [limited(0, 0.5, 0.2, -0.1), limited(1, 0.6, 0.1, 0.0)]
    (text,) = unmet_constraints(history)
    assert text.startswith("no candidate of generation 0 meets the constraint on c0; the nearest first: x 0 (limit 0)")
    assert unmet_constraints([limited(0, 0.5, 0.2, -0.1), limited(1, 0.6, -0.1, 0.1)]) == [
        "no candidate of generation 0 meets all constraints together, though each is met by some"
    ]
    assert unmet_constraints([limited(0, 0.5, 0.0), limited(1, 0.6, 0.1)]) == []
    assert unmet_constraints([candidate(0, [0.5])]) == []
