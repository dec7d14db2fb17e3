"""A checkpoint scored by itself: any backend, prompts as asked for, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from evomerge.errors import BadInput, CandidateError
from evomerge.run.evaluate import evaluate
from tests.evaluation.conftest import documents, write_documents, write_task
from tests.frame import TASKS


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_evaluate(tiny_family: dict[str, Path], backend: Any) -> None:
    tasks = ["tiny_choice", "tiny_text", "tiny_answer"]
    model = str(tiny_family["a"])
    result = evaluate(model, tasks, include_path=[str(TASKS)], limit=6, backend=backend)
    assert result.model == model
    assert list(result.tasks) == tasks
    assert result.tasks["tiny_choice"]["acc"].n == 6
    assert result.tasks["tiny_answer"]["exact_match"].n == 4
    assert list(result.to_json()) == ["model", "tasks"]
    # A random model spreads its guesses over some 259 tokens of a byte each: about eight bits.
    assert 7.5 < result.tasks["tiny_text"]["bits_per_byte"].value < 8.5


def test_backends_agree(tiny_family: dict[str, Path]) -> None:
    tasks = ["tiny_choice", "tiny_text"]
    native, hf = (
        evaluate(str(tiny_family["b"]), tasks, include_path=[str(TASKS)], backend=backend).tasks
        for backend in ("native", "hf")
    )
    for task in tasks:
        for metric in native[task]:
            assert native[task][metric].value == pytest.approx(hf[task][metric].value, abs=1e-5)


def test_evaluate_refuses(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    model, paths = str(tiny_family["a"]), [str(TASKS)]
    with pytest.raises(BadInput, match="dtype"):
        evaluate(model, ["tiny_text"], include_path=paths, dtype="int7")
    with pytest.raises(BadInput, match="none"):
        evaluate(str(tmp_path / "none"), ["tiny_text"], include_path=paths)
    broken = Path(shutil.copytree(tiny_family["a"], tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CandidateError, match="finite"):
        evaluate(str(broken), ["tiny_text"], include_path=paths)


def test_prompts_are_put_together_as_asked_for(tiny_family: dict[str, Path]) -> None:
    def loss(**options: Any) -> float:
        result = evaluate(str(tiny_family["a"]), ["tiny_choice"], include_path=TASKS, limit=4, **options)
        return result.tasks["tiny_choice"]["loss"].value

    assert loss() == loss(fewshot_as_multiturn=False)  # no chat, no examples
    assert loss() != loss(system_instruction="Answer in one word.")


def test_warnings_go_where_they_are_asked_to_go(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    write_documents(tmp_path / "data" / "docs.jsonl", documents(2))
    write_task(tmp_path / "tasks", "long", kind="mc", doc_to_text="{{text*40}}")
    warnings: list[str] = []
    evaluate(str(tiny_family["a"]), ["long"], include_path=tmp_path / "tasks", warn=warnings.append)
    assert len(warnings) == 1
    with pytest.warns(UserWarning, match="task 'long': 2 of 2 items are longer than the context of 512 tokens"):
        evaluate(str(tiny_family["a"]), ["long"], include_path=tmp_path / "tasks")
