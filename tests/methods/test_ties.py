"""TIES and DARE-TIES by hand: trim, election, averages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.methods.plain_statistics import PlainStatistics, merge_tensors
from evomerge.methods.random_field import field_key
from evomerge.methods.registry import METHODS

TIES, DARE_TIES = METHODS["ties"], METHODS["dare_ties"]


def merge(rows: Sequence[Sequence[float]], weights: Sequence[float], **shared: Any) -> list[float]:
    """TIES of deltas on a base of zeros."""
    sources = [torch.tensor(row, dtype=torch.float32) for row in rows]
    chosen = TIES.settings([{"weight": w} for w in weights], shared)
    return merge_tensors(TIES, torch.zeros_like(sources[0]), sources, chosen).tolist()


def test_signs_are_elected_and_the_agreeing_averaged() -> None:
    # element 0: 3 − 1 + 1 = 3 > 0, so +: (3 + 1) / 2 = 2
    # element 1: −2 + 1 − 4 = −5, so −: (−2 − 4) / 2 = −3
    # element 2: 0 + 5 − 1 = 4, so +: 5 / 1 = 5 (the zero does not count)
    # element 3: all zero: 0
    rows = [[3.0, -2.0, 0.0, 0.0], [-1.0, 1.0, 5.0, 0.0], [1.0, -4.0, -1.0, 0.0]]
    assert merge(rows, [1, 1, 1]) == [2.0, -3.0, 5.0, 0.0]
    # the sums of what agrees: 4, −6, 5, 0
    assert merge(rows, [1, 1, 1], normalize=False) == [4.0, -6.0, 5.0, 0.0]
    # by all three weights: 4/3, −6/3, 5/3, 0
    assert merge(rows, [1, 1, 1], average="all") == pytest.approx([4 / 3, -2.0, 5 / 3, 0.0], rel=1e-6)
    # λ = 0.5 on the first
    assert merge(rows, [1, 1, 1], **{"lambda": 0.5}) == [1.0, -1.5, 2.5, 0.0]


def test_weights_vote_and_average() -> None:
    # 2·1 + 1·(−3) = −1: elected −, agrees: the second, −3·1/1. With weight 4: 4 − 3 = 1, elected +: 4·1/4 = 1
    assert merge([[1.0], [-3.0]], [2, 1]) == [-3.0]
    assert merge([[1.0], [-3.0]], [4, 1]) == [1.0]


def test_a_negative_weight_turns_its_delta() -> None:
    # w δ: −2 and 1: sum −1, elected −; agrees: the first; −2 / abs(−1) = −2
    assert merge([[2.0], [1.0]], [-1, 1]) == [-2.0]
    # w δ: −2, −1: sum −3; (−2 − 1) / (1 + 1) = −1.5; weights that sum to zero cannot blow up
    assert merge([[2.0], [-1.0]], [-1, 1]) == [-1.5]


def test_a_sum_of_zero_elects_plus() -> None:
    assert merge([[-2.0], [2.0]], [1, 1]) == [2.0]
    assert merge([[2.0], [-2.0]], [1, 1]) == [2.0]


def test_count_is_the_majority_and_ties_go_to_the_first_model() -> None:
    # mass: −5 + 1 + 1 = −3, so −5; count: two against one, so (1 + 1) / 2
    assert merge([[-5.0], [1.0], [1.0]], [1, 1, 1]) == [-5.0]
    assert merge([[-5.0], [1.0], [1.0]], [1, 1, 1], consensus="count") == [1.0]
    # one against one: the first model's sign
    assert merge([[-1.0], [4.0]], [1, 1], consensus="count") == [-1.0]
    assert merge([[4.0], [-1.0]], [1, 1], consensus="count") == [4.0]
    # a negative weight turns the first model's sign as well: votes − and +
    assert merge([[1.0], [4.0]], [-1, 1], consensus="count") == [-1.0]
    # the first model has no sign here, and 0 elects +
    assert merge([[0.0], [-3.0], [2.0]], [1, 1, 1], consensus="count") == [2.0]


def test_the_trim_keeps_exactly_its_share_and_the_first_of_equals() -> None:
    # density 0.5 of 5 elements: floor(2.5) = 2 kept: 4, and the first of the magnitudes 3
    assert merge([[1.0, -3.0, 4.0, 3.0, 3.0]], [1], density=0.5) == [0.0, -3.0, 4.0, 0.0, 0.0]
    # floor(0.1 · 5) = 0, but at least 1
    assert merge([[1.0, -3.0, 4.0, 3.0, 3.0]], [1], density=0.1) == [0.0, 0.0, 4.0, 0.0, 0.0]
    assert merge([[2.0, 2.0, 2.0, 2.0]], [1], density=0.5) == [2.0, 2.0, 0.0, 0.0]


def test_what_was_trimmed_neither_votes_nor_counts() -> None:
    # density 0.5 keeps −9 of the first and 3 of the second: each element has one model left
    assert merge([[2.0, -9.0], [3.0, 1.0]], [1, 1], density=0.5) == [3.0, -9.0]


@given(
    steps=st.lists(st.lists(st.integers(-6, 6), min_size=4, max_size=4), min_size=2, max_size=4),
    weight=st.sampled_from([0.1, 0.3, 0.7, 1.1]),
    data=st.data(),
)
def test_sums_that_cancel_cancel_in_any_order(steps: list[list[int]], weight: float, data: st.DataObject) -> None:
    """Deltas of bfloat16 fine-tunes are small multiples of one step: 0.7·1 + 0.7·2 − 0.7·3 has to be 0."""
    rows = [[0.001953125 * s for s in row] for row in steps]
    order = data.draw(st.permutations(rows))
    assert merge(order, [weight] * len(rows)) == pytest.approx(merge(rows, [weight] * len(rows)), rel=1e-6)
    exact = [sum(column) for column in zip(*steps, strict=True)]
    for got, mass, column in zip(merge(rows, [weight] * len(rows)), exact, zip(*steps, strict=True), strict=True):
        agreeing = [c for c in column if (c > 0 if mass >= 0 else c < 0)]
        mean = sum(agreeing) / len(agreeing) if agreeing else 0.0
        assert got == pytest.approx(0.001953125 * mean, rel=1e-6)


def test_dare_ties_without_drop_rate_takes_density_as_the_chance_to_keep() -> None:
    source = torch.ones(1000)
    chosen = DARE_TIES.settings([{"weight": 1.0}], {"density": 0.25})
    merged = merge_tensors(DARE_TIES, torch.zeros(1000), [source], chosen, seed=3)
    assert set(merged.tolist()) == {0.0, 4.0}  # kept and divided by 0.25
    assert abs((merged > 0).float().mean().item() - 0.25) < 0.07  # five standard deviations
    plain = DARE_TIES.settings([{"weight": 1.0}], {"density": 0.25, "rescale": False})
    assert torch.equal(merge_tensors(DARE_TIES, torch.zeros(1000), [source], plain, seed=3), merged / 4)


@pytest.mark.parametrize(("drop_rate", "density"), itertools.product([0.0, 0.5, 0.9, 1.0], [0.0, 0.01, 0.3, 1.0]))
def test_dare_ties_with_drop_rate_trims_the_survivors(drop_rate: float, density: float) -> None:
    n = 501
    source = torch.randn(n, generator=torch.Generator().manual_seed(1))
    key = field_key(0, "tensor", "f")
    alive = PlainStatistics(torch.zeros(n), [source], [key]).keep_mask(0, 1 - drop_rate)
    chosen = DARE_TIES.settings([{"weight": 1.0, "drop_rate": drop_rate, "density": density}])
    merged = merge_tensors(DARE_TIES, torch.zeros(n), [source], chosen, fingerprints=["f"])
    kept = merged != 0
    survivors = int(alive.sum())
    assert int(kept.sum()) == (min(survivors, max(1, int(density * survivors))) if density > 0 else 0)
    assert not (kept & ~alive).any()
    if kept.any() and (alive & ~kept).any():
        assert source[kept].abs().min() >= source[alive & ~kept].abs().max()
    if kept.any():
        torch.testing.assert_close(merged[kept], source[kept] / (1 - drop_rate))


def test_dare_ties_sees_the_whole_tensor_only_when_it_trims() -> None:
    def granularity(**own: float) -> str:
        return DARE_TIES.granularity(DARE_TIES.settings([{"weight": 1.0}, {"weight": 1.0, **own}]))

    assert granularity(density=0.5) == "element"
    assert granularity(drop_rate=0.5) == "element"
    assert granularity(drop_rate=0.5, density=0.5) == "tensor"


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_rescale_gives_what_is_kept_the_mass_of_the_whole(name: str) -> None:
    """As in mergekit: for one source the merged delta's sum of magnitudes is the delta's own, sign for sign."""
    generator = torch.Generator().manual_seed(0)
    base, source = torch.zeros(40, 5), torch.randn(40, 5, generator=generator)
    method = METHODS[name]
    own = [{"weight": 1.0, "density": 0.3}]
    plain = merge_tensors(method, base, [source], method.settings(own, {"normalize": False}, paper=False))
    whole = merge_tensors(
        method, base, [source], method.settings(own, {"normalize": False, "rescale": True}, paper=False)
    )
    assert (plain != 0).sum() == 60
    torch.testing.assert_close(whole.abs().sum(), source.abs().sum())
    torch.testing.assert_close(whole, plain * (source.abs().sum() / plain.abs().sum()))
    nothing = merge_tensors(method, base, [base], method.settings(own, {"rescale": True}, paper=False))
    assert torch.equal(nothing, base)
