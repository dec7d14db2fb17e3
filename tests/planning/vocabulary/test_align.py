"""Merges of models whose vocabularies differ, from the recipe to a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evomerge.checkpoints.checkpoint import open_checkpoints
from evomerge.engine.resident import Resident
from evomerge.errors import CheckpointError, RecipeError
from evomerge.planning.plan import align_and_plan, make_plan
from evomerge.recipe import parse_recipe
from evomerge.run.check import check_file
from evomerge.run.merge import merge_to_folder
from tests.frame import invoke
from tests.planning.vocabulary.tokenizers import recipes, truncated, write_models

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("untied"), tied=False)


def merged(recipe: dict[str, Any], out: Path, **options: Any) -> tuple[dict[str, torch.Tensor], Any, list[str]]:
    """(weights, tokenizer, warnings) of a merge."""
    warnings: list[str] = []
    merge_to_folder(parse_recipe(recipe), out, warn=warnings.append, **options)
    return load_file(out / "model.safetensors"), AutoTokenizer.from_pretrained(out), warnings


def table(folder: Path, name: str = EMBEDDING) -> dict[str, np.ndarray]:
    """A model's rows by token, in float64."""
    rows = load_file(folder / "model.safetensors")[name].double().numpy()
    return {token: rows[i] for token, i in AutoTokenizer.from_pretrained(folder).get_vocab().items() if i < len(rows)}


def single(folder: Path, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1.0}}], **more}


@pytest.mark.parametrize("name", [EMBEDDING, "lm_head.weight"])
def test_union_row_by_row(untied: dict[str, Path], tmp_path: Path, name: str) -> None:
    """0.5 base + 1 chatml + 2 tools, over 3.5, token by token; each lacking token as the rules say.

    <|im_start|> is chatml's alone, so that all three have its row; <|im_end|> is in chatml and tools, so that the base
    has their mean; <tool> is tools' alone.
    """
    weights, tokenizer, warnings = merged(dict(recipes(untied))["linear-union-chatml-tools"], tmp_path / "out")
    base, chatml, tools = (table(untied[model], name) for model in ("base", "chatml", "tools"))
    assert warnings == []
    assert sorted(set(tokenizer.get_vocab()) - set(base)) == ["<tool>", "<|im_end|>", "<|im_start|>"]
    expected = {token: (0.5 * base[token] + chatml[token] + 2 * tools[token]) / 3.5 for token in base}
    expected["<|im_start|>"], expected["<tool>"] = chatml["<|im_start|>"], tools["<tool>"]
    ours, theirs = chatml["<|im_end|>"], tools["<|im_end|>"]
    expected["<|im_end|>"] = (0.5 * (ours + theirs) / 2 + ours + 2 * theirs) / 3.5
    found = weights[name].double().numpy()
    assert len(found) == len(expected) == 262
    for token, row in tokenizer.get_vocab().items():
        np.testing.assert_allclose(found[row], expected[token], rtol=1e-6, atol=1e-8)


def test_every_option_makes_a_whole_model(tied: dict[str, Path], tmp_path: Path) -> None:
    """What is compared with mergekit elsewhere loads, and its tokenizer, config and weights agree."""
    alike = ("base-padded", "base-shuffled", "union-padded", "arithmetic", "ties", "slerp-", "float32", "chat-")
    for name, recipe in recipes(tied):
        if any(text in name for text in alike):
            continue
        weights, tokenizer, _ = merged(recipe, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["vocab_size"] == len(weights[EMBEDDING]) >= len(tokenizer), name
        ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        assert {role: config[f"{role}_token_id"] for role in ids} == ids, name
        if "block-pad" in name:
            assert len(weights[EMBEDDING]) == 320
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "linear-union-chatml-tools")
    ids = AutoTokenizer.from_pretrained(tmp_path / "linear-union-chatml-tools")("hi<|im_end|>", return_tensors="pt")
    assert model(**ids).logits.shape == (1, 3, 262)


