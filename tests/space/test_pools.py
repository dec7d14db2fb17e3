"""Pools: a candidate merges K of the sources, and only those."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import SpecError
from evomerge.recipe import parse_recipe
from evomerge.space.baselines import baselines
from evomerge.space.decode import active_genes, decode, decode_literally, genome_hash, why_invalid
from evomerge.space.genome import Genome
from evomerge.space.space import SearchSpace
from evomerge.space.transfer import SpaceLayout, nearest_genome, transfer_genome
from tests.algorithms.landscapes import make_space

METHODS = ("linear", "task_arithmetic", "ties", "sce", "model_stock", "wudi")
POOL = {name: f"models/{name}" for name in ("law", "math", "code", "chat", "bio")}


def pool(choose: int | None = 2, **changes: Any) -> SearchSpace:
    return make_space(**{"sources": POOL, "methods": METHODS, "choose": choose, **changes})


def moved(genome: Genome, **values: Any) -> Genome:
    return Genome.of({**genome.values, **{name.replace("_", "."): value for name, value in values.items()}})


def merged(recipe: dict[str, Any]) -> set[str]:
    return set(parse_recipe(recipe).models()) - {"models/base"}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), choose=st.integers(2, 5), method=st.sampled_from(METHODS))
def test_a_candidate_merges_the_chosen(seed: int, choose: int, method: str) -> None:
    space = pool(choose)
    genome = moved(space.sample(np.random.default_rng(seed)), method=method)
    keys = {name: float(genome.values[f"chosen.{name}"]) for name in POOL}
    members = space.members(genome)
    assert len(members) == choose
    assert min(keys[name] for name in members) >= max([keys[n] for n in POOL if n not in members], default=0.0)
    if why_invalid(space, genome) is not None:
        return
    expected = {POOL[name] for name in members}
    assert merged(decode(space, genome)) <= expected
    literal = decode_literally(space, genome)
    assert merged(literal.recipe) == expected
    for slice_, genes in zip(literal.recipe["slices"], literal.genes, strict=True):
        models = [source["model"] for source in slice_["sources"] if source["model"] != "models/base"]
        for (_, index), setting in genes.items():
            named = str(setting)
            assert index is None or f".{next(n for n in POOL if POOL[n] == models[index])}." in named


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), method=st.sampled_from(METHODS))
def test_genes_of_the_others_have_no_effect(seed: int, method: str) -> None:
    space, rng = pool(2), np.random.default_rng(seed)
    genome = moved(space.sample(rng), method=method)
    members, other = space.members(genome), space.sample(rng)
    away = {
        g.name: other.values[g.name]
        for g in space.reals
        if g.source is not None and g.source not in members and g.parameter != "chosen"
    }
    changed = Genome.of({**genome.values, **away})
    assert genome_hash(space, changed) == genome_hash(space, genome)
    assert not active_genes(space, genome) & set(away)
    assert {f"chosen.{name}" for name in POOL} <= active_genes(space, genome)


def test_equal_genes_choose_the_first() -> None:
    space = pool(3)
    assert space.members(space.default()) == ("law", "math", "code")
    assert space.members(moved(space.default(), chosen_bio=0.6)) == ("law", "math", "bio")


def test_generation_zero_knows_every_source() -> None:
    space = pool(1, methods=("arcee_fusion", "task_arithmetic"))
    starts = {start.name: start for start in baselines(space)}
    for name, reference in POOL.items():
        assert merged(dict(starts[f"parent:{name}"].recipe)) == {reference}
        assert name in space.members(starts[f"parent:{name}"].genome)
    for start in starts.values():
        parse_recipe(dict(start.recipe))
        assert space.contains(start.genome)


def test_warm_starts_choose_what_was_merged() -> None:
    space, whole = pool(2), pool(None, sources={"a": "models/code", "b": "models/bio"})
    shape = SpaceLayout(whole.groups, False, (), "linear")
    taken = transfer_genome(space, whole.default(), shape, {"a": "code", "b": "bio"})
    assert taken is not None
    assert space.members(taken) == ("code", "bio")
    again = transfer_genome(space, taken, SpaceLayout(space.groups, False, (), "linear"), {name: name for name in POOL})
    assert again == taken
    models = [{"model": POOL[name], "parameters": {"weight": 1.0}} for name in ("math", "chat")]
    recipe = parse_recipe({"merge_method": "linear", "models": models})
    assert space.members(nearest_genome(space, recipe, [("model.norm.weight", None)])) == ("math", "chat")


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(SpecError, match=r"space.choose: at most the 5 of models.sources; got 6"):
        pool(6)
    with pytest.raises(SpecError, match=r"space.choose: says how many models are merged, and none"):
        pool(2, methods=("frankenmerge",))
    with pytest.raises(SpecError, match="'arcee_fusion' takes at most 1 sources; got 2"):
        pool(2, methods=("arcee_fusion",))
