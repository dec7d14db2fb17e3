"""Slopes of the fitness beside differences of the fitness itself, on tiny models in float32."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.engine.parameter_gradients import STEP
from evomerge.evaluation.splits import SEARCH, Selection
from evomerge.objective.fitness import Fitness, Scores
from evomerge.planning.plan import Plan
from evomerge.problem.candidate_evaluator import CandidateEvaluator
from evomerge.problem.fitness_gradients import COST, fitness_gradients, genes_of_settings
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.prepare_objective import prepare_objective
from evomerge.problem.problem import Problem, open_problem
from evomerge.run.folder import RunFolder
from evomerge.space.decode import active_genes, decode, decode_literally, why_invalid
from evomerge.space.genome import Genome
from evomerge.spec.load import parse_spec
from evomerge.study.interfaces import NullTracker
from evomerge.system.memory import available
from evomerge.system.sealed import read_sealed_json
from tests.frame import changed, search_spec
from tests.models import write_tiny_llama


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models, close enough to each other for differences of the fitness to be slopes."""
    root = tmp_path_factory.mktemp("slopes")
    made = {"base": write_tiny_llama(root / "base", 0, layers=2, initializer_range=0.1)}
    for seed, name in enumerate("ab", start=1):
        made[name] = write_tiny_llama(root / name, seed, base=made["base"], noise=0.002)
    return made


@dataclass(frozen=True)
class Opened:
    """A problem, and what runs its models."""

    problem: Problem
    runner: ModelRunner

    @property
    def selection(self) -> Selection:
        return self.problem.splits[SEARCH]

    @property
    def steering(self) -> Fitness:
        return self.problem.steering

    def plan(self, genome: Genome) -> Plan:
        return self.runner.plan(decode(self.problem.space, genome))

    def scores(self, genome: Genome) -> Scores:
        return self.runner.measure(self.plan(genome), self.selection)[0]

    def gradients(self, fitness: Fitness, genome: Genome, scores: Scores) -> dict[str, float] | None:
        """The gradient over all items of the selection."""
        problem = self.problem
        return fitness_gradients(problem.space, self.runner, problem.tasks, fitness, self.selection, genome, scores)


def opened(family: Mapping[str, Path], method: str, **changes: Any) -> Opened:
    """A search with one method in two layer groups, on the smooth metrics; `changes` as for `search_spec`."""
    spec = search_spec(
        {**family, "c": family["b"]},
        models__sources={name: str(family[name]) for name in "ab"},
        space={"methods": [method], "layer_groups": 2},
        evaluation__guard=[],
        evaluation__splits={"search": 0.2, "select": 0.2, "test": 0.2},
    )
    problem = open_problem(parse_spec(changed(spec, changes)))
    return Opened(problem, ModelRunner(problem))


def point(search: Opened, seed: int = 0) -> Genome:
    """A genome inside the ranges of all genes."""
    rng = np.random.default_rng(seed)
    return search.problem.space.genome(0.2 + 0.6 * rng.random(len(search.problem.space.reals)))


def found(search: Opened, genome: Genome, fitness: Fitness) -> dict[str, float]:
    gradients = search.gradients(fitness, genome, search.scores(genome))
    assert gradients is not None
    return gradients


def differences(search: Opened, genome: Genome, fitness: Fitness) -> dict[str, float]:
    """Central differences of the fitness: materialise, score, one gene at a time."""

    def at(name: str, value: float) -> float:
        moved = Genome.of({**genome.values, name: value}, genome.layers)
        return fitness(search.scores(moved))

    used = active_genes(search.problem.space, genome)
    slopes = {}
    for gene in search.problem.space.reals:
        if gene.name in used:
            value, step = float(genome.values[gene.name]), STEP * (gene.high - gene.low)
            low, high = max(gene.low, value - step), min(gene.high, value + step)
            slopes[gene.name] = (at(gene.name, high) - at(gene.name, low)) / (high - low)
    return slopes


