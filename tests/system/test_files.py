"""Where a relative path leads, what is written whole, and where the cache is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from evomerge.errors import OutputError
from evomerge.system.files import cache_folder, resolve_path, write_atomic


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("work", "top/here/deep", "top/x", "top/here/x", "work/x", "work/only"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "top/here/deep/file.yaml").touch()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path.resolve()


def test_nearest_above_the_file_wins(tree: Path) -> None:
    assert resolve_path("x", tree / "top/here/deep/file.yaml") == tree / "top/here/x"
    assert resolve_path("x", tree / "top/here/deep") == tree / "top/here/x"
    assert resolve_path("x", tree / "top/not-yet-written.yaml") == tree / "top/x"


def test_working_directory_is_last(tree: Path) -> None:
    assert resolve_path("only", tree / "top/here/deep/file.yaml") == tree / "work/only"
    assert resolve_path("x", None) == tree / "work/x"


def test_absolute_paths_and_home(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_path(str(tree / "top/x"), None) == tree / "top/x"
    assert resolve_path(str(tree / "none"), tree) is None
    monkeypatch.setenv("HOME", str(tree / "top"))
    assert resolve_path("~/x", None) == tree / "top/x"


@pytest.mark.parametrize("text", ["", "  ", "nowhere", "nul\0byte", "n" * 5000, "org/model@main"])
def test_what_is_not_there(tree: Path, text: str) -> None:
    assert resolve_path(text, tree / "top") is None


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written: no space left on the disk"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        write_atomic(tmp_path / "none" / "file", "x")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    assert cache_folder("scores") == tmp_path / "cache" / "scores"
    monkeypatch.delenv("EVOMERGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("zoo") == tmp_path / "xdg" / "evomerge" / "zoo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("zoo") == tmp_path / ".cache" / "evomerge" / "zoo"
