"""The search spaces and benchmarks that come with EvoMerge: in the wheel, or in the folders of a clone."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import SpecError, suggest


def shipped_folder() -> Path:
    """The folder that holds `search_spaces` and `eval`."""
    packaged = Path(__file__).parent.parent / "_data"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent.parent


def find_search(text: str) -> Path:
    """A search.yaml by its path, or one of ours by its name ("quickstart").

    Raises:
        SpecError: When there is neither.
    """
    path = Path(text)
    if path.exists():
        return path
    ours = {p.stem: p for p in (shipped_folder() / "search_spaces").glob("*.yaml")}
    if path.name == text and path.stem in ours:
        return ours[path.stem]
    names = ", ".join(sorted(ours))
    raise SpecError(f"{text}: no such file{suggest(text, ours)}; by name there are {names}")
