"""`evomerge merge` with the options that people know from mergekit-yaml."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge.cli.merge import WITHOUT_EFFECT, _seeded, choose_device, mergekit_size
from evomerge.errors import BadInput
from evomerge.recipe import parse_recipe
from tests.frame import files, invoke

VALUES = {"write_threads": ["2"], "lora_merge_cache": ["somewhere"], "lora_merge_dtype": ["float32"]}


@pytest.fixture
def recipe(tiny_family: dict[str, Path], tmp_path: Path) -> Path:
    models = [{"model": str(tiny_family[name]), "parameters": {"weight": 1, "density": 0.5}} for name in "ab"]
    content = {"merge_method": "dare_linear", "base_model": str(tiny_family["base"]), "models": models}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_whole_line_that_people_type(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option without effect says so once, on stderr, and changes nothing."""
    plain = invoke(capsys, "merge", recipe, recipe.parent / "plain")
    assert (plain.code, plain.err) == (0, "")
    given = [a for name in WITHOUT_EFFECT for a in (f"--{name.replace('_', '-')}", *VALUES.get(name, []))]
    ended = invoke(capsys, "merge", recipe, recipe.parent / "out", *given, "--allow-crimes", "--copy-tokenizer")
    assert (ended.code, ended.out) == (0, f"{recipe.parent / 'out'}\n")
    notes = ended.err.splitlines()
    assert len(notes) == len(WITHOUT_EFFECT)
    for note, name in zip(notes, WITHOUT_EFFECT, strict=True):
        assert note == f"note: --{name.replace('_', '-')} has no effect here: {WITHOUT_EFFECT[name]}"
    assert dict(files(recipe.parent / "out")) == dict(files(recipe.parent / "plain"))
    quiet = invoke(capsys, "merge", recipe, recipe.parent / "quiet", "--lazy-unpickle", "-q")
    assert (quiet.code, quiet.err) == (0, "")


def test_help_says_which_options_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(invoke(capsys, "merge", "--help").out.split())
    for name, reason in WITHOUT_EFFECT.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert f"No effect here: {reason}." in shown


def test_sizes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [mergekit_size(text) for text in ("7", "3k", "500M", "5B")] == [7, 3000, 500 * 10**6, 5 * 10**9]
    for text in ("5GB", "0", "-1", "1.5B", ""):
        with pytest.raises(BadInput, match="--out-shard-size"):
            mergekit_size(text)
    out = recipe.parent / "out"
    assert invoke(capsys, "merge", recipe, out, "--out-shard-size", "60K").code == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert {path.name for path in shards} == set(index["weight_map"].values())
    for path in shards:
        assert sum(value.numel() * 4 for value in load_file(path).values()) <= 60_000


