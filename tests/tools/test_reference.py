"""The reference pages: every key, method, algorithm and command is on them, and the site's pages exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from evomerge.algorithms.registry import ALGORITHMS
from evomerge.methods.registry import METHODS
from evomerge.spec.schema import SearchSpec
from tests.frame import ROOT
from tools.docs.reference import PAGES, main


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: page() for name, page in PAGES.items()}


def test_every_key_of_a_search_is_there(pages: dict[str, str]) -> None:
    schema = SearchSpec.model_json_schema(by_alias=True)
    keys = {key for section in (schema, *schema["$defs"].values()) for key in section["properties"]}
    assert {"informative", "keep", "scale", "batch_tokens", "from", "low"} <= keys
    assert [key for key in sorted(keys) if f"\n| `{key}` |" not in pages["search"]] == []


def test_every_method_algorithm_and_command_is_there(pages: dict[str, str]) -> None:
    assert [name for name in METHODS if f"\n## {name}\n" not in pages["methods"]] == []
    assert [name for name in ALGORITHMS if f"\n| `{name}` |" not in pages["methods"]] == []
    assert {"run", "export", "extract-lora", "schema"} <= set(
        re.findall(r"^## evomerge (\S+)$", pages["commands"], re.M)
    )
    assert "`--lora`" in pages["commands"]
    assert "`density`" in pages["recipe"]


def test_tables_are_tables(pages: dict[str, str]) -> None:
    for page in pages.values():
        for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block[:200]


def test_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reference", str(tmp_path / "reference")])
    main()
    assert {path.stem for path in (tmp_path / "reference").iterdir()} == set(PAGES)


def test_the_navigation_names_pages_that_exist() -> None:
    named = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(named) > 15
    missing = [name for name in named if not (ROOT / "docs" / name).is_file()]
    assert missing == [name for name in missing if Path(name).parts[0] == "reference" and Path(name).stem in PAGES]
