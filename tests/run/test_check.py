"""`check`: what it takes for a search and what for a recipe, and what it reckons."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from evomerge.errors import BadInput, RecipeError, SpecError
from evomerge.run.check import check_file, output_bytes
from tests.engine.recipes import layers, plan_of, single
from tests.frame import changed, files, search_spec


def written(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_bytes_are_those_on_the_disk(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    whole = output_bytes(plan_of(single(tiny_family["a"])))
    # Header aside, the file of the source is the same tensors.
    size = (tiny_family["a"] / "model.safetensors").stat().st_size
    assert 0 < size - whole < 8192
    assert output_bytes(plan_of(single(tiny_family["a"], out_dtype="bfloat16"))) == whole // 2
    longer = output_bytes(plan_of(layers((tiny_family["a"], 0, 4), (tiny_family["a"], 0, 4))))
    per_layer = (longer - whole) // 4
    assert longer == whole + 4 * per_layer > whole


def test_a_recipe_of_slices_with_methods_of_their_own(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    text = check_file(written(tmp_path / "recipe.yaml", layers((tiny_family["a"], 0, 3), (tiny_family["b"], 1, 4))))
    assert "frankenmerge of 2 models, 56 tensors" in text
    with pytest.raises(RecipeError, match="merge_method"):
        check_file(written(tmp_path / "none.yaml", {"slices": layers((tiny_family["a"], 0, 3))["slices"]}))


def test_warnings_of_a_recipe(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    text = check_file(written(tmp_path / "recipe.yaml", single(tiny_family["a"]) | {"parameters": {"density": 0.5}}))
    assert text.startswith("warning: ")
    assert "density" in text.splitlines()[0]


def test_a_search_is_known_by_its_keys(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="evaluation: missing"):
        check_file(written(tmp_path / "search.yaml", {"name": "x", "models": {"sources": {"a": "a"}}}))


def test_what_a_search_will_need(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """The memory is what a process really has, and small times are not rounded to nothing."""
    content = search_spec(tiny_family, evaluation__dtype="auto")
    text = check_file(written(tmp_path / "search.yaml", content))
    assert "dtype: float32, of float32 and bfloat16 the faster here; a run keeps its own" in text
    memory, seconds, whole = re.search(
        r"memory: about (\S+) GB.*time: about (\S+) s to score a candidate on all search items, (.*) for 18; "
        r"an estimate from 8 of \d+ items",
        text,
        re.DOTALL,
    ).groups()  # type: ignore[union-attr]
    assert float(memory) > 0.2
    assert float(seconds) >= 0.0
    assert whole.split()[1] in ("s", "min")


def test_splits_that_ask_too_much(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    content = search_spec(tiny_family, evaluation__splits={"search": 30, "select": 2, "test": 2})
    with pytest.raises(BadInput, match="has 24 items, fewer than the splits ask for") as caught:
        check_file(written(tmp_path / "search.yaml", content))
    assert len(caught.value.problems) == 2  # both tasks


def test_raw_scale_of_two_units(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    content = changed(search_spec(tiny_family), {"evaluation__scale": "raw", "run__dir": str(tmp_path / "run")})
    with pytest.raises(SpecError, match="raw cannot add up a share of items, bits_per_byte; use relative"):
        check_file(written(tmp_path / "search.yaml", content))
    assert dict(files(tmp_path)).keys() == {"search.yaml"}


def test_a_survey_of_the_sources(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """What more of each is worth and how far each pair agrees; of a recipe and without a base there is none."""
    content = search_spec(tiny_family)
    text = check_file(written(tmp_path / "search.yaml", content), sources=True)
    count = 8 * len(content["evaluation"]["tasks"])
    assert f"sources, at their average, on {count} items:" in text
    names = list(content["models"]["sources"])
    assert all(f"| {name} " in text for name in names)
    assert f"| {names[0]}, {names[1]} " in text
    recipe = written(tmp_path / "recipe.yaml", single(tiny_family["a"]))
    with pytest.raises(BadInput, match="a recipe; --sources surveys those of a search"):
        check_file(recipe, sources=True)
    del content["models"]["base"]
    content["space"]["methods"] = ["linear"]
    with pytest.raises(BadInput, match=r"models\.base: none is named"):
        check_file(written(tmp_path / "baseless.yaml", content), sources=True)
