"""The random field in torch's integers against numpy's Philox, and against what DARE drew when it was frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.engine.device.random_field import philox, uniform16
from evomerge.engine.kernels import random_field as compiled
from evomerge.methods import random_field as plain
from tests.engine.device.pretend import pretending

WORDS = st.integers(0, 2**64 - 1)
EDGES = [(0, 0), (2**64 - 1, 2**64 - 1), (1 << 63, 1), (0xFFFFFFFF, 0xFFFFFFFF00000000)]


@settings(max_examples=50, deadline=None)
@given(key=st.tuples(WORDS, WORDS), start=st.integers(0, 1 << 40), count=st.integers(0, 100))
def test_the_same_bits_as_numpys(key: tuple[int, int], start: int, count: int) -> None:
    drawn = uniform16(key, start, count, None)
    assert drawn.dtype == torch.int32
    assert drawn.tolist() == plain.uniform16(key, start, count).tolist()


@pytest.mark.parametrize("key", EDGES)
def test_the_same_words_as_the_compiled_kernel(key: tuple[int, int]) -> None:
    words = np.empty(4 * 1000, dtype=np.uint64)
    compiled.philox(*np.array(key, dtype=np.uint64), 12345, words)
    drawn = torch.stack(philox(key, torch.arange(12346, 13346)), 1).view(-1).numpy()
    assert np.array_equal(drawn.view(np.uint64), words)


def test_what_was_frozen() -> None:
    """The first numbers of the field of one tensor, as of the first version."""
    key = plain.field_key(7, "model.layers.0.mlp.up_proj.weight", "fingerprint")
    frozen = [44527, 33563, 53300, 18769, 12751, 36796, 26377, 21525]
    assert uniform16(key, 0, 8, None).tolist() == frozen
    assert plain.uniform16(key, 0, 8).tolist() == frozen


def test_on_a_device() -> None:
    with pretending() as device:
        assert uniform16((3, 4), 37, 50, device).cpu().tolist() == plain.uniform16((3, 4), 37, 50).tolist()
