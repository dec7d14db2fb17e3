"""AIM, the stage: by hand, column by column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evomerge.methods import aim
from evomerge.methods.contract import Settings
from evomerge.methods.plain_statistics import PlainStatistics
from evomerge.testing.methods import family


def shrunk(base: Tensor, merged: Tensor, inputs: list[float], omega: float) -> Tensor:
    block = PlainStatistics(base, [merged], activations=torch.tensor(inputs)).block("tensor")
    return aim.apply(block, merged.clone(), Settings({"aim_omega": omega}))


def test_a_delta_shrinks_where_inputs_are_large() -> None:
    # a / max a = 1, 1/2, 0: what is left is 1 − 0.6 · that
    base, merged = torch.ones(2, 3), torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.4, 1.7, 2.0], [0.6, 0.3, 0.0]])
    torch.testing.assert_close(shrunk(base, merged, [4.0, 2.0, 0.0], 0.4), expected)


@pytest.mark.parametrize("inputs", [[1.0, 5.0, 2.0, 0.0], [0.0] * 4])
def test_at_one_and_without_inputs_nothing_shrinks(inputs: list[float]) -> None:
    base, (merged,) = family(1, 1, (3, 4))
    assert torch.equal(shrunk(base, merged, inputs, 1.0 if any(inputs) else 0.3), merged)


def test_a_factor_on_all_inputs_changes_nothing() -> None:
    base, (merged,) = family(1, 1, (3, 4))
    one, other = (shrunk(base, merged, [scale * a for a in (1.0, 5.0, 2.0, 0.5)], 0.2) for scale in (1.0, 8.0))
    assert torch.equal(one, other)
