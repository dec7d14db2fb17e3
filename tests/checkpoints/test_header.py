"""The header reader: what the format allows is read, everything else is our error and names file and tensor."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from evomerge.checkpoints.dtypes import DTYPE_BYTES
from evomerge.checkpoints.header import read_header, shape_text
from evomerge.errors import CheckpointError
from tests.checkpoints.raw import entry, raw_file

VALID = save({"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {
        "matrix": torch.zeros(2, 3),
        "half": torch.zeros(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "nothing": torch.zeros(0, 7),
        "flags": torch.zeros(3, dtype=torch.bool),
        "small": torch.zeros(3, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert list(header.tensors) == sorted(tensors)
    assert header.metadata == {"format": "pt"}
    assert {name: info.shape for name, info in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert header.tensors["half"].dtype == "BF16"
    assert header.tensors["small"].dtype == "F8_E4M3"
    assert (header.tensors["scalar"].numel, header.tensors["nothing"].numel) == (1, 0)
    assert sum(info.nbytes for info in header.tensors.values()) == 24 + 10 + 4 + 0 + 3 + 3
    assert max(info.end for info in header.tensors.values()) == path.stat().st_size


def test_offsets_are_absolute(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "m.safetensors", {"a": entry("U8", [2], 0, 2), "b": entry("U8", [1], 2, 3)}, b"xyz")
    b = read_header(path).tensors["b"]
    assert path.read_bytes()[b.start : b.end] == b"z"


def test_a_file_without_tensors_is_valid(tmp_path: Path) -> None:
    assert read_header(raw_file(tmp_path / "m.safetensors", {})).tensors == {}


BAD: list[tuple[str, Any, bytes, str]] = [
    (
        "data ends early",
        {"a": entry("F32", [4], 0, 16)},
        b"\0" * 15,
        r"is truncated: header says \d+ bytes, file has \d+",
    ),
    ("data goes on", {"a": entry("U8", [1], 0, 1)}, b"\0\0", "1 bytes after its last tensor"),
    (
        "overlap",
        {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)},
        b"\0" * 6,
        "tensor 'b' overlaps 'a' by 2 bytes",
    ),
    (
        "gap",
        {"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)},
        b"\0" * 3,
        "1 unused bytes between 'a' and 'b'",
    ),
    ("gap at the start", {"a": entry("U8", [1], 1, 2)}, b"\0" * 2, "1 unused bytes between the header and 'a'"),
    ("wrong size", {"a": entry("F32", [3], 0, 8)}, b"\0" * 8, "'a': F32 3 takes 12 bytes, .* give 8"),
    ("backwards", {"a": entry("U8", [1], 1, 0)}, b"", "'a': U8 1 takes 1 bytes"),
    ("unknown dtype", {"a": entry("F31", [1], 0, 4)}, b"\0" * 4, "'a': unknown dtype 'F31'"),
    ("dtype no text", {"a": entry(7, [1], 0, 4)}, b"\0" * 4, "'a': unknown dtype 7"),  # type: ignore[arg-type]
    ("negative size", {"a": entry("U8", [-1], 0, 0)}, b"", "'a': shape must be"),
    ("size no number", {"a": entry("U8", [True], 0, 1)}, b"\0", "'a': shape must be"),
    ("huge shape", {"a": entry("U8", [2**62, 4, 0], 0, 0)}, b"", "'a': shape .* is absurdly large"),
    ("negative offset", {"a": entry("U8", [1], -1, 0)}, b"", "'a': data_offsets must be"),
    ("missing field", {"a": {"dtype": "U8", "shape": [1]}}, b"\0", "'a': an entry has exactly"),
    ("entry no object", {"a": [1]}, b"", "'a': an entry has exactly"),
    ("metadata no text", {"__metadata__": {"format": 1}}, b"", "__metadata__ must map"),
    ("duplicate tensor", b'{"a":' + b"{}" + b',"a":{}}', b"", "'a' occurs twice"),
    ("duplicate field", b'{"a":{"dtype":"U8","dtype":"U8"}}', b"", "'dtype' occurs twice"),
    ("no JSON", b"{a}", b"", "corrupt header"),
    ("no object", b"[]", b"", "not a JSON object"),
    ("NaN", b'{"a": NaN}', b"", "NaN is not JSON"),
    ("no UTF-8", b'{"\xff": 1}', b"", "corrupt header"),
    ("deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"", "nested too deeply"),
    ("unprintable name", {"a\n": entry("U8", [1], 0, 1)}, b"\0", "not printable"),
    ("half a character", b'{"\\ud800": {}}', b"", "not printable"),
]


@pytest.mark.parametrize(("header", "data", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_refuses(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert all(str(path) in problem for problem in caught.value.problems)


def test_truncated_inside_the_header(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(VALID[:40])
    length = int.from_bytes(VALID[:8], "little")
    with pytest.raises(CheckpointError, match=f"is truncated: header says {8 + length} bytes, file has 40"):
        read_header(path)


def test_absurd_header_length(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header would be 1152921504606846976 bytes long"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_shorter_than_a_length(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is truncated"):
        read_header(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "t.safetensors", {name: entry("F31", [1], 0, 1) for name in "abcdefg"}, b"\0")
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert len(caught.value.problems) == 6
    assert "'e'" in caught.value.problems[4]
    assert "and 2 more" in caught.value.problems[5]


def _only_our_error(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.safetensors"
        path.write_bytes(raw)
        try:
            header = read_header(path)
        except CheckpointError:
            return
        # What is accepted covers the file exactly once.
        infos = sorted(header.tensors.values(), key=lambda info: (info.start, info.end))
        position = 8 + int.from_bytes(raw[:8], "little")
        for info in infos:
            assert info.start == position
            assert info.end - info.start == info.nbytes
            position = info.end
        assert position == len(raw)


@given(st.binary(max_size=200))
def test_random_bytes(raw: bytes) -> None:
    _only_our_error(raw)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutated_bytes(changes: list[tuple[int, int]]) -> None:
    raw = bytearray(VALID)
    for position, value in changes:
        raw[position] = value
    _only_our_error(bytes(raw))


@given(st.integers(0, len(VALID)))
def test_truncated_anywhere(length: int) -> None:
    _only_our_error(VALID[:length])


_scalar = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(list(DTYPE_BYTES))
)
_json = st.recursive(
    _scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
)
_sizes = st.lists(st.integers(-1, 2**64) | st.integers(0, 5), max_size=4)
_entry = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPE_BYTES, "F4"]), "shape": _sizes, "data_offsets": _sizes | st.just([0, 4])}
)


@given(
    st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), _entry | _json, max_size=4), st.binary(max_size=16)
)
def test_random_headers(header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    _only_our_error(len(text).to_bytes(8, "little") + text + data)


def test_shape_text() -> None:
    assert shape_text((2, 3)) == "2x3"
    assert shape_text(()) == "scalar"


def test_works_without_torch() -> None:
    modules = ("dtypes", "header", "weight_files", "layout", "fingerprint", "reference", "writer")
    code = f"import sys\nfor m in {modules}: __import__('evomerge.checkpoints.' + m)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
