"""Broken and hostile model folders: our error or a model, and never a look at a file outside the folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.layout import layout_of, residual_writers
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
NAMES = ["model.layers.0.mlp.up.weight", "model.layers.1.mlp.up.weight", "model.norm.weight", "model.steps"]

_opened: list[str] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Every file that Python opens meanwhile."""
    global _opened
    if not getattr(opened_files, "listens", False):
        sys.addaudithook(_listen)  # stays for the life of the process, and is silent outside of this block
        opened_files.listens = True  # type: ignore[attr-defined]
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder of two shards."""
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    tensors = {NAMES[0]: torch.ones(2, 3), NAMES[1]: torch.zeros(2, 3, dtype=torch.bfloat16)}
    tensors |= {NAMES[2]: torch.ones(3), NAMES[3]: torch.tensor(7)}
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    specs = [TensorSpec(name, tuple(t.shape), dtypes[t.dtype]) for name, t in tensors.items()]
    with CheckpointWriter(folder, specs, max_shard_bytes=40) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
        (writer.folder / "config.json").write_text('{"num_hidden_layers": 2}')
    assert sorted(path.name for path in folder.glob("*.safetensors")) == SHARDS
    return folder


def read_everything(folder: Path) -> bool:
    """Whether the folder is a model: all of it is looked at. Anything but our error goes through."""
    with opened_files() as seen:
        problems = _problems(folder)
    assert all(str(folder) in problem for problem in problems), "a message names the file"
    beside = [path for path in seen if path.startswith(f"{folder.parent}{os.sep}")]
    assert [path for path in beside if not path.startswith(f"{folder}{os.sep}")] == []
    return not problems


def _problems(folder: Path) -> tuple[str, ...]:
    try:
        model = open_checkpoint(str(folder))
        assert len(model.layout.names) == len(model.tensors)
        for name, info in model.tensors.items():
            tensor = model.tensor(name)
            assert tuple(tensor.shape) == info.shape
            assert tensor.numel() * tensor.element_size() == info.nbytes
        model.check_finite()
    except CheckpointError as error:
        return error.problems
    return ()


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write(path: Path, header: str, data: bytes) -> None:
    text = header.encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


Break = Callable[[Path], None]
shard = st.sampled_from(SHARDS)
any_file = st.sampled_from([*SHARDS, INDEX, "config.json"])
number = st.sampled_from([-1, 0, 1, 2, 3, 6, 12, 24, 2**31, 2**63, 2**64, 10**30]) | st.integers()
value = st.one_of(number, st.floats(), st.booleans(), st.none(), st.text(max_size=5), st.lists(number, max_size=3))
dtype = st.sampled_from(["F32", "BF16", "F16", "I64", "U8", "F64", "C64", "BOOL", "F4", "", "f32"])
paths = st.sampled_from(
    [
        *(
            "../outside.safetensors",
            "sub/../../outside.safetensors",
            "/etc/hostname",
            "..",
            ".",
            "",
            "~",
            "\0",
            "x" * 300,
        ),
        *(f"./{SHARDS[0]}", f"a/../{SHARDS[1]}", f"{SHARDS[1]}/", "..\\x", "C:\\x", SHARDS[0].upper()),
        *("config.json", INDEX),
    ]
)


@st.composite
def breaks(draw: st.DrawFn) -> Break:
    """One way to spoil a folder."""
    kind = draw(st.sampled_from(["cut", "flip", "entry", "length", "repeat", "map", "index", "config", "remove"]))
    name, at = draw(any_file), draw(st.integers(0, 400))
    if kind == "cut":
        return lambda folder: os.truncate(folder / name, min(at, (folder / name).stat().st_size))
    if kind == "flip":
        byte = draw(st.integers(0, 255))
        return lambda folder: _flip(folder / name, at, byte)
    if kind == "remove":
        return lambda folder: (folder / name).unlink()
    if kind == "length":
        size = draw(st.sampled_from([0, 1, 7, 8, 100_000_000, 100_000_001, 2**63, 2**64 - 1]))
        return lambda folder: _flip(folder / SHARDS[0], 0, *size.to_bytes(8, "little"))
    if kind == "map":
        tensor, target = draw(st.sampled_from([*NAMES, "new"])), draw(paths | shard | value)
        return lambda folder: _edit_index(folder, {tensor: target})
    if kind in ("index", "config"):
        text = draw(st.sampled_from(["", "{", "null", "[]", '{"weight_map": 3}', '"a"', "[" * 9999, "\udc80", "1e999"]))
        file = INDEX if kind == "index" else "config.json"
        return lambda folder: _overwrite(folder / file, text.encode("utf-8", "surrogatepass")) and None
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    new = draw(
        {"dtype": dtype | value, "shape": value, "data_offsets": st.lists(number, min_size=2, max_size=2)}[field]
    )
    which = draw(st.integers(0, 1))
    return lambda folder: _edit_header(folder / SHARDS[which], field, new, repeat=kind == "repeat")


def _flip(path: Path, at: int, *values: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(values)] = bytes(values)
    _overwrite(path, bytes(raw))


def _overwrite(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)


def _edit_index(folder: Path, changes: dict[str, Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def _edit_header(path: Path, field: str, new: Any, *, repeat: bool) -> None:
    header, data = _header(path)
    tensor = max(set(header) - {"__metadata__"})
    entry = json.dumps(header[tensor] | {field: new})
    text = json.dumps(header)
    if repeat:  # the same tensor a second time
        text = f"{text[:-1]}, {json.dumps(tensor)}: {entry}}}"
    else:
        text = text.replace(json.dumps(header[tensor]), entry)
    _write(path, text, data)


def spoiled(good: Path, spoil: list[Break]) -> bool:
    """Whether a copy of the folder, spoiled in these ways, is still a model."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        shutil.copytree(good, folder)
        shutil.copyfile(good / SHARDS[0], Path(root) / "outside.safetensors")
        for one in spoil:
            try:
                one(folder)
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                return False  # an earlier one left nothing to spoil
        return read_everything(folder)


