"""The same in Python: `evomerge.merge`, `evomerge.search`, `evomerge.evaluate`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import evomerge
from evomerge.errors import RecipeError, SpecError
from evomerge.recipe import parse_recipe
from evomerge.system.sealed import read_sealed_json
from tests.frame import TASKS, environment, search_spec


def recipe(family: dict[str, Path]) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(family[n]), "parameters": {"weight": 1}} for n in "ab"]}


def test_exported_names() -> None:
    calls = ["dare_merge_llama", "evaluate", "mean_inputs", "merge", "merge_models"]
    calls += ["open_run", "search", "ties_merge_llama"]
    assert sorted(evomerge.__all__) == ["DareConfig", "DareMerger", *calls]
    assert all(callable(getattr(evomerge, name)) for name in evomerge.__all__)


def test_the_package_imports_what_is_asked_for() -> None:
    """A bare import loads none of its modules, and every name is listed all the same."""
    script = (
        "import sys, evomerge; assert not [m for m in sys.modules if m.startswith('evomerge.')]; "
        "assert set(evomerge.__all__) <= set(dir(evomerge)); "
        "from evomerge import search; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], env=environment(), check=True)
    with pytest.raises(AttributeError, match="has no attribute 'serach'"):
        evomerge.serach  # noqa: B018


def test_merge_takes_a_recipe_in_any_form(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    content = recipe(tiny_family)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    forms: list[Any] = [content, parse_recipe(content), path, str(path)]
    outs = [evomerge.merge(form, tmp_path / f"out{number}") for number, form in enumerate(forms)]
    weights = [(out / "model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1] == weights[2] == weights[3]
    a, b = (load_file(tiny_family[name] / "model.safetensors") for name in "ab")
    merged = load_file(outs[0] / "model.safetensors")
    torch.testing.assert_close(merged["model.norm.weight"], (a["model.norm.weight"] + b["model.norm.weight"]) / 2)
    with pytest.raises(RecipeError, match="merge_method"):
        evomerge.merge({"models": []}, tmp_path / "none")


def test_merge_warns_of_a_parameter_without_effect(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    content = recipe(tiny_family) | {"parameters": {"density": 0.5}}
    with pytest.warns(UserWarning, match="density"):
        evomerge.merge(content, tmp_path / "out")


def test_search_on_a_run_that_is_there(finished_run: Path, tmp_path: Path) -> None:
    """Twice in one process, and after its package was imported: the name stays the function that it is."""
    import evomerge.study.loop

    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    path = finished_run.parent / "tiny.yaml"
    for form in (path, str(path), yaml.safe_load(path.read_text())):
        assert evomerge.search(form, folder=run) == read_sealed_json(run / "result.json", dict, "")
    assert evomerge.study.loop.search is not evomerge.search


def test_search_refuses_as_the_command_line_does(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'candidates'"):
        evomerge.search(search_spec(tiny_family, search__candidate=3), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluate_gives_what_the_command_line_prints(tiny_family: dict[str, Path]) -> None:
    result = evomerge.evaluate(str(tiny_family["a"]), ["tiny_choice"], include_path=TASKS, limit=2)
    assert list(result) == ["model", "tasks"]
    assert result["model"] == str(tiny_family["a"])
    assert result["tasks"]["tiny_choice"]["acc"]["n"] == 2
