"""Stages after a merge: the same in memory as on disk, for every method that adds something to a base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.engine.execute import materialise
from evomerge.engine.resident import Resident
from evomerge.engine.setting_derivatives import setting_derivatives
from evomerge.engine.statistics.tensor_statistics import StatisticsStore
from evomerge.errors import BadInput
from evomerge.methods.contract import Method
from evomerge.methods.plain_statistics import PlainStatistics
from evomerge.methods.registry import METHODS, STAGES
from evomerge.planning.operation import Operation
from evomerge.testing.methods import family
from tests.engine.helpers import operation_for, store_for
from tests.engine.recipes import EVERY, opened, plan_of, recipe_for
from tests.engine.test_resident import on_disk, same_model

VALUES = {"svc_alpha": 0.5, "svc_strength": 0.75}


def staged(method: Method, models: dict[str, Path], **values: float) -> dict[str, Any]:
    """A recipe with a stage."""
    recipe = recipe_for(method, models, base_model=str(models["base"]))
    return recipe | {"after": ["svc"], "parameters": {**recipe.get("parameters", {}), **VALUES, **values}}


def by_hand(operation: Operation, store: StatisticsStore) -> torch.Tensor:
    """The method's own result, then the stage."""
    merged = materialise(replace(operation, after=()), store, torch.float32)
    assert operation.base is not None
    base, *sources = (
        store.tensors.flat(t).float().view(operation.shape)
        for t in (operation.base, *(operation.sources[i] for i in operation.settings.taking_part()))
    )
    return STAGES["svc"].apply(PlainStatistics(base, sources).block("tensor"), merged, operation.settings)


DELTAS = [m for m in EVERY if m.needs_base or m.takes_base]


@pytest.mark.parametrize("method", DELTAS, ids=lambda m: m.name)
def test_after_every_method_of_deltas(tiny_family: dict[str, Path], tmp_path: Path, method: Method) -> None:
    recipe = staged(method, tiny_family)
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    plan, store = plan_of(recipe, checkpoints), StatisticsStore(checkpoints)
    same_model(Resident(checkpoints).write(plan)[0], on_disk(recipe, tmp_path / "out"))
    matrices = [op for op in plan.operations if op.after]
    assert {len(op.shape) for op in matrices} == {2}
    assert all(op.after or "svc_alpha" not in op.settings.shared for op in plan.operations)
    for operation in matrices[:3]:
        got = materialise(operation, store, torch.float32, plan.family)
        torch.testing.assert_close(got, by_hand(operation, store), rtol=0.0, atol=0.0)


def test_what_is_off_costs_nothing(tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = staged(METHODS["ties"], tiny_family, svc_strength=0.0)
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    expected = Resident(checkpoints).write(plan_of(recipe_for(METHODS["ties"], tiny_family), checkpoints))[0]
    monkeypatch.setattr(torch.linalg, "eigh", None)
    got = Resident(checkpoints).write(plan_of(recipe, checkpoints))[0].state_dict()
    assert all(torch.equal(value, got[name]) for name, value in expected.state_dict().items())


def test_a_source_of_weight_zero_is_no_task() -> None:
    base, sources = family(4, 3, (6, 5))
    method = METHODS["task_arithmetic"]
    shared = {"svc_alpha": 1.0, "svc_strength": 1.0}

    def merged(weights: list[float], of: list[torch.Tensor]) -> torch.Tensor:
        chosen = method.settings([{"weight": w} for w in weights])
        chosen = replace(chosen, shared={**chosen.shared, **shared})
        operation = operation_for("task_arithmetic", chosen, base.shape, after=("svc",))
        return materialise(operation, store_for(base, of), torch.float32)

    assert torch.equal(merged([1.0, 0.0, 1.0], sources), merged([1.0, 1.0], [sources[0], sources[2]]))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_derivatives_by_the_strength(strength: float) -> None:
    """Exact: the result is linear in it."""
    base, sources = family(4, 2, (6, 5))
    store = store_for(base, sources)

    def operation(value: float) -> Operation:
        chosen = METHODS["task_arithmetic"].settings([{"weight": 1.0}] * 2)
        chosen = replace(chosen, shared={**chosen.shared, "svc_alpha": 1.0, "svc_strength": value})
        return operation_for("task_arithmetic", chosen, base.shape, after=("svc",))

    key = ("svc_strength", None)
    ((_, derivatives),) = setting_derivatives([(operation(strength), {key: (0.0, 1.0)})], store)
    ends = [materialise(operation(value), store, torch.float32) for value in (0.0, 1.0)]
    assert float((ends[1] - ends[0]).abs().max()) > 1e-3
    torch.testing.assert_close(derivatives[key], ends[1] - ends[0], rtol=1e-3, atol=1e-5)


@pytest.fixture
def activations(tiny_family: dict[str, Path], tmp_path: Path) -> Path:
    """A file of mean inputs for the matrices of the first layer."""
    base = opened([str(tiny_family["base"])])[str(tiny_family["base"])]
    generator = torch.Generator().manual_seed(0)
    means = {
        name: torch.rand(info.shape[1], generator=generator)
        for name, info in base.tensors.items()
        if "layers.0." in name and len(info.shape) == 2
    }
    save_file(means, tmp_path / "means.safetensors")
    return tmp_path / "means.safetensors"


def aimed(models: dict[str, Path], activations: Path, omega: float = 0.3) -> dict[str, Any]:
    recipe = recipe_for(METHODS["ties"], models) | {"after": ["aim"], "activations": str(activations)}
    return recipe | {"parameters": {**recipe["parameters"], "aim_omega": omega}}


def test_activations_shrink_what_they_are_of(tiny_family: dict[str, Path], tmp_path: Path, activations: Path) -> None:
    recipe, plain = aimed(tiny_family, activations), recipe_for(METHODS["ties"], tiny_family)
    checkpoints = opened(str(folder) for folder in tiny_family.values())
    base = checkpoints[str(tiny_family["base"])]
    expected = {
        k: v.clone() for k, v in Resident(checkpoints).write(plan_of(plain, checkpoints))[0].state_dict().items()
    }
    model = Resident(checkpoints).write(plan_of(recipe, checkpoints))[0]
    for name, means in load_file(activations).items():
        left = 1 - 0.7 * means / means.max()
        start = base.tensor(name).float()
        expected[name] = start + (expected[name].float() - start) * left
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=1e-5, atol=1e-5)
    same_model(model, on_disk(recipe, tmp_path / "out"))
    assert (tmp_path / "out" / "recipe.yaml").read_text().count("\nactivations: ") == 1


def test_other_activations_are_another_plan(tiny_family: dict[str, Path], activations: Path) -> None:
    before = plan_of(aimed(tiny_family, activations))
    means = load_file(activations)
    save_file({name: value * 2 + 1 for name, value in means.items()}, activations)
    after = plan_of(aimed(tiny_family, activations))
    changed = {a.output for a, b in zip(before.operations, after.operations, strict=True) if a.digest != b.digest}
    assert changed == set(means)


def test_activations_that_are_none_are_refused(tiny_family: dict[str, Path], activations: Path) -> None:
    means = load_file(activations)
    name = next(iter(means))
    for wrong, text in ((means[name][:-1].clone(), "inputs in the recipe's activations"), (-means[name], "magnitudes")):
        save_file(means | {name: wrong}, activations)
        with pytest.raises(BadInput, match=text):
            plan_of(aimed(tiny_family, activations))
    with pytest.raises(BadInput, match=r"missing\.safetensors"):
        plan_of(aimed(tiny_family, activations.with_name("missing.safetensors")))