def test_the_sound_one_is_read(good: Path) -> None:
    assert spoiled(good, [])


@settings(max_examples=100)
@given(spoil=st.lists(breaks(), min_size=1, max_size=2))
def test_spoiled_folders(good: Path, spoil: list[Break]) -> None:
    spoiled(good, spoil)


def leads_elsewhere(target: str) -> bool:
    """Whether it is none of the shards, however spelt."""
    return os.path.normpath(target or "nothing") not in SHARDS


@settings(max_examples=40)
@given(changes=st.dictionaries(st.sampled_from([*NAMES, "x"]), paths.filter(leads_elsewhere) | value, min_size=1))
@example(changes={NAMES[0]: "../outside.safetensors"})
def test_a_weight_map_with_a_wrong_entry_is_never_a_model(good: Path, changes: dict[str, Any]) -> None:
    assert not spoiled(good, [lambda folder: _edit_index(folder, changes)])


@pytest.mark.parametrize("file", [SHARDS[0], INDEX, "config.json"])
def test_links_that_lead_nowhere_and_pipes(good: Path, tmp_path: Path, file: str) -> None:
    """A loop, a dangling link, a folder and a pipe in the place of a file: nothing waits, nothing is followed."""
    kinds: dict[str, Callable[[Path], None]] = {
        "loop": lambda path: path.symlink_to(path),
        "dangling": lambda path: path.symlink_to(path.parent / "nothing"),
        "folder": Path.mkdir,
        "pipe": lambda path: os.mkfifo(path),
    }
    for kind, make in kinds.items():
        folder = tmp_path / kind
        shutil.copytree(good, folder)
        (folder / file).unlink()
        make(folder / file)
        assert not read_everything(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_pipe_is_no_model(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"model{suffix}")
    with pytest.raises(CheckpointError, match=r"model"):
        open_checkpoint(str(tmp_path / f"model{suffix}"), allow_pickle=True)


def test_a_link_to_a_file_that_is_no_model_tells_nothing_of_it(good: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret that nobody should read in a message")
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to(secret)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert "secret" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
config_keys = st.sampled_from(
    [
        *("num_hidden_layers", "vocab_size", "text_config", "vision_config", "tie_word_embeddings", "architectures"),
        *("is_encoder_decoder", "n_layer", "encoder", "decoder", "encoder_layers", "quantization_config"),
    ]
)
parts = st.sampled_from(["model", "layers", "0", "1", "00", "-1", "9" * 30, "weight", "lm_head", "", "embed", "norm"])


@given(
    names=st.lists(st.lists(parts, min_size=1, max_size=6).map(".".join), max_size=8, unique=True),
    shape=st.lists(st.sampled_from([0, 1, 5]), max_size=3),
    config=st.dictionaries(config_keys, json_values, max_size=4),
)
@example(names=["0.model", ".0.model"], shape=[0, 0], config={})
def test_any_names_and_any_config_have_a_layout(names: list[str], shape: list[int], config: dict[str, Any]) -> None:
    tensors = {name: TensorSpec(name, tuple(shape), "F32") for name in names}
    layout = layout_of(tensors, config)
    for name in names:
        place = layout.locate(name)
        if place.stack is not None and place.layer is not None:
            assert layout.name(place.stack, place.layer, place.suffix) == name
    for stack in layout.stacks:
        assert stack.length <= 2 * len(names)
        residual_writers(layout, tensors, 0, stack=stack.prefix)


@settings(max_examples=40)
@given(raw=st.binary(max_size=60) | st.binary(max_size=40).map(lambda tail: b"PK\x03\x04" + tail))
@example(raw=b"\x80\x02cos\nsystem\n(S'true'\ntR.")
def test_bytes_that_are_no_pickle(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "model.bin"
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match="pickle"):
            open_checkpoint(str(path))
        with pytest.raises(CheckpointError):
            open_checkpoint(str(path), allow_pickle=True)
