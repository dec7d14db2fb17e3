"""Tiny models of every architecture: merged to disk and in memory, reloaded by their own classes, layers stacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.engine.resident import Resident
from evomerge.errors import RecipeError
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from evomerge.space.genes import WIDER
from tests.architectures import ARCHITECTURES, LAYERS, Architecture, outputs
from tests.engine.recipes import layers, opened, plan_of
from tests.methods.references import elect, largest

Families = Callable[[str], dict[str, Path]]
each = pytest.mark.parametrize("name", list(ARCHITECTURES))
one_stack = pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if len(a.stacks) == 1])
several_stacks = pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if len(a.stacks) > 1])

WEIGHTS = {"a": 0.5, "b": 0.3}


def recipe_of(method: str, family: dict[str, Path], **own: Any) -> dict[str, Any]:
    models = [{"model": str(family[name]), "parameters": {"weight": w, **own}} for name, w in WEIGHTS.items()]
    return {"merge_method": method, "base_model": str(family["base"]), "models": models}


def load(architecture: Architecture, folder: Path) -> Any:
    """The model by its own class; every tensor has to be found, and none may be left over."""
    kind = getattr(transformers, architecture.model)
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert {key: names for key, names in report.items() if names} == {}
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(folder))
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


@each
def test_structure(family_of: Families, name: str) -> None:
    architecture, checkpoint = ARCHITECTURES[name], open_checkpoint(str(family_of(name)["base"]))
    layout = checkpoint.layout
    assert tuple(stack.prefix for stack in layout.stacks) == architecture.stacks
    assert {stack.length for stack in layout.stacks} == {architecture.depth}
    assert layout.main == (layout.stacks[0] if len(layout.stacks) == 1 else None)
    assert (layout.embedding, layout.head, layout.tied_head) == (
        architecture.embedding,
        architecture.head,
        architecture.tied,
    )
    places = {n: layout.locate(n) for n, i in checkpoint.tensors.items() if len(i.shape) > 1}
    loose = {at.suffix.split(".")[0] for at in places.values() if at.group == "rest"}
    assert loose == {*architecture.loose}
    kinds = {(at.kind, at.group) for at in map(layout.locate, checkpoint.tensors)}
    assert {group == WIDER.get(kind, kind) for kind, group in kinds} == {True}
    experts = {"experts", "router"} if any(n.endswith("_experts") for n in checkpoint.whole_config) else set()
    assert experts <= {kind for kind, _ in kinds}


@each
def test_merged_to_disk_and_in_memory(family_of: Families, tmp_path: Path, name: str) -> None:
    """Task arithmetic is the same sum on whole modules, which transformers loads by ways of its own."""
    architecture, family = ARCHITECTURES[name], family_of(name)
    recipe = recipe_of("task_arithmetic", family)
    merged = load(architecture, merge_to_folder(parse_recipe(recipe), tmp_path / "out"))
    base = load(architecture, family["base"])
    states = {model: load(architecture, family[model]).state_dict() for model in WEIGHTS}
    expected = {
        key: value + sum(w * (states[model][key] - value) for model, w in WEIGHTS.items())
        if value.is_floating_point()
        else value
        for key, value in base.state_dict().items()
    }
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)
    base.load_state_dict(expected)
    arguments = architecture.inputs(merged)
    found = outputs(merged, arguments)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, outputs(base, arguments), rtol=1e-4, atol=1e-5)

    resident = Resident(opened(str(folder) for folder in family.values()))
    live, _ = resident.write(plan_of(recipe_of("linear", family)))
    for key, value in live.state_dict().items():
        if value.is_floating_point():
            average = sum(w * states[model][key] for model, w in WEIGHTS.items()) / sum(WEIGHTS.values())
            torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-6, msg=key)
    live, _ = resident.write(plan_of(recipe))  # a second candidate goes into the same storage
    assert type(live) is type(merged)
    assert {k for k, v in live.state_dict().items() if not torch.equal(v, merged.state_dict()[k])} == set()
    torch.testing.assert_close(outputs(live, arguments), found, rtol=1e-5, atol=1e-6)


@each
def test_ties_tensor_by_tensor(family_of: Families, tmp_path: Path, name: str) -> None:
    family = family_of(name)
    out = merge_to_folder(parse_recipe(recipe_of("ties", family, density=0.4)), tmp_path / "out")
    base, merged, sources = tensors(family["base"]), tensors(out), [tensors(family[m]) for m in WEIGHTS]
    assert merged.keys() == base.keys()
    shared = {"consensus": "mass", "average": "agreeing", "normalize": True, "lambda": 1.0}
    own = [{"weight": w} for w in WEIGHTS.values()]
    for key, origin in base.items():
        deltas = [(source[key] - origin).numpy().astype(np.float64) for source in sources]
        trimmed = [delta * largest(delta, 0.4) for delta in deltas]
        expected = elect(origin.numpy().astype(np.float64), trimmed, own, shared)
        np.testing.assert_allclose(merged[key].numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=key)


@one_stack
def test_layers_copied_twice(family_of: Families, tmp_path: Path, name: str) -> None:
    """a's layers, then b's last one: config.json says one more, and so do its lists with an entry a layer."""
    architecture, family = ARCHITECTURES[name], family_of(name)
    depth = architecture.depth
    recipe = layers((family["a"], 0, depth), (family["b"], depth - 1, depth))
    if architecture.immovable is not None:
        with pytest.raises(RecipeError, match=architecture.immovable):
            merge_to_folder(parse_recipe(recipe), tmp_path / "out")
        return
    out = merge_to_folder(parse_recipe(recipe), tmp_path / "out")
    model = load(architecture, out)
    assert model.config.num_hidden_layers == depth + 1
    stored, kept = open_checkpoint(str(out)), {m: open_checkpoint(str(family[m])) for m in WEIGHTS}
    stack = architecture.stacks[0]
    assert [(s.prefix, s.length) for s in stored.layout.stacks] == [(stack, depth + 1)]
    for k, (origin, layer) in enumerate((*(("a", number) for number in range(depth)), ("b", depth - 1))):
        suffixes = stored.layout.suffixes(stack, k)
        assert suffixes == kept[origin].layout.suffixes(stack, layer)
        for suffix in suffixes:
            here, there = (c.layout.name(stack, n, suffix) for c, n in ((stored, k), (kept[origin], layer)))
            assert torch.equal(stored.tensor(here), kept[origin].tensor(there)), here
    found = outputs(model, architecture.inputs(model))
    assert torch.isfinite(found).all()
    live, _ = Resident(opened(str(family[m]) for m in WEIGHTS)).write(plan_of(recipe))
    torch.testing.assert_close(outputs(live, architecture.inputs(live)), found, rtol=1e-5, atol=1e-6)


@several_stacks
def test_slices_of_several_stacks_are_refused_by_name(family_of: Families, name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(layers((family_of(name)["a"], 0, 1)))
    for stack in ARCHITECTURES[name].stacks:
        assert f"{stack} ({LAYERS} layers)" in str(caught.value)
    assert "modules" in str(caught.value)
