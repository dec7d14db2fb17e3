"""The elements on which the sources differ most: the same as by ordering them, whatever parts they come in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evomerge.engine.statistics import sce_selection
from evomerge.engine.statistics.sce_selection import SHIFT, Floats, Selection, count_variances, select, variance_levels
from evomerge.methods.sce import element_variance as variance
from evomerge.methods.topk import cutoff, cutoff_mask, keep_count
from tests.engine.helpers import inputs, store_for

SIZE = 5_003  # no whole number of anything
SOURCES = 3


def tensors(step: float | None) -> Floats:
    """[base and sources, elements]: normal deltas, or multiples of a step; in a tenth of the elements no variance."""
    random = np.random.default_rng(3)
    base, deltas = random.normal(size=SIZE), random.normal(size=(SOURCES, SIZE))
    deltas[:, random.random(SIZE) < 0.1] = 0.5
    deltas = deltas if step is None else np.round(deltas / step) * step
    base = base if step is None else np.round(base)  # so that the deltas are exact
    return np.concatenate([base[None], base + deltas]).astype(np.float32)


def selected(x: Floats, fraction: float) -> Selection:
    def rows() -> Iterator[tuple[int, Floats]]:
        for start in range(0, SIZE, 960):
            yield start, x[:, start : start + 960]

    def gather(start: int, places: NDArray[np.int32]) -> Floats:
        return np.ascontiguousarray(x[:, start + places])

    variances = count_variances(rows, SOURCES)
    return select(variances, lambda: variance_levels(rows, variances), gather, fraction)


@pytest.mark.parametrize("look", [1 << 20, 1_024])
@pytest.mark.parametrize("step", [None, 0.25, 2.0])
@pytest.mark.parametrize("fraction", [1e-4, 0.03, 0.4, 0.95, 0.9999])
def test_the_same_as_ordering_all(
    fraction: float, step: float | None, look: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sce_selection, "_SCAN", look)
    x = tensors(step)
    selection = selected(x, fraction)
    deltas = [torch.from_numpy(source - x[0]) for source in x[1:]]
    sizes = variance(deltas)
    cut = cutoff(sizes, keep_count(int((sizes > 0).sum()), fraction))
    mask = cutoff_mask(sizes, *cut).numpy()
    assert cutoff_mask(sizes, *selection.cut).equal(cutoff_mask(sizes, *cut))
    assert selection.cut[0] == cut[0]
    assert selection.marks is not None
    assert np.array_equal(np.unpackbits(selection.marks.view(np.uint8), bitorder="little")[:SIZE], mask)
    energies = [float(np.square(delta.double().numpy()[mask]).sum()) for delta in deltas]
    assert selection.energies == pytest.approx(energies, rel=1e-12)


@pytest.mark.parametrize(("step", "fraction"), [(0.25, 0.0), (100.0, 0.5)])
def test_where_nothing_is_selected_there_are_no_marks(step: float, fraction: float) -> None:
    selection = selected(tensors(step), fraction)
    assert selection == Selection((float("inf"), -1), [0.0] * SOURCES, None)


def test_levels_rise_with_the_variance() -> None:
    x = tensors(None)
    variances = count_variances(lambda: iter([(0, x)]), SOURCES)
    levels = variance_levels(lambda: iter([(0, x)]), variances)
    bins = variance([torch.from_numpy(source - x[0]) for source in x[1:]]).numpy().view(np.uint32) >> SHIFT
    assert np.all(np.diff(levels[np.argsort(bins)].astype(int)) >= 0)
    assert len(np.unique(levels)) > 200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_levels_are_found_once_where_there_is_room(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *sources = (torch.from_numpy(row).to(dtype) for row in tensors(0.25))
    store = store_for(base, sources, room=SIZE)
    origin, others = inputs(SOURCES)
    first = store.select(origin, others, 0.4)
    monkeypatch.setattr("evomerge.engine.statistics.tensor_statistics.variance_levels", None)
    again, other = store.select(origin, others, 0.4), store.select(origin, others, 0.2)
    assert (again.cut, again.energies) == (first.cut, first.energies)
    assert other.cut[0] >= first.cut[0]
