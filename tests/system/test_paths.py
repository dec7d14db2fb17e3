"""Where a relative path points to."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.system.paths import resolve_path


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
