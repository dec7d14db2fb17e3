"""What every merge method promises, for every method in the registry and every combination of its choices."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.errors import RecipeError
from evomerge.methods.contract import Method
from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.registry import METHODS, get_method
from evomerge.testing.methods import (
    check_base,
    check_blocks,
    check_declaration,
    check_inputs,
    check_order,
    check_shapes,
    check_weight_zero,
    declared,
    family,
    in_pieces,
    run,
    weighted,
)
from tests.methods.helpers import (
    FAR,
    MERGING,
    every_keeping_mode,
    every_method,
    every_mode,
    having,
    in_every_mode,
    neutral,
    numbers,
)

SIZE = 24
FEW = settings(max_examples=12, deadline=None)
positive = st.floats(0.05, 3.0)


# ---------------------------------------------------------------- identity


@every_keeping_mode
@FEW
@given(
    base=numbers(torch.float32, SIZE),
    source=numbers(torch.float32, SIZE),
    weights=st.lists(positive, min_size=1, max_size=4),
)
def test_identical_sources_give_the_source(
    method: Method, mode: dict[str, Any], base: Tensor, source: Tensor, weights: list[float]
) -> None:
    merged = run(method, base, [source] * len(weights), weights, neutral(method) | mode)
    assert torch.equal(merged, source)


@every_keeping_mode
@FEW
@given(base=numbers(torch.float32, SIZE), source=numbers(torch.float32, SIZE))
def test_one_source_at_weight_one_gives_itself(
    method: Method, mode: dict[str, Any], base: Tensor, source: Tensor
) -> None:
    plain = {name: value for name, value in neutral(method).items() if name != "normalize"} | mode
    assert torch.equal(run(method, base, [source], [1.0], plain), source)


@every_keeping_mode
@FEW
@given(base=numbers(torch.bfloat16, SIZE), source=numbers(torch.bfloat16, SIZE))
def test_a_bfloat16_source_survives_the_round_trip(
    method: Method, mode: dict[str, Any], base: Tensor, source: Tensor
) -> None:
    merged = run(method, base, [source, source, source], [0.3, 0.7, 0.9], neutral(method) | mode)
    assert torch.equal(merged.to(torch.bfloat16), source)


@in_every_mode([method for method in MERGING if method.parameter("weight")])
def test_a_source_at_weight_zero_takes_no_part(method: Method, mode: dict[str, Any]) -> None:
    check_weight_zero(method, mode)


@having("weight")
@pytest.mark.parametrize("switch", [False, True])
def test_a_factor_on_all_weights_changes_nothing_exactly_where_only_their_ratios_count(
    method: Method, switch: bool
) -> None:
    base, sources = family(11, 3, (6, 7))
    declaration = method.parameter("weight")
    assert declaration is not None
    rule = declaration.only_ratios
    chosen = {rule: switch} if isinstance(rule, str) else {}
    one = run(method, base, sources, [0.4, 1.0, 0.7], declared(method, chosen))
    scaled = run(method, base, sources, [0.4 * 0.3, 0.3, 0.7 * 0.3], declared(method, chosen))
    same = torch.allclose(one, scaled, rtol=1e-5, atol=1e-6)
    assert same == (switch if isinstance(rule, str) else rule)


@pytest.mark.parametrize(
    ("method", "name"),
    [(m, p.name) for m in METHODS.values() for p in m.parameters if p.idle_at],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_is_declared_idle_has_no_effect_there_and_has_one_elsewhere(method: Method, name: str) -> None:
    base, sources = family(11, 3, (6, 7))
    declaration = method.parameter(name)
    assert declaration is not None
    assert declaration.idle_at is not None
    assert declaration.gene is not None
    other, at = declaration.idle_at
    for value, same in ((at, True), (0.5, False)):
        both = [run(method, base, sources, [0.4, 1.0, 0.7], {other: value, name: end}) for end in declaration.gene]
        assert torch.equal(*both) == same


# ---------------------------------------------------------------- blocks


@every_mode
@FEW
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    columns=st.integers(1, 67),
    cuts=st.lists(st.integers(0, 600), max_size=8),
    paper=st.booleans(),
    scale=st.sampled_from([1.0, 0.83]),
)
def test_any_blocks_give_the_same_bits(
    method: Method, mode: dict[str, Any], seed: int, rows: int, columns: int, cuts: list[int], paper: bool, scale: float
) -> None:
    shared = declared(method, {"lambda": scale}) | ({"gamma": 1.3} if method.name == "dfs" else {})
    check_blocks(method, mode, seed=seed, shape=(rows, columns), cuts=cuts, paper=paper, shared=shared)


@every_mode
def test_inputs_are_left_alone_and_the_result_is_new(method: Method, mode: dict[str, Any]) -> None:
    check_inputs(method, mode)


@every_mode
def test_vectors_and_numbers_are_tensors_too(method: Method, mode: dict[str, Any]) -> None:
    check_shapes(method, mode, neutral(method))


# ---------------------------------------------------------------- symmetry, scale, density


@every_method
@FEW
@given(seed=st.integers(0, 10**6), order=st.permutations(range(3)), density=st.sampled_from([1.0, 0.4]))
def test_the_order_of_sources_does_not_matter(method: Method, seed: int, order: list[int], density: float) -> None:
    shared = declared(method, {"density": density, "select_topk": density})
    check_order(method, {}, seed=seed, order=order, shared=shared)


@every_keeping_mode
@FEW
@given(seed=st.integers(0, 10**6), power=st.integers(-20, 20))
def test_scaled_deltas_give_a_scaled_merge(method: Method, mode: dict[str, Any], seed: int, power: int) -> None:
    _, sources = family(seed, 3, (4, 9))
    origin, factor = torch.zeros(4, 9), 2.0**power
    own = [declared(method, {"weight": w}) for w in (0.4, 1.1, 0.7)]
    chosen = method.settings(own, mode | FAR.get(method.name, {}), paper=True)
    small = merge_tensors(method, origin, sources, chosen, fingerprints="abc")
    large = merge_tensors(method, origin, [factor * s for s in sources], chosen, fingerprints="abc")
    torch.testing.assert_close(large, factor * small, rtol=1e-6, atol=0.0)


@having("lambda")
def test_lambda_scales_the_merged_delta(method: Method) -> None:
    base, sources = family(5, 3, (6, 6))
    one = run(method, base, sources, [0.5, 1.0, 0.25], {"lambda": 1.0}) - base
    for scale in (0.0, 0.5, 1.7):
        merged = run(method, base, sources, [0.5, 1.0, 0.25], {"lambda": scale})
        torch.testing.assert_close(merged - base, scale * one, rtol=1e-4, atol=2e-6)
    assert torch.equal(run(method, base, sources, [0.5, 1.0, 0.25], {"lambda": 0.0}), base)


def active(method: Method, name: str) -> dict[str, Any]:
    """The choice under which a parameter has an effect."""
    parameter = method.parameter(name)
    assert parameter is not None
    return dict([parameter.when]) if parameter.when else {}


@having("density")
@FEW
@given(seed=st.integers(0, 10**6), densities=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_what_is_kept_is_nested_in_density(method: Method, seed: int, densities: tuple[float, float]) -> None:
    base, sources = family(seed, 1, (7, 11))
    low, high = (
        run(method, base, sources, [1.0], {"density": d} | active(method, "density")) != base for d in sorted(densities)
    )
    assert not (low & ~high).any()


@having("density")
def test_density_zero_gives_the_base(method: Method) -> None:
    base, sources = family(5, 3, (6, 6))
    merged = run(method, base, sources, [0.5, 1.0, 0.25], {"density": 0.0} | active(method, "density"))
    assert torch.equal(merged, base)


@having("density")
def test_a_tiny_density_is_finite(method: Method) -> None:
    base, sources = family(5, 3, (6, 6))
    merged = run(method, base, sources, [0.5, 1.0, 0.25], {"density": 1e-7} | active(method, "density"))
    assert torch.isfinite(merged).all()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.1, 0.2, -0.3], [0.0, 0.0]])
def test_weights_that_sum_to_zero_are_refused_by_name(weights: list[float]) -> None:
    base, sources = family(0, len(weights), (3, 3))
    with pytest.raises(RecipeError, match="linear: the weights sum to zero"):
        run(METHODS["linear"], base, sources, weights, {"normalize": True})


@pytest.mark.parametrize("name", ["task_arithmetic", "dare", "dare_linear", "breadcrumbs", "della_linear"])
@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.1, 0.2, -0.3], [0.0, 0.0]])
def test_weights_of_deltas_that_cancel_are_taken_as_they_are(name: str, weights: list[float]) -> None:
    """As in mergekit, whose divisor is then one: a sum of deltas means something where an average does not."""
    base, sources = family(0, len(weights), (3, 3))
    merged, plain = (run(METHODS[name], base, sources, weights, {"normalize": on}) for on in (True, False))
    assert torch.equal(merged, plain)


@pytest.mark.parametrize("mode", ["model", "position"])
def test_dfs_refuses_weights_of_zero(mode: str) -> None:
    base, sources = family(0, 2, (3, 3))
    with pytest.raises(RecipeError, match="dfs: the weights sum to zero"):
        run(METHODS["dfs"], base, sources, [0.0, 0.0], {"mode": mode})


@having("weight")
def test_the_merge_itself_never_divides_by_a_zero_sum(method: Method) -> None:
    base, sources = family(0, 2, (3, 3))
    chosen = weighted(method, [0.0, 0.0], declared(method, {"normalize": True}))
    if method.check(chosen):
        with pytest.raises(RecipeError, match="sum to zero"):
            in_pieces(method, base, sources, chosen, [])
    else:  # no source takes part, so nothing may change
        assert torch.equal(in_pieces(method, base, sources, chosen, []), base)


@every_method
def test_shapes_that_differ_are_refused(method: Method) -> None:
    sources = [torch.zeros(3, 2), torch.zeros(2, 3)][-(method.max_sources or 2) :]
    told = ", ".join(f"source {i} {tuple(source.shape)}" for i, source in enumerate(sources))
    with pytest.raises(RecipeError, match=re.escape(f"w.q: shapes differ: the base (3, 2), {told}")):
        run(method, torch.zeros(3, 2), sources, [1.0, 1.0], {}, name="w.q")


@every_mode
def test_a_missing_base_is_refused_exactly_where_it_is_needed(method: Method, mode: dict[str, Any]) -> None:
    check_base(method, mode)


def test_sources_are_counted() -> None:
    base, sources = family(0, 2, (3, 3))
    with pytest.raises(RecipeError, match="linear: settings for 1 sources, got 2 tensors"):
        merge_tensors(METHODS["linear"], base, sources, weighted(METHODS["linear"], [1.0], {}))
    with pytest.raises(RecipeError, match="linear: takes 1 or more sources, got 0"):
        merge_tensors(METHODS["linear"], base, [], weighted(METHODS["linear"], [], {}))


def test_layers_are_not_merged() -> None:
    method = METHODS["frankenmerge"]
    with pytest.raises(RecipeError, match="frankenmerge: copies layers"):
        merge_tensors(method, None, [torch.zeros(2)], method.settings([{}]))


# ---------------------------------------------------------------- declarations


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_declarations_are_consistent(method: Method) -> None:
    assert method.name in METHODS
    assert re.search(r"\b(19|20)\d\d\b.*https://", method.paper)
    check_declaration(method)


def test_defaults_are_those_of_mergekit() -> None:
    normalize = {name: m.parameter("normalize").default for name, m in METHODS.items() if m.parameter("normalize")}  # type: ignore[union-attr]
    assert normalize == {
        "linear": True,
        "task_arithmetic": False,
        "ties": True,
        "dare": True,
        "dare_linear": False,
        "dare_ties": False,
        "della": True,
        "della_linear": False,
        "breadcrumbs": False,
        "breadcrumbs_ties": False,
    }
    for name in ("ties", "dare", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs"):
        assert METHODS[name].settings([{"weight": 1.0}]).sources[0]["density"] == 1.0
        assert METHODS[name].settings([{"weight": 1.0}]).shared["lambda"] == 1.0


def test_the_papers_values_are_theirs() -> None:
    assert METHODS["ties"].settings([{}], paper=True).sources[0]["density"] == 0.2
    for name in ("dare", "dare_linear", "dare_ties"):
        assert METHODS[name].settings([{}], paper=True).sources[0]["density"] == pytest.approx(1 - 0.9)
    assert METHODS["slerp"].settings([{}], paper=True).shared["on"] == "deltas"


def test_methods_are_found_by_name_and_alias() -> None:
    assert get_method("passthrough") is get_method("frankenmerge") is METHODS["frankenmerge"]
    assert get_method("dare_linear").name == "dare_linear"
    with pytest.raises(
        RecipeError, match=r"unknown merge_method 'tias' \(did you mean 'ties'\?\); known: linear, slerp"
    ):
        get_method("tias")


def test_settings_are_completed_and_checked() -> None:
    ties = METHODS["ties"]
    chosen = ties.settings([{"weight": 1.0, "density": 0.3}, {"weight": 2.0}], {"density": 0.5, "lambda": 0.7})
    assert chosen.column("density") == [0.3, 0.5]
    assert chosen.column("weight") == [1.0, 2.0]
    assert (chosen.shared["lambda"], chosen.shared["normalize"], chosen.shared["consensus"]) == (0.7, True, "mass")
    with pytest.raises(RecipeError) as caught:
        ties.settings([{"densty": 0.3}, {"lambda": 1.0}])
    assert caught.value.problems == (
        "ties: unknown parameter 'densty' (did you mean 'density'?)",
        "ties: 'lambda' is one for all sources, not a source's own",
        "ties: 'weight' is required for every source",
    )


def test_the_declarations_load_without_torch() -> None:
    code = "import sys, evomerge.methods.registry, evomerge.methods.plain_statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
