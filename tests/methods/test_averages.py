"""Linear, task arithmetic and DARE by hand, and the exact sums they share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.methods.arithmetic import affine, apply_update, zero_sum_problem
from evomerge.methods.contract import Method
from evomerge.methods.plain_statistics import PlainStatistics, merge_tensors, tensor_fingerprint
from evomerge.methods.random_field import field_key, kept_elements
from evomerge.methods.registry import METHODS
from evomerge.testing.methods import family

LINEAR, TASKS, DARE, DARE_LINEAR = (METHODS[n] for n in ("linear", "task_arithmetic", "dare", "dare_linear"))


def test_linear_by_hand() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])
    own = [{"weight": 1.0}, {"weight": 3.0}]
    # (1·1 + 3·5)/4 = 4, (1·2 − 3·2)/4 = −1; without normalize 16 and −4
    assert merge_tensors(LINEAR, None, [a, b], LINEAR.settings(own)).tolist() == [4.0, -1.0]
    assert merge_tensors(LINEAR, None, [a, b], LINEAR.settings(own, {"normalize": False})).tolist() == [16.0, -4.0]


def test_linear_takes_a_base_for_a_source_like_any_other() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    chosen = LINEAR.settings([{"weight": 1.0}, {"weight": 1.0}])
    assert torch.equal(merge_tensors(LINEAR, a, [a, b], chosen), merge_tensors(LINEAR, None, [a, b], chosen))


def test_task_arithmetic_by_hand() -> None:
    base, a, b = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([0.0])
    own = [{"weight": 0.5}, {"weight": 1.5}]
    # δ = 2, −1: 1 + 0.5·2 − 1.5·1 = 0.5; λ = 2: 1 − 1 = 0; normalised: 1 − 0.5/2 = 0.75
    assert merge_tensors(TASKS, base, [a, b], TASKS.settings(own)).tolist() == [0.5]
    assert merge_tensors(TASKS, base, [a, b], TASKS.settings(own, {"lambda": 2.0})).tolist() == [0.0]
    assert merge_tensors(TASKS, base, [a, b], TASKS.settings(own, {"normalize": True})).tolist() == [0.75]


def test_dare_drops_by_the_field_and_rescales() -> None:
    base, (source,) = family(0, 1, (40,))
    mask = torch.from_numpy(kept_elements(field_key(5, "w", "f"), 0, 40, 0.25))
    chosen = DARE.settings([{"weight": 2.0, "density": 0.25}])
    merged = merge_tensors(DARE, base, [source], chosen, seed=5, name="w", fingerprints=["f"])
    torch.testing.assert_close(merged, base + mask * (source - base) / 0.25)  # the weight is normalised away
    plain = DARE_LINEAR.settings([{"weight": 2.0, "density": 0.25}], {"rescale": False})
    merged = merge_tensors(DARE_LINEAR, base, [source], plain, seed=5, name="w", fingerprints=["f"])
    torch.testing.assert_close(merged, base + 2 * mask * (source - base))


@pytest.mark.parametrize("method", [DARE, DARE_LINEAR], ids=lambda m: m.name)
def test_drop_rate_is_one_minus_density(method: Method) -> None:
    base, sources = family(0, 2, (40,))
    by_rate = method.settings([{"weight": 1.0, "drop_rate": 0.75}, {"weight": 1.0, "density": 0.5}])
    by_density = method.settings([{"weight": 1.0, "density": 0.25}, {"weight": 1.0, "drop_rate": 0.5}])
    assert torch.equal(merge_tensors(method, base, sources, by_rate), merge_tensors(method, base, sources, by_density))


def test_dare_keeps_the_expected_delta() -> None:
    base, (source,) = torch.zeros(300), [torch.linspace(-1, 1, 300)]
    total = torch.zeros(300, dtype=torch.float64)
    draws, density = 400, 0.2
    for seed in range(draws):
        chosen = DARE.settings([{"weight": 1.0, "density": density}])
        total += merge_tensors(DARE, base, [source], chosen, seed=seed)
    # each element: mean δ, variance δ² (1 − p)/p = 4 δ², so five standard errors are 0.5 abs(δ)
    assert ((total / draws - source).abs() <= 0.5 * source.abs() + 1e-6).all()


def test_the_default_fingerprint_is_the_content() -> None:
    base, sources = family(0, 2, (6, 5))
    assert tensor_fingerprint(sources[0]) == tensor_fingerprint(sources[0].clone())
    assert len({tensor_fingerprint(s) for s in (*sources, sources[0].t(), base)}) == 4
    chosen = DARE.settings([{"weight": 1.0, "density": 0.5}] * 2)
    forth, back = (merge_tensors(DARE, base, order, chosen) for order in (sources, sources[::-1]))
    torch.testing.assert_close(forth, back)


def test_masks_need_keys() -> None:
    with pytest.raises(ValueError, match="give the sources' keys"):
        PlainStatistics(torch.zeros(3), [torch.ones(3)]).keep_mask(0, 0.5)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=4),
    raw=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
)
def test_affine_is_the_linear_combination(values: list[float], raw: list[float]) -> None:
    coefficients = raw[: len(values) - 1]
    coefficients.append(1.0 - sum(coefficients))
    got = affine([torch.tensor([v]) for v in values], coefficients)
    expected = sum(v * c for v, c in zip(values, coefficients, strict=True))
    scale = max(abs(v) for v in values) * sum(abs(c) for c in coefficients)
    assert abs(float(got) - expected) <= 1e-6 * scale + 1e-30


def test_adding_a_delta_in_float32_may_miss_the_source_but_landing_does_not() -> None:
    base, source = torch.tensor([1.0]), torch.tensor([2.0**-30])
    block = PlainStatistics(base, [source]).block()
    assert float(base + (source - base)) == 0.0  # 1 − 2^-30 rounds to 1
    assert torch.equal(apply_update(block, [0], block.deltas[0]), source)


def test_a_sum_is_zero_relative_to_its_weights() -> None:
    assert zero_sum_problem("m", [0.1, 0.2, -0.3])
    assert zero_sum_problem("m", [])
    assert not zero_sum_problem("m", [1e-9, 1e-9])
    assert not zero_sum_problem("m", [1.0, -0.99])
