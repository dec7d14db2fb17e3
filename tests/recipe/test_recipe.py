"""The recipe as a value: parsing, identity, round trip, references."""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipe import DTYPES, Recipe, Slice, Source, load_recipe, parse_recipe, resolve_models

LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 0.5}}],
}


def test_import_needs_no_torch() -> None:
    code = "import sys, evomerge.recipe; print(any(m in sys.modules for m in ('torch', 'transformers', 'lm_eval')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_all_problems_at_once() -> None:
    data = {
        "merge_method": "tiess",
        "models": [{"model": "a", "parametres": {}}, {"model": 3}],
        "parameters": {"wieght": 1},
        "dtype": "bf16",
        "seed": -1,
    }
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, where="my.yaml")
    places = [problem.split(": ")[1] for problem in caught.value.problems]
    assert sorted(places) == [
        "dtype",
        "merge_method",
        "models[0].parametres",
        "models[1].model",
        "parameters.wieght",
        "seed",
    ]
    assert all(problem.startswith("my.yaml: ") for problem in caught.value.problems)


def test_digest_ignores_order_and_spelling_of_numbers() -> None:
    one = parse_recipe("merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 1, density: 0.5}\n")
    two = parse_recipe("models:\n- parameters: {density: 5e-1, weight: 1.0}\n  model: a\nmerge_method: linear\n")
    assert one == two
    assert one.digest == two.digest
    assert len(one.digest) == 32
    assert int(one.digest, 16) >= 0


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": "c"},
        {"seed": 1},
        {"dtype": "float32"},
        {"parameters": {"normalize": False}},
        {"models": LINEAR["models"][::-1]},
        {"tokenizer_source": "union"},
    ],
)
def test_digest_sees_what_matters(change: dict[str, Any]) -> None:
    assert parse_recipe(LINEAR | change).digest != parse_recipe(LINEAR).digest


def test_digest_is_stable_for_ever() -> None:
    # Recorded runs name recipes by it: this value must never change.
    assert parse_recipe(LINEAR).digest == "c7b6511a9ac2bf46dd297621b9300c2c"


def test_name_and_warnings_are_no_identity() -> None:
    named = parse_recipe(LINEAR | {"name": "soup", "parameters": {"density": 1}})
    assert named.warnings
    assert named.digest == parse_recipe(LINEAR | {"parameters": {"density": 1}}).digest


def test_recipes_are_hashable_and_travel() -> None:
    recipe = parse_recipe(LINEAR)
    assert len({recipe, parse_recipe(LINEAR)}) == 1
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    json.dumps(recipe.to_mapping())


def test_parameter_of_another_method_is_a_warning() -> None:
    recipe = parse_recipe(LINEAR | {"parameters": {"density": 0.5}})
    assert len(recipe.warnings) == 1
    assert "parameters.density: has no effect: method linear does not know it" in recipe.warnings[0]
    assert recipe.parameters["density"] == 0.5


def test_seed_among_parameters_is_told_where_it_belongs() -> None:
    recipe = parse_recipe(LINEAR | {"parameters": {"seed": 5}})
    assert "stands at the top of a recipe" in recipe.warnings[0]


def test_shared_parameter_at_a_source_is_a_warning() -> None:
    models = [{"model": "a", "parameters": {"weight": 1, "normalize": False}}]
    assert "one for all sources" in parse_recipe(LINEAR | {"models": models}).warnings[0]


def test_parameters_known_everywhere() -> None:
    recipe = parse_recipe(LINEAR | {"parameters": {"int8_mask": True, "embed_slerp": 1}, "tokenizer_source": "base"})
    assert recipe.warnings == ()
    assert recipe.parameters["embed_slerp"] is True


def test_embed_slerp() -> None:
    """It is about the embeddings under a tokenizer source, and SLERP's parameters then have an effect."""
    wanted = {"parameters": {"embed_slerp": True, "t": 0.5}}
    assert parse_recipe(LINEAR | wanted | {"tokenizer_source": "base"}).warnings == ()
    (warning,) = parse_recipe(LINEAR | wanted).warnings
    assert warning == "recipe: parameters.embed_slerp: has no effect without tokenizer_source"


