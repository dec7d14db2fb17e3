"""Patterns written out as slices."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipe import Recipe, expand_frankenmerge, layer_places, parse_recipe, random_pattern, resolve


def recipe_of(models: str, **parameters: Any) -> Recipe:
    entries = [{"model": name} for name in models]
    return parse_recipe({"merge_method": "frankenmerge", "models": entries, "parameters": parameters})


def runs(recipe: Recipe) -> list[tuple[str, tuple[int, int] | None]]:
    return [(source.model, source.layer_range) for part in recipe.slices for source in part.sources]


def test_short_pattern_cycles_and_runs_are_joined() -> None:
    # ABBA over six layers is ABBAAB: the A of layers 3 and 4 is one run.
    expanded = expand_frankenmerge(recipe_of("xy", pattern="ABBA"), 6)
    assert runs(expanded) == [("x", (0, 1)), ("y", (1, 3)), ("x", (3, 5)), ("y", (5, 6))]
    assert expanded.parameters == {}
    assert parse_recipe(expanded.to_yaml()) == expanded


def test_letters_may_be_small() -> None:
    assert runs(expand_frankenmerge(recipe_of("xy", pattern="ba"), 2)) == [("y", (0, 1)), ("x", (1, 2))]


def test_one_model_is_copied_whole() -> None:
    assert runs(expand_frankenmerge(recipe_of("x"), 4)) == [("x", (0, 4))]


def test_pattern_longer_than_the_models_is_refused() -> None:
    with pytest.raises(RecipeError, match="has 4 letters for 3 layers"):
        expand_frankenmerge(recipe_of("xy", pattern="ABBA"), 3)


def test_random_pattern_is_stable_for_ever() -> None:
    # Recorded recipes hold the seed alone: this row must never change.
    assert random_pattern(3, 3, 12) == (0, 1, 0, 0, 0, 1, 2, 1, 2, 2, 1, 2)


def test_seed_decides_and_top_level_seed_serves() -> None:
    one = expand_frankenmerge(recipe_of("xyz", seed=3), 12)
    top = {"merge_method": "frankenmerge", "models": [{"model": m} for m in "xyz"], "seed": 3}
    assert expand_frankenmerge(parse_recipe(top), 12) == one
    assert expand_frankenmerge(recipe_of("xyz", seed=4), 12) != one
    assert expand_frankenmerge(recipe_of("xyz"), 12) == expand_frankenmerge(recipe_of("xyz", seed=0), 12)


@settings(deadline=None)
@given(st.integers(0, 2**64), st.integers(1, 26), st.integers(1, 40), st.integers(0, 40))
def test_random_pattern_does_not_depend_on_its_length(seed: int, models: int, short: int, more: int) -> None:
    pattern = random_pattern(seed, models, short + more)
    assert pattern[:short] == random_pattern(seed, models, short)
    assert all(0 <= index < models for index in pattern)


def test_random_pattern_is_even() -> None:
    counts = [random_pattern(0, 4, 4000).count(index) for index in range(4)]
    assert all(900 < count < 1100 for count in counts)  # 1000 expected, standard deviation 27


@settings(deadline=None)
@given(st.text("AB", min_size=1, max_size=9), st.integers(9, 20))
def test_expansion_copies_what_the_pattern_says(pattern: str, layers: int) -> None:
    expanded = expand_frankenmerge(recipe_of("xy", pattern=pattern), layers)
    got = [(s.model, k) for part in expanded.slices for s in part.sources for k in range(*(s.layer_range or ()))]
    assert got == [("xy"["AB".index(pattern[k % len(pattern)])], k) for k in range(layers)]


def test_gradients_run_over_the_whole_stack() -> None:
    data = {
        "merge_method": "frankenmerge",
        "models": [{"model": "x"}, {"model": "y", "parameters": {"scale": [0, 4]}}],
        "parameters": {"pattern": "AABBA", "residual_scale": [{"filter": "o_proj", "value": [0, 4]}, {"value": 9}]},
        "input_model_parameters": {"x": {"scale": 5}},
    }
    expanded = expand_frankenmerge(parse_recipe(data), 5)
    places = layer_places(expanded, 0)
    tensors = [resolve(expanded, p.slice_index, "o_proj", p.t) for p in places]
    assert [t.residual_scale for t in tensors] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [t.settings.column("scale")[0] for t in tensors] == [5.0, 5.0, 2.0, 3.0, 5.0]
    assert resolve(expanded, 0, "q_proj", 0.0).residual_scale == 9.0
    assert tensors[0].settings.column("residual_scale") == [0.0]


def test_other_recipes_come_back_as_they_are() -> None:
    linear = parse_recipe({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]})
    assert expand_frankenmerge(linear, 4) is linear
    expanded = expand_frankenmerge(recipe_of("xy", pattern="AB"), 4)
    assert expand_frankenmerge(expanded, 4) is expanded


def test_unexpanded_pattern_does_not_resolve() -> None:
    with pytest.raises(RecipeError, match="a tensor is copied from one model"):
        resolve(recipe_of("xy", pattern="AB"), 0, "x", 0.0)
