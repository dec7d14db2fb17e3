"""Heads and towers that not every model has: named with a way out, left out, or taken from one model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from evomerge.errors import BadInput, RecipeError
from evomerge.planning.parts import is_meant
from evomerge.recipe import parse_recipe
from evomerge.recipe.mergekit import to_mergekit_yaml
from evomerge.run.merge import merge_to_folder
from tests.models import byte_tokenizer, write_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model with a head of its own, and two classifiers with its body."""
    root = tmp_path_factory.mktemp("parts")
    folders = {"base": write_tiny_llama(root / "base", tied=False)}
    for seed, name in enumerate(("one", "two"), start=1):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification.from_pretrained(folders["base"], num_labels=seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        folders[name] = root / name
        model.save_pretrained(folders[name])
        byte_tokenizer().save_pretrained(folders[name])
    return folders


def _recipe(*models: Path, **more: Any) -> dict[str, Any]:
    rows = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": rows, **more}


def _merged(recipe: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    merge_to_folder(parse_recipe(recipe), out, warn=lambda text: None)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("pattern", "name", "meant"),
    [
        ("score", "score.weight", True),
        ("score", "model.scores.weight", False),
        ("model.visual", "model.visual.blocks.0.attn.qkv.weight", True),
        ("visual.blocks", "model.visual.blocks.0.attn.qkv.weight", True),
        ("*.bias", "model.layers.0.attn.bias", True),
        ("layers", "model.layers.0.attn.bias", True),
    ],
)
def test_what_is_meant(pattern: str, name: str, meant: bool) -> None:
    assert is_meant(pattern, name) == meant


def test_the_message_says_what_to_write(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        _merged(_recipe(models["base"], models["one"]), tmp_path / "out")
    lacks, has = caught.value.problems
    assert f"'ignore: [lm_head]' or 'take_from: {{lm_head: {models['base']}}}'" in lacks
    assert f"'ignore: [score]' or 'take_from: {{score: {models['one']}}}'" in has
    with pytest.raises(BadInput, match=r"score.weight \(3x32 against 2x32\); a recipe may say 'ignore: \[score\]'"):
        _merged(_recipe(models["one"], models["two"]), tmp_path / "out")


def test_a_head_of_one_model(models: dict[str, Path], tmp_path: Path) -> None:
    one, two = (load_file(models[name] / "model.safetensors") for name in ("one", "two"))
    recipe = _recipe(models["one"], models["two"], take_from={"score": str(models["two"])})
    got = _merged(recipe, tmp_path / "out")
    assert got.keys() == one.keys()
    assert torch.equal(got["score.weight"], two["score.weight"])
    for name in one.keys() - {"score.weight"}:
        torch.testing.assert_close(got[name], (one[name] + two[name]) / 2)


@pytest.mark.parametrize("first", ["base", "one"])
def test_a_classifier_of_a_language_model(models: dict[str, Path], tmp_path: Path, first: str) -> None:
    """Its class goes with its head: the output is loaded as what it is, whichever model comes first."""
    order = [models[first], models["one" if first == "base" else "base"]]
    recipe = _recipe(*order, ignore=["lm_head"], take_from={"score": str(models["one"])})
    got = _merged(recipe, tmp_path / "out")
    assert "lm_head.weight" not in got
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: names for key, names in report.items() if names} == {}
    assert model.config.num_labels == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


def test_towers(family_of: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    a, b = (family_of("clip")[name] for name in "ab")
    got = _merged(_recipe(a, b, take_from={"text_model": str(b)}, ignore="logit_scale"), tmp_path / "out")
    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert got.keys() == one.keys() - {"logit_scale"}
    for name, value in got.items():
        expected = two[name] if name.startswith("text_model.") else (one[name] + two[name]) / 2
        torch.testing.assert_close(value, expected)


def test_what_is_not_there(models: dict[str, Path], tmp_path: Path) -> None:
    more = {"ignore": ["scoer"], "take_from": {"lm_head": str(models["two"]), "score": "elsewhere"}}
    with pytest.raises(RecipeError) as caught:
        _merged(_recipe(models["one"], models["two"], **more), tmp_path / "out")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "ignore",
        "take_from.lm_head",
        "take_from.score",
    ]


def test_as_yaml() -> None:
    recipe = parse_recipe(_recipe(Path("a"), Path("b"), ignore="head", take_from={"vision": "a"}))
    assert (recipe.ignore, recipe.take_from) == (("head",), (("vision", "a"),))
    assert parse_recipe(recipe.to_mapping()) == recipe
    assert to_mergekit_yaml(recipe) is None
    for wrong in ({"ignore": []}, {"ignore": [3]}, {"take_from": ["a"]}, {"take_from": {"score": 3}}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            parse_recipe(_recipe(Path("a"), Path("b"), **wrong))
