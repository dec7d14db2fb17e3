"""Derivatives of log-likelihoods by genes beside their differences, on tiny models in float32."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.engine.setting_derivatives import STEP
from evomerge.evaluation.backends.native.jacobian import shortened
from evomerge.evaluation.backends.registry import Directions
from evomerge.evaluation.score_store import RunScores
from evomerge.evaluation.scores import ResponseJacobian
from evomerge.evaluation.splits import SEARCH, Selection
from evomerge.objective.fitness import Scores
from evomerge.planning.plan import Plan
from evomerge.problem.candidate_evaluator import CandidateEvaluator
from evomerge.problem.genome_jacobian import COST, genes_of_settings, genome_jacobian, sample_items
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.prepare_objective import prepare_objective
from evomerge.problem.problem import Problem, open_problem
from evomerge.run.folder import RunFolder
from evomerge.space.decode import active_genes, decode, decode_literally, recipe_hash, why_invalid
from evomerge.space.genome import Genome
from evomerge.spec.load import parse_spec
from evomerge.study.candidate import Candidate, Proposal
from evomerge.study.interfaces import NullTracker
from evomerge.system.arrays import FloatArray
from evomerge.system.memory import available
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

    def plan(self, genome: Genome) -> Plan:
        return self.runner.plan(decode(self.problem.space, genome))

    def scores(self, genome: Genome) -> Scores:
        return self.runner.measure(self.plan(genome), self.selection)[0]

    def jacobian(self, genome: Genome) -> dict[str, ResponseJacobian]:
        """Over all items of the selection, in units of the genes' ranges."""
        return genome_jacobian(self.problem.space, self.runner, self.selection, genome)


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


def derivatives(search: Opened, genome: Genome) -> FloatArray:
    """[requests of all tasks, genes]."""
    return np.concatenate([part.derivatives for part in search.jacobian(genome).values()])


def loglikelihoods(search: Opened, genome: Genome) -> FloatArray:
    """[requests of all tasks], without derivatives."""
    model = search.runner.materialise(search.plan(genome))
    parts = search.runner.evaluator.jacobian(model, search.selection, {}, 0)
    return np.concatenate([part.loglikelihoods for part in parts.values()])


def differences(search: Opened, genome: Genome) -> FloatArray:
    """Central differences of the log-likelihoods: materialise, score, one gene at a time."""

    def at(name: str, value: float) -> FloatArray:
        return loglikelihoods(search, Genome.of({**genome.values, name: value}, genome.layers))

    used = active_genes(search.problem.space, genome)
    columns = np.zeros((len(loglikelihoods(search, genome)), len(search.problem.space.reals)))
    for k, gene in enumerate(search.problem.space.reals):
        if gene.name in used:
            value, step = float(genome.values[gene.name]), STEP * (gene.high - gene.low)
            low, high = max(gene.low, value - step), min(gene.high, value + step)
            columns[:, k] = (at(gene.name, high) - at(gene.name, low)) * (gene.high - gene.low) / (high - low)
    return columns