def test_the_word_on_is_no_truth_value() -> None:
    text = "merge_method: slerp\nbase_model: b\nmodels: [{model: a}]\nparameters: {t: 0.5, on: deltas}\n"
    recipe = parse_recipe(text)
    assert recipe.parameters["on"] == "deltas"
    assert parse_recipe(recipe.to_yaml()) == recipe
    as_other_readers_have_it = parse_recipe(recipe.to_mapping() | {"parameters": {"t": 0.5, True: "deltas"}})
    assert as_other_readers_have_it == recipe


def test_models_lists_base_first_without_repeats() -> None:
    recipe = parse_recipe(
        {
            "merge_method": "linear",
            "base_model": "base",
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "base", "layer_range": [0, 2]}]},
                {"sources": [{"model": "b", "layer_range": [0, 2]}, {"model": "a", "layer_range": [2, 4]}]},
            ],
            "parameters": {"weight": 1},
        }
    )
    assert recipe.models() == ("base", "a", "b")


def test_long_references_become_text() -> None:
    model = {"model": {"path": "org/a", "revision": "v1"}, "lora": "org/adapter"}
    recipe = parse_recipe({"merge_method": "passthrough", "models": [{"model": model}]})
    assert recipe.sources == (Source("org/a@v1+org/adapter"),)


def test_output_dtype() -> None:
    assert parse_recipe(LINEAR).output_dtype is None
    assert parse_recipe(LINEAR | {"dtype": "torch.bfloat16"}).output_dtype == "bfloat16"
    assert parse_recipe(LINEAR | {"dtype": "float32", "out_dtype": "float16"}).output_dtype == "float16"


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(binary)


def test_deep_nesting_is_an_error_of_ours() -> None:
    with pytest.raises(RecipeError, match="nested more than 100 deep"):
        parse_recipe("[" * 2000)


def test_self_reference_is_an_error_of_ours() -> None:
    with pytest.raises(RecipeError, match="an alias stands for what it is in"):
        parse_recipe("merge_method: linear\nmodels: &a [*a]\n")


def test_models_are_found_beside_the_file_and_above(tmp_path: Path) -> None:
    for folder in ("models/base", "recipes/near", "recipes/adapter", "with+plus"):
        (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / "recipes" / "r.yaml"
    file.write_text(
        "merge_method: linear\n"
        "base_model: models/base\n"
        "tokenizer_source: model:near\n"
        "models:\n"
        "  - model: ./near\n"
        "  - model: models/base+adapter\n"
        "  - model: with+plus\n"
        "  - model: org/on-the-hub@main+adapter\n"
        "  - model: zoo:near\n"
        "parameters: {weight: 1}\n"
        "input_model_parameters: {./near: {weight: 2}}\n"
    )
    recipe = load_recipe(file)
    root = tmp_path.resolve()
    assert recipe.base_model == str(root / "models/base")
    assert recipe.tokenizer_source == f"model:{root / 'recipes/near'}"
    assert [source.model for source in recipe.sources] == [
        str(root / "recipes/near"),
        f"{root / 'models/base'}+{root / 'recipes/adapter'}",
        str(root / "with+plus"),
        f"org/on-the-hub@main+{root / 'recipes/adapter'}",
        "zoo:near",
    ]
    assert dict(recipe.input_model_parameters).keys() == {str(root / "recipes/near")}
    assert resolve_models(recipe, None) == recipe


def test_tokenizer_models_are_found_too(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tokens = {"x": {"source": "a"}, "y": {"source": {"kind": "model_token", "model": "a", "token_id": 3}}, "z": None}
    recipe = parse_recipe(LINEAR | {"tokenizer": {"source": "a", "tokens": tokens}}, beside=tmp_path)
    path = str((tmp_path / "a").resolve())
    assert recipe.tokenizer is not None
    mapping = recipe.tokenizer.to_mapping()
    assert mapping["source"] == mapping["tokens"]["x"]["source"] == mapping["tokens"]["y"]["source"]["model"] == path


# Round trips of generated recipes.

NUMBER = st.one_of(st.integers(-3, 3), st.floats(-1e3, 1e3, allow_nan=False), st.sampled_from([1e-7, 1e22]))
FRACTION = st.floats(0, 1)
NAME = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)


def settings_of(scalar: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    value = st.one_of(scalar, st.lists(scalar, min_size=1, max_size=4))
    conditional = st.fixed_dictionaries({"value": value}, optional={"filter": st.text(max_size=8)})
    return st.one_of(value, st.lists(conditional, min_size=1, max_size=3))


PARAMETERS = st.fixed_dictionaries(
    {"weight": settings_of(NUMBER)},
    optional={"density": settings_of(FRACTION), "lambda": settings_of(NUMBER), "normalize": settings_of(st.booleans())},
)
MODEL = st.fixed_dictionaries({"model": NAME, "parameters": PARAMETERS})
TOP = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["ties", "dare_ties", "dare_linear"]), "base_model": st.just("\0base")},
    optional={
        "parameters": PARAMETERS,
        "dtype": st.sampled_from(DTYPES),
        "chat_template": NAME,
        "tokenizer": st.fixed_dictionaries(
            {
                "source": NAME,
                "tokens": st.dictionaries(st.text(max_size=8), st.just({"source": "a", "force": True}), max_size=3),
            }
        ),
        "seed": st.integers(0, 2**63),
        "name": NAME,
    },
)


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, Any]:
    mapping = draw(TOP)
    models = draw(st.lists(MODEL, min_size=1, max_size=3))
    if draw(st.booleans()):
        return mapping | {"models": models}
    slices, start = [], 0
    for length in draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)):
        sources = [model | {"layer_range": [start, start + length]} for model in models]
        slices.append({"sources": sources, "residual_scale": draw(st.lists(NUMBER, min_size=length, max_size=length))})
        start += length
    return mapping | {"slices": slices}


