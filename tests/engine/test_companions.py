"""What lies beside merged weights: every small file of the first model's folder, and a word on what stays behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.reference import is_hub_id
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder

KEPT = {
    **dict.fromkeys(("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"), "{}"),
    **dict.fromkeys(("tekken.json", "tiktoken.model", "qwen.tiktoken", "source.spm", "normalizer.json"), "x"),
    **dict.fromkeys(("modeling_x.py", "configuration_x.py", "LICENSE", "sentence_bert_config.json"), "x"),
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
    "additional_chat_templates/tool_use.jinja": "T{{messages}}",
    "some/deeper/folder.txt": "x",
}
LEFT = {
    **dict.fromkeys(("consolidated.safetensors", "model.gguf", "onnx/model.onnx", "onnx/config.json"), "x"),
    **dict.fromkeys(("adapter_config.json", "hf_quant_config.json"), "{}"),
}
SILENT = dict.fromkeys(("trainer_state.json", "training_args.bin", ".gitattributes", "checkpoint-5/x.json"), "x")


def place(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def merged(folder: Path, *models: Path, **more: Any) -> list[str]:
    listed = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    said: list[str] = []
    recipe = parse_recipe({"merge_method": "linear", "models": listed, **more})
    merge_to_folder(recipe, folder, warn=said.append)
    return said


@pytest.fixture
def pair(tiny_family: dict[str, Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(tiny_family[name], tmp_path / name)) for name in "ab"]


def test_every_small_file_goes_along_and_what_does_not_is_named(pair: list[Path], tmp_path: Path) -> None:
    for folder in pair:
        place(folder, KEPT | LEFT | SILENT)
    save_file(load_file(pair[0] / "model.safetensors"), pair[0] / "consolidated.safetensors")
    (pair[0] / "2_Dense").mkdir()
    save_file({}, pair[0] / "2_Dense" / "model.safetensors")
    said = merged(tmp_path / "out", *pair)
    for name, text in KEPT.items():
        assert (tmp_path / "out" / name).read_text() == text
    for name in (*LEFT, *SILENT):
        assert not (tmp_path / "out" / name).exists(), name
    assert said[0].startswith(f"not taken along from {pair[0]}: ")
    for name in ("adapter_config.json", "consolidated.safetensors", "hf_quant_config.json", "model.gguf", "onnx/"):
        assert name in said[0]
    assert said[1] == f"copied from {pair[0]} and not merged: 2_Dense/model.safetensors"
    assert len(said) == 2


def test_a_folder_without_more_says_nothing(pair: list[Path], tmp_path: Path) -> None:
    assert merged(tmp_path / "out", *pair) == []
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert parse_recipe(recipe).models() == tuple(map(str, pair))


def test_from_a_snapshot_of_the_hub(tmp_path: Path, pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are links there; what is asked for has folders in it, and no second form of the model."""
    blobs = tmp_path / "blobs"
    place(pair[0], KEPT)
    shutil.move(pair[0], blobs)
    for path in sorted(blobs.rglob("*")):
        if path.is_file():
            link = pair[0] / path.relative_to(blobs)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    asked: list[Any] = []

    def download(model: str, **options: Any) -> str:
        asked.append(options)
        return str(pair[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    open_checkpoint("org/name")
    from huggingface_hub.utils import filter_repo_objects

    offered = [*KEPT, *LEFT, "2_Dense/model.safetensors", "original/consolidated.00.pth"]
    taken = set(filter_repo_objects(offered, **{k: v for k, v in asked[0].items() if k.endswith("patterns")}))
    assert taken >= {*KEPT, "2_Dense/model.safetensors"}
    assert not taken & {"model.gguf", "onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth"}
    merged(tmp_path / "out", *pair)
    for name, text in KEPT.items():
        path = tmp_path / "out" / name
        assert path.read_text() == text
        assert not path.is_symlink()


def test_another_tokenizer_takes_the_place_of_all_its_files(pair: list[Path], tmp_path: Path) -> None:
    """Several chat templates go along with it, a second form of the old tokenizer does not."""
    for folder in pair:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        tokenizer.chat_template = {"default": "D{{messages}}", "tool_use": "T{{messages}}"}
        tokenizer.save_pretrained(folder)
        place(folder, {"tekken.json": "{}", "preprocessor_config.json": "{}"})
    said = merged(
        tmp_path / "out", *pair, tokenizer={"source": "union", "tokens": {"<z>": {"source": {"kind": "zero"}}}}
    )
    assert "the tokenizer is another, so these are left out: tekken.json" in said
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<z>" in loaded.get_vocab()
    assert set(loaded.chat_template) == {"default", "tool_use"}
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_a_tokenizer_that_is_python_code(pair: list[Path], tmp_path: Path) -> None:
    """It is not run: equal files are the same tokenizer, and of others it is said that nobody looked."""
    coded = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}, "tokenizer_class": "XTokenizer"}
    for folder in pair:
        (folder / "tokenizer.json").unlink()
        place(folder, {"tokenization_x.py": "1 / 0", "words.x": "a b c"})
        (folder / "tokenizer_config.json").write_text(json.dumps(coded))
    assert merged(tmp_path / "out", *pair) == []
    for name in ("tokenization_x.py", "words.x"):
        assert (tmp_path / "out" / name).read_text() == (pair[0] / name).read_text()
    (pair[1] / "words.x").write_text("c b a")
    (said,) = merged(tmp_path / "other", *pair)
    assert "its tokenizer is Python code, which is not run" in said


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/name", True),
        ("org/name@v1", True),
        ("org/m.safetensors", False),
        ("/a/b", False),
        ("zoo:x", False),
        ("x", False),
    ],
)
def test_hub_ids(reference: str, expected: bool) -> None:
    assert is_hub_id(reference) == expected
