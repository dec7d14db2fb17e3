"""What several modules compare runs with: a search with racing that nobody stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.run.search import start
from evomerge.spec.load import parse_spec
from evomerge.spec.schema import SearchSpec
from tests.frame import search_spec


@pytest.fixture(scope="session")
def raced_spec(tiny_family: dict[str, Path]) -> SearchSpec:
    """A raced search with a random baseline and the score cache."""
    changes = {"evaluation__racing": True, "evaluation__cache": True, "search__baseline": "random"}
    return parse_spec(search_spec(tiny_family, **changes))


@pytest.fixture(scope="session")
def raced_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `raced_run`, its own."""
    return tmp_path_factory.mktemp("raced-cache")


@pytest.fixture(scope="session")
def raced_run(raced_spec: SearchSpec, raced_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search of `raced_spec`, for reading only."""
    folder = tmp_path_factory.mktemp("raced") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_CACHE", str(raced_cache))
        start(raced_spec, folder=folder)
    return folder