def scores(folder: Path, text: str) -> torch.Tensor:
    """Log-probability of each token of a text among the tokens that every tokenizer here has."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    shared = sorted(token for token in tokenizer.get_vocab() if len(token) == 1 or token in ("<s>", "</s>", "<pad>"))
    rows = torch.tensor(tokenizer.convert_tokens_to_ids(shared))
    with torch.no_grad():
        logits = model(ids).logits[0, :-1, rows].log_softmax(-1)
    places = [shared.index(token) for token in tokenizer.convert_ids_to_tokens(ids[0, 1:])]
    return logits[torch.arange(len(places)), torch.tensor(places)]


def test_a_model_scores_the_same_under_another_tokenizer(untied: dict[str, Path], tmp_path: Path) -> None:
    """`shuffled` has the base's tokens under other ids; there and back again, the rows are the same bits."""
    there, back = tmp_path / "there", tmp_path / "back"
    merged(single(untied["base"], tokenizer_source=str(untied["shuffled"])), there)
    text = "the cat sat, and that was that"
    torch.testing.assert_close(scores(there, text), scores(untied["base"], text))
    base, moved = (load_file(folder / "model.safetensors") for folder in (untied["base"], there))
    assert not torch.equal(moved[EMBEDDING], base[EMBEDDING])
    merged(single(there, tokenizer_source=f"model:{untied['base']}"), back)
    again = load_file(back / "model.safetensors")
    assert all(torch.equal(again[name], base[name]) for name in base)


def test_the_union_scores_shared_texts_as_before(tied: dict[str, Path], tmp_path: Path) -> None:
    """A model of weight 1 beside one of weight 0 gains tokens and changes nothing else."""
    models = [{"model": str(tied[n]), "parameters": {"weight": w}} for n, w in (("base", 1.0), ("words", 0.0))]
    recipe = {"merge_method": "linear", "models": models, "tokenizer_source": "union"}
    _, tokenizer, _ = merged(recipe, tmp_path / "out")
    text = "dogs bark at night"
    torch.testing.assert_close(scores(tmp_path / "out", text), scores(tied["base"], text))
    assert tokenizer.tokenize(" the cat") == ["Ġthe", "Ġcat"]


def test_nothing_changes_where_nothing_differs(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """One vocabulary under `union`: the same weights, and the very files of the base's tokenizer."""
    recipe = {
        "merge_method": "dare_ties",
        "base_model": str(tiny_family["base"]),
        "models": [{"model": str(tiny_family[n]), "parameters": {"weight": 1.0, "density": 0.5}} for n in "ab"],
    }
    plain, _, _ = merged(recipe, tmp_path / "plain")
    united, _, warnings = merged(recipe | {"tokenizer_source": "union"}, tmp_path / "united")
    assert warnings == []
    assert all(torch.equal(plain[name], united[name]) for name in plain)
    for path in (tmp_path / "plain").iterdir():
        if path.name not in ("README.md", "recipe.yaml"):
            assert path.read_bytes() == (tmp_path / "united" / path.name).read_bytes(), path.name


def test_in_memory_as_on_disk(untied: dict[str, Path], tmp_path: Path) -> None:
    """The resident model, a search's and a notebook's, holds what is written."""
    recipe = dict(recipes(untied))["ties-union"]
    on_disk, _, _ = merged(recipe, tmp_path / "out")
    plan, checkpoints, _ = align_and_plan(wanted := parse_recipe(recipe), open_checkpoints(wanted.models()))
    model, _ = Resident(checkpoints).write(plan)
    held = model.state_dict()
    assert all(torch.equal(held[name], on_disk[name]) for name in on_disk)
    assert model.config.vocab_size == 271


def test_embed_slerp(tied: dict[str, Path], tmp_path: Path) -> None:
    """Embeddings by SLERP at t, layers by the recipe's method: each is what a recipe of that method alone gives."""
    models = [{"model": str(tied[n]), "parameters": {"weight": 0.5}} for n in ("base", "chatml")]
    common = {"base_model": str(tied["base"]), "models": models, "tokenizer_source": "union"}
    linear, _, _ = merged({"merge_method": "linear", **common}, tmp_path / "linear")
    slerp, _, _ = merged({"merge_method": "slerp", **common, "parameters": {"t": 0.7}}, tmp_path / "slerp")
    mixed, _, warnings = merged(
        {"merge_method": "linear", **common, "parameters": {"t": 0.7, "embed_slerp": True}}, tmp_path / "mixed"
    )
    assert warnings == []
    assert torch.equal(mixed[EMBEDDING], slerp[EMBEDDING])
    assert not torch.equal(mixed[EMBEDDING], linear[EMBEDDING])
    layers = [name for name in linear if name != EMBEDDING]
    assert all(torch.equal(mixed[name], linear[name]) for name in layers)


def test_truncation(untied: dict[str, Path], tmp_path: Path) -> None:
    """Without a source: 259 rows are left of 259, 320 and 261, merged by number; the same words from check."""
    name, recipe = truncated(untied)
    with pytest.raises(CheckpointError, match=r"differ in size .*: with tokenizer_source: .* with --truncate-vocab"):
        merged(recipe, tmp_path / name)
    weights, tokenizer, (warning,) = merged(recipe, tmp_path / name, truncate_vocabulary=True)
    rows = ", ".join(f"{untied[model]} {count}" for model, count in (("base", 259), ("padded", 320), ("chatml", 261)))
    assert warning == (
        f"the vocabularies differ in size ({rows} rows): cut to the smallest, 259 rows; "
        "with tokenizer_source: union or base they are matched by token"
    )
    assert len(tokenizer) == 259
    for tensor in (EMBEDDING, "lm_head.weight"):
        parts = [
            load_file(untied[m] / "model.safetensors")[tensor][:259].double() for m in ("base", "padded", "chatml")
        ]
        expected = (0.5 * parts[0] + parts[1] + 2 * parts[2]) / 3.5
        torch.testing.assert_close(weights[tensor].double(), expected, rtol=1e-6, atol=1e-7)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert f"warning: {warning}" in check_file(path, truncate_vocabulary=True)


def test_truncation_takes_tokens_and_ids_out(tied: dict[str, Path], tmp_path: Path) -> None:
    """chatml loses its two tokens to the base's 259 rows, and its end of turn with them."""
    chatml = Path(shutil.copytree(tied["chatml"], tmp_path / "chatml"))
    for file in ("config.json", "generation_config.json"):
        content = json.loads((chatml / file).read_text()) | {"eos_token_id": [1, 260], "pad_token_id": 259}
        (chatml / file).write_text(json.dumps(content))
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in (chatml, tied["base"])]
    recipe = {"merge_method": "linear", "models": models}
    _, tokenizer, warnings = merged(recipe, tmp_path / "out", truncate_vocabulary=True)
    assert "<|im_end|>" not in tokenizer.get_vocab()
    assert warnings[1:] == [
        "eos_token_id: [1, 260] is no token of the merged vocabulary, so it is left out",
        "pad_token_id: 259 is no token of the merged vocabulary, so it is left out",
    ]
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "out" / file).read_text())
        assert (content["eos_token_id"], content.get("pad_token_id")) == ([1], None)


