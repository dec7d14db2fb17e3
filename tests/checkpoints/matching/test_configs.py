"""Equal tensors that mean different things: said with both values, or refused where no average makes sense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.matching.compatible import check_compatible
from evomerge.checkpoints.matching.configs import disagreements
from evomerge.planning.plan import align_and_plan
from evomerge.recipe import parse_recipe
from evomerge.run.init import init_search


def changed(model: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(model, folder)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta 1000000.0 against 10000.0"),
        ({"rope_parameters": ..., "rope_theta": 1e6}, "rope_theta 1000000.0 against 10000.0"),
        ({"rope_parameters": ..., "rope_theta": 1e4}, ""),
        ({"hidden_act": "gelu"}, "hidden_act gelu against silu"),
        ({"rms_norm_eps": 1e-2}, "rms_norm_eps 0.01 against 1e-06"),
        ({"sliding_window": 4096, "max_position_embeddings": 9, "attention_dropout": 0.1}, ""),
        ({"torch_dtype": "bfloat16", "use_cache": False, "eos_token_id": [1, 2], "transformers_version": "4.1"}, ""),
    ],
)
def test_what_is_said(tiny_family: dict[str, Path], tmp_path: Path, config: dict[str, Any], said: str) -> None:
    """In either spelling of transformers; nothing of what changes no weight's meaning, or of what one alone has."""
    base = open_checkpoint(str(tiny_family["base"]))
    model = open_checkpoint(str(changed(tiny_family["a"], tmp_path / "m", **config)))
    text = disagreements(base, model)
    assert bool(text) == bool(said)
    assert said in text
    assert check_compatible(base, {"m": model}) == []
    models = [{"model": one.reference, "parameters": {"weight": 0.5}} for one in (base, model)]
    recipe = parse_recipe({"merge_method": "linear", "models": models})
    _, _, warnings = align_and_plan(recipe, {one.reference: one for one in (base, model)}, identify=False)
    assert warnings == ((text,) if text else ())


def test_init_says_it(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    model = changed(tiny_family["a"], tmp_path / "m", hidden_act="gelu")
    text = init_search([str(tiny_family["base"]), str(model)], tmp_path / "search.yaml")
    assert f"warning: {model}: its config disagrees with that of {tiny_family['base']}" in text


def test_other_heads_are_refused(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    other = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    model = open_checkpoint(str(changed(tiny_family["a"], tmp_path / "m", **other)))
    problems = check_compatible(open_checkpoint(str(tiny_family["base"])), {"m": model})
    assert [problem.split(":")[1].split(" is")[0] for problem in problems] == [
        " head_dim",
        " num_attention_heads",
        " num_key_value_heads",
    ]


def test_lists_by_layer_do_not_count_where_layers_are_copied(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    kinds = {"layer_types": ["full_attention"] * 4, "sliding_window": 4}
    one = open_checkpoint(str(changed(tiny_family["a"], tmp_path / "one", **kinds)))
    kinds["layer_types"] = ["sliding_attention"] * 4
    two = open_checkpoint(str(changed(tiny_family["b"], tmp_path / "two", **kinds)))
    assert "layer_types" in disagreements(one, two)
    assert disagreements(one, two, by_layer=False) == ""