@settings(deadline=None)
@given(mappings())
def test_generated_recipes_round_trip(mapping: dict[str, Any]) -> None:
    try:
        recipe = parse_recipe(mapping)
    except RecipeError as error:
        assume("weights sum to zero" not in str(error))  # rightly refused; nothing to write back
        raise
    again = parse_recipe(recipe.to_yaml())
    assert again == recipe
    assert again.digest == recipe.digest
    assert parse_recipe(dict(reversed(mapping.items()))).digest == recipe.digest


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | NUMBER | st.text(max_size=5),
        lambda v: st.lists(v) | st.dictionaries(st.text(max_size=5), v),
    )
)
def test_any_value_anywhere_is_read_or_refused(value: Any) -> None:
    for key in (
        "merge_method",
        "base_model",
        "models",
        "slices",
        "modules",
        "parameters",
        "tokenizer",
        "dtype",
        "seed",
    ):
        with contextlib.suppress(RecipeError):  # anything else is a crash
            assert isinstance(parse_recipe(LINEAR | {key: value}), Recipe)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text)


def test_parts_of_whole_models_are_one_slice() -> None:
    recipe = parse_recipe(LINEAR)
    assert recipe.parts == (Slice(sources=recipe.sources),)
    assert recipe.parts[0].length is None


def test_keys_that_mergekit_passes_over() -> None:
    """Anchors and remarks under keys of their own; what may be a slip of the pen is refused, as before."""
    text = """
    const: &MODEL a
    half: &half {weight: 0.5}
    merge_method: linear
    models:
    - {model: *MODEL, parameters: *half, why: it is good at sums}
    - {model: b, parameters: *half}
    """
    recipe = parse_recipe(text)
    assert [source.parameters["weight"] for source in recipe.sources] == [0.5, 0.5]
    for key in ("const", "half", "models[0].why"):
        assert any(f"{key}: is passed over" in warning for warning in recipe.warnings)
    for slip, message in (
        (text.replace("merge_method", "merge_methd"), r"merge_methd: unknown key \(did you mean 'merge_method'"),
        (text.replace("why: it is good at sums", "weight: 0.9"), r"models\[0\]\.weight: unknown key"),
        (text.replace("why: it is good at sums", "paramaters: {}"), r"paramaters: unknown key \(did you mean"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(slip)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: a\ngate_mode: hidden\nexperts: [{source_model: b}]", "a configuration of mergekit-moe"),
        ("genome: {models: [a, b], merge_method: ties}\ntasks: [{name: t}]", "mergekit-evolve.*evomerge init"),
    ],
)
def test_files_of_mergekits_other_programs_are_told_what_they_are(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text)


def test_a_weight_that_mergekit_passes_over_is_said() -> None:
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 0.8), ("b", 0.2))]
    recipe = parse_recipe({"merge_method": "karcher", "models": models})
    assert len(recipe.warnings) == 2
    assert all("weight: counts here; mergekit's" in warning for warning in recipe.warnings)
    assert not parse_recipe({"merge_method": "karcher", "models": [{"model": "a"}, {"model": "b"}]}).warnings
