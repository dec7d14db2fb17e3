"""An adapter trained on the search items: what it is trained for rises, in the layout that PEFT and we read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.evaluation.splits import SEARCH
from evomerge.problem import lora_control
from evomerge.problem.lora_control import _loglikelihoods, _pairs, train_lora
from evomerge.problem.model_runner import ModelRunner
from evomerge.problem.problem import open_problem
from evomerge.recipe.parse import single_model
from evomerge.spec.load import parse_spec
from tests.frame import search_spec


def test_training_raises_what_steers(
    tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = open_problem(parse_spec(search_spec(tiny_family)))
    runner, selection = ModelRunner(problem), problem.splits[SEARCH]
    before = runner.scores(runner.plan(single_model(problem.reference)), selection)[0]
    fitness = problem.steering.relative_to([before])
    monkeypatch.setattr(lora_control, "LEARNING_RATE", 3e-3)  # a tiny model has little to move
    adapters = train_lora(runner, problem.reference, fitness, selection, tmp_path, items=600, seed=0)
    assert [path.name for path in adapters] == ["adapter-1", "adapter-2", "adapter-3", "adapter-4"]
    stored = {path: (path / "adapter_model.safetensors").read_bytes() for path in adapters}
    assert len(set(stored.values())) == 4

    spec = search_spec(tiny_family)
    spec["models"]["sources"] = {path.name: f"{problem.reference}+{path}" for path in adapters}
    trained = ModelRunner(open_problem(parse_spec(spec)))
    recipe = single_model(spec["models"]["sources"]["adapter-4"])
    after = trained.scores(trained.plan(recipe), selection)[0]
    assert fitness(after) > fitness(before) + 0.02

    again = train_lora(runner, problem.reference, fitness, selection, tmp_path / "again", items=600, seed=0)
    for one, path in zip(again, adapters, strict=True):
        one_model, other_model = (open_checkpoint(f"{problem.reference}+{folder}") for folder in (one, path))
        assert all(torch.equal(one_model.tensor(name), other_model.tensor(name)) for name in one_model.tensors)


def test_its_log_likelihoods_are_those_that_score(tiny_family: dict[str, Path]) -> None:
    problem = open_problem(parse_spec(search_spec(tiny_family, evaluation__dtype="float32")))
    runner = ModelRunner(problem)
    model = runner.materialise(runner.plan(single_model(problem.reference)))
    for task, positions in problem.splits[SEARCH].items():
        requests = runner.evaluator.requests(task)
        requests.build(positions)
        owners, pairs = _pairs(runner, requests.by_item, positions)
        with torch.no_grad():
            own = _loglikelihoods(model, pairs, runner.evaluator.max_length)
        answered = runner.evaluator.answer(model, {task: positions})[task][1]
        scored = [r[0] if isinstance(r, tuple) else r for group in answered for one in group for r in one.resps]
        assert np.allclose(np.bincount(owners, weights=own.numpy()), scored, atol=1e-4)


def test_a_batch_has_every_item_before_any_comes_again() -> None:
    batches = lora_control._batches({"a": tuple(range(20)), "b": tuple(range(12))}, seed=0)
    seen = [item for _ in range(2) for item in next(batches)]
    assert len(set(seen)) == 32
