"""The structures of mergekit's own examples and documentation, one file each under recipes/mergekit, on tiny models.

The first line of a file says what models it is for. `base`, `a`, `b` and `c` stand for the models of the original.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from tests.architectures import ARCHITECTURES, Architecture, outputs, shaken
from tests.engine.test_architectures import load
from tests.models import byte_tokenizer, write_tiny_llama

FILES = sorted((Path(__file__).parent.parent / "recipes" / "mergekit").glob("*.yaml"))
_HEAD = re.compile(r"# on: (\w+)(?: of (\d+) layers)?(?:, becomes (\d+))?")
_DEPTHS = ("num_hidden_layers", "n_layer")
_TOKENS = {"a": ["<|im_start|>", "<|im_end|>"]}
_TOKENS |= {"b": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|special|>"]}


def head_of(path: Path) -> tuple[str, int | None, int | None]:
    """(architecture, layers, layers of the result), of what the first line says."""
    found = _HEAD.fullmatch(path.read_text().splitlines()[0])
    assert found is not None, f"{path.name}: the first line says what the recipe is for"
    return found[1], *(int(number) if number else None for number in found.groups()[1:])  # type: ignore[return-value]


def architecture_of(name: str, layers: int | None) -> Architecture:
    architecture = ARCHITECTURES["llama" if name == "chat" else name]
    deeper = {key: layers for key in _DEPTHS if layers is not None and key in architecture.options}
    return replace(architecture, options=architecture.options | deeper)


def write_models(root: Path, name: str, layers: int | None) -> Path:
    """A folder with a base and three noisy copies of it."""
    for seed, model in enumerate(("base", "a", "b", "c")):
        if name == "chat":
            write_chat_model(root, model, seed)
        else:
            made = architecture_of(name, layers).build()
            (shaken(made, seed) if seed else made).save_pretrained(root / model)
    return root


def write_chat_model(root: Path, model: str, seed: int) -> None:
    """One of a family whose members know different special tokens."""
    from transformers import LlamaForCausalLM

    write_tiny_llama(root / model, seed, base=root / "base" if seed else None, layers=2, tied=False)
    if model in _TOKENS:
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": _TOKENS[model]})
        tokenizer.save_pretrained(root / model)
        made = LlamaForCausalLM.from_pretrained(root / model)
        made.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        made.save_pretrained(root / model)


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int | None], Path]:
    root = tmp_path_factory.mktemp("examples")
    return functools.cache(lambda name, layers: write_models(root / f"{name}-{layers}", name, layers))


def test_there_are_examples() -> None:
    assert len(FILES) >= 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parses_and_runs(models_of: Callable[[str, int | None], Path], tmp_path: Path, path: Path) -> None:
    name, layers, deeper = head_of(path)
    architecture = architecture_of(name, layers)
    recipe = parse_recipe(path.read_text(), where=str(path), beside=models_of(name, layers))
    assert recipe.warnings == ()
    model: Any = load(architecture, merge_to_folder(recipe, tmp_path / "out"))
    depth = next((getattr(model.config, key) for key in _DEPTHS if hasattr(model.config, key)), None)
    if deeper is not None or layers is not None:
        assert depth == (deeper or layers)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{recipe.output_dtype or 'float32'}"}
    found = outputs(model.float(), architecture.inputs(model))
    assert torch.isfinite(found).all()
    assert found.std() > 0
