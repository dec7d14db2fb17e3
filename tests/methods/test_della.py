"""DELLA: ranks by hand, its probabilities, and its mean over seeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.methods.della import TOP, line, rank_levels
from evomerge.methods.plain_statistics import PlainStatistics, merge_tensors
from evomerge.methods.random_field import STEPS
from evomerge.methods.registry import METHODS

LINEAR = METHODS["della_linear"]


def test_levels_by_hand() -> None:
    # ranks 0, 2, 1 of 0 .. 2 are 0, 254, 127; equals share the mean rank: 0, (1 + 2) / 2 = 1.5 of 0 .. 2 -> 190.5, down
    rows = torch.tensor([[0.1, 0.9, 0.5], [0.0, 7.0, 7.0], [3.0, 3.0, 3.0]])
    assert rank_levels(rows).tolist() == [[0, 254, 127], [0, 190, 190], [127, 127, 127]]
    assert rank_levels(torch.tensor([[5.0], [0.0]])).tolist() == [[127], [127]]


@given(row=st.lists(st.integers(0, 6), min_size=2, max_size=30), order=st.randoms())
def test_levels_follow_the_magnitude_alone(row: list[int], order: object) -> None:
    values = torch.tensor([row], dtype=torch.float32)
    levels = rank_levels(values)
    shuffled = torch.randperm(len(row), generator=torch.Generator().manual_seed(len(row)))
    assert torch.equal(rank_levels(values[:, shuffled]), levels[:, shuffled])
    by_level = sorted(zip(levels[0].tolist(), row, strict=True))
    assert [value for _, value in by_level] == sorted(row)
    assert levels.double().mean().item() == pytest.approx(TOP / 2, abs=0.51)


@pytest.mark.parametrize(
    ("density", "epsilon", "low", "high"),
    [(0.5, 0.15, 0.35, 0.65), (0.9, 0.15, 0.8, 1.0), (0.05, 0.15, 0.0, 0.1), (1.0, 0.3, 1.0, 1.0)],
)
def test_probabilities_rise_from_density_less_epsilon_to_density_and_epsilon(
    density: float, epsilon: float, low: float, high: float
) -> None:
    first, step = line({"density": density, "epsilon": epsilon})
    assert int(first) / STEPS == pytest.approx(low, abs=1e-5)
    assert int(first + TOP * step) / STEPS == pytest.approx(high, abs=1e-5)


def test_the_mean_over_seeds_is_the_delta() -> None:
    base, source = torch.zeros(2, 60), torch.linspace(-1, 1, 120).view(2, 60)
    draws, density, epsilon = 400, 0.5, 0.3
    chosen = LINEAR.settings([{"weight": 1.0, "density": density, "epsilon": epsilon}])
    merged = torch.stack(
        [merge_tensors(LINEAR, base, [source], chosen, seed=seed, fingerprints=["f"]) for seed in range(draws)]
    ).double()
    chance = density - epsilon + 2 * epsilon * rank_levels(source.abs()).double() / TOP
    # each element: kept with its own probability, mean δ, variance δ² (1 − p) / p; five standard errors
    error = source.abs() * ((1 - chance) / chance / draws).sqrt()
    assert ((merged.mean(0) - source).abs() <= 5 * error + 1e-6).all()
    kept = (merged != 0).double().mean(0)
    assert ((kept - chance).abs() <= 5 * (chance * (1 - chance) / draws).sqrt() + 1e-3).all()


def test_without_epsilon_it_drops_as_dare_does() -> None:
    base, source = torch.zeros(5, 40), torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    own = [{"weight": 1.0, "density": 0.25}]
    dare = METHODS["dare_linear"]
    with_ranks = merge_tensors(LINEAR, base, [source], LINEAR.settings([own[0] | {"epsilon": 0.0}]), fingerprints="f")
    assert torch.equal(with_ranks, merge_tensors(dare, base, [source], dare.settings(own), fingerprints="f"))


def test_a_vector_is_one_row() -> None:
    values = torch.tensor([3.0, 1.0, 2.0])
    assert PlainStatistics(torch.zeros(3), [values]).block().statistics.rank_levels(0).tolist() == [254, 0, 127]
