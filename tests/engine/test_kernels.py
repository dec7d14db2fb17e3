"""Compiled loops against plain numpy."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.engine.kernels import jit, reductions
from evomerge.engine.kernels import random_field as field
from evomerge.methods.random_field import LANES, uniform16

words = st.integers(0, 2**64 - 1)


@given(key=st.tuples(words, words), first=st.sampled_from([0, 1, 77, 2**40]), blocks=st.integers(1, 5))
def test_the_field_is_numpys_philox(key: tuple[int, int], first: int, blocks: int) -> None:
    drawn = np.empty(4 * blocks, dtype=np.uint64)
    field.philox(np.uint64(key[0]), np.uint64(key[1]), first, drawn)
    np.testing.assert_array_equal(drawn.view(np.uint16), uniform16(key, first * LANES, blocks * LANES))


def stored(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(bits as stored, float32 values that they stand for)."""
    whole = values.astype(np.float32).view(np.uint32)
    if bits == 16:
        whole = whole >> 16 << 16
        return (whole >> 16).astype(np.uint16), whole.view(np.float32)
    return whole, whole.view(np.float32)


@pytest.fixture(params=[16, 32])
def pair(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bits of a base, bits of a source, float32 delta); more than two tiles, not a whole number of them."""
    generator = np.random.default_rng(3)
    base = generator.normal(size=2 * jit.TILE + 77)
    source = np.where(generator.random(base.size) < 0.3, base, base + generator.normal(0, 0.01, base.size))
    (base_bits, a), (source_bits, b) = stored(base, request.param), stored(source, request.param)
    return base_bits, source_bits, b - a


@pytest.mark.parametrize("shift", [13, 16])
def test_magnitudes_are_counted_by_upper_and_lower_bits(
    pair: tuple[np.ndarray, np.ndarray, np.ndarray], shift: int
) -> None:
    base_bits, source_bits, delta = pair
    magnitudes = delta.view(np.uint32) & 0x7FFFFFFF
    counts, low = np.zeros(1 << (31 - shift), np.int64), np.zeros(1 << (31 - shift), np.uint16)
    reductions.count_magnitudes(base_bits, source_bits, shift, counts, low)
    np.testing.assert_array_equal(counts, np.bincount(magnitudes >> shift, minlength=counts.size))
    for upper in np.unique(magnitudes >> shift)[::40]:
        within = magnitudes[magnitudes >> shift == upper] & ((1 << shift) - 1)
        assert low[upper] == np.bitwise_or.reduce(within)
        inside = np.zeros(1 << shift, np.int64)
        reductions.count_low_bits(base_bits, source_bits, shift, int(upper), inside)
        np.testing.assert_array_equal(inside, np.bincount(within, minlength=inside.size))


def test_an_equal_element_is_found_by_its_rank(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    base_bits, source_bits, delta = pair
    zeros = np.flatnonzero(delta == 0)
    for rank in (1, 2, len(zeros) // 2, len(zeros)):
        assert reductions.find_equal(base_bits, source_bits, 0, rank) == (zeros[rank - 1], 0)
    assert reductions.find_equal(base_bits, source_bits, 0, len(zeros) + 5) == (-1, 5)


def test_inner_products_and_moments_are_float64(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    base_bits, source_bits, delta = pair
    other = stored(np.linspace(-1.0, 1.0, delta.size), 8 * base_bits.itemsize)
    apart = other[1] - (delta * 0 + stored_values(base_bits))
    sums = np.zeros((3, reductions.PARTIAL))
    reductions.add_gram(base_bits, source_bits, other[0], True, sums)
    wide, others = delta.astype(np.float64), apart.astype(np.float64)
    assert sums.sum(1) == pytest.approx([wide @ wide, wide @ others, others @ others], rel=1e-12)
    weights = np.zeros((3, reductions.PARTIAL))
    reductions.add_gram(base_bits, source_bits, other[0], False, weights)
    whole, rest = (stored_values(bits).astype(np.float64) for bits in (source_bits, other[0]))
    assert weights.sum(1) == pytest.approx([whole @ whole, whole @ rest, rest @ rest], rel=1e-12)


def stored_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << (16 if bits.itemsize == 2 else 0)).view(np.float32)


@given(rows=st.integers(1, 6), columns=st.integers(1, 900), cut=st.floats(0, 1), mean=st.sampled_from([0.0, 1000.0]))
def test_moments_of_rows_come_together_from_parts(rows: int, columns: int, cut: float, mean: float) -> None:
    generator = np.random.default_rng(rows * 1000 + columns)
    values = (generator.normal(size=rows * columns) + mean).astype(np.float32)
    zero, bits, edge = np.zeros(values.size, np.uint32), values.view(np.uint32), int(cut * values.size)
    means, squares = np.zeros(rows), np.zeros(rows)
    reductions.add_moments(zero[:edge], bits[:edge], 0, columns, means, squares)
    reductions.add_moments(zero[edge:], bits[edge:], edge, columns, means, squares)
    wide = values.reshape(rows, columns).astype(np.float64)
    np.testing.assert_allclose(means, wide.mean(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(squares / columns, wide.var(1), rtol=1e-9, atol=1e-12)


def test_what_is_kept_on_disk_is_that_of_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose shared part has changed, in another file, is compiled again; numba alone does not notice."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "user_kernel.py").write_text(
        "from shared_part import amount\nfrom evomerge.engine.kernels.jit import kernel\n\n\n"
        "@kernel\ndef added(x):\n    return x + amount()\n"
    )

    def result(amount: int, version: str) -> int:
        text = "from evomerge.engine.kernels.jit import part\n\n\n@part\ndef amount():\n    return {}\n"
        (tmp_path / "shared_part.py").write_text(text.format(amount))
        importlib.invalidate_caches()
        for name in ("user_kernel", "shared_part"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(jit, "_VERSION", version)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return int(importlib.import_module("user_kernel").added(1))

    assert result(10, "before") == 11
    assert result(20, "before") == 11  # read from the disk
    assert result(20, "after") == 21


def test_the_version_covers_all_that_kernels_are_compiled_from() -> None:
    """What a kernel imports from elsewhere in the package are constants and functions of these files."""
    folder = Path(jit.__file__).parent
    assert set(folder.glob("*.py")) < set(jit.SOURCES)
    compiled = {path for path in folder.glob("*.py") if path.name != "jit.py"}
    imported = {
        node.module
        for path in compiled
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("evomerge")
    }
    root = folder.parents[2]
    files = {root / f"{module.replace('.', '/')}.py" for module in imported}
    assert {str(file) for file in files} <= {str(path) for path in jit.SOURCES}
