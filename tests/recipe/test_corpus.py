"""Recipes with one mistake each, and recipes that are right, one file each."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import RecipeError
from evomerge.recipe import Recipe, expand_frankenmerge, layer_places, load_recipe, parse_recipe, resolve
from evomerge.recipe.mergekit import to_mergekit_yaml

CORPUS = Path(__file__).parent.parent / "recipes"
BAD = sorted((CORPUS / "bad").glob("*.yaml"))
GOOD = sorted((CORPUS / "good").glob("*.yaml"))


def test_corpus_is_there() -> None:
    assert len(BAD) >= 60
    assert len(GOOD) >= 20


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_mistake_is_reported(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    expected = first.removeprefix("# error: ")
    assert expected != first, "the first line of a bad recipe says what the message contains"
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(path)), "a message names the file"


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_one_mistake_is_one_problem(path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 1, caught.value.problems


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good_recipe_round_trips(path: Path) -> None:
    recipe = load_recipe(path)
    again = parse_recipe(recipe.to_yaml())
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.digest == recipe.digest
    assert parse_recipe(recipe.to_mapping()) == recipe


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good_recipe_has_no_warnings(path: Path) -> None:
    unexpected = [text for text in load_recipe(path).warnings if "residual_weight" not in text]
    assert unexpected == []


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good_recipe_resolves_for_every_layer(path: Path) -> None:
    whole = load_recipe(path)
    for recipe in (expand_frankenmerge(one, 16) for one in whole.modules or (whole,)):
        places = layer_places(recipe, 16)
        assert [place.slice_index for place in places if place.offset == 0] == list(range(len(recipe.parts)))
        for k, place in enumerate(places):
            for suffix in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
                tensor = resolve(recipe, place.slice_index, f"model.layers.{k}.{suffix}", place.t)
                assert len(tensor.settings.sources) == len(tensor.sources) >= 1
        for name, index, t in (("model.embed_tokens.weight", 0, 0.0), ("lm_head.weight", -1, 1.0)):
            assert resolve(recipe, index % len(recipe.parts), name, t).sources


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_mergekit_export_means_the_same_here(path: Path) -> None:
    """What mergekit can say, we read back as a recipe that resolves to the same values."""
    recipe = expand_frankenmerge(load_recipe(path), 16)
    text = to_mergekit_yaml(recipe)
    if text is None:
        ours = {"frankenmerge_pattern", "methods_by_slice", "dfs", "slerp_deltas"}
        assert path.stem in ours | {
            "iso_c_without_embeddings",
            "tsv_merge",
            "ties_then_svc",
            "task_arithmetic_then_aim",
        }
        return
    again = parse_recipe(text)
    for mine, theirs in zip(recipe.modules or (recipe,), again.modules or (again,), strict=True):
        assert mine.module == theirs.module
        _mean_the_same(mine, theirs)


def _mean_the_same(recipe: Recipe, again: Recipe) -> None:
    name = "model.layers.{}.mlp.down_proj.weight"
    for k, place in enumerate(layer_places(recipe, 16)):
        mine = resolve(recipe, place.slice_index, name.format(k), place.t)
        theirs = resolve(again, place.slice_index, name.format(k), place.t)
        assert (theirs.method, theirs.base) == (mine.method, mine.base)
        kept = [
            i for i, source in enumerate(theirs.settings.sources) if source.get("weight") != 0 or i < len(mine.sources)
        ]
        assert tuple(theirs.sources[i] for i in kept) == mine.sources
        assert [theirs.settings.sources[i] for i in kept] == list(mine.settings.sources)
        assert theirs.settings.shared == mine.settings.shared


def test_slices_may_need_different_things() -> None:
    """The recipe's base is looked for in the slice first."""
    slices = [{"sources": [{"model": "a", "layer_range": [0, 2]}], "merge_method": "ties", "parameters": {"weight": 1}}]
    with pytest.raises(RecipeError, match=r"slices\[0\]\.base_model: is missing"):
        parse_recipe({"merge_method": "passthrough", "slices": slices})
    slices[0]["base_model"] = "base"
    assert parse_recipe({"merge_method": "passthrough", "slices": slices}).models() == ("base", "a")
