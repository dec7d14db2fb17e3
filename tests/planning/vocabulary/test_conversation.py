"""What a pretrained base's files take from its instruct models: said, and kept when asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from tests.frame import write_json
from tests.planning.vocabulary.tokenizers import write_models

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
Make = Callable[[str, str, list[int]], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("conversation"))


@pytest.fixture
def instruct(folders: dict[str, Path], tmp_path: Path) -> Make:
    """Makes an instruct model: (model, name, its stop tokens)."""

    def make(model: str, name: str, stops: list[int]) -> Path:
        folder = Path(shutil.copytree(folders[model], tmp_path / name))
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        write_json(folder / "generation_config.json", eos_token_id=stops)
        return folder

    return make


def _merged(base: Path, sources: list[Path], out: Path, **more: Any) -> tuple[Any, Any, list[str]]:
    """(chat template, stop tokens, warnings) of task arithmetic."""
    models = [{"model": str(source), "parameters": {"weight": 0.5}} for source in sources]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, **more}
    warnings: list[str] = []
    merge_to_folder(parse_recipe(recipe), out, warn=warnings.append)
    generation = json.loads((out / "generation_config.json").read_text())
    return AutoTokenizer.from_pretrained(out).chat_template, generation["eos_token_id"], warnings


def test_what_is_lost_is_said_with_what_keeps_it(instruct: Make, folders: dict[str, Path], tmp_path: Path) -> None:
    base, inst = folders["base"], instruct("base", "inst", [1, 2])
    template, stops, (no_template, no_stop) = _merged(base, [folders["base"], inst], tmp_path / "out")
    assert (template, stops) == (None, 1)
    assert no_template.startswith(f"the tokenizer of {base}, which is taken, has no chat template, and that of {inst}")
    assert f"'chat_template: auto' to have it, or 'tokenizer_source: {inst}'" in no_template
    assert no_stop.startswith(f"{inst} stops at '<pad>', the merged model does not")
    kept = _merged(base, [inst], tmp_path / "auto", chat_template="auto")
    assert kept == (TEMPLATE, [1, 2], []), "a template of a model's own brings its stop tokens"
    assert _merged(base, [inst], tmp_path / "source", tokenizer_source=str(inst)) == (TEMPLATE, [1, 2], [])


def test_tokens_that_the_base_lacks(instruct: Make, folders: dict[str, Path], tmp_path: Path) -> None:
    base, inst = folders["padded"], instruct("chatml", "inst", [260, 1])
    template, stops, (warning,) = _merged(
        base, [inst], tmp_path / "auto", chat_template="auto", tokenizer_source="base"
    )
    assert (template, stops) == (TEMPLATE, 1)
    assert warning.startswith(f"{inst} stops at '<|im_end|>'")
    assert warning.endswith(f"'tokenizer_source: {inst}' keeps its stop tokens")
    assert _merged(base, [inst], tmp_path / "source", tokenizer_source=str(inst)) == (TEMPLATE, [260, 1], [])
    union = _merged(base, [inst], tmp_path / "union", chat_template="auto", tokenizer_source="union")
    assert union == (TEMPLATE, [1, 260], [])


def test_stop_tokens_of_a_base_without_a_generation_config(
    instruct: Make, folders: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(folders["base"], tmp_path / "base"))
    (base / "generation_config.json").unlink()
    inst = instruct("base", "inst", [1, 2])
    assert _merged(base, [inst], tmp_path / "source", tokenizer_source=str(inst))[1] == [1, 2]


def test_nothing_is_said_where_nothing_is_lost(instruct: Make, folders: dict[str, Path], tmp_path: Path) -> None:
    base, inst = instruct("base", "base", [1, 2]), instruct("base", "inst", [2])
    assert _merged(base, [inst, folders["base"]], tmp_path / "out") == (TEMPLATE, [1, 2], [])


@pytest.mark.parametrize("source", ["base", "union"])
def test_a_special_token_without_a_row(folders: dict[str, Path], tmp_path: Path, source: str) -> None:
    """[PAD] was added to the tokenizer and the embedding never resized."""
    models = []
    for name in ("one", "two"):
        models.append(Path(shutil.copytree(folders["base"], tmp_path / name)))
        tokenizer = AutoTokenizer.from_pretrained(models[-1])
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(models[-1])
    state = load_file(models[1] / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, models[1] / "model.safetensors")
    out = tmp_path / "out"
    _, _, (warning,) = _merged(models[0], models[1:], out, tokenizer_source=source)
    assert warning == f"{models[0]}: its pad token '[PAD]' has no row in the embedding, so it is left out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token is None
    table = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    assert max(tokenizer.get_vocab().values()) == len(table) - 1 == 258
    torch.testing.assert_close(table, state["model.embed_tokens.weight"] + 0.5)
