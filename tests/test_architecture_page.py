"""docs/architecture.md names the modules that there are, each under its package, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.frame import ROOT

PACKAGE = ROOT / "evomerge"
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LISTS: dict[str, str] = dict(re.findall(r"^\*\*(\w+)/\*\*.*?^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
"""Package to its list of files."""
TEXT = re.sub(r"^```\n.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
NOT_THERE = {"runs/NAME/", "stages/", "engine/device/"}
"""Folders of a run, and those that the next things will bring."""


def _modules(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py") if p.name != "__init__.py")


def test_every_package_has_its_list() -> None:
    assert sorted(LISTS) == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_a_list_names_the_modules_of_its_package(package: str) -> None:
    assert sorted(re.findall(r"[\w/]+\.py\b", LISTS[package])) == _modules(PACKAGE / package)


def test_the_text_names_the_modules_at_the_top() -> None:
    assert {f"`{path.name}`" for path in PACKAGE.glob("*.py")} <= set(re.findall(r"`\w+\.py`", TEXT))


def test_files_and_folders_that_the_text_names_exist() -> None:
    """Their paths are from `evomerge/`, or from the root of the repository."""
    names = set(re.findall(r"`([\w/]+(?:\.py|/))`", TEXT)) - NOT_THERE
    assert len(names) > 50
    assert [name for name in sorted(names) if not (PACKAGE / name).exists() and not (ROOT / name).exists()] == []


def test_functions_that_the_text_names_exist() -> None:
    names = set(re.findall(r"`(?:\w+\.)?(\w+)\(\)`", TEXT))
    assert len(names) > 20
    sources = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert [name for name in sorted(names) if f"def {name}(" not in sources] == []
