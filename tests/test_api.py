"""The same in Python: `evomerge.merge`, `evomerge.search`, `evomerge.evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import evomerge
from evomerge.errors import BadInput, CandidateError, RecipeError, SpecError
from evomerge.recipe import parse_recipe
from tests.frame import TASKS, search_spec


def recipe(family: dict[str, Path]) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(family[n]), "parameters": {"weight": 1}} for n in "ab"]}


def test_exported_names() -> None:
    calls = ["dare_merge_llama", "evaluate", "merge", "merge_models", "search", "ties_merge_llama"]
    assert sorted(evomerge.__all__) == ["DareConfig", "DareMerger", *calls]
    assert all(callable(getattr(evomerge, name)) for name in evomerge.__all__)


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
        found = evomerge.search(form, folder=run)
        assert found == json.loads((run / "result.json").read_text())
    assert evomerge.study.loop.search is not evomerge.search


def test_search_refuses_as_the_command_line_does(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'candidates'"):
        evomerge.search(search_spec(tiny_family, search__candidate=3), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_evaluate(tiny_family: dict[str, Path], backend: Any) -> None:
    tasks = ["tiny_choice", "tiny_text", "tiny_answer"]
    model = str(tiny_family["a"])
    found = evomerge.evaluate(model, tasks, include_path=[str(TASKS)], limit=6, backend=backend)
    assert found["model"] == model
    assert list(found["tasks"]) == tasks
    assert found["tasks"]["tiny_choice"]["acc"]["n"] == 6
    assert found["tasks"]["tiny_answer"]["exact_match"]["n"] == 4
    # A random model spreads its guesses over some 259 tokens of a byte each: about eight bits.
    assert 7.5 < found["tasks"]["tiny_text"]["bits_per_byte"]["value"] < 8.5


def test_backends_agree(tiny_family: dict[str, Path]) -> None:
    tasks = ["tiny_choice", "tiny_text"]
    native, hf = (
        evomerge.evaluate(str(tiny_family["b"]), tasks, include_path=[str(TASKS)], backend=backend)["tasks"]
        for backend in ("native", "hf")
    )
    for task in tasks:
        for metric in native[task]:
            assert native[task][metric]["value"] == pytest.approx(hf[task][metric]["value"], abs=1e-5)


def test_evaluate_refuses(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    model, paths = str(tiny_family["a"]), [str(TASKS)]
    with pytest.raises(BadInput, match="dtype"):
        evomerge.evaluate(model, ["tiny_text"], include_path=paths, dtype="int7")
    with pytest.raises(BadInput, match="none"):
        evomerge.evaluate(str(tmp_path / "none"), ["tiny_text"], include_path=paths)
    broken = Path(shutil.copytree(tiny_family["a"], tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CandidateError, match="finite"):
        evomerge.evaluate(str(broken), ["tiny_text"], include_path=paths)


def test_prompts_are_put_together_as_asked_for(tiny_family: dict[str, Path], tmp_path: Path) -> None:

    def loss(**options: Any) -> float:
        result = evomerge.evaluate(str(tiny_family["a"]), ["tiny_choice"], include_path=TASKS, limit=4, **options)
        return float(result["tasks"]["tiny_choice"]["loss"]["value"])

    assert loss() == loss(fewshot_as_multiturn=False)  # no chat, no examples
    assert loss() != loss(system_instruction="Answer in one word.")


def test_warnings_go_where_they_are_asked_to_go(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    from tests.evaluation.conftest import documents, write_documents, write_task

    write_documents(tmp_path / "data" / "docs.jsonl", documents(2))
    write_task(tmp_path / "tasks", "long", kind="mc", doc_to_text="{{text*40}}")
    told: list[str] = []
    evomerge.evaluate(str(tiny_family["a"]), ["long"], include_path=tmp_path / "tasks", warn=told.append)
    assert len(told) == 1
    with pytest.warns(UserWarning, match="task 'long': 2 of 2 items are longer than the context of 512 tokens"):
        evomerge.evaluate(str(tiny_family["a"]), ["long"], include_path=tmp_path / "tasks")
