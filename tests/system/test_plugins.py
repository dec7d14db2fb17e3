"""What installed packages add to a registry, and what is said when they cannot."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from evomerge.errors import BadInput
from evomerge.methods.registry import METHODS, _adopt
from evomerge.system.plugins import Registry, source_digest


def registry(monkeypatch: pytest.MonkeyPatch, **points: str) -> Registry[int]:
    """A registry with 1 under "one", and what packages say."""
    listed = EntryPoints(EntryPoint(name, value, "evomerge.numbers") for name, value in points.items())
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: listed.select(group=group))
    return Registry({"one": 1}, "evomerge.numbers", int)


def test_what_packages_add_is_loaded_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = registry(monkeypatch, maxsize="sys:maxsize", broken="no_such_package:two")
    assert list(numbers) == ["one", "broken", "maxsize"]
    assert (len(numbers), "broken" in numbers, "two" in numbers) == (3, True, False)
    assert numbers["maxsize"] > numbers["one"]
    with pytest.raises(KeyError):
        numbers["two"]
    assert numbers.get("two") is None


def test_what_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = registry(monkeypatch, broken="no_such_package:two", name="sys:platform")
    with pytest.raises(BadInput, match=r"evomerge.numbers: 'broken' of .* cannot be loaded: ModuleNotFoundError"):
        numbers["broken"]
    with pytest.raises(BadInput, match=r"'name' of .*: sys:platform is no builtins.int, but str"):
        numbers["name"]


def test_a_name_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="'one' of an unknown package: the name is taken, EvoMerge has one itself"):
        list(registry(monkeypatch, one="sys:maxsize"))


def test_a_method_has_its_own_name_and_the_hash_of_its_source() -> None:
    linear = METHODS["linear"]
    assert linear.version == ""
    assert linear.merge is not None
    assert _adopt("linear", linear).version == source_digest(linear.merge) != source_digest(METHODS["ties"].merge)
    with pytest.raises(BadInput, match="is called 'median' itself; got 'linear'"):
        _adopt("median", linear)
    with pytest.raises(BadInput, match="a method that merges"):
        _adopt("frankenmerge", METHODS["frankenmerge"])


def test_a_function_without_a_file_has_no_hash(tmp_path: Path) -> None:
    assert source_digest(eval("lambda: 0", {"__name__": "nowhere"})) == ""