def apart(a: FloatArray, b: FloatArray) -> float:
    """The distance of two Jacobians, over the second's length."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("method", "near"),
    [
        ("linear", 0.003),
        ("task_arithmetic", 0.003),
        ("slerp", 0.003),
        ("dfs", 0.003),
        ("dare", 0.05),  # a density moves elements at random: what bends does not cancel
        ("ties", 0.05),
    ],
)
def test_derivatives_are_differences_of_the_loglikelihoods(family: dict[str, Path], method: str, near: float) -> None:
    search = opened(family, method)
    genome = point(search)
    assert apart(derivatives(search, genome), differences(search, genome)) < near


def test_log_likelihoods_are_those_of_the_scores(family: dict[str, Path]) -> None:
    """Sequences that share no tokens are rounded otherwise than prefix trees, and no more."""
    search = opened(family, "linear")
    genome = point(search)
    scores = search.scores(genome)
    part = search.jacobian(genome)["tiny_choice"]
    metric = search.runner.smooth_metric("tiny_choice", "loss", search.selection["tiny_choice"], part.loglikelihoods)
    assert metric is not None
    np.testing.assert_allclose(metric(part.loglikelihoods)[0], scores["tiny_choice"].metrics["loss"][0], atol=1e-3)


def test_tensor_groups_have_derivatives_of_their_own(family: dict[str, Path]) -> None:
    search = opened(family, "task_arithmetic", space__tensor_groups=["attention", "norm"])
    genome = point(search)
    ours = derivatives(search, genome)
    names = [gene.name for gene in search.problem.space.reals]
    assert all(
        ours[:, names.index(name)].any()
        for name in ("weight.a.g0.attention", "weight.b.g1.norm", "weight.b.g1.rest", "lambda.outer")
    )
    assert apart(ours, differences(search, genome)) < 0.003


@pytest.mark.parametrize("rank", [1, 4])
def test_directions_of_a_low_rank_are_as_good(
    family: dict[str, Path], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a rank that is allowed they are exact; noise, which has none, is left whole."""
    rng = torch.Generator().manual_seed(0)
    low = torch.randn(3, 24, rank, generator=rng) @ torch.randn(3, rank, 40, generator=rng)
    noise = torch.randn(1, 24, 40, generator=rng)
    monkeypatch.setattr("evomerge.evaluation.backends.native.jacobian.RANKS", (4,))
    groups = shortened(Directions(np.arange(4), torch.cat([low, noise])))
    assert [(group.columns.tolist(), group.right is None) for group in groups] == [([0, 1, 2], False), ([3], True)]
    assert groups[0].right is not None
    torch.testing.assert_close(groups[0].tensors @ groups[0].right, low, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(groups[1].tensors, noise)


def test_the_ends_of_a_range_have_derivatives_from_within(family: dict[str, Path]) -> None:
    search = opened(family, "ties")
    reals = search.problem.space.reals
    low = np.array([1.0 if gene.source == "a" else 0.5 * (gene.parameter == "lambda") for gene in reals])
    genome = search.problem.space.genome(low)
    ours, theirs = derivatives(search, genome), differences(search, genome)
    assert np.all(np.isfinite(ours))
    scales = [gene.parameter == "lambda" for gene in reals]
    assert apart(ours[:, scales], theirs[:, scales]) < 0.003


def test_genes_of_a_frozen_range_and_of_other_methods_have_none(family: dict[str, Path]) -> None:
    search = opened(
        family, "ties", space__methods=["task_arithmetic", "ties"], space__genes={"lambda": {"low": 1.0, "high": 1.0}}
    )
    genome = point(search)
    assert genome.values["method"] == "task_arithmetic"
    moving = derivatives(search, genome).any(axis=0)
    assert {gene.parameter for gene, moves in zip(search.problem.space.reals, moving, strict=True) if moves} == {
        "weight"
    }
    literal = decode_literally(search.problem.space, genome)
    effects = genes_of_settings(search.problem.space, genome, literal, search.runner.plan(literal.recipe))
    assert {factor for e in effects.values() for genes in e.values() for factor in genes.values()} == {1.0}


def test_the_model_and_the_next_scores_are_as_before(family: dict[str, Path]) -> None:
    search = opened(family, "task_arithmetic", evaluation__dtype="bfloat16")
    genome, other = point(search), point(search, 1)
    before = [search.scores(g) for g in (genome, other)]
    model = search.runner.materialise(search.plan(genome))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = derivatives(search, genome)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    after = [search.scores(g) for g in (genome, other)]
    for one, again in zip(before, after, strict=True):
        for task, part in one.items():
            for metric, columns in part.metrics.items():
                np.testing.assert_array_equal(columns, again[task].metrics[metric])
    np.testing.assert_array_equal(derivatives(search, genome), first)


def test_what_a_pass_computed_is_gone_after_it(family: dict[str, Path]) -> None:
    search = opened(family, "task_arithmetic")
    genome, outputs = point(search), []
    model = search.runner.materialise(search.plan(genome))

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    derivatives(search, genome)
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert len(outputs) > 10
    assert not any(output() is not None for output in outputs)


def test_threads_and_the_size_of_batches(family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No bit depends on the number of threads; smaller batches round differently, and no more."""
    genome = point(search := opened(family, "task_arithmetic"))
    one = derivatives(search, genome)
    monkeypatch.setattr("evomerge.evaluation.backends.native.jacobian.MAX_TOKENS", 64)
    smaller = opened(family, "task_arithmetic")  # batches are kept
    small = derivatives(smaller, genome)
    assert apart(small, one) < 1e-4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        np.testing.assert_array_equal(derivatives(smaller, genome), small)
    finally:
        torch.set_num_threads(threads)


def test_generated_text_has_none(family: dict[str, Path]) -> None:
    tasks = [{"task": "tiny_choice", "metric": "acc"}, {"task": "tiny_answer", "metric": "exact_match"}]
    splits = {"search": 0.3, "select": 0.3, "test": 0.3}
    search = opened(family, "linear", evaluation__tasks=tasks, evaluation__splits=splits)
    assert set(search.jacobian(point(search))) == {"tiny_choice"}


def test_a_model_without_derivatives_has_none_and_stays_as_it_is(
    family: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    search = opened(family, "linear")
    genome = point(search)

    def no_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch.autograd, "backward", no_memory)
    assert search.jacobian(genome) == {}
    assert "cannot be differentiated: can't allocate memory" in caplog.text
    model = search.runner.materialise(search.plan(genome))
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_memory_for_derivatives_there_are_none(
    family: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    search = opened(family, "task_arithmetic")
    monkeypatch.setattr("evomerge.problem.model_runner.available", lambda: 1000)
    assert search.jacobian(point(search)) == {}
    assert "GB are free" in caplog.text


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
    done = [c for c in copied.candidates() if c.generation > 0 and c.state == "done"]
    merged = next(c for c in done if c.genome.values["method"] != "frankenmerge")
    labels = np.arange(len(problem.space.reals))
    model = evaluator.likelihood_model(merged)
    assert model is not None
    move, gain = model.step(labels, 0.02, 0.1)
    assert gain > 0
    assert {gene.name for gene, by in zip(problem.space.reals, move, strict=True) if by} <= active_genes(
        problem.space, merged.genome
    )
    sampled = sample_items(problem.splits[SEARCH], "")
    assert evaluator.jacobian_items == round(COST * sum(map(len, sampled.values())))
    monkeypatch.setattr("evomerge.problem.candidate_evaluator.genome_jacobian", lambda *_: pytest.fail("asked twice"))
    again = evaluator_of(copied)[1].likelihood_model(merged)
    assert again is not None
    np.testing.assert_array_equal(again.step(labels, 0.02, 0.1)[0], move)


def test_what_is_predicted_is_measured(family: dict[str, Path], tmp_path: Path) -> None:
    """Within a small radius the model's gain is the fitness' own, and it is one."""
    search = opened(family, "task_arithmetic", evaluation__fitness="smooth")
    (tmp_path / "scores").mkdir()
    store = RunScores(tmp_path)
    objective = prepare_objective(search.problem, search.runner, store, NullTracker())
    evaluator = CandidateEvaluator(search.problem, search.runner, store, objective)
    genome = point(search)
    recipe = decode(search.problem.space, genome)
    start = Proposal(0, 1, genome, recipe, recipe_hash(recipe), (), "start")
    outcome = evaluator(start)
    model = evaluator.likelihood_model(Candidate.of(start, outcome))
    assert model is not None
    move, gain = model.step(np.arange(len(search.problem.space.reals)), 0.001, 0.01)
    moved = search.problem.space.genome(search.problem.space.unit(genome) + move)
    assert gain > 0
    measured = objective.fitness(search.scores(moved)) - objective.fitness(search.scores(genome))
    assert measured == pytest.approx(gain, rel=0.3)


def test_who_has_none(copied: RunFolder) -> None:
    """Copies of layers; baselines that are not their genome's recipe; candidates that were not scored."""
    problem, evaluator = evaluator_of(copied)
    candidates = copied.candidates()
    copies = next(c for c in candidates if c.recipe["merge_method"] == "frankenmerge")
    assert evaluator.likelihood_model(copies) is None
    by_name = {c.operator: c for c in candidates if c.generation == 0}
    assert why_invalid(problem.space, by_name["parent:base"].genome)  # no source has a weight: no recipe
    assert evaluator.likelihood_model(by_name["parent:base"]) is None
    arithmetic = next(c for name, c in by_name.items() if name.startswith("task_arithmetic λ"))
    assert evaluator.likelihood_model(replace(arithmetic, state="pruned")) is None
    assert evaluator.likelihood_model(arithmetic)
