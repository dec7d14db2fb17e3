"""Recipes of several merges, carried out: the numbers, what lies beside the output meanwhile, and what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import evomerge
from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoints
from evomerge.engine import kernel_dispatch
from evomerge.engine import to_disk as disk
from evomerge.errors import BadInput, CheckpointError, OutputError, RecipeError
from evomerge.recipe import parse_recipe
from evomerge.run.check import check_file
from evomerge.run.merge import merge_to_folder, plan_documents
from tests.frame import files, invoke
from tests.models import write_tiny_llama


def linear(*models: Any, weights: tuple[float, ...] = (), **more: Any) -> dict[str, Any]:
    pairs = zip(models, weights or (1.0,) * len(models), strict=True)
    return {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": w}} for m, w in pairs],
    } | more


def chain(family: dict[str, Path]) -> list[dict[str, Any]]:
    """((a + b) / 2 + 3 c) / 4, and then a quarter of the way from the base to that."""
    arithmetic = {
        "merge_method": "task_arithmetic",
        "base_model": str(family["base"]),
        "models": [{"model": "second", "parameters": {"weight": 0.25}}],
    }
    first = linear(family["a"], family["b"], name="first")
    return [first, linear("first", family["c"], weights=(1, 3), name="second"), arithmetic]


def test_the_numbers_and_what_is_left(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def progress(done: int, total: int) -> None:
        seen.append({path.name for path in tmp_path.iterdir()})

    out = merge_to_folder(parse_recipe(chain(tiny_family)), tmp_path / "out", progress=progress)
    assert all(".out.steps" in names for names in seen), "intermediate results lie beside the output"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    base, a, b, c = (load_file(tiny_family[name] / "model.safetensors") for name in ("base", "a", "b", "c"))
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == base.keys()
    for name in merged:
        second = ((a[name] + b[name]) / 2 + 3 * c[name]) / 4
        torch.testing.assert_close(merged[name], base[name] + 0.25 * (second - base[name]), atol=1e-6, rtol=1e-5)


def test_the_card_holds_every_step(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    recipe = parse_recipe(chain(tiny_family))
    card = (merge_to_folder(recipe, tmp_path / "out") / "README.md").read_text()
    assert parse_recipe(card.split("```yaml\n")[1].split("```")[0]) == recipe
    assert [line for line in card.splitlines() if line.startswith("- `")] == [
        "- `a`",
        "- `b`",
        "- `c`",
        "- `base` (base)",
    ]
    assert "second" not in card.split("## Recipe")[0]


def test_steps_keep_their_own_dtype(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """A step rounded to bfloat16 is read as bfloat16; the final merge writes what it was asked for."""
    first = linear(tiny_family["a"], name="first", out_dtype="bfloat16")
    out = merge_to_folder(parse_recipe([first, linear("first", out_dtype="float32")]), tmp_path / "out")
    a, merged = (load_file(folder / "model.safetensors") for folder in (tiny_family["a"], out))
    for name, value in merged.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, a[name].bfloat16().float())


def test_what_is_wrong_with_a_later_step_is_found_before_the_first_is_carried_out(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = write_tiny_llama(tmp_path / "narrow", 3, hidden=16)
    documents = [
        linear(tiny_family["a"], name="first"),
        linear("first", narrow, name="second"),
        linear("second"),
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    for arguments in (["merge", path, tmp_path / "out"], ["check", path]):
        ended = invoke(capsys, *arguments)
        assert (ended.code, ended.out) == (2, "")
        assert "the merge 'second': " in ended.err
        assert "other shapes than first" in ended.err
    assert {found.name for found in tmp_path.iterdir()} == {"narrow", "recipe.yaml"}


def test_a_failure_in_a_step_leaves_nothing(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    write_tiny_llama(broken, 1, base=tiny_family["base"])
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    documents = [
        linear(tiny_family["a"], name="first"),
        linear("first", broken, name="second"),
        linear("second"),
    ]
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in model\.norm\.weight"):
        evomerge.merge(documents, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_stopped_by_the_user(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == total + 2:  # within the second step
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evomerge.merge(chain(tiny_family), tmp_path / "out", progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_merge_left_is_cleared(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    left = tmp_path / ".out.steps" / "step-1"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    evomerge.merge(chain(tiny_family), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_folder_that_is_taken_is_intact(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    evomerge.merge(linear(tiny_family["a"]), tmp_path / "out")
    before = dict(files(tmp_path))
    steps: list[int] = []
    with pytest.raises(OutputError, match="is not empty"):
        evomerge.merge(chain(tiny_family), tmp_path / "out", progress=lambda done, total: steps.append(done))
    assert steps == [], "refused before any work"
    assert dict(files(tmp_path)) == before


def test_a_drop_of_a_step_is_the_same_in_every_folder(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """The random field hangs on the content of a step's result, not on where it lay."""
    dare = {
        "merge_method": "dare_linear",
        "base_model": str(tiny_family["base"]),
        "models": [{"model": "first", "parameters": {"weight": 1, "density": 0.5}}],
    }
    documents = [linear(tiny_family["a"], tiny_family["b"], name="first"), dare]
    outs = [evomerge.merge(documents, tmp_path / name / "out") for name in ("one", "two")]
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()


