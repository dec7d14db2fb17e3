"""All merge methods and stages by name. A new one is a file and a line here; packages add methods by entry points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evomerge.errors import BadInput, RecipeError, suggest
from evomerge.methods import (
    aim,
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
    svc,
    task_arithmetic,
    ties,
    tsv_merge,
    wudi,
)
from evomerge.methods.contract import Method, Stage
from evomerge.system.plugins import Registry, source_digest


def _adopt(name: str, method: Method) -> Method:
    """A package's method, with what tells its versions apart."""
    if method.name != name or method.merge is None:
        raise BadInput(f"a method that merges, and is called '{name}' itself; got '{method.name}'")
    return replace(method, version=source_digest(method.merge))


_OWN = {
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
        wudi.METHOD,
    )
}

STAGES: dict[str, Stage] = {stage.name: stage for stage in (svc.STAGE, aim.STAGE)}


def with_stages(method: Method, names: Sequence[str]) -> Method:
    """Returns a method as it is with stages after it, in this order: it has their parameters too."""
    stages = tuple(STAGES[name] for name in names)
    own = tuple(parameter for stage in stages for parameter in stage.parameters)
    return replace(method, parameters=(*method.parameters, *own), after=stages) if stages else method


METHODS: Registry[Method] = Registry(_OWN, "evomerge.methods", Method, _adopt)


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