def test_without_tokenizer_and_card(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, bare = recipe.parent / "whole", recipe.parent / "bare"
    assert invoke(capsys, "merge", recipe, whole).code == 0
    assert invoke(capsys, "merge", recipe, bare, "--no-copy-tokenizer", "--no-write-model-card").code == 0
    assert {path.name for path in bare.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    left = {path.name for path in whole.iterdir()} - {path.name for path in bare.iterdir()}
    assert left == {"README.md", "recipe.yaml", "tokenizer.json", "tokenizer_config.json"}
    card = recipe.parent / "card"
    assert invoke(capsys, "merge", recipe, card, "--no-copy-tokenizer").code == 0
    assert (card / "README.md").is_file()
    assert not (card / "tokenizer.json").exists()


def test_random_seed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same as the seed in the recipe, and said in the card."""
    for out, more in (("zero", []), ("three", ["--random-seed", "3"])):
        assert invoke(capsys, "merge", recipe, recipe.parent / out, *more).code == 0
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "seed": 3}))
    assert invoke(capsys, "merge", recipe, recipe.parent / "written").code == 0
    found = {name: dict(files(recipe.parent / name)) for name in ("zero", "three", "written")}
    assert found["three"] == found["written"]
    assert found["three"]["model.safetensors"] != found["zero"]["model.safetensors"]


def test_random_seed_of_modules_and_steps() -> None:
    models = [{"model": "a"}, {"model": "b"}]
    modules = {"encoder": {"models": models}, "decoder": {"models": [{"model": "first"}, *models]}}
    shared = {"merge_method": "linear", "parameters": {"weight": 1}, "seed": 2}
    recipe = parse_recipe([shared | {"name": "first", "models": models}, shared | {"modules": modules}])
    for seed, found in ((2, recipe), (7, _seeded(recipe, 7))):
        assert [one.seed for one in (*found.documents, *found.modules)] == [seed] * 4


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--trust-remote-code", "needs no model's code"),
        ("--no-safe-serialization", "only safetensors"),
        ("--tensor-union", "--tensor-intersection leaves such tensors out"),
        ("--device=abacus", "'abacus' is no device"),
        ("--out-shard-size=5GB", "'5GB'"),
    ],
)
def test_refusals(recipe: Path, capsys: pytest.CaptureFixture[str], option: str, expected: str) -> None:
    ended = invoke(capsys, "merge", recipe, recipe.parent / "out", option)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {option.split('=')[0]}: ")
    assert expected in ended.err
    assert not (recipe.parent / "out").exists()


def test_devices(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (choose_device(None, False), choose_device("cpu", True), choose_device("auto", False)) == ("cpu",) * 3
    for option in ("--cuda", "--gpu-rich", "--device=cuda:1"):
        ended = invoke(capsys, "merge", recipe, recipe.parent / "out", option)
        assert ended.code == 2
        assert "error: --device: 'cuda" in ended.err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (choose_device(None, True), choose_device("auto", False), choose_device("cuda:1", False)) == (
        "cuda",
        "cuda",
        "cuda:1",
    )


def test_verbose_says_what_is_read_and_written(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = invoke(capsys, "merge", recipe, recipe.parent / "out", "-v")
    assert ended.out == f"{recipe.parent / 'out'}\n"
    lines = ended.err.splitlines()
    assert [line.split("/")[-1] for line in lines[:3]] == [f"{n}: 38 tensors, 0.000 GB" for n in ("base", "a", "b")]
    assert lines[3].startswith(f"wrote {recipe.parent / 'out' / 'model.safetensors'}: ")
    assert lines[4].startswith("1 merge in ")


def test_a_bar_on_a_terminal_only(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    shown = invoke(capsys, "merge", recipe, recipe.parent / "out")
    assert "tensors" in shown.err
    assert shown.out == f"{recipe.parent / 'out'}\n"


def test_crimes(recipe: Path, tiny_family: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A config of another architecture with tensors of the same names: by `merge` and `check` alike."""
    other = recipe.parent / "other"
    assert invoke(capsys, "merge", recipe, other).code == 0
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    content = yaml.safe_load(recipe.read_text())
    content["models"][1]["model"] = str(other)
    recipe.write_text(yaml.safe_dump(content))
    for arguments in (["merge", recipe, recipe.parent / "out"], ["check", recipe]):
        refused = invoke(capsys, *arguments)
        assert (refused.code, refused.out) == (2, "")
        assert f"{other} is MistralForCausalLM" in refused.err
        assert f"{tiny_family['base']} is LlamaForCausalLM" in refused.err
        assert "--allow-crimes" in refused.err
        assert invoke(capsys, *arguments, "--allow-crimes").code == 0


def test_transformers_cache(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "before")
    assert invoke(capsys, "merge", recipe, recipe.parent / "out", "--transformers-cache", recipe.parent).code == 0
    import os

    assert os.environ["HF_HUB_CACHE"] == str(recipe.parent)


def test_threads(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert invoke(capsys, "merge", recipe, recipe.parent / "out", "-j", "2").code == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
