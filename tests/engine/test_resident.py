"""The resident model is, bit for bit, the checkpoint that the same recipe writes; and stays right in any order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.engine.resident import Resident
from evomerge.errors import CandidateError
from evomerge.methods.contract import Method
from evomerge.methods.registry import METHODS
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from tests.engine.recipes import EVERY, layers, opened, plan_of, recipe_for, single
from tests.models import write_tiny_llama

TOKENS = torch.arange(3, 43).view(2, 20)  # within every vocabulary here


def hashes(family: dict[str, Path]) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in family.values()
        for path in sorted(folder.glob("*.safetensors"))
    }


@pytest.fixture(autouse=True)
def _sources_stay_as_they_are(tiny_family: dict[str, Path]) -> Iterator[None]:
    """No test may write through a memory-mapped tensor."""
    before = hashes(tiny_family)
    yield
    assert hashes(tiny_family) == before


@pytest.fixture
def resident(tiny_family: dict[str, Path]) -> Resident:
    """A live model over the whole family, in the recipes' own dtypes."""
    return Resident(opened(str(folder) for folder in tiny_family.values()))


def on_disk(recipe: dict[str, Any], out: Path) -> Any:
    """The checkpoint that a recipe writes, as transformers loads it: whole, with nothing left over."""
    merge_to_folder(parse_recipe(recipe), out)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def same_model(ours: Any, theirs: Any) -> None:
    """Every tensor of the state dict has the same bits, and the logits agree."""
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name]), name
    with torch.inference_mode():
        torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-6, atol=1e-6)


def write(resident: Resident, recipe: dict[str, Any]) -> Any:
    return resident.write(plan_of(recipe))[0]


@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)
def test_as_written_to_disk(resident: Resident, tiny_family: dict[str, Path], tmp_path: Path, method: Method) -> None:
    """And the same from several threads as from one."""
    recipe = recipe_for(method, tiny_family)
    model = write(resident, recipe)
    same_model(model, on_disk(recipe, tmp_path / "out"))
    before, alone = torch.get_num_threads(), model.state_dict()
    torch.set_num_threads(3)
    try:
        threaded = write(Resident(opened(str(folder) for folder in tiny_family.values())), recipe).state_dict()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(value, threaded[name]) for name, value in alone.items())


