"""The JSON Schemas for editors: complete, and of the same opinion as the readers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from evomerge.errors import RecipeError, SpecError
from evomerge.recipe.json_schema import recipe_schema
from evomerge.spec.schema import SearchSpec, search_schema
from evomerge.system.yaml import read_documents, read_yaml
from tests.frame import ROOT, invoke, search_spec

SHIPPED = sorted((ROOT / "search_spaces").glob("*.yaml"))


def validator_of(schema: dict[str, Any]) -> Any:
    """What validates documents by a schema, which is checked once."""
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


@pytest.fixture(scope="module")
def recipes() -> Any:
    return validator_of(recipe_schema())


def keys(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a schema, at any depth, with what is said of it."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            yield from schema["properties"].items()
        for value in schema.values():
            yield from keys(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from keys(value)


def test_every_key_of_a_search_is_described() -> None:
    schema = SearchSpec.model_json_schema(by_alias=True)
    sections = {"SearchSpec": schema, **schema["$defs"]}
    declared = {f"{name}.{key}": value for name in sections for key, value in sections[name]["properties"].items()}
    assert len(declared) > 100
    assert [key for key, value in declared.items() if not value.get("description")] == []
    said = list(keys(search_schema()))
    assert len(said) > 50
    assert [name for name, value in said if not value["description"].endswith(".")] == []


def test_every_key_of_a_recipe_is_described() -> None:
    said = [(n, v) for n, v in keys(recipe_schema()) if n not in ("filter", "value")]
    assert {"merge_method", "density", "residual_scale", "take_from"} <= {name for name, _ in said}
    assert [name for name, value in said if not value.get("description")] == []


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_files_fit_and_name_the_schema(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=search.schema.json\n")
    jsonschema.validate(read_yaml(text, str(path), SpecError), search_schema())


def test_the_schema_beside_them_is_this_one() -> None:
    """`make schema` writes it anew."""
    assert json.loads((ROOT / "search_spaces" / "search.schema.json").read_text()) == search_schema()


def test_a_whole_search_fits(tiny_family: dict[str, Path]) -> None:
    jsonschema.validate(search_spec(tiny_family), search_schema())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("search", {"candidates": 0}),
        ("space", {"methods": ["tias"]}),
        ("evaluation", {"tasks": [{"t": 1}]}),
        ("x", 1),
    ],
)
def test_what_is_wrong_is_seen(tiny_family: dict[str, Path], key: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(search_spec(tiny_family) | {key: value}, search_schema())


def test_recipes_fit(recipes: Any) -> None:
    paths = sorted((ROOT / "tests" / "recipes" / "good").glob("*.yaml"))
    assert len(paths) > 20
    for path in paths:
        for document in read_documents(path.read_text(), str(path), RecipeError):
            recipes.validate(document)


def test_a_recipe_that_is_wrong_is_seen(recipes: Any) -> None:
    right = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a", "parameters": {"density": [0.1, 1]}}]}
    recipes.validate(right)
    for wrong in ({"merge_method": "tias"}, {"models": ["a"]}, {"parameters": {"densty": 1}}, {"dtype": "int8"}):
        with pytest.raises(jsonschema.ValidationError):
            recipes.validate({**right, **wrong})


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(invoke(capsys, "schema", "search").out) == search_schema()
    assert json.loads(invoke(capsys, "schema", "recipe").out) == recipe_schema()
    assert invoke(capsys, "schema", "run").code == 2
