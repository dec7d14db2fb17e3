"""What is particular to the algorithms that stand on others' samplers and strategies."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evomerge.algorithms import replay
from evomerge.algorithms.cmaes import mergekit_mean
from evomerge.algorithms.map_elites import elites_of
from evomerge.algorithms.operators import reflect
from evomerge.algorithms.optuna_samplers import all_params, values_of
from evomerge.algorithms.proposals import generator
from evomerge.algorithms.registry import ALGORITHMS
from evomerge.executors.in_process import InProcess
from evomerge.space.genome import Genome
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Candidate, Outcome, Proposal
from evomerge.study.interfaces import AlgorithmSettings
from evomerge.study.loop import search
from evomerge.study.optuna_trials import distributions_of, genome_of
from tests.algorithms.landscapes import COSTLY, Bowl, Memory, best_truth, make_space, pattern_space, plain

SMALL = make_space(methods=("task_arithmetic",), layer_groups=2)


def candidate(number: int, fitness: float | None, **more: Any) -> Candidate:
    state = "failed" if fitness is None else more.pop("state", "done")
    proposal = Proposal(number, more.pop("generation", 1), more.pop("genome", Genome()), {}, str(number), (), "cmaes")
    return replace(Candidate.of(proposal, Outcome(fitness, state=state)), **more)


@functools.cache
def median_best(algorithm: str) -> float:
    """The best of 90 candidates on a bowl without noise, over five seeds."""
    return float(np.median([best_truth(SMALL, Bowl(SMALL, seed, noise=0.0), algorithm, seed, 90) for seed in range(5)]))


@pytest.mark.parametrize("algorithm", sorted(set(ALGORITHMS) - {"random", *COSTLY}))
def test_it_beats_random_search_on_an_easy_smooth_landscape(algorithm: str) -> None:
    """Without noise, 17 genes: the bowl's best is 0.9. The costly ones would need too long for enough seeds."""
    assert median_best(algorithm) > median_best("random")
    assert median_best(algorithm) > 0.85


@pytest.mark.parametrize("algorithm", ["cmaes", "catcma"])
def test_a_replayed_strategy_is_the_same_with_and_without_its_memo(algorithm: str) -> None:
    landscape, runs = Bowl(SMALL, 1), []
    for forgetting in (False, True):
        replay._KEPT.clear()

        def scored(proposal: Proposal, forgets: bool = forgetting) -> Outcome:
            if forgets:
                replay._KEPT.clear()
            return landscape(proposal) if proposal.number % 5 else Outcome(None, state="failed", failure="x: y")

        record: Any = Memory()
        settings = AlgorithmSettings(population=6)
        runs.append(
            search(
                SMALL, ALGORITHMS[algorithm], InProcess(scored), record, StopConditions(50), seed=2, settings=settings
            )
        )
    assert plain(runs[0].candidates) == plain(runs[1].candidates)


def test_cmaes_is_the_strategy_of_the_package_fed_directly() -> None:
    """Points, folding, ranks and failures worked out here, with an optimizer that is never replayed."""
    from cmaes import CMA

    population, seed, landscape = 6, 3, Bowl(SMALL, 0)
    record: Any = Memory()

    def scored(proposal: Proposal) -> Outcome:
        return landscape(proposal) if proposal.number % 7 else Outcome(None, state="failed", failure="x: y")

    settings = AlgorithmSettings(population=population, options={"restarts": False})
    found = search(
        SMALL, ALGORITHMS["cmaes"], InProcess(scored), record, StopConditions(60), seed=seed, settings=settings
    ).candidates
    starts = [c for c in found if c.generation == 0]
    start = max((c for c in starts if c.fitness is not None), key=lambda c: (c.fitness or 0.0, -c.number))
    optimizer = CMA(mean=SMALL.unit(start.genome), sigma=1 / 6, population_size=population)
    own = found[len(starts) :]
    assert {c.operator for c in own} == {"cmaes"}
    for first in range(0, len(own) - population, population):
        points = []
        for one in own[first : first + population]:
            optimizer.reseed_rng(int(generator(seed, one.number).integers(2**32)))
            points.append(optimizer.ask())
            assert one.genome == SMALL.genome(reflect(points[-1]))
        losses = [np.inf if c.fitness is None else -c.fitness for c in own[first : first + population]]
        optimizer.tell([(points[i], float(rank)) for rank, i in enumerate(np.argsort(losses, kind="stable"))])


def test_as_mergekit_starts_at_equal_weights_and_full_density_and_takes_absolute_values() -> None:
    wide = {"weight": {"low": 0.0, "high": 10.0}, "density": {"low": 0.0, "high": 1.0}}
    space = make_space(methods=("ties",), layer_groups=2, gene_overrides=wide)
    expected = {"weight": 1 / 3, "density": 1.0, "lambda": 1.0}
    assert mergekit_mean(space) == pytest.approx([expected[gene.parameter] for gene in space.reals])
    settings = AlgorithmSettings(population=200, options={"like_mergekit": True, "sigma": 0.5})
    drawn = ALGORITHMS["cmaes"](space, (), range(200), 1, 0, settings)
    weights = np.array([[p.genome.values[g.name] for g in space.reals if g.parameter == "weight"] for p in drawn])
    # |N(1/3, 1/2)| has the mean 0.5 √(2/π) e^(-2/9) + 1/3 (1 - 2 Φ(-2/3)) = 0.4838; 1800 draws know it within 0.02.
    assert weights.mean() == pytest.approx(0.4838, abs=0.04)
    density = np.array([[p.genome.values[g.name] for g in space.reals if g.parameter == "density"] for p in drawn])
    assert 0.45 < (density == 1.0).mean() < 0.55  # half of N(1, 1/2) is cut to 1, and hardly any is below -1
    assert {p.genome.values[g.name] for p in drawn for g in space.reals if g.parameter == "lambda"} == {1.0}


