"""Fingerprints: they depend on content alone, and are remembered only while the files stay as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import tensors as tensors_module
from evomerge.checkpoints.checkpoint import open_checkpoint
from tests.models import write_tiny_llama


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every fingerprint that is computed, not remembered."""
    computed: list[int] = []
    real = tensors_module.content_fingerprint

    def counting(*arguments: object) -> str:
        computed.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tensors_module, "content_fingerprint", counting)
    return computed


def _file(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return _age(path)


def _age(path: Path) -> Path:
    """Makes a file look older than the time in which changes may go unseen."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10_000_000_000))
    return path


def _fingerprint(path: Path) -> str:
    return open_checkpoint(str(path)).fingerprint


def test_independent_of_the_division_into_files(tmp_path: Path) -> None:
    whole = write_tiny_llama(tmp_path / "whole")
    shards = write_tiny_llama(tmp_path / "shards", max_shard_size="30KB")
    assert len(open_checkpoint(str(shards)).files) > 1
    assert _fingerprint(whole) == _fingerprint(shards)


def test_depends_on_name_dtype_shape_and_bytes(tmp_path: Path) -> None:
    base = torch.zeros(2, 3)
    variants = {
        "same": {"a": base},
        "again": {"a": base.clone()},
        "name": {"b": base},
        "shape": {"a": base.view(3, 2)},
        "dtype": {"a": base.view(torch.int32)},
        "bytes": {"a": base + 1},
        "more": {"a": base, "b": base.clone()},
    }
    found = {name: _fingerprint(_file(tmp_path / f"{name}.safetensors", **value)) for name, value in variants.items()}
    assert found["same"] == found["again"]
    assert len(set(found.values())) == len(variants) - 1
    assert all(len(value) == 32 for value in found.values())


def test_known_value(tmp_path: Path) -> None:
    """Fixed for ever: DARE's masks of today depend on it in a year."""
    path = _file(tmp_path / "m.safetensors", w=torch.tensor([1.0, 2.0]), v=torch.ones(2, 2, dtype=torch.bfloat16))
    assert _fingerprint(path) == "f19974f7ca4fd6a15a9cfc6616593b72"


def test_remembered(tmp_path: Path, own_cache: Path, reads: list[int]) -> None:
    path = _file(tmp_path / "m.safetensors", w=torch.ones(3))
    first = _fingerprint(path)
    assert (_fingerprint(path), len(reads)) == (first, 1)
    assert [file.read_text() for file in (own_cache / "fingerprints").iterdir()] == [first]


def test_not_remembered_of_a_file_just_written(tmp_path: Path, reads: list[int]) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(3)}, path)
    assert _fingerprint(path) == _fingerprint(path)
    assert len(reads) == 2


def test_a_changed_file_is_read_again(tmp_path: Path, reads: list[int]) -> None:
    path = _file(tmp_path / "m.safetensors", w=torch.ones(3))
    first = _fingerprint(path)
    save_file({"w": torch.zeros(3)}, path)
    assert _fingerprint(path) != first
    assert len(reads) == 2


@pytest.mark.parametrize("damage", [b"", b"not a fingerprint", b"\xff", b"0" * 31])
def test_a_damaged_memory_is_ignored(tmp_path: Path, own_cache: Path, reads: list[int], damage: bytes) -> None:
    path = _file(tmp_path / "m.safetensors", w=torch.ones(3))
    first = _fingerprint(path)
    next((own_cache / "fingerprints").iterdir()).write_bytes(damage)
    assert (_fingerprint(path), len(reads)) == (first, 2)


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "file"))
    path = _file(tmp_path / "m.safetensors", w=torch.ones(3))
    assert _fingerprint(path) == _fingerprint(path)
    assert len(reads) == 2


def test_computed_once_for_one_open_checkpoint(tmp_path: Path, reads: list[int]) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(3)}, path)
    model = open_checkpoint(str(path))
    assert model.fingerprint == model.fingerprint
    assert len(reads) == 1


def test_bytes_are_hashed_not_values(tmp_path: Path) -> None:
    """-0.0 equals 0.0 and is another weight all the same."""
    zero = _file(tmp_path / "zero.safetensors", w=torch.zeros(2))
    minus = _file(tmp_path / "minus.safetensors", w=-torch.zeros(2))
    assert torch.equal(load_file(zero)["w"], load_file(minus)["w"])
    assert _fingerprint(zero) != _fingerprint(minus)
