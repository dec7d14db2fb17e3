"""YAML of strangers: limits of size, depth and aliases; no error but ours; no file that is none."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from evomerge.errors import SpecError
from evomerge.system.files import read_text
from evomerge.system.yaml import read_yaml

BOMB = "a: &b0 [x,x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"a{i}: &b{i} [{','.join([f'*b{i - 1}'] * 10)}]" for i in range(1, 10)
)
MERGES = "a: &b0 {x: 1}\n" + "\n".join(f"a{i}: &b{i} {{<<: [{','.join([f'*b{i - 1}'] * 10)}]}}" for i in range(1, 10))
CHAIN = "a: &b0 [x]\n" + "\n".join(f"a{i}: &b{i} [*b{i - 1}]" for i in range(1, 2000))
WRONG = [
    *(BOMB, MERGES, CHAIN, "a: &x [*x]", "a: &x {b: *x}", "[" * 3000, "{a: " * 3000, "- " * 5000),
    *("a: !!int ''", "a: !!bool x", "a: !!timestamp x", "a: !!float x", "a: !!binary é", "a: 2024-02-30"),
    *("a: " + "9" * 5000, "a: !!python/object/apply:os.system [x]", "a: \x1b", "a: \ud800", "? [a]\n: b"),
]


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_refused_at_once_by_name(text: str) -> None:
    started = time.process_time()
    with pytest.raises(SpecError, match=r"^some\.yaml"):
        read_yaml(text, "some.yaml", SpecError)
    assert time.process_time() - started < 2


def test_an_alias_as_people_use_it_is_fine() -> None:
    assert read_yaml("a: &x {b: [1, 2]}\nc: *x\nd: {<<: *x, e: 1}", "f", SpecError)["d"] == {"b": [1, 2], "e": 1}


def test_what_is_no_text_file_is_refused_by_name(tmp_path: Path) -> None:
    for name, content in (("latin", b"ok\ncaf\xe9"), ("zeros", b"\xff" * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SpecError, match=f"{name}, line .*not a text file"):
            read_text(tmp_path / name, SpecError)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "missing"):
        with pytest.raises(SpecError, match="cannot be read"):
            read_text(path, SpecError)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(SpecError, match="larger than"):
        read_text(tmp_path / "large", SpecError, limit=10)