def test_rows_that_mean_something_else_are_not_cut(tied: dict[str, Path], tmp_path: Path) -> None:
    """Of other sizes they are refused, of the same size there is a warning: some models just rename spare tokens."""
    with pytest.raises(CheckpointError, match=r"shuffled: another vocabulary: 256 rows .*\(row 3: 'Ń' against '!'\)"):
        merged(
            {
                "merge_method": "linear",
                "models": [
                    {"model": str(tied[n]), "parameters": {"weight": 1}} for n in ("base", "shuffled", "chatml")
                ],
            },
            tmp_path / "out",
        )
    models = [{"model": str(tied[n]), "parameters": {"weight": 1}} for n in ("base", "shuffled")]
    _, _, (warning,) = merged({"merge_method": "linear", "models": models}, tmp_path / "out")
    assert "256 rows stand for other tokens" in warning
    assert warning.endswith("; with tokenizer_source: union or base they are matched by token")


def test_special_ids_follow_the_tokenizer(tied: dict[str, Path], tmp_path: Path) -> None:
    """Under another model's tokenizer its ids count, for generation too; one that it does not name goes by its text."""
    other = Path(shutil.copytree(tied["chatml"], tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(other)
    config = json.loads((other / "config.json").read_text()) | {"eos_token_id": 260}
    (other / "config.json").write_text(json.dumps(config))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 260]}))
    base = Path(shutil.copytree(tied["base"], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"image_token_id": 7}
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.5, "do_sample": True}))
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in (base, other)]
    out = tmp_path / "out"
    merged({"merge_method": "linear", "models": models, "tokenizer_source": str(other)}, out)
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["image_token_id"], config["vocab_size"]) == (260, 7, 261)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [1, 260], "temperature": 0.5, "do_sample": True}
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 260
    for path in (out / "tokenizer.json", out / "tokenizer_config.json"):
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_a_token_without_a_row_is_taken_out(tied: dict[str, Path], tmp_path: Path) -> None:
    """`beyond` has 260 rows and 261 tokens; as the base, it loses the last one and takes the chatml's instead."""
    weights, tokenizer, _ = merged(dict(recipes(tied))["linear-beyond"], tmp_path / "out")
    ids = tokenizer.get_vocab()
    assert (ids["<|im_start|>"], ids["<|im_end|>"], "<unused>" in ids) == (259, 260, False)
    assert len(weights[EMBEDDING]) == 261