def test_a_point_that_cannot_be_drawn_again_is_made_of_the_genome() -> None:
    """As after a move to a machine whose arithmetic differs in the last bit; no point is folded here."""
    settings = AlgorithmSettings(population=16, options={"mean": "center", "sigma": 0.05})
    record: Any = Memory()
    history = search(
        SMALL, ALGORITHMS["cmaes"], InProcess(Bowl(SMALL, 0)), record, StopConditions(42), seed=0, settings=settings
    ).candidates
    moved = tuple(
        replace(c, genome=SMALL.genome(SMALL.unit(c.genome) + 2e-4)) if c.operator == "cmaes" else c for c in history
    )
    asked = [ALGORITHMS["cmaes"](SMALL, h, range(42, 46), 5, 0, settings) for h in (history, moved)]
    units = [np.stack([SMALL.unit(p.genome) for p in proposals]) for proposals in asked]
    assert 0 < np.abs(units[0] - units[1]).max() < 0.005  # a tenth of a step


def test_pruned_candidates_are_told_with_their_estimate_and_failed_ones_as_the_worst() -> None:
    history = [candidate(0, 0.5), candidate(1, 0.2, state="pruned"), candidate(2, None), candidate(3, 0.7)]
    assert [values for _, values in values_of(history)] == [(0.5,), (0.2,), (0.2,), (0.7,)]
    several = [candidate(0, 0.5, objectives=(0.9, 0.1)), candidate(1, None), candidate(2, 0.4, objectives=(0.2, 0.6))]
    assert [values for _, values in values_of(several)] == [(0.9, 0.1), (0.2, 0.1), (0.2, 0.6)]
    assert values_of([candidate(0, None)]) == []


def test_every_gene_of_a_pattern_becomes_parameters_and_back() -> None:
    space = pattern_space()
    for seed in range(20):
        genome = space.sample(np.random.default_rng(seed))
        params = all_params(space, genome)
        assert set(params) == set(distributions_of(space))
        assert genome_of(space, params) == genome


def test_the_archive_keeps_the_best_of_each_cell() -> None:
    """Two tasks over [0, 1] in a 2 x 2 grid: cells by (math ≥ 0.5, code ≥ 0.5)."""

    def on(number: int, fitness: float, math: float, code: float) -> Candidate:
        scores = {"search": {"math": {"acc": {"value": math}}, "code": {"acc": {"value": code}}}}
        return candidate(number, fitness, scores=scores)

    history = [
        on(0, 0.1, 0.0, 0.0),
        on(1, 0.3, 0.2, 0.4),  # the cell of 0, better
        on(2, 0.9, 1.0, 1.0),
        on(3, 0.8, 0.6, 0.9),  # the cell of 2, worse
        on(4, 0.2, 0.9, 0.1),  # bad, but the only one in its cell
        candidate(5, None),
    ]
    assert [c.number for c in elites_of(history, cells=4)] == [2, 1, 4]


def test_many_tasks_are_tessellated() -> None:
    rng = np.random.default_rng(0)
    rows = rng.random((40, 6))
    history = [candidate(i, float(row.mean()), objectives=tuple(row.tolist())) for i, row in enumerate(rows)]
    elites = elites_of(history, cells=8)
    assert 4 <= len(elites) <= 8
    assert elites[0].number == int(rows.mean(axis=1).argmax())


@pytest.mark.parametrize(
    "algorithm", sorted(n for n, entry in ALGORITHMS.items() if entry.multi_objective and n != "random")
)
def test_those_for_several_objectives_learn_from_them(algorithm: str) -> None:
    """Two objectives that want a gene high and low; all else wants to be 0. The middle is as good as the ends."""

    def scored(proposal: Proposal) -> Outcome:
        unit = SMALL.unit(proposal.genome)
        rest = float(np.mean(unit[1:]))
        values = (float(unit[0]) - rest, 1.0 - float(unit[0]) - rest)
        return Outcome(sum(values) / 2, objectives=values)

    record: Any = Memory()
    found = search(SMALL, ALGORITHMS[algorithm], InProcess(scored), record, StopConditions(90), seed=0).candidates
    rest = [float(np.mean(SMALL.unit(c.genome)[1:])) for c in found]
    assert np.mean(rest[-16:]) < np.mean(rest[:16])
    assert np.mean(rest[-16:]) < 0.42


def test_options_of_the_strategies_are_checked() -> None:
    assert ALGORITHMS["cmaes"].option_problems({"mean": "middle", "sigma": 0.0}) == [
        "search.options.sigma: a positive number; got 0.0",
        "search.options.mean: one of best, center, mergekit; got 'middle'",
    ]
    assert ALGORITHMS["catcma"].option_problems({"sigma": -1}) == ["search.options.sigma: a positive number; got -1"]
    assert ALGORITHMS["map_elites"].option_problems({"cells": 1}) == [
        "search.options.cells: a number from 2 to 2000; got 1"
    ]
    assert ALGORITHMS["cmaes"].option_problems({"mean": "center", "separable": True, "like_mergekit": False}) == []
