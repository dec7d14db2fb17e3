"""The random field is frozen: its values, its independence of how it is read, and its statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.methods.random_field import field_key, keep_threshold, kept_elements, uniform16

KEY = field_key(7, "model.layers.0.mlp.up_proj.weight", "abc")
MASK = (1 << 64) - 1


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox 4x64-10 from the paper (section 3.3), in Python integers."""
    words = [(counter >> (64 * i)) & MASK for i in range(4)]
    first, second = key
    for _ in range(10):
        left, right = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [(right >> 64) ^ words[1] ^ first, right & MASK, (left >> 64) ^ words[3] ^ second, left & MASK]
        first, second = (first + 0x9E3779B97F4A7C15) & MASK, (second + 0xBB67AE8584CAA73B) & MASK
    return words


def test_the_reference_gives_the_published_known_answer() -> None:
    # Random123, kat_vectors: philox4x64 10, counter 0, key 0
    assert philox(0, (0, 0)) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


def test_the_field_is_philox_in_sixteen_bit_lanes() -> None:
    # numpy counts its blocks from 1; each word gives four lanes, lowest bits first
    expected = [
        (word >> (16 * lane)) & 0xFFFF for block in range(1, 4) for word in philox(block, KEY) for lane in range(4)
    ]
    assert uniform16(KEY, 0, 48).tolist() == expected


def test_the_field_is_frozen() -> None:
    assert field_key(0, "w", "f") == (10788376801823841484, 3508375787234963249)
    assert uniform16(field_key(0, "w", "f"), 0, 12).tolist() == [
        9639,
        5855,
        39669,
        17920,
        46852,
        63118,
        11189,
        28811,
        62826,
        36134,
        22300,
        58108,
    ]
    assert uniform16(field_key(0, "w", "f"), 10**10 + 3, 4).tolist() == [26238, 56318, 43363, 29641]


@given(start=st.integers(0, 5000), count=st.integers(0, 300))
def test_a_part_is_a_slice_of_the_whole(start: int, count: int) -> None:
    part = uniform16(KEY, start, count)
    assert part.dtype == np.uint16
    assert np.array_equal(part, uniform16(KEY, 0, 5300)[start : start + count])


@given(low=st.floats(0, 1), high=st.floats(0, 1))
def test_masks_are_nested(low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert not (kept_elements(KEY, 3, 400, low) & ~kept_elements(KEY, 3, 400, high)).any()


def test_the_ends_keep_nothing_and_everything() -> None:
    assert not kept_elements(KEY, 0, 10_000, 0.0).any()
    assert kept_elements(KEY, 0, 10_000, 1.0).all()
    assert [keep_threshold(d) for d in (0.0, 0.5, 0.1, 1.0)] == [0, 32768, 6554, 65536]


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 0.9])
def test_the_kept_fraction_is_the_density(density: float) -> None:
    n = 200_000
    kept = kept_elements(KEY, 0, n, density).mean()
    assert abs(kept - density) < 5 * np.sqrt(density * (1 - density) / n) + 0.5 / 65536


@pytest.mark.parametrize("other", [(8, "w", "f"), (7, "v", "f"), (7, "w", "g"), (7, "w", "")])
def test_fields_of_other_seeds_tensors_and_sources_are_independent(other: tuple[int, str, str]) -> None:
    n = 100_000
    one = uniform16(field_key(7, "w", "f"), 0, n).astype(float)
    two = uniform16(field_key(*other), 0, n).astype(float)
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(n)
    assert (one == two).mean() < 5e-4  # 1/65536 by chance


def test_neighbours_in_a_field_are_independent() -> None:
    field = uniform16(KEY, 0, 100_000).astype(float)
    for step in (1, 4, 16):
        assert abs(np.corrcoef(field[:-step], field[step:])[0, 1]) < 5 / np.sqrt(field.size)


def test_the_parts_of_a_key_cannot_be_mistaken() -> None:
    keys = [
        field_key(1, "a", "b"),
        field_key(1, "ab", ""),
        field_key(1, "", "ab"),
        field_key(11, "a", "b"),
        field_key(1, 'a","b', ""),
    ]
    assert len(set(keys)) == len(keys)


def test_negative_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="starts at 0 or later"):
        uniform16(KEY, -1, 4)
    with pytest.raises(ValueError, match="has 0 elements or more"):
        uniform16(KEY, 0, -4)
