"""A recipe as a table, and what differs between two, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.report.recipe_table import OUTER, Cell, changes, recipe_table

NAMES = {"/m/a": "a", "/m/b": "b"}


def linear(a: Any, b: Any, **more: Any) -> dict[str, Any]:
    models = [{"model": f"/m/{name}", "parameters": {"weight": weight}} for name, weight in (("a", a), ("b", b))]
    return {"merge_method": "linear", "models": models, **more}


def copied(*layers: tuple[str, int], scale: float = 1.0) -> dict[str, Any]:
    slices = [{"sources": [{"model": f"/m/{m}", "layer_range": [k, k + 1]}]} for m, k in layers]
    slices[0] |= {"residual_scale": scale} if scale != 1.0 else {}
    return {"merge_method": "passthrough", "slices": slices}


def test_a_gradient_is_written_out_over_the_layers() -> None:
    table = recipe_table(linear([0.0, 1.0], 0.25), NAMES, 3)
    assert [layer.method for layer in table.layers] == ["linear"] * 3
    assert table.numbers == {
        **{Cell("weight", "a", "all", k): value for k, value in enumerate((0.0, 0.5, 1.0))},
        **{Cell("weight", "b", "all", k): 0.25 for k in range(3)},
    }


def test_filters_tell_tensors_apart() -> None:
    weight = [
        {"filter": "model.norm.weight", "value": 0.1},
        {"filter": ".self_attn.", "value": 0.2},
        {"value": 0.3},
    ]
    table = recipe_table(linear(weight, 1.0), NAMES, 1)
    own = {(cell.tensors, cell.layer): value for cell, value in table.numbers.items() if cell.source == "a"}
    assert own == {("self_attn", 0): 0.2, ("rest", 0): 0.3, (OUTER, None): 0.1}


def test_without_the_models_one_layer_stands_for_all() -> None:
    assert len(recipe_table(linear(0.5, 0.5), NAMES).layers) == 1


def test_layers_that_are_copied() -> None:
    layers = recipe_table(copied(("a", 0), ("b", 3), scale=0.5), NAMES).layers
    assert [(layer.copied_from, layer.scale) for layer in layers] == [(("a", 0), 0.5), (("b", 3), 1.0)]


@pytest.mark.parametrize(
    ("before", "after", "texts"),
    [
        (linear(0.5, 0.5), linear(0.5, 0.5), []),
        (linear(0.5, 0.5), linear(0.75, 0.4), ["mean weight of a 0.5 → 0.75", "mean weight of b 0.5 → 0.4"]),
        (linear([0.4, 0.6], 0.5), linear([0.6, 0.4], 0.5), ["weight of a by 0.2 up and down"]),
        (
            linear(0.5, 0.5),
            {**linear(0.5, 0.5), "merge_method": "task_arithmetic", "base_model": "/m/base"},
            ["linear → task_arithmetic"],
        ),
        (
            copied(("a", 0), ("a", 1)),
            copied(("a", 0), ("b", 1), ("b", 2), scale=0.5),
            ["2 → 3 layers", "layer 1: a 1 → b 1", "layer 0 scaled 1 → 0.5"],
        ),
    ],
)
def test_changes_by_hand(before: dict[str, Any], after: dict[str, Any], texts: list[str]) -> None:
    assert changes(recipe_table(before, NAMES, 2), recipe_table(after, NAMES, 2)) == texts


def test_a_recipe_that_tells_tensors_apart_is_compared_with_one_that_does_not() -> None:
    fine = linear([{"filter": ".mlp.", "value": 0.9}, {"value": 0.5}], 0.5)
    assert changes(recipe_table(linear(0.5, 0.5), NAMES, 1), recipe_table(fine, NAMES, 1)) == [
        "mean weight of a 0.5 → 0.7"
    ]
