"""Recipes over the tiny family: one for every method, and the plan and the checkpoint that each gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from evomerge.methods.contract import Method
from evomerge.methods.registry import METHODS
from evomerge.planning.plan import Plan, make_plan
from evomerge.recipe import parse_recipe
from evomerge.testing.methods import fit

DROPPED = {"density": 0.5, "lambda": 0.9}


def recipe_for(method: Method, family: Mapping[str, Path], names: str = "ab", **more: Any) -> dict[str, Any]:
    """A recipe that uses the method in earnest: uneven weights, something trimmed, λ other than 1."""
    if method.copies_layers:
        slices = [
            {"sources": [{"model": str(family[name]), "layer_range": span}]}
            for name, span in (("a", [0, 2]), ("b", [1, 4]))
        ]
        slices[1]["sources"][0]["parameters"] = {"scale": 0.75}
        return {"merge_method": method.name, "slices": slices, **more}
    given = {name: value for name, value in DROPPED.items() if method.parameter(name) is not None}
    own = {p: given.pop(p) for p in list(given) if method.parameter(p).per_source}  # type: ignore[union-attr]
    weigh = method.parameter("weight") is not None
    models = [
        {"model": str(family[name]), "parameters": {**({"weight": 0.3 + 0.4 * i} if weigh else {}), **own}}
        for i, name in enumerate(fit(method, names))
    ]
    if not method.needs_base and method.name != "slerp":
        return {"merge_method": method.name, "models": models, "parameters": given, **more}
    return {
        "merge_method": method.name,
        "base_model": str(family["base"]),
        "models": models,
        "parameters": given,
        **more,
    }


def single(model: Path | str, **more: Any) -> dict[str, Any]:
    """One model as it is."""
    return {"merge_method": "linear", "models": [{"model": str(model), "parameters": {"weight": 1.0}}], **more}


def layers(*parts: tuple[Path | str, int, int], **more: Any) -> dict[str, Any]:
    """Copied layers: (model, first, after the last) of each slice."""
    slices = [{"sources": [{"model": str(model), "layer_range": [first, last]}]} for model, first, last in parts]
    return {"merge_method": "passthrough", "slices": slices, **more}


def opened(references: Iterable[str]) -> dict[str, Checkpoint]:
    """Open checkpoints by reference."""
    return {reference: open_checkpoint(reference) for reference in references}


def plan_of(recipe: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint] | None = None) -> Plan:
    """The plan of a recipe."""
    parsed = parse_recipe(recipe)
    return make_plan(parsed, checkpoints or opened(parsed.models()))


EVERY = list(METHODS.values())
