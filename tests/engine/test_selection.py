"""The k-th largest of a random sample, found near the one of what it was drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from evomerge.engine.selection import COARSE, FINE, Floats, Histogram, Parts, count, top, top_sampled

SIZE = 70_000


def magnitudes(values: Floats, shift: int = FINE) -> Histogram:
    """Their histogram, as differences from a base of zeros."""
    parts: Parts = lambda: iter([(0, np.zeros(values.size, np.uint32), values.view(np.uint32))])  # noqa: E731
    return count(parts, shift)


def chunks(scores: Floats) -> Iterator[tuple[int, Floats]]:
    for start in range(0, scores.size, 9_000):
        yield start, scores[start : start + 9_000]


def draw(values: Floats, chance: float, factor: np.float32) -> Callable[[], Iterator[tuple[int, Floats]]]:
    dropped = np.random.default_rng(1).random(values.size) >= chance
    return partial(chunks, np.where(dropped, np.float32(np.nan), values * factor))


def normal(step: float | None) -> Floats:
    """Normal deltas, or multiples of a step as those of bfloat16 models are: many of one magnitude, many zeros."""
    values = np.random.default_rng(0).normal(size=SIZE)
    return (values if step is None else np.round(values / step) * step).astype(np.float32)


@pytest.mark.parametrize("shift", [FINE, COARSE])
@pytest.mark.parametrize("step", [None, 0.25, 3.0])
@pytest.mark.parametrize("density", [0.0, 1e-5, 0.03, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("chance", [0.002, 0.4, 0.95])
def test_a_sample_is_cut_where_a_full_look_cuts_it(
    chance: float, density: float, step: float | None, shift: int
) -> None:
    values, factor = normal(step), np.float32(1.0 / chance)
    scores = draw(values, chance, factor)
    found = top_sampled(scores, density, magnitudes(values, shift), chance, float(factor))
    assert found == top(scores, SIZE, density)


def test_a_sample_of_something_else_is_not_cut() -> None:
    scores = draw(normal(None), 0.5, np.float32(2.0))
    assert top_sampled(scores, 0.3, magnitudes(normal(None) * np.float32(10.0)), 0.5, 2.0) is None
