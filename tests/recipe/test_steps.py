"""Recipes of several merges: what names what, in what order, and what they are written as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import RecipeError
from evomerge.recipe import load_recipe, parse_recipe
from evomerge.recipe.mergekit import to_mergekit_yaml
from evomerge.system.yaml import read_documents


def linear(*models: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models], **more}


CHAIN = [
    linear("a", "b", name="first"),
    linear("first", "c", name="second"),
    linear("second", "first", "d"),
]


def test_documents_and_lists_mean_the_same() -> None:
    recipe = parse_recipe(CHAIN)
    assert [step.name for step in recipe.steps] == ["first", "second"]
    assert recipe.name is None
    assert recipe.models() == ("second", "first", "d")
    assert recipe.external_models() == ("a", "b", "c", "d")
    again = parse_recipe(recipe.to_yaml())
    assert again == recipe
    assert (again.digest, hash(again)) == (recipe.digest, hash(recipe))
    assert parse_recipe(f"- {CHAIN[0]}\n- {CHAIN[1]}\n- {CHAIN[2]}") == recipe
    assert parse_recipe([CHAIN[0]]) == parse_recipe(CHAIN[0])


def test_the_order_of_the_documents_does_not_matter() -> None:
    """The one without a name is final wherever it stands, as with mergekit-multi."""
    recipe = parse_recipe([CHAIN[2], CHAIN[1], CHAIN[0]])
    assert [step.name for step in recipe.steps] == ["first", "second"]
    assert recipe == parse_recipe(CHAIN)


def test_where_every_document_has_a_name_the_last_is_final() -> None:
    recipe = parse_recipe([CHAIN[0], linear("first", "c", name="whole")])
    assert (recipe.name, [step.name for step in recipe.steps]) == ("whole", ["first"])


def test_a_step_changes_the_digest() -> None:
    other = [linear("a", "c", name="first"), *CHAIN[1:]]
    assert parse_recipe(other).digest != parse_recipe(CHAIN).digest


def test_a_name_is_meant_before_a_folder_of_that_name(tmp_path: Path) -> None:
    for name in ("a", "first", "x"):
        (tmp_path / name).mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(parse_recipe([linear("a", name="first"), linear("first", "first+x", "a")]).to_yaml())
    recipe = load_recipe(path)
    assert recipe.models() == ("first", f"first+{tmp_path / 'x'}", str(tmp_path / "a"))
    assert recipe.external_models() == (str(tmp_path / "a"),)


def test_a_tokenizer_may_be_that_of_a_step() -> None:
    recipe = parse_recipe([linear("a", name="first"), linear("first", "b", tokenizer_source="model:first")])
    assert recipe.external_models() == ("a", "b")


def test_every_document_is_written_for_mergekit() -> None:
    text = to_mergekit_yaml(parse_recipe(CHAIN))
    assert text is not None
    documents = read_documents(text, "", RecipeError)
    assert [document.get("name") for document in documents] == ["first", "second", None]
    assert parse_recipe(text) == parse_recipe(CHAIN)
    dfs = {"merge_method": "dfs", "base_model": "a", "models": [{"model": "b", "parameters": {"weight": 1}}]}
    assert to_mergekit_yaml(parse_recipe([{**dfs, "name": "first"}, linear("first")])) is None


def test_warnings_name_their_document() -> None:
    odd = {**CHAIN[0], "parameters": {"density": 0.5}}
    (warning,) = parse_recipe([odd, linear("first")], where="file").warnings
    assert warning.startswith("file: document 1: parameters.density")


def test_mistakes_of_every_document_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe([linear("a", name="first", sed=1), linear("first", tokeniser="x")])
    assert [text.split(": ")[1] for text in caught.value.problems] == ["document 1", "document 2"]


def test_a_merge_of_itself() -> None:
    with pytest.raises(RecipeError, match="wait for each other: 'first' needs 'first'"):
        parse_recipe([linear("first", name="first"), linear("first")])
