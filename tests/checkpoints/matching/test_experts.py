"""Experts in one tensor beside experts of their own: read one by one, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.matching.experts import with_single_experts
from evomerge.engine.resident import Resident
from evomerge.planning.plan import align_and_plan
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from tests.architectures import ARCHITECTURES, outputs
from tests.engine.recipes import opened
from tests.engine.test_architectures import load, recipe_of


@pytest.mark.parametrize("stacked", ["base", "a"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "jamba", "lfm2_moe"])
def test_merged_as_if_all_were_stored_alike(
    family_of: Callable[[str], dict[str, Path]], tmp_path: Path, name: str, stacked: str
) -> None:
    architecture, family = ARCHITECTURES[name], family_of(name)
    whole = tmp_path / stacked
    load(architecture, family[stacked]).save_pretrained(whole, save_original_format=False)
    stored = open_checkpoint(str(whole)).tensors
    assert any(len(info.shape) == 3 and ".experts." in key for key, info in stored.items())

    expected = load(architecture, merge_to_folder(parse_recipe(recipe_of("ties", family)), tmp_path / "expected"))
    recipe = recipe_of("ties", family | {stacked: whole})
    merged = load(architecture, merge_to_folder(parse_recipe(recipe), tmp_path / "out"))
    torch.testing.assert_close(merged.state_dict(), expected.state_dict(), rtol=0, atol=0)
    parsed = parse_recipe(recipe)
    plan, models, _ = align_and_plan(parsed, opened(parsed.models()), identify=True)
    live, _ = Resident(models).write(plan)
    arguments = architecture.inputs(live)
    torch.testing.assert_close(outputs(live, arguments), outputs(expected, arguments), rtol=1e-5, atol=1e-6)


def test_models_alike_stay_as_they_are(family_of: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    architecture, family = ARCHITECTURES["mixtral"], family_of("mixtral")
    for name in ("a", "b"):
        load(architecture, family[name]).save_pretrained(tmp_path / name, save_original_format=False)
    models = opened(str(tmp_path / name) for name in ("a", "b"))
    assert all(model is models[name] for name, model in with_single_experts(models).items())


def test_parts_are_views_with_a_content_of_their_own(
    family_of: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    architecture, family = ARCHITECTURES["qwen3_moe"], family_of("qwen3_moe")
    load(architecture, family["a"]).save_pretrained(tmp_path / "a", save_original_format=False)
    single, stacked = with_single_experts(opened((str(family["b"]), str(tmp_path / "a")))).values()
    same = open_checkpoint(str(family["a"]))
    assert stacked.tensors.keys() == single.tensors.keys()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert torch.equal(stacked.tensor(name), same.tensor(name))
    assert stacked.tensors[name].nbytes == same.tensors[name].nbytes
    assert len({stacked.fingerprint, open_checkpoint(str(tmp_path / "a")).fingerprint, same.fingerprint}) == 3
