"""The k-th largest of what a random drop leaves, found near the one of what it was drawn from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from evomerge.engine.statistics import dropped_topk
from evomerge.engine.statistics.dropped_topk import Dropout, bracket, dropped_topk_cutoff
from evomerge.engine.statistics.exact_topk import (
    COARSE,
    FINE,
    Bits,
    Floats,
    Histogram,
    count_magnitudes,
    density_cutoff,
)
from evomerge.methods.random_field import keep_threshold, kept_elements

SIZE = 70_007  # no whole number of anything
KEY = (17, 4)


def parts(values: Floats) -> Iterator[tuple[int, Bits, Bits]]:
    """The values as differences from a base of zeros."""
    for start in range(0, SIZE, 9_600):
        part = values[start : start + 9_600].view(np.uint32)
        yield start, np.zeros(part.size, np.uint32), part


def magnitudes(values: Floats, shift: int = FINE) -> Histogram:
    return count_magnitudes(lambda: parts(values), shift)


def drop_of(chance: float) -> Dropout:
    return Dropout(chance, keep_threshold(chance), np.array(KEY, np.uint64), np.float32(1.0 / chance))


def cut_by_a_full_look(values: Floats, chance: float, density: float) -> tuple[float, int]:
    alive = kept_elements(KEY, 0, SIZE, chance)
    scores = np.where(alive, values * np.float32(1.0 / chance), np.float32(np.nan))
    return density_cutoff(lambda: iter([(0, scores)]), SIZE, density)


def normal(step: float | None) -> Floats:
    """Normal deltas, or multiples of a step as those of bfloat16 models are: many of one magnitude, many zeros."""
    values = np.random.default_rng(0).normal(size=SIZE)
    return (values if step is None else np.round(values / step) * step).astype(np.float32)


def cut(values: Floats, chance: float, density: float, shift: int = FINE) -> tuple[float, int, NDArray[np.bool_]]:
    """(threshold, last, which elements are marked)."""
    marks = np.empty(-(-SIZE // 16), np.uint16)
    cutoff = dropped_topk_cutoff(
        lambda: parts(values), magnitudes(values, shift), SIZE, density, drop_of(chance), marks
    )
    return *cutoff, np.unpackbits(marks.view(np.uint8), bitorder="little")[:SIZE].astype(bool)


CHANCES, DENSITIES, STEPS = (0.002, 0.4, 0.95, 0.999999), (1e-5, 0.03, 0.5, 0.97, 0.99999), (None, 0.25, 3.0, 0.1)
# Every chance with every density, and each of them with every step.
PAIRS = [(c, d, STEPS[(i + k) % len(STEPS)]) for i, c in enumerate(CHANCES) for k, d in enumerate(DENSITIES)]


@pytest.mark.parametrize("shift", [FINE, COARSE])
@pytest.mark.parametrize(("chance", "density", "step"), PAIRS)
def test_survivors_are_cut_where_a_full_look_cuts_them(
    chance: float, density: float, step: float | None, shift: int
) -> None:
    values = normal(step)
    values[[0, 5_000, -1]] = np.nan, np.inf, -np.inf
    threshold, last, marked = cut(values, chance, density, shift)
    assert (threshold, last) == cut_by_a_full_look(values, chance, density)
    assert np.array_equal(marked, kept_elements(KEY, 0, SIZE, chance))


def test_a_bracket_holds_the_threshold_and_little_else() -> None:
    values = normal(None)
    low, middle, high = bracket(magnitudes(values), 0.3, 0.5, np.float32(2.0)).view(np.float32)
    threshold, _ = cut_by_a_full_look(values, 0.5, 0.3)
    assert low <= threshold <= high < 1.1 * low
    assert low <= middle <= high


@pytest.mark.parametrize("step", [None, 0.25])
def test_a_bracket_elsewhere_costs_time_and_nothing_else(step: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(step)
    for bounds in ((0, 500, 1000), (0x7F000000, 0x7F000000, 0x7F000001)):
        monkeypatch.setattr(dropped_topk, "bracket", lambda *_, bounds=bounds: np.array(bounds, np.uint32))
        assert cut(values, 0.5, 0.3)[:2] == cut_by_a_full_look(values, 0.5, 0.3)


def test_too_many_within_the_bracket_cost_time_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropped_topk, "_FEW", 0)
    monkeypatch.setattr(dropped_topk, "bracket", lambda *_: np.array([0, 1, 0x7F800000], np.uint32))
    assert cut(normal(None), 0.5, 0.3)[:2] == cut_by_a_full_look(normal(None), 0.5, 0.3)
