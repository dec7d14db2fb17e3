"""A search over models whose vocabularies differ: aligned once, scored with the merged tokenizer, exported with it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from evomerge.errors import CheckpointError, SpecError
from evomerge.planning.vocabulary.aligned_weights import AlignedWeights
from evomerge.problem.problem import open_problem
from evomerge.recipe import load_recipe
from evomerge.run.init import init_search
from evomerge.run.merge import merge_to_folder
from evomerge.run.search import start
from evomerge.spec.load import load_spec, parse_spec
from tests.frame import search_spec, write_json
from tests.planning.vocabulary.tokenizers import write_models

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
NAMES = {"a": "chatml", "b": "tools"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretrained base, and two instruct models with tokens and a template of their own."""
    folders = write_models(tmp_path_factory.mktemp("vocabulary-run"), layers=2)
    for name in NAMES.values():
        (folders[name] / "chat_template.jinja").write_text(TEMPLATE)
        write_json(folders[name] / "generation_config.json", eos_token_id=[1, 260])
    return folders


def _spec(models: dict[str, Path], **changes: Any) -> dict[str, Any]:
    sources = {name: str(models[folder]) for name, folder in NAMES.items()}
    small = {
        "models": {"base": str(models["base"]), "sources": sources, "tokenizer": "union"},
        "space": {"methods": ["linear", "dare_ties", "frankenmerge"], "layer_groups": 1},
        "search__candidates": 5,
        "search__finalists": 2,
        "evaluation__guard": [],
    }
    return search_spec(dict.fromkeys(("base", "a", "b", "c"), models["base"]), **(small | changes))


def test_a_run_from_start_to_end(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: Counter[tuple[int, str]] = Counter()
    read = AlignedWeights._read

    def counted(self: AlignedWeights, name: str) -> torch.Tensor:
        if name == "model.embed_tokens.weight":
            computed[id(self), name] += 1
        return read(self, name)

    monkeypatch.setattr(AlignedWeights, "_read", counted)
    start(parse_spec(_spec(models)), folder=tmp_path / "run")
    assert len(computed) == 3, "of each model once"
    assert set(computed.values()) == {1}
    (best,) = (tmp_path / "run" / "best").iterdir()
    tokenizer = AutoTokenizer.from_pretrained(best)
    assert {"<|im_start|>", "<|im_end|>", "<tool>"} <= set(tokenizer.get_vocab())
    assert tokenizer.chat_template == TEMPLATE
    table = load_file(best / "model.safetensors")["model.embed_tokens.weight"]
    assert max(tokenizer.get_vocab().values()) == len(table) - 1
    assert json.loads((best / "config.json").read_text())["vocab_size"] == len(table)
    assert "the same numbers as in the search" in (best / "README.md").read_text()
    ends = json.loads((best / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends

    monkeypatch.undo()
    again = merge_to_folder(load_recipe(best / "recipe.yaml"), tmp_path / "again", warn=lambda text: None)
    merged, kept = (load_file(folder / "model.safetensors") for folder in (again, best))
    assert merged.keys() == kept.keys()
    assert all(torch.equal(merged[name], kept[name]) for name in kept)
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (best / name).read_bytes()


@pytest.mark.parametrize(("source", "rows"), [("base", 259), ("b", 261), ("union", 262)])
def test_whose_tokens(models: dict[str, Path], source: str, rows: int) -> None:
    problem = open_problem(parse_spec(_spec(models, models__tokenizer=source)))
    assert len(problem.tokenizer) == rows
    sizes = {model.tensors["model.embed_tokens.weight"].shape[0] for model in problem.checkpoints.values()}
    assert sizes == {rows}


def test_without_a_tokenizer_it_is_refused_with_what_to_write(models: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"models\.tokenizer: union in a search, matches rows by token"):
        open_problem(parse_spec(_spec(models, models__tokenizer=...)))
    with pytest.raises(SpecError, match=r"models\.tokenizer: no source is called 'unoin'.*union"):
        parse_spec(_spec(models, models__tokenizer="unoin"))


@pytest.mark.parametrize(
    ("names", "tokenizer"),
    [
        (("base", "chatml", "tools"), "union"),
        (("base", "chatml", "padded"), "chatml"),
        (("base", "padded"), "base"),
        (("padded", "base"), "base"),
    ],
)
def test_init_writes_it_where_it_is_needed(
    models: dict[str, Path], tmp_path: Path, names: tuple[str, ...], tokenizer: str
) -> None:
    out = tmp_path / "search.yaml"
    init_search([str(models[name]) for name in names[1:]], out, base=str(models[names[0]]))
    assert yaml.safe_load(out.read_text())["models"]["tokenizer"] == tokenizer
    assert open_problem(load_spec(out).model_copy(update={"evaluation": parse_spec(_spec(models)).evaluation}))


def test_init_for_instruct_models_of_a_pretrained_base(models: dict[str, Path], tmp_path: Path) -> None:
    """One vocabulary, but the base has no template: merges would lose it."""
    inst = Path(shutil.copytree(models["base"], tmp_path / "inst"))
    (inst / "chat_template.jinja").write_text("{{ messages[0].content }}")
    init_search([str(inst)], tmp_path / "s.yaml", base=str(models["base"]))
    assert yaml.safe_load((tmp_path / "s.yaml").read_text())["models"]["tokenizer"] == "inst"
