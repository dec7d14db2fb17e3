"""Model cards: what the Hub reads, whether the licences agree, and whether the numbers do."""

from __future__ import annotations

import re
import shutil
from math import nan
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.evaluation.scores import Score
from evomerge.recipe import parse_recipe
from evomerge.report.model_card import ReportedScores, Rescored, licence_verdict, licences, merge_card
from tests.engine.recipes import opened


def card_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.fixture
def licensed(tiny_family: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The family with cards that state a licence."""
    family = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in tiny_family.items()}
    for folder in family.values():
        (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n")
    return family


def the_card(family: dict[str, Path], body: str = "") -> str:
    models = [{"model": str(family[name]), "parameters": {"weight": 0.5}} for name in "ab"]
    recipe = {"merge_method": "ties", "base_model": str(family["base"]), "models": models}
    parsed = parse_recipe(recipe)
    return merge_card(parsed, opened(parsed.models()), body)


def test_metadata(licensed: dict[str, Path]) -> None:
    text = the_card(licensed, "## Scores\n\nnone yet\n")
    assert card_of(text) == {
        "library_name": "transformers",
        "tags": ["evomerge", "merge", "ties"],
        "license": "apache-2.0",
    }
    assert text.index("# Merged with EvoMerge: ties") < text.index("## Scores") < text.index("## Sources")
    assert "**Licence:**" not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert parse_recipe(recipe).digest


def test_base_models_are_the_hubs(licensed: dict[str, Path]) -> None:
    """The Hub takes a name for one of its own: no folder's name stands there, whatever it looks like."""
    models = ["org/one@v2", str(licensed["a"]), "org/two+org/adapter", f"org/one+{licensed['b']}", "zoo:x"]
    listed = [{"model": model, "parameters": {"weight": 1}} for model in models]
    parsed = parse_recipe({"merge_method": "linear", "models": listed})
    checkpoint = opened([str(licensed["a"])])[str(licensed["a"])]
    card = card_of(merge_card(parsed, dict.fromkeys(models, checkpoint)))
    assert card["base_model"] == ["org/one", "org/two", "org/adapter"]
    assert card["base_model_relation"] == "merge"


def test_the_card_says_which_layers_a_drawn_pattern_took(licensed: dict[str, Path]) -> None:
    models = [{"model": str(licensed[name])} for name in "ab"]
    recipe = parse_recipe({"merge_method": "frankenmerge", "models": models, "parameters": {"pattern": "AAB"}})
    card = merge_card(recipe, opened(recipe.models()))
    assert "## Layers\n\n- 0 to 1: `a`\n- 2 to 2: `b`\n- 3 to 3: `a`\n" in card
    drawn = parse_recipe({"merge_method": "frankenmerge", "models": models})
    assert "## Layers" in merge_card(drawn, opened(drawn.models()))
    assert "## Layers" not in the_card(licensed)


@pytest.mark.parametrize("content", ["---\nlicense: mit\n---\n", "# no metadata", "---\n[not a mapping]\n---\n", None])
def test_licences_that_do_not_agree(licensed: dict[str, Path], content: str | None) -> None:
    if content is None:
        (licensed["b"] / "README.md").unlink()
    else:
        (licensed["b"] / "README.md").write_text(content)
    text = the_card(licensed)
    stated = "mit" if content and "mit" in content else "not stated"
    assert "license" not in card_of(text)
    assert f"(base: apache-2.0, a: apache-2.0, b: {stated})" in text
    assert "check what the merged model may be used for" in text


def test_a_card_whose_metadata_is_no_yaml(licensed: dict[str, Path]) -> None:
    (licensed["b"] / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert "license" not in card_of(the_card(licensed))


def test_a_card_names_models_not_places(licensed: dict[str, Path], tmp_path: Path) -> None:
    before_recipe = the_card(licensed).split("## Recipe")[0]
    assert str(tmp_path) not in before_recipe
    assert "- `base`, content `" in before_recipe


def test_verdict() -> None:
    assert licence_verdict({"org/a": "mit", "org/b": "mit"}) == ("mit", None)
    licence, warning = licence_verdict({"org/a": "mit", "/home/me/b": None})
    assert licence is None
    assert warning is not None
    assert "(org/a: mit, b: not stated)" in warning


def test_licences_of_what_has_no_folder(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    lone = shutil.copyfile(tiny_family["a"] / "model.safetensors", tmp_path / "lone.safetensors")
    assert licences(opened([str(lone)])) == {str(lone): None}


def test_numbers_that_differ_are_said_to() -> None:
    same = Rescored("test", {"t": {"acc": 0.5}}, {"t": {"acc": 0.5 + 1e-9}})
    assert same.sentence().endswith("the same numbers as in the search.")
    other = Rescored("test", {"t": {"acc": 0.5, "loss": 1.0}}, {"t": {"acc": 0.5, "loss": 1.25}})
    assert other.sentence().endswith("the numbers DIFFER from the search's, by up to 0.2500.")


FRONTS = {
    "a date": "license: mit\ndate: 2024-02-30",
    "brackets": "license: " + "[" * 3000 + "]" * 3000,
    "a bomb": "\n".join(f"b{i}: &b{i} [{','.join([f'*b{i - 1}' if i else 'x'] * 10)}]" for i in range(10)),
    "a cycle": "license: &a [*a]",
    "markup": r'license: "mit\n\n# Injected\n\n<script>x</script> \e[2J ‮"',
    "a table": "license: 'a | b | [x](javascript:y) `z`'",
    "a number": "license: 1.0",
    "a mapping": "license: {name: mit}",
    "a tag": "license: !!python/object/apply:os.system ['true']",
    "a long text": "license: " + "mit " * 100_000,
    "bytes": "license: caf\udce9",
}


@pytest.mark.parametrize("front", FRONTS.values(), ids=FRONTS)
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_strangers_front_matter_is_data(licensed: dict[str, Path], front: str, everywhere: bool) -> None:
    for name in "ab" if everywhere else "a":
        (licensed[name] / "README.md").write_text(f"---\n{front}\n---\n# M\n", errors="surrogateescape")
    if everywhere:
        (licensed["base"] / "README.md").write_text(f"---\n{front}\n---\n# M\n", errors="surrogateescape")
    text = the_card(licensed)
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text.split("---\n", 2)[2], flags=re.S)
    assert not re.search("\n# Injected|<script", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]|\n# Injected|<script|\\](?<!\\\\\\])\\(", prose)
    assert len(text) < 5000
    assert card_of(text)["library_name"] == "transformers"


def test_several_licences_are_listed(licensed: dict[str, Path]) -> None:
    for folder in licensed.values():
        (folder / "README.md").write_bytes(b"---\r\nlicense:\r\n- mit\r\n- apache-2.0\r\n---\r\n")
    assert card_of(the_card(licensed))["license"] == ["mit", "apache-2.0"]


def test_a_licence_that_the_hub_has_no_name_for(licensed: dict[str, Path]) -> None:
    for folder in licensed.values():
        (folder / "README.md").write_text("---\nlicense: My own terms\n---\n")
    card = card_of(the_card(licensed))
    assert (card["license"], card["license_name"]) == ("other", "My own terms")


def test_the_hub_s_own_reader_takes_the_scores_with_their_intervals(licensed: dict[str, Path]) -> None:
    from huggingface_hub import ModelCard

    recipe = parse_recipe({"merge_method": "passthrough", "models": [{"model": str(licensed["a"])}]})
    rows = (("one", "acc", Score(0.75, 0.1, 40)), ("two", "f1", Score(0.5, None, 7)), ("x", "acc", Score(nan, None, 1)))
    card = merge_card(recipe, opened(recipe.models()), reported=ReportedScores("mine", "test", rows))
    data = ModelCard(card, ignore_metadata_errors=False).data
    assert data.model_name == "mine"
    results = [(r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results]
    assert results == [("one", "test", "acc", 0.75), ("two", "test", "f1", 0.5)]
    names = ["acc, 95% interval 0.5540 to 0.9460 (40 items)", "f1 (7 items)"]
    assert [r.metric_name for r in data.eval_results] == names


def test_a_long_recipe_is_folded(licensed: dict[str, Path]) -> None:
    slices = [{"sources": [{"model": str(licensed["a"]), "layer_range": [k % 4, k % 4 + 1]}]} for k in range(20)]
    recipe = parse_recipe({"merge_method": "passthrough", "slices": slices})
    text = merge_card(recipe, opened(recipe.models()))
    assert re.search("<details><summary>\\d+ lines, also in recipe.yaml</summary>\n\n```yaml\n", text)
    assert "<details>" not in the_card(licensed)


@pytest.mark.parametrize("name", ["m\x1b[2J\x1b]0;x\x07", "m\n\n# Injected\n\nx", "m<script>alert(1)<", "m```x", "m`x"])
def test_a_strangers_name_is_a_name(tiny_family: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_family["a"], tmp_path / name))
    text = the_card({**tiny_family, "a": folder})
    prose = re.sub(r"(`{3,}).*?\n\1|`[^`\n]*`", "", text, flags=re.S)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]|\n# Injected|<script", prose)
    assert "\x1b" not in text
    assert text.rstrip().endswith("```")