def test_added_tokens_under_the_base(tied: dict[str, Path], tmp_path: Path) -> None:
    """A token of the recipe's own starts as another token's row; one without a source is nobody's: zeros."""
    tokens = {"<new>": {"source": {"kind": "model_token", "model": str(tied["base"]), "token": "a"}}, "<none>": None}
    recipe = single(tied["base"], tokenizer={"source": "base", "tokens": tokens})
    weights, tokenizer, (warning,) = merged(recipe, tmp_path / "out")
    assert warning == "no model has the 1 token '<none>': zeros, until they are trained"
    ids = tokenizer.get_vocab()
    assert (ids["<new>"], ids["<none>"]) == (259, 260)
    assert torch.equal(weights[EMBEDDING][259], weights[EMBEDDING][ids["a"]])
    assert not weights[EMBEDDING][260].any()
    assert tokenizer.tokenize("a<new>b") == ["a", "<new>", "b"]


def test_models_without_a_tokenizer(tied: dict[str, Path], tmp_path: Path) -> None:
    """One that has none is taken to have the base's; where nobody has one, there is nothing to match by."""
    bare = tmp_path / "bare.safetensors"
    shutil.copy(tied["base"] / "model.safetensors", bare)
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in (tied["chatml"], bare)]
    _, _, warnings = merged({"merge_method": "linear", "models": models, "tokenizer_source": "base"}, tmp_path / "out")
    assert warnings == [f"{bare}: has no tokenizer; taken to have that of {tied['chatml']}"]
    with pytest.raises(CheckpointError, match="has no tokenizer, which the recipe needs"):
        merged(single(bare, tokenizer_source="base"), tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no tokenizer, which the recipe takes as tokenizer source"):
        merged(single(tied["base"], tokenizer_source=str(tmp_path)), tmp_path / "none")
    with pytest.raises(CheckpointError, match="no such model"):
        merged(single(tied["base"], tokenizer_source="model:nowhere"), tmp_path / "none")


def test_notations_do_not_mix(tied: dict[str, Path], tmp_path: Path) -> None:
    """Words of another kind of tokenizer cannot join; they can be matched against the base's tokens."""
    words = Path(shutil.copytree(tied["base"], tmp_path / "words"))
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "cat": 2}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<s>").save_pretrained(words)
    both = [{"model": str(path), "parameters": {"weight": 1.0}} for path in (tied["base"], words)]
    with pytest.raises(
        RecipeError, match="writes its tokens as WordLevel, plain text, the base as BPE, bytes as letters"
    ):
        merged({"merge_method": "linear", "models": both, "tokenizer_source": "union"}, tmp_path / "out")
    _, _, (warning,) = merged({"merge_method": "linear", "models": both, "tokenizer_source": "base"}, tmp_path / "out")
    assert warning == f"{words}: has 2 of the merged vocabulary's 259 tokens; the others' rows are not its own"


def test_broken_tokenizers_and_tables(tied: dict[str, Path], untied: dict[str, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tied["base"], tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer could be read"):
        merged(single(broken, tokenizer_source="base"), tmp_path / "out")
    short = Path(shutil.copytree(untied["base"], tmp_path / "short"))
    tensors = load_file(short / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:250].clone()
    save_file(tensors, short / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight has 250 rows, model.embed_tokens.weight has 259"):
        merged(single(short, tokenizer_source="base"), tmp_path / "out")
    wide = write_models(tmp_path / "wide", hidden=16)["chatml"]
    both = [{"model": str(path), "parameters": {"weight": 1.0}} for path in (tied["base"], wide)]
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight has rows of 16, in"):
        merged({"merge_method": "linear", "models": both, "tokenizer_source": "base"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_without_alignment_is_refused(tied: dict[str, Path]) -> None:
    recipe = parse_recipe(dict(recipes(tied))["linear-base-chatml-tools"])
    with pytest.raises(RecipeError, match="tokenizer_source: not carried out here"):
        make_plan(recipe, open_checkpoints(recipe.models()))


def test_command_line(tied: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`merge` says on stderr what `check` says."""
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(truncated(tied)[1]))
    merging, checking = (
        invoke(capsys, *c)
        for c in (("merge", path, tmp_path / "out", "--truncate-vocabulary"), ("check", path, "--truncate-vocabulary"))
    )
    (line,) = [line for line in merging.err.splitlines() if line.startswith("warning:")]
    assert (merging.code, checking.code) == (0, 0)
    assert line in checking.out.splitlines()
