"""The command line as people use it: what goes where, exit codes, and what each refusal says."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.cli.main import main
from tests.frame import TASKS, files, invoke, process, search_spec
from tests.models import write_tiny_llama

COMMANDS = (
    "run",
    "resume",
    "status",
    "export",
    "extract-lora",
    "push",
    "lineage",
    "merge",
    "dare",
    "eval",
    "check",
    "init",
    "methods",
    "schema",
)


def write_recipe(path: Path, family: dict[str, Path], **more: Any) -> Path:
    """A recipe file: 0.4 of each delta of a and b."""
    models = [{"model": str(family[name]), "parameters": {"weight": 0.4}} for name in "ab"]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(family["base"]), "models": models, **more}
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_help_names_every_command() -> None:
    shown = process("--help")
    assert (shown.code, shown.err) == (0, "")
    for command in COMMANDS:
        assert f"\n  {command} " in shown.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    shown = invoke(capsys, command, "--help")
    assert shown.code == 0
    assert "--help" in shown.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu"], "rnu"),
        (["run"], "Missing argument"),
        (["run", "x.yaml", "--candidates", "0"], "--candidates"),
        (["merge", "x.yaml"], "Missing argument"),
        (["status", "x", "--jsn"], "--jsn"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    ended = invoke(capsys, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert expected in ended.err
    assert "Traceback" not in ended.err


def test_run_prints_its_table_on_stdout_and_its_progress_on_stderr(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    ended = invoke(capsys, "run", finished_run.parent / "tiny.yaml", "--dir", run)
    assert ended.code == 0
    assert ended.out.startswith("tiny: 18 of 18 candidates: 18 scored in full")
    assert "| winner: candidate" in ended.out
    assert "18 of 18 candidates are recorded" in ended.err
    assert "18 of 18 candidates are recorded" not in ended.out
    assert "\x1b" not in ended.out + ended.err  # no terminal, no escape codes
    assert invoke(capsys, "resume", run).out == ended.out


def test_merge_and_check_a_recipe(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_family)
    checked = invoke(capsys, "check", recipe)
    assert checked.code == 0
    assert "task_arithmetic of 3 models, 38 tensors" in checked.out
    merged = invoke(capsys, "merge", recipe, tmp_path / "out")
    assert (merged.code, merged.out) == (0, f"{tmp_path / 'out'}\n")
    base, a, b = (load_file(tiny_family[n] / "model.safetensors") for n in ("base", "a", "b"))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = base[name] + 0.4 * (a[name] - base[name]) + 0.4 * (b[name] - base[name])
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")[name], expected)
    again = invoke(capsys, "merge", recipe, tmp_path / "out")
    assert again.code == 1
    assert "is not empty" in again.err
    assert invoke(capsys, "merge", recipe, tmp_path / "out", "--overwrite").code == 0


def test_eval(tiny_family: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(tiny_family["a"]), "--tasks", "tiny_choice, tiny_text", "--include-path", str(TASKS)]
    found = json.loads(invoke(capsys, *arguments, "--limit", "5", "--json").out)
    assert found["model"] == str(tiny_family["a"])
    assert set(found["tasks"]["tiny_choice"]["acc"]) >= {"value", "stderr", "n"}
    assert found["tasks"]["tiny_choice"]["acc"]["n"] == found["tasks"]["tiny_text"]["bits_per_byte"]["n"] == 5
    shown = invoke(capsys, *arguments)
    assert shown.code == 0
    assert "| tiny_choice | acc" in shown.out
    for option, value in (("dtype", "int3"), ("backend", "magic")):
        refused = invoke(capsys, *arguments, f"--{option}", value)
        assert refused.code == 2
        assert f"'{value}'" in refused.err
        assert option in refused.err


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    from evomerge.methods.registry import METHODS

    shown = invoke(capsys, "methods")
    assert shown.code == 0
    assert all(f"| {name} " in shown.out for name in METHODS)
    assert "passthrough" in shown.out
    assert "density" in invoke(capsys, "methods", "ties").out
    unknown = invoke(capsys, "methods", "tise")
    assert unknown.code == 2
    assert "did you mean 'ties'?" in unknown.err


# Refusals: each names its file and key, exits with 2 (bad input), prints nothing on stdout, and leaves no output.


def _without(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != name}, path, metadata={"format": "pt"})


def _replaced(folder: Path, name: str, value: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: value}, path, metadata={"format": "pt"})


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _headless(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def _not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _smaller(folder: Path) -> None:
    shutil.rmtree(folder)
    write_tiny_llama(folder, 5, layers=3)


def _narrower(folder: Path) -> None:
    shutil.rmtree(folder)
    write_tiny_llama(folder, 5, hidden=16)


def _gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NORM = "model.layers.3.input_layernorm.weight"
BROKEN: dict[str, tuple[Any, list[str]]] = {
    "truncated": (_truncated, ["broken/model.safetensors", "truncated"]),
    "absurd header": (_headless, ["broken/model.safetensors"]),
    "missing tensor": (lambda folder: _without(folder, NORM), [NORM]),
    "extra tensor": (lambda folder: _replaced(folder, "model.extra.weight", torch.ones(3)), ["model.extra.weight"]),
    "shape": (lambda folder: _replaced(folder, NORM, torch.ones(31)), [NORM, "31", "32"]),
    "nan": (_not_a_number, ["NaN", "model.layers.2.mlp.up_proj.weight"]),
    "another depth": (_smaller, ["layers in model.layers, "]),
    "another width": (_narrower, ["other shapes"]),
    "no such model": (_gone, ["broken"]),
    "pickle": (_pickled, ["pickle"]),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("which", ["a", "base"])
def test_models_that_cannot_be_merged(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str, which: str
) -> None:
    """By `merge`, `check` and `run` alike; a base of another shape is no ancestor."""
    family = dict(tiny_family)
    family[which] = Path(shutil.copytree(tiny_family[which], tmp_path / "broken"))
    spoil, expected = BROKEN[broken]
    spoil(family[which])
    recipe = write_recipe(tmp_path / "recipe.yaml", family)
    search = tmp_path / "search.yaml"
    search.write_text(yaml.safe_dump(search_spec(family, run__dir=str(tmp_path / "run"))))
    for arguments in (["merge", recipe, tmp_path / "out"], ["check", recipe], ["check", search], ["run", search]):
        ended = invoke(capsys, *arguments)
        assert (ended.code, ended.out) == (2, ""), (arguments, ended)
        told = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert told
        assert "Traceback" not in ended.err
        assert any(all(text in line for text in expected) for line in told), told
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run" / "study.log").exists()


def test_several_broken_models_at_once(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in tiny_family.items()}
    _truncated(family["a"])
    _gone(family["b"])
    search = tmp_path / "search.yaml"
    search.write_text(yaml.safe_dump(search_spec(family)))
    ended = invoke(capsys, "check", search)
    assert ended.code == 2
    assert len([line for line in ended.err.splitlines() if line.startswith("error: ")]) == 2
    recipe = write_recipe(tmp_path / "recipe.yaml", family)
    for arguments in (["check", recipe], ["merge", recipe, tmp_path / "out"]):
        refused = invoke(capsys, *arguments)
        assert len([line for line in refused.err.splitlines() if line.startswith("error: ")]) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"merge_metod": "ties"}, "merge_metod"),
        ({"merge_method": "tise"}, "did you mean 'ties'"),
        ({"merge_method": "linear", "parameters": {"weight": 0}}, ""),
        ({"slices": [{"sources": [{"model": "MODEL", "layer_range": [0, 9]}]}]}, ""),
    ],
)
def test_recipes_that_mean_nothing(
    tiny_family: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    expected: str,
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_family)
    content = yaml.safe_load(recipe.read_text()) | change
    if "slices" in change:
        content["slices"][0]["sources"][0]["model"] = str(tiny_family["a"])
        content = {"merge_method": "passthrough", "slices": content["slices"]}
        expected = "which has 4 layers"
    if "parameters" in change:
        content["models"] = [{"model": str(tiny_family[name])} for name in "ab"]
        expected = "sum to zero"
    recipe.write_text(yaml.safe_dump(content))
    for arguments in (["merge", recipe, tmp_path / "out"], ["check", recipe]):
        ended = invoke(capsys, *arguments)
        assert (ended.code, ended.out) == (2, "")
        assert expected in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("- a", "mapping"), ("name: [", "not valid YAML"), ("{}", ""), ("name: x\n", "models: missing")],
)
def test_files_that_are_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    ended = invoke(capsys, "check", path)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert expected in ended.err
    missing = invoke(capsys, "check", tmp_path / "missing.yaml")
    assert missing.code == 2
    assert "missing.yaml: no such file" in missing.err


def test_check_takes_the_names_that_run_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # the run's own folder does not hide the name
    assert "quickstart" in invoke(capsys, "check", "quickstart").out
    ended = invoke(capsys, "check", "quickstrt")
    assert (ended.code, "did you mean 'quickstart'" in ended.err) == (2, True)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(capsys, "--version").out == f"evomerge {version('evomerge')}\n"


def test_overflow_is_refused_by_name(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_family, out_dtype="float16", parameters={"lambda": 1e9})
    ended = invoke(capsys, "merge", recipe, tmp_path / "out")
    assert ended.code == 2
    assert "no finite value in F16" in ended.err
    assert not list(tmp_path.glob(".out*partial*"))


def test_a_parameter_of_another_method_is_a_warning(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_family, parameters={"density": 0.5})
    ended = invoke(capsys, "merge", recipe, tmp_path / "out")
    assert ended.code == 0
    assert ended.out == f"{tmp_path / 'out'}\n"
    assert [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert "density" in ended.err
    assert ".py:" not in ended.err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(path: Path, **options: bool) -> str:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("evomerge.run.check.check_file", broken)
    monkeypatch.setattr(sys, "argv", ["evomerge", "check", str(tmp_path)])
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main()


def test_check_a_search(tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = tmp_path / "search.yaml"
    search.write_text(yaml.safe_dump(search_spec(tiny_family, run__dir=str(tmp_path / "run"))))
    ended = invoke(capsys, "check", search)
    assert ended.code == 0
    assert "tiny: 3 sources, " in ended.out
    assert "18 candidates of ga" in ended.out
    assert "| tiny_choice | multiple_choice       | 12     | 6      | 6    | 0     |" in ended.out
    for word in ("memory: about ", "disk: ", "time: about "):
        assert f"\n{word}" in ended.out
    assert not (tmp_path / "run").exists()
    assert dict(files(tmp_path)).keys() == {"search.yaml"}
