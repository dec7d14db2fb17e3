"""The small files of a run: any change is noticed and named; an accepted one is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.system.sealed import (
    Damaged,
    accept_json,
    accept_lines,
    read_sealed_json,
    read_sealed_lines,
    seal_json,
    seal_lines,
)

CONTENT = {"deaths": 3, "value": 0.1, "list": [1, {"a": None}], 7: "number"}


def _deaths(content: dict[str, Any]) -> int:
    return int(content["deaths"])


def test_what_was_sealed_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(seal_json(CONTENT))
    (tmp_path / "a.yaml").write_text(seal_lines("x: 1\ny: 2"))
    assert read_sealed_json(tmp_path / "a.json", _deaths, "") == 3
    assert read_sealed_lines(tmp_path / "a.yaml", "") == "x: 1\ny: 2\n"


@given(st.data())
def test_no_flipped_bit_changes_what_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("sealed", numbered=True)
    for name, text in (("a.json", seal_json(CONTENT)), ("a.yaml", seal_lines("x: 1\ny: 2"))):
        raw = bytearray(text.encode())
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(raw)
    try:
        assert read_sealed_json(folder / "a.json", dict, "advice") == json.loads(json.dumps(CONTENT))
    except Damaged as error:  # a space that has become another changes nothing
        assert re.search(r"a\.json.*advice", str(error), re.S)  # noqa: PT017
    with pytest.raises(Damaged, match=r"a\.yaml"):
        read_sealed_lines(folder / "a.yaml", "advice")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"deaths": "x"}', '{"deaths": 3}', "\udcff"])
def test_damage_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, errors="surrogateescape")
    with pytest.raises(Damaged, match=r"a\.json.*do this"):
        read_sealed_json(tmp_path / "a.json", _deaths, "do this")


def test_an_edit_is_told_from_damage_and_can_be_accepted(tmp_path: Path) -> None:
    file, lines = tmp_path / "a.json", tmp_path / "a.yaml"
    file.write_text(seal_json(CONTENT).replace('"deaths": 3', '"deaths": 4'))
    lines.write_text(seal_lines("x: 1").replace("1", "2", 1))
    for read in (lambda: read_sealed_json(file, _deaths, ""), lambda: read_sealed_lines(lines, "")):
        with pytest.raises(Damaged, match="--accept-edited") as raised:
            read()
        assert raised.value.edited
    accept_json(file)
    accept_lines(lines)
    assert read_sealed_json(file, _deaths, "") == 4
    assert read_sealed_lines(lines, "") == "x: 2\n"