def test_planned_from_headers(tiny_family: dict[str, Path]) -> None:
    recipe = parse_recipe(chain(tiny_family))
    plans = plan_documents(recipe, open_checkpoints(recipe.external_models()))
    assert [len(plan.operations) for plan in plans] == [38, 38, 38]
    assert {op.base.model for op in plans[2].operations if op.base} == {str(tiny_family["base"])}
    assert {source.model for op in plans[2].operations for source in op.sources} == {"second"}


def test_check_tells_every_step(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump_all(chain(tiny_family)))
    ended = invoke(capsys, "check", path)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].startswith("step first: linear of 2 models, 38 tensors, 0.00 GB")
    assert lines[1].startswith("step second: linear of 2 models")
    assert lines[2] == f"{path}: task_arithmetic of 2 models, 38 tensors"
    assert lines[4].startswith("its steps take ")


def test_a_name_that_is_nowhere(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such model: 'third'"):
        evomerge.merge([linear(tiny_family["a"], name="first"), linear("first", "third")], tmp_path / "out")
    with pytest.raises(RecipeError, match="did you mean 'first'"):
        evomerge.merge([linear(tiny_family["a"], name="first"), linear("fisrt")], tmp_path / "out")


def test_a_search_takes_no_list_of_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "search.yaml"
    path.write_text("name: x\n---\nname: y\n")
    for command in ("run", "check"):
        ended = invoke(capsys, command, path)
        assert ended.code == 2
        assert "has 2 documents" in ended.err


def test_an_adapter_on_the_result_of_a_step(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """`first+adapter` is (a + b) / 2 with B A added to one weight (rank 2, alpha 2: a scale of 1)."""
    name = "model.layers.0.mlp.up_proj"
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(64, 2, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(weights, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    first = linear(tiny_family["a"], tiny_family["b"], name="first")
    out = evomerge.merge([first, linear(f"first+{adapter}", "first", weights=(1, 3))], tmp_path / "out")
    a, b, merged = (load_file(folder / "model.safetensors") for folder in (tiny_family["a"], tiny_family["b"], out))
    for key, value in merged.items():
        added = up @ down / 4 if key == f"{name}.weight" else 0
        torch.testing.assert_close(value, (a[key] + b[key]) / 2 + added, atol=1e-6, rtol=1e-5)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump_all([first, linear(f"first+{adapter}")]))
    assert "what comes after step first shows when that is there" in check_file(path)


def test_a_device_computes_every_step(
    tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(chain(tiny_family))
    here = load_file(merge_to_folder(recipe, tmp_path / "here") / "model.safetensors")
    monkeypatch.setattr(disk, "find_device", torch.device)  # the processor as a device: no compiled kernels
    monkeypatch.setattr(kernel_dispatch, "find_kernel", None)
    there = load_file(merge_to_folder(recipe, tmp_path / "there", device="cpu") / "model.safetensors")
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=2e-6, atol=1e-7, msg=name)


def test_models_are_not_read_for_their_hashes(
    tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single merge tells no candidates apart; its steps, a call's and a check's neither."""

    def refuse(checkpoint: Checkpoint) -> str:
        raise AssertionError(f"{checkpoint} was hashed")

    monkeypatch.setattr(Checkpoint, "fingerprint", property(refuse))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(chain(tiny_family)))
    merge_to_folder(parse_recipe(chain(tiny_family)), tmp_path / "out")
    assert "task_arithmetic" in check_file(path)
    evomerge.merge_models("ties", base=tiny_family["base"], models=[tiny_family["a"], tiny_family["b"]])
    with pytest.raises(AssertionError, match="was hashed"):  # what a draw depends on
        evomerge.merge_models("dare", base=tiny_family["base"], models=[tiny_family["a"]])


def test_tensors_that_not_every_model_has_can_be_left_out(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    states = [load_file(tiny_family[name] / "model.safetensors") for name in "ab"]
    states[0]["extra.weight"] = torch.ones(3)
    del states[1]["model.norm.weight"]
    for name, state in zip("ab", states, strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    recipe = parse_recipe(linear(*(tmp_path / f"{name}.safetensors" for name in "ab")))
    with pytest.raises(CheckpointError, match="lacks"):
        merge_to_folder(recipe, tmp_path / "out")
    said: list[str] = []
    merge_to_folder(recipe, tmp_path / "out", tensor_intersection=True, warn=said.append)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == states[0].keys() & states[1].keys()
    assert said == [f"{tmp_path / 'a.safetensors'}: without extra.weight, model.norm.weight, which not every model has"]