def apart(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The distance of two gradients, over the second's length."""
    assert ours.keys() == theirs.keys()
    a, b = (np.array([row[name] for name in sorted(theirs)]) for row in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("method", "near"),
    [
        ("linear", 0.002),
        ("task_arithmetic", 0.002),
        ("slerp", 0.002),
        ("dfs", 0.002),
        ("dare", 0.03),  # a density moves elements at random: what bends does not cancel
        ("ties", 0.03),
    ],
)
def test_slopes_are_differences_of_the_fitness(family: dict[str, Path], method: str, near: float) -> None:
    search = opened(family, method)
    genome = point(search)
    assert apart(found(search, genome, search.steering), differences(search, genome, search.steering)) < near


def test_relative_goals_weighted_items_and_tensor_groups(family: dict[str, Path]) -> None:
    """A goal's own slope (over its reference, and inverted where lower is better) and the items' weights count."""
    groups = {"space__tensor_groups": ["attention", "mlp"]}
    search = opened(family, "task_arithmetic", evaluation__scale="relative", **groups)
    genome = point(search)
    scores = search.scores(genome)
    items = {task: {item: 1.0 + k for k, item in enumerate(part.items)} for task, part in scores.items()}
    relative = search.steering.relative_to([scores])
    fitness = Fitness(relative.goals, items)
    ours = found(search, genome, fitness)
    assert {"weight.a.g0.attention", "weight.b.g1.mlp", "weight.b.g1.rest", "lambda.outer"} <= set(ours)
    assert apart(ours, differences(search, genome, fitness)) < 0.002
    assert apart(ours, differences(search, genome, relative)) > 0.02


def test_the_ends_of_a_range_have_slopes_from_within(family: dict[str, Path]) -> None:
    search = opened(family, "ties")
    low = np.zeros(len(search.problem.space.reals))
    low[[gene.parameter == "lambda" for gene in search.problem.space.reals]] = 0.5
    low[[gene.source == "a" for gene in search.problem.space.reals]] = 1.0
    genome = search.problem.space.genome(low)
    ours, theirs = found(search, genome, search.steering), differences(search, genome, search.steering)
    assert set(genome.values.values()) >= {1.0}
    assert all(np.isfinite(value) for value in ours.values())
    linear = [name for name in ours if name.startswith("lambda")]
    assert apart({n: ours[n] for n in linear}, {n: theirs[n] for n in linear}) < 0.002


def test_genes_of_a_frozen_range_and_of_other_methods_have_none(family: dict[str, Path]) -> None:
    search = opened(
        family, "ties", space__methods=["task_arithmetic", "ties"], space__genes={"lambda": {"low": 1.0, "high": 1.0}}
    )
    genome = point(search)
    assert genome.values["method"] == "task_arithmetic"
    ours = found(search, genome, search.steering)
    assert {name.split(".")[0] for name in ours} == {"weight"}
    literal = decode_literally(search.problem.space, genome)
    effects = genes_of_settings(search.problem.space, genome, literal, search.runner.plan(literal.recipe))
    assert {factor for e in effects.values() for genes in e.values() for factor in genes.values()} == {1.0}


def test_the_model_and_the_next_scores_are_as_before(family: dict[str, Path]) -> None:
    search = opened(family, "task_arithmetic", evaluation__dtype="bfloat16")
    genome, other = point(search), point(search, 1)
    before = [search.scores(g) for g in (genome, other)]
    model = search.runner.materialise(search.plan(genome))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = search.gradients(search.steering, genome, before[0])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    after = [search.scores(g) for g in (genome, other)]
    for one, again in zip(before, after, strict=True):
        for task, part in one.items():
            for metric, columns in part.metrics.items():
                np.testing.assert_array_equal(columns, again[task].metrics[metric])
    assert search.gradients(search.steering, genome, before[0]) == first


def test_threads_and_the_size_of_pieces(family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No bit depends on the number of threads; smaller pieces round differently, and no more."""
    from evomerge.evaluation.backends.native import weight_gradients as backward

    search = opened(family, "task_arithmetic")
    genome = point(search)
    one = found(search, genome, search.steering)
    monkeypatch.setattr(backward, "MAX_TOKENS", 64)
    small = found(search, genome, search.steering)
    assert apart(small, one) < 1e-4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert found(search, genome, search.steering) == small
    finally:
        torch.set_num_threads(threads)


def test_where_nothing_changes_smoothly_there_are_none(family: dict[str, Path]) -> None:
    """Accuracy is flat but where it jumps; generated text has no likelihood."""
    tasks = [{"task": "tiny_choice", "metric": "acc"}, {"task": "tiny_answer", "metric": "exact_match"}]
    splits = {"search": 0.3, "select": 0.3, "test": 0.3}
    metric = {"evaluation__fitness": "metric", "evaluation__splits": splits}
    search = opened(family, "linear", evaluation__tasks=tasks, **metric)
    genome = point(search)
    scores = search.scores(genome)
    assert search.gradients(search.problem.reported, genome, scores) is None
    assert search.gradients(search.steering, genome, scores) is None


def test_a_model_without_a_gradient_has_none_and_stays_as_it_is(
    family: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    search = opened(family, "linear")
    genome = point(search)
    scores = search.scores(genome)

    def no_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch.autograd, "grad", no_memory)
    assert search.gradients(search.steering, genome, scores) is None
    assert "cannot be differentiated: can't allocate memory" in caplog.text
    model = search.runner.materialise(search.plan(genome))
    assert not any(p.requires_grad for p in model.parameters())


def test_without_memory_for_a_gradient_there_are_none(
    family: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    search = opened(family, "task_arithmetic")
    genome = point(search)
    scores = search.scores(genome)
    monkeypatch.setattr("evomerge.evaluation.backends.native.weight_gradients.available", lambda: 1000)
    assert search.gradients(search.steering, genome, scores) is None
    assert "a gradient takes 0.0 GB, and 0.0 GB are free" in caplog.text
    ours = 12 * sum(p.numel() for p in search.runner.materialise(search.plan(genome)).parameters())
    monkeypatch.setattr(
        "evomerge.evaluation.backends.native.weight_gradients.available", lambda: ours
    )  # for one piece at a time
    assert search.gradients(search.steering, genome, scores)


def test_the_kernel_is_asked_what_is_free(tmp_path: Path) -> None:
    told = tmp_path / "meminfo"
    assert available(told) is None
    told.write_text("MemTotal:       24 kB\nMemAvailable:       12 kB\n")
    assert available(told) == 12 * 1024
    assert (available() or 0) > 0 or not Path("/proc/meminfo").exists()


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> RunFolder:
    return RunFolder.existing(Path(shutil.copytree(finished_run, tmp_path / "copied")))


def evaluator_of(folder: RunFolder) -> tuple[Problem, CandidateEvaluator]:
    problem = open_problem(folder.spec)
    runner = ModelRunner(problem)
    objective = prepare_objective(problem, runner, folder.scores, NullTracker())
    return problem, CandidateEvaluator(problem, runner, folder.scores, objective)


def test_a_run_finds_them_once(copied: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, evaluator = evaluator_of(copied)
    known = {c.number: c for c in copied.candidates()}
    done = [c for c in known.values() if c.generation > 0 and c.state == "done"]
    merged = next(c for c in done if c.genome.values["method"] != "frankenmerge")
    ours = evaluator.gradients(merged)
    assert ours
    assert set(ours) <= active_genes(problem.space, merged.genome)
    assert evaluator.gradient_items == round(COST * sum(map(len, problem.splits[SEARCH].values())))
    monkeypatch.setattr("evomerge.problem.candidate_evaluator.fitness_gradients", lambda *_: pytest.fail("asked twice"))
    assert evaluator_of(copied)[1].gradients(merged) == ours
    digest = ModelRunner(problem).plan(merged.recipe).digest
    kept = read_sealed_json(copied.root / "scores" / f"{digest}-gradients.json", dict, "")
    assert kept == {"gradients": dict(ours)}


def test_who_has_none(copied: RunFolder) -> None:
    """Copies of layers; baselines that are not their genome's recipe; candidates that were not scored."""
    problem, evaluator = evaluator_of(copied)
    found = copied.candidates()
    copies = next(c for c in found if c.recipe["merge_method"] == "frankenmerge")
    assert evaluator.gradients(copies) is None
    by_name = {c.operator: c for c in found if c.generation == 0}
    assert why_invalid(problem.space, by_name["parent:base"].genome)  # no source has a weight: no recipe
    assert evaluator.gradients(by_name["parent:base"]) is None
    arithmetic = next(c for name, c in by_name.items() if name.startswith("task_arithmetic λ"))
    assert evaluator.gradients(replace(arithmetic, state="pruned")) is None
    assert evaluator.gradients(arithmetic)
