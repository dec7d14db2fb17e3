"""All merge methods by name. Adding one costs its file and a line here."""

from __future__ import annotations

from evomerge.errors import RecipeError, suggest
from evomerge.methods import (
    arcee_fusion,
    breadcrumbs,
    dare,
    dare_ties,
    della,
    dfs,
    frankenmerge,
    iso_c,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    ram,
    sce,
    slerp,
    task_arithmetic,
    ties,
    tsv_merge,
)
from evomerge.methods.contract import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        linear.METHOD,
        slerp.METHOD,
        task_arithmetic.METHOD,
        ties.METHOD,
        dare.METHOD,
        dare.LINEAR,
        dare_ties.METHOD,
        frankenmerge.METHOD,
        dfs.METHOD,
        della.METHOD,
        della.LINEAR,
        breadcrumbs.METHOD,
        breadcrumbs.TIES,
        model_stock.METHOD,
        sce.METHOD,
        arcee_fusion.METHOD,
        nuslerp.METHOD,
        multislerp.METHOD,
        karcher.METHOD,
        nearswap.METHOD,
        tsv_merge.METHOD,
        iso_c.METHOD,
        ram.METHOD,
        ram.PLUS,
    )
}


def get_method(name: str) -> Method:
    """Finds the method of this name or alias.

    Raises:
        RecipeError: There is none; the message names the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    names = {alias: method for method in METHODS.values() for alias in (method.name, *method.aliases)}
    if name not in names:
        raise RecipeError(f"unknown merge_method '{name}'{suggest(name, names)}; known: {', '.join(names)}")
    return names[name]