@pytest.mark.parametrize("name", ["ties", "slerp"])
def test_scope_model_as_written_to_disk(
    resident: Resident, tiny_family: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """One threshold, one angle for the whole model: not what each tensor would have on its own."""
    method = next(m for m in EVERY if m.name == name)
    recipe = recipe_for(method, tiny_family)
    alone = {key: value.clone() for key, value in write(resident, recipe).state_dict().items()}
    recipe["parameters"]["scope"] = "model"
    model = write(resident, recipe)
    assert any(not torch.equal(value, alone[key]) for key, value in model.state_dict().items())
    same_model(model, on_disk(recipe, tmp_path / "out"))


def test_another_architecture(tmp_path: Path) -> None:
    """GPT-2: other names, transposed weights, biases, learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=3, n_head=2)).save_pretrained(
            tmp_path / name
        )
    family = {name: tmp_path / name for name in "ab"}
    merged = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1}} for m in family.values()],
    }
    for number, recipe in enumerate([merged, layers((family["a"], 0, 3), (family["b"], 1, 3))]):
        model = Resident(opened(str(folder) for folder in family.values())).write(plan_of(recipe))[0]
        same_model(model, on_disk(recipe, tmp_path / f"out{number}"))


@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)
def test_stored_tensors_are_the_resident_ones(
    resident: Resident, tiny_family: dict[str, Path], tmp_path: Path, method: Method
) -> None:
    """In bfloat16, with three models: what the file holds, not what transformers makes of it."""
    recipe = recipe_for(method, tiny_family, names="abc", out_dtype="bfloat16")
    model = write(resident, recipe)
    merge_to_folder(parse_recipe(recipe), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    held = model.state_dict()
    assert set(held) - set(stored) == {"lm_head.weight"}
    for name, value in stored.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(held[name], value), name


def test_what_is_there_already_is_skipped(resident: Resident, tiny_family: dict[str, Path]) -> None:
    recipe = recipe_for(next(m for m in EVERY if m.name == "ties"), tiny_family)
    _, first = resident.write(plan_of(recipe))
    assert (first.computed, first.bound, first.skipped) == (38, 0, 0)
    _, again = resident.write(plan_of(recipe))
    assert (again.computed, again.bound, again.skipped) == (0, 0, 38)


def test_one_changed_slice_computes_its_own_tensors(
    resident: Resident, tiny_family: dict[str, Path], tmp_path: Path
) -> None:
    def recipe(upper: float) -> dict[str, Any]:
        def part(span: list[int], weight: float) -> dict[str, Any]:
            parameters = {"weight": weight, "density": 0.5}
            models = [{"model": str(tiny_family[n]), "layer_range": span, "parameters": parameters} for n in "ab"]
            return {"sources": models}

        slices = [part([0, 3], 0.7), part([3, 4], upper)]
        return {"merge_method": "ties", "base_model": str(tiny_family["base"]), "slices": slices}

    resident.write(plan_of(recipe(0.3)))
    model, written = resident.write(plan_of(recipe(0.4)))
    # The last slice has one layer of nine tensors, and the final norm.
    assert (written.computed, written.skipped) == (10, 28)
    same_model(model, on_disk(recipe(0.4), tmp_path / "out"))


PATTERNS = {3: [("a", 0, 1), ("b", 1, 3)], 7: [("a", 0, 3), ("a", 1, 3), ("c", 2, 4)], 4: [("b", 0, 4)]}


@pytest.mark.parametrize("depth", PATTERNS)
def test_layers_copied_whole(resident: Resident, tiny_family: dict[str, Path], tmp_path: Path, depth: int) -> None:
    """Shorter, longer and as deep as the sources; a repeated layer shares its parameters between modules."""
    recipe = layers(*((tiny_family[name], first, last) for name, first, last in PATTERNS[depth]))
    plan = plan_of(recipe)
    model, written = resident.write(plan)
    assert (written.computed, written.bound) == (0, 9 * depth + 2)
    decoder = model.model.layers  # type: ignore[union-attr]
    assert len(decoder) == model.config.num_hidden_layers == depth  # type: ignore[union-attr,arg-type]
    assert [layer.self_attn.layer_idx for layer in decoder] == list(range(depth))  # type: ignore[union-attr]
    assert len({id(layer) for layer in decoder}) == depth  # type: ignore[union-attr]
    if depth == 7:
        twice = [layer.mlp.up_proj.weight for layer in decoder]  # type: ignore[union-attr]
        assert twice[1].data_ptr() == twice[3].data_ptr()
        assert twice[2].data_ptr() == twice[4].data_ptr()
        assert twice[0].data_ptr() != twice[1].data_ptr()
    same_model(model, on_disk(recipe, tmp_path / "out"))
    generated = model.generate(TOKENS[:, :5], max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert generated.shape == (2, 9)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, 8), min_size=2, max_size=6))
def test_any_order_of_candidates(
    tiny_family: dict[str, Path], written_once: dict[int, dict[str, Tensor]], order: list[int]
) -> None:
    """Copies, scaled copies, merges of several depths one after another: each is what it is on its own."""
    resident = Resident(opened(str(folder) for folder in tiny_family.values()))
    for number in order:
        model = write(resident, variety(tiny_family)[number])
        state, expected = model.state_dict(), written_once[number]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


def variety(family: dict[str, Path]) -> list[dict[str, Any]]:
    merged = [recipe_for(m, family) for m in EVERY if m.name in ("ties", "dare_ties", "linear")]
    copied = [layers(*((family[name], first, last) for name, first, last in parts)) for parts in PATTERNS.values()]
    scaled = layers((family["a"], 0, 2), (family["a"], 0, 2), parameters={"scale": 0.5})
    return [*merged, *copied, scaled, single(family["a"]), single(family["b"], out_dtype="bfloat16")]


@pytest.fixture(scope="module")
def written_once(tiny_family: dict[str, Path]) -> dict[int, dict[str, Tensor]]:
    """Each of the variety, from a resident model of its own."""
    found = {}
    for number, recipe in enumerate(variety(tiny_family)):
        model = write(Resident(opened(str(folder) for folder in tiny_family.values())), recipe)
        found[number] = {name: value.clone() for name, value in model.state_dict().items()}
    return found


def test_a_failed_write_leaves_nothing_that_counts(
    resident: Resident, tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error in the middle, the candidate that was there before is computed again, and right."""
    method = next(m for m in EVERY if m.name == "task_arithmetic")
    first, second = recipe_for(method, tiny_family), recipe_for(method, tiny_family, names="bc")
    expected = {name: value.clone() for name, value in write(resident, first).state_dict().items()}
    whole = "evomerge.engine.resident.execute_all"
    calls = 0

    def half(work: list[Any], threads: int) -> None:
        nonlocal calls
        calls += 1
        for piece in work[: len(work) // 2]:
            piece()
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(whole, half)
        with pytest.raises(RuntimeError, match="out of memory"):
            write(resident, second)
    assert calls == 1
    state = write(resident, first).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_untied_heads(tmp_path: Path) -> None:
    family = {"base": write_tiny_llama(tmp_path / "base", 0, tied=False)}
    family |= {name: write_tiny_llama(tmp_path / name, i, base=family["base"]) for i, name in enumerate("ab", 1)}
    for name in ("frankenmerge", "linear", "ties", "dare"):  # copied, combined, elected, drawn at random
        recipe = recipe_for(METHODS[name], family)
        plan = plan_of(recipe)
        assert "lm_head.weight" in {operation.output for operation in plan.operations}
        model = Resident(opened(str(folder) for folder in family.values())).write(plan)[0]
        assert isinstance(model, LlamaForCausalLM)
        assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
        same_model(model, on_disk(recipe, tmp_path / name))


def test_tied_heads(resident: Resident, tiny_family: dict[str, Path]) -> None:
    for recipe in variety(tiny_family):
        model = write(resident, recipe)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_rounded_once_to_the_output_then_cast(
    tmp_path: Path, tiny_family: dict[str, Path], wanted: torch.dtype
) -> None:
    """Sources in bfloat16 give a bfloat16 checkpoint; the evaluator casts from there, in float32 too."""
    family = {}
    for name, folder in tiny_family.items():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        loaded.save_pretrained(tmp_path / name)
        family[name] = tmp_path / name
    recipe = recipe_for(next(m for m in EVERY if m.name == "task_arithmetic"), family)
    plan = plan_of(recipe)
    assert {operation.dtype for operation in plan.operations} == {"BF16"}
    model, _ = Resident(opened(str(f) for f in family.values()), wanted).write(plan)
    merge_to_folder(parse_recipe(recipe), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    base, a, b = (load_file(family[n] / "model.safetensors") for n in ("base", "a", "b"))
    for name, value in stored.items():
        assert value.dtype == torch.bfloat16
        held = model.state_dict()[name]
        assert held.dtype == wanted
        assert torch.equal(held, value.to(wanted))
        start = base[name].double()
        exact = start + 0.9 * (0.3 * (a[name].double() - start) + 0.7 * (b[name].double() - start))
        # bfloat16 has eight significant bits, so that rounding once errs by 2^-8 relative at most; and but for a few
        # values that lie between two by a hair of float32, it gives the nearest.
        assert torch.all((value.double() - exact).abs() <= exact.abs() * 2.0**-7.99 + 1e-9)
        assert (value == exact.bfloat16()).float().mean() > 0.995


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's note on tied heads
def test_an_adapter_is_a_source(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_family["base"]),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    reference = f"{tiny_family['base']}+{tmp_path / 'adapter'}"
    recipe = {
        "merge_method": "ties",
        "base_model": str(tiny_family["base"]),
        "models": [{"model": reference}, {"model": str(tiny_family["b"])}],
        "parameters": {"weight": 0.6, "density": 0.5},
    }
    checkpoints = opened([str(tiny_family["base"]), reference, str(tiny_family["b"])])
    model, _ = Resident(checkpoints).write(plan_of(recipe, checkpoints))
    same_model(model, on_disk(recipe, tmp_path / "out"))
    # Alone, it is PEFT's own merge.
    alone, _ = Resident({reference: open_checkpoint(reference)}).write(plan_of(single(reference)))
    merged = adapted.merge_and_unload().state_dict()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)


def test_residual_scale_multiplies_what_a_block_writes_last(
    resident: Resident, tiny_family: dict[str, Path], tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {"merge_method": "frankenmerge", "models": [{"model": str(tiny_family["a"])}]}
    recipe["parameters"] = {"pattern": "AAAA", "residual_scale": [0.5, 1.0, 1.0, 2.0]}
    model = write(resident, recipe)
    stored = load_file(tiny_family["a"] / "model.safetensors")
    factors = (0.5, 1.0, 1.0, 2.0)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        layer = int(name.split(".")[2]) if ".layers." in name else None
        last = name.endswith(("o_proj.weight", "down_proj.weight"))
        factor = factors[layer] if last and layer is not None else 1.0
        assert torch.equal(value, stored[name] * factor), name
    same_model(model, on_disk(recipe, tmp_path / "out"))


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
def test_a_config_of_other_shapes_is_told(tmp_path: Path, key: str) -> None:
    folder = write_tiny_llama(tmp_path / "model", 0)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {key: 2 * settings[key]}))
    with pytest.raises(CandidateError, match=r"config\.json describes .*(embed_tokens|mlp).* with shape \["):
        Resident({str(folder): open_checkpoint(str(folder))}).write(plan_of(single(str(folder))))
