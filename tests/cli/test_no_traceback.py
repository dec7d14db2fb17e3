"""Whatever lies on people's disks: every command says what is wrong with it, and none ends in a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.frame import TASKS, invoke

CORPUS = Path(__file__).parent.parent / "recipes"
FILES = sorted(CORPUS.glob("*/*.y*ml"))
COMMANDS = ["merge", "check", "run", "dare"]  # each reads its share of the recipes, and all of the garbage
GARBAGE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "null": b"null",
    "number": b"3",
    "list": b"- 1\n- [2]\n",
    "anchor": b"a: &a [*a]\n",
    "tag": b"!!python/object/apply:os.system ['true']\n",
    "nested": b"[" * 3000,
    "keys": b"1: 2\n? [a]\n: b\n",
    "documents": b"---\n---\nname: x\n---\n",
    "long": b"merge_method: " + b"x" * 100_000,
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


def complains(capsys: pytest.CaptureFixture[str], *command: object) -> None:
    """`invoke` lets through what is no message: a traceback fails the test."""
    ended = invoke(capsys, *command)
    assert ended.code in (0, 1, 2), command
    if ended.code:
        assert "rror" in ended.err, command


@pytest.mark.parametrize("command", COMMANDS)
def test_files(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = FILES[COMMANDS.index(command) :: len(COMMANDS)]
    for name, content in GARBAGE.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_bytes(content)
    paths += [tmp_path, tmp_path / "nowhere.yaml", tmp_path / ("x" * 300)]
    for path in paths:
        complains(capsys, command, path, *([tmp_path / "out"] if command == "merge" else []))
    assert not (tmp_path / "out").exists()


def _edited(name: str, content: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")

    return edit


def _config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


MODELS: dict[str, Callable[[Path], None]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "config is a list": _edited("config.json", []),
    "config is text": _edited("config.json", "{"),
    "config is empty": _edited("config.json", {}),
    "tokenizer is empty": _edited("tokenizer.json", {}),
    "tokenizer_config is a list": _edited("tokenizer_config.json", []),
    "generation_config is a list": _edited("generation_config.json", []),
    "modules.json is text": _edited("modules.json", "{"),
    "modules.json is odd": _edited("modules.json", [{"path": 3}, 4]),
    "pointer": _edited("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"),
    "unknown type": _config(model_type="nobodys", architectures=["Nobodys"]),
    "type is a number": _config(model_type=3, architectures=4),
    "layers are text": _config(num_hidden_layers="four"),
    "layers are many": _config(num_hidden_layers=10**9),
    "heads are none": _config(num_attention_heads=0),
    "rope is odd": _config(rope_parameters={"rope_type": "nobodys"}),
    "quantisation is odd": _config(quantization_config=[1]),
    "auto_map is odd": _edited("tokenizer_config.json", {"auto_map": {"AutoTokenizer": 3}}),
    "no embedding": _tensors(lambda state: [state.pop(k) for k in list(state) if "embed" in k] and None),
    "no tensors": _tensors(lambda state: state.clear()),
    "integers": _tensors(lambda state: state.update({k: v.to(torch.int32) for k, v in state.items()})),
    "not finite": _tensors(lambda state: state.update({k: v * float("nan") for k, v in state.items()})),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(
    name: str,
    tiny_family: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = Path(shutil.copytree(tiny_family["a"], tmp_path / "broken"))
    MODELS[name](broken)
    mean = [{"model": str(model), "parameters": {"weight": 0.5}} for model in (broken, tiny_family["b"])]
    stack = [{"sources": [{"model": str(broken), "layer_range": span}]} for span in ([0, 2], [1, 4])]
    recipes = {
        "mean": {"merge_method": "linear", "models": mean},
        "union": {"merge_method": "linear", "models": mean, "tokenizer_source": "union"},
        "stack": {"merge_method": "passthrough", "slices": stack},
    }
    for file, recipe in recipes.items():
        (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(recipe))
        complains(capsys, "merge", tmp_path / f"{file}.yaml", tmp_path / file)
    complains(capsys, "check", tmp_path / "stack.yaml")
    complains(capsys, "init", broken, tiny_family["b"], "--overwrite")
    complains(capsys, "eval", broken, "--tasks", "tiny_choice", "--include-path", TASKS, "--limit", "1")


@pytest.mark.parametrize("command", ["status", "resume", "lineage", "export"])
@pytest.mark.parametrize("content", ["empty", "binary", "list", "nested", "documents"])
def test_run_folders(command: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("resolved.yaml", "study.log", "result.json", "environment.json"):
        (run / name).write_bytes(GARBAGE[content])
    complains(capsys, command, run, *([tmp_path / "out"] if command == "export" else []))
