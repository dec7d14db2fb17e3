"""`evomerge.merge_models`: every method as a call, the same numbers as by recipe, a model of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

import evomerge
from evomerge.errors import BadInput, CheckpointError, RecipeError
from evomerge.methods.registry import METHODS
from evomerge.notebook import recipe_body
from tests.architectures import ARCHITECTURES
from tests.engine.test_architectures import load
from tests.frame import environment
from tests.models import write_tiny_llama

# What a method needs to be told beyond its papers' values.
NEEDED: dict[str, dict[str, Any]] = {"frankenmerge": {"pattern": "AABB"}}


def paths(family: dict[str, Path], names: str = "ab") -> list[str]:
    return [str(family[name]) for name in names]


def state(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors; a tied head under the embedding's name alone."""
    return {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_as_by_recipe(tiny_family: dict[str, Path], tmp_path: Path, name: str) -> None:
    method, base = METHODS[name], str(tiny_family["base"])
    ancestor = None if method.copies_layers else base
    models = paths(tiny_family, "abc"[: min(method.max_sources or 2, 3)])
    asked = {p.name: sum(p.gene) / 2 for p in method.parameters if p.required and not p.per_source and p.gene}
    given = asked | NEEDED.get(name, {})
    merged = evomerge.merge_models(name, base=ancestor, models=models, seed=3, **given)
    body = recipe_body(name, models, ancestor, given, 3)
    written = load_file(evomerge.merge({**body, "seed": 3}, tmp_path / "out") / "model.safetensors")
    assert isinstance(merged, LlamaForCausalLM)
    held = state(merged)
    assert held.keys() == written.keys()
    for key, value in written.items():
        assert torch.equal(held[key], value), key


def test_ties_with_its_lists(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    base, models = str(tiny_family["base"]), paths(tiny_family)
    merged = evomerge.merge_models(
        "ties", base=base, models=models, weights=[1, 0.5], densities=[0.3, 0.6], lambda_=0.8
    )
    entries = [
        {"model": model, "parameters": {"weight": weight, "density": density}}
        for model, weight, density in zip(models, (1, 0.5), (0.3, 0.6), strict=True)
    ]
    recipe = {"merge_method": "ties", "base_model": base, "models": entries, "parameters": {"lambda": 0.8}}
    written = load_file(evomerge.merge(recipe, tmp_path / "out") / "model.safetensors")
    assert all(torch.equal(state(merged)[key], value) for key, value in written.items())


def test_the_result_is_a_model_like_any_other(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """Saved and loaded with its tokenizer, it is the same; it generates, and it can be trained on."""
    merged = evomerge.merge_models("linear", models=paths(tiny_family))
    merged.save_pretrained(tmp_path / "saved")
    merged.tokenizer.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    batch = tokenizer("a merge", return_tensors="pt")
    assert not merged.training
    torch.testing.assert_close(merged(**batch).logits, again(**batch).logits)
    assert merged.generate(**batch, max_new_tokens=3).shape == (1, batch["input_ids"].shape[1] + 3)
    assert merged.generation_config.eos_token_id == again.generation_config.eos_token_id == 1
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    merged(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in merged.parameters())


def test_memory_of_its_own(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """The files may change and go; two layers from one are two."""
    copy = Path(shutil.copytree(tiny_family["a"], tmp_path / "a"))
    merged = evomerge.merge_models("frankenmerge", models=[copy], pattern="A")
    before = {key: value.clone() for key, value in state(merged).items()}
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(8000)
        file.write(b"\0" * 100_000)
    shutil.rmtree(copy)
    assert all(torch.equal(state(merged)[key], value) for key, value in before.items())
    with torch.no_grad():
        merged.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(state(merged)["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])


def test_loaded_models_and_paths_alike(tiny_family: dict[str, Path]) -> None:
    by_path = evomerge.merge_models("task_arithmetic", base=tiny_family["base"], models=paths(tiny_family), weights=0.4)
    base, a = (LlamaForCausalLM.from_pretrained(tiny_family[name]) for name in ("base", "a"))
    mixed = evomerge.merge_models("task_arithmetic", base=base, models=[a, tiny_family["b"]], weights=0.4)
    assert all(torch.equal(state(mixed)[key], value) for key, value in state(by_path).items())
    assert mixed.tokenizer.get_vocab() == by_path.tokenizer.get_vocab()
    # And of what comes out, again.
    again = evomerge.merge_models("linear", models=[mixed])
    assert all(torch.equal(state(again)[key], value) for key, value in state(mixed).items())
    assert again.tokenizer is not None


def test_dtype(tiny_family: dict[str, Path]) -> None:
    merged = evomerge.merge_models("linear", models=paths(tiny_family), dtype="bfloat16")
    assert {value.dtype for value in merged.parameters()} == {torch.bfloat16}
    assert merged.dtype == merged.config.dtype == torch.bfloat16


def test_seeds(tiny_family: dict[str, Path]) -> None:
    def drop(seed: int) -> torch.Tensor:
        base, models = tiny_family["base"], paths(tiny_family)
        merged = evomerge.merge_models("dare_linear", base=base, models=models, drop_rates=[0.5, 0.7], seed=seed)
        return state(merged)["model.layers.0.mlp.up_proj.weight"]

    assert torch.equal(drop(1), drop(1))
    assert not torch.equal(drop(1), drop(2))


def test_familiar_helpers(tiny_family: dict[str, Path]) -> None:
    base, models = str(tiny_family["base"]), paths(tiny_family)
    ties = evomerge.ties_merge_llama(base, models, [0.7, 0.3], [0.4, 0.5])
    same = evomerge.merge_models("ties", base=base, models=models, weights=[0.7, 0.3], densities=[0.4, 0.5])
    assert all(torch.equal(state(ties)[key], value) for key, value in state(same).items())
    dare = evomerge.dare_merge_llama(
        base_model_path=base, ft_model_paths=models, weights=[0.7, 0.3], densities=[0.4, 0.5]
    )
    same = evomerge.merge_models("dare_linear", base=base, models=models, weights=[0.7, 0.3], densities=[0.4, 0.5])
    assert all(torch.equal(state(dare)[key], value) for key, value in state(same).items())
    assert evomerge.dare_merge_llama(base, models, use_fp16=True).dtype == torch.float16


def body(name: str, base: str | None = "base", count: int = 2, **parameters: Any) -> dict[str, Any]:
    return recipe_body(name, ["a", "b", "c"][:count], base, parameters, 0)


def test_what_is_left_out_is_the_papers() -> None:
    assert body("ties")["parameters"] == {"weight": 1.0, "density": 0.2}
    assert body("dare")["parameters"] == {"weight": 1.0, "density": 0.1}
    assert body("dare_ties", drop_rates=[0.5, 0.6])["parameters"] == {"weight": 1.0}, "no second trim"
    assert body("ties", density=0.7)["parameters"] == {"weight": 1.0, "density": 0.7}
    found = body("ties", weights=[1, None], density=[0.1, 0.2])
    assert found["parameters"] == {}
    assert [entry["parameters"] for entry in found["models"]] == [{"weight": 1, "density": 0.1}, {"density": 0.2}]


def test_slerp_is_on_deltas_where_there_is_a_base_and_something_to_interpolate() -> None:
    assert body("slerp")["parameters"] == {"weight": 1.0, "on": "deltas"}
    assert body("slerp", base=None)["parameters"] == {"weight": 1.0}
    assert body("slerp", t=0.3)["parameters"] == {"t": 0.3, "on": "deltas"}
    assert body("slerp", count=1, t=0.3)["parameters"] == {"t": 0.3}


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("ties", {"densitys": [1, 1]}, r"ties has no parameter 'densitys' \(did you mean 'densit(y|ies)'\?\)"),
        ("ties", {"weights": [1, 1, 1]}, "weights: 3 values for 2 models"),
        ("ties", {"weights": [1, 1], "weight": 1}, "weight is given twice"),
        ("ties", {"density": 2}, r"merge_models\('ties'\): parameters.density: must be between 0 and 1"),
        ("tise", {}, "did you mean 'ties'"),
    ],
)
def test_refusals(tiny_family: dict[str, Path], name: str, parameters: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        evomerge.merge_models(name, base=tiny_family["base"], models=paths(tiny_family), **parameters)


def test_refused_models(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a list of at least one model"):
        evomerge.merge_models("linear", models=str(tiny_family["a"]))
    with pytest.raises(BadInput, match="got int"):
        evomerge.merge_models("linear", models=[3])
    with pytest.raises(CheckpointError, match="no such model"):
        evomerge.merge_models("linear", models=[tmp_path / "none"])
    with pytest.raises(RecipeError, match="base_model: is missing"):
        evomerge.merge_models("ties", models=paths(tiny_family))


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, evomerge; evomerge.merge_models, evomerge.DareMerger; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def extended(folder: Path, seed: int) -> Path:
    """A tiny model with two more tokens than the others have."""
    write_tiny_llama(folder, seed)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<x>", "<y>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_vocabularies_of_other_sizes_are_aligned_by_text(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """To the base's tokens where there is a base, else to those of all; a token that one lacks is the other's."""
    base, a, b = tiny_family["base"], tiny_family["a"], extended(tmp_path / "b", 9)
    narrow = evomerge.merge_models("task_arithmetic", base=base, models=[a, b])
    assert (narrow.config.vocab_size, len(narrow.tokenizer)) == (259, 259)
    wide = evomerge.merge_models("linear", models=[a, b])
    rows = wide.model.embed_tokens.weight
    assert (wide.config.vocab_size, len(wide.tokenizer), rows.shape[0]) == (261, 261, 261)
    theirs = load_file(b / "model.safetensors")["model.embed_tokens.weight"]
    for token in ("<x>", "<y>"):
        index = wide.tokenizer.convert_tokens_to_ids(token)
        torch.testing.assert_close(rows[index].detach(), theirs[index])
    first = evomerge.merge_models("linear", models=[a, b], tokenizer_source=f"model:{a}")
    assert first.config.vocab_size == 259


def test_a_step_of_another_vocabulary(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """The final merge takes the tokenizer that an earlier one made."""
    a, b = str(tiny_family["a"]), str(extended(tmp_path / "b", 9))
    united = [{"model": model, "parameters": {"weight": 1}} for model in (a, b)]
    final = [{"model": model, "parameters": {"weight": 1}} for model in ("first", a)]
    documents = [
        {"name": "first", "merge_method": "linear", "tokenizer_source": "union", "models": united},
        {"merge_method": "linear", "tokenizer_source": "model:first", "models": final},
    ]
    out = evomerge.merge(documents, tmp_path / "out")
    assert load_file(out / "model.safetensors")["model.embed_tokens.weight"].shape == (261, 32)
    assert len(AutoTokenizer.from_pretrained(out)) == 261


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "llava", "vit"])
def test_other_architectures(family_of: Callable[[str], dict[str, Path]], tmp_path: Path, name: str) -> None:
    """Some of their modules are not the stored tensors one by one: experts in one tensor, other names."""
    family, architecture = family_of(name), ARCHITECTURES[name]
    given = {"weights": [0.5, 0.3]}
    merged = evomerge.merge_models("task_arithmetic", base=family["base"], models=paths(family), **given)
    recipe = recipe_body("task_arithmetic", paths(family), str(family["base"]), given, 0)
    written = load(architecture, evomerge.merge(recipe, tmp_path / "out"))
    assert type(merged) is type(written)
    assert {k for k, v in written.state_dict().items() if not torch.equal(merged.state_dict()[k], v)} == set()


@pytest.mark.parametrize("name", ["mixtral", "llava"])
def test_memory_of_their_own(family_of: Callable[[str], dict[str, Path]], tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(family_of(name)["a"], tmp_path / "a"))
    merged = evomerge.merge_models("passthrough", models=[copy], pattern="A")
    before = {key: value.clone() for key, value in merged.state_dict().items()}
    size = (copy / "model.safetensors").stat().st_size
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))
    assert {key for key, value in merged.state_dict().items() if not torch.equal(value, before[key])} == set()


def test_a_run_is_opened_to_look_at(finished_run: Path) -> None:
    run = evomerge.open_run(finished_run)
    assert run.result is not None
    assert run.winner is not None
    assert run.winner.number == run.result.winner.candidate
    table = run.candidates()
    assert list(table.index) == list(range(18))
    assert table.loc[run.winner.number, "fitness"] == run.winner.fitness
    assert table["tiny_choice/acc"].notna().all()
    for figure in (run.plot_history(), run.plot_recipe(), run.plot_recipe(0), run.plot_lineage()):
        assert len(figure.data) >= 1
    assert run.result.verdict in repr(run)
    assert f"Candidate {run.winner.number} wins" in run._repr_html_()
    with pytest.raises(BadInput, match="nothing to draw"):
        run.plot_recipe(999)


def test_a_run_that_has_no_candidates_yet(finished_run: Path, tmp_path: Path) -> None:
    from evomerge.run.folder import RunFolder

    folder = RunFolder.create(tmp_path / "run", RunFolder.existing(finished_run).spec, "")
    run = evomerge.open_run(folder.root)
    assert (run.result, run.winner, len(run.candidates())) == (None, None, 0)
    assert "Nothing is scored yet" in run._repr_html_()
