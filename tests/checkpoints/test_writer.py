"""The writer: what it writes others read; what fails, or is killed, leaves what was there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import writer
from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.dtypes import dtype_name
from evomerge.checkpoints.header import TensorSpec, read_header
from evomerge.checkpoints.writer import CheckpointWriter, plan_shards
from evomerge.errors import OutputError

TENSORS = {
    "a": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "b": torch.arange(5, dtype=torch.float32),
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "wide": torch.arange(3, dtype=torch.float64),
}


def _specs(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()]


def _write(out: Path, tensors: dict[str, torch.Tensor] = TENSORS, **options: object) -> None:
    with CheckpointWriter(out, _specs(tensors), **options) as writer:  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            writer.put(name, tensor)
        (writer.folder / "config.json").write_text("{}")


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _equal(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)


def test_one_file(tmp_path: Path) -> None:
    _write(tmp_path / "out")
    assert sorted(_content(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    _equal(tmp_path / "out", TENSORS)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for info in read_header(tmp_path / "out" / "model.safetensors").tensors.values():
        assert info.start % TENSORS[info.name].element_size() == 0


def test_shards(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((10,), float(i)) for i in range(7)} | {"big": torch.ones(100)}
    _write(tmp_path / "out", tensors, max_shard_bytes=100)
    files = sorted(path.name for path in (tmp_path / "out").glob("model-*"))
    # 40 bytes each, two to a file: 2 + 2 + 2 + 1, and the big one alone.
    assert files == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    _equal(tmp_path / "out", tensors)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 7 * 40 + 400}
    assert index["weight_map"]["big"] == files[-1]
    assert all(torch.equal(open_checkpoint(str(tmp_path / "out")).tensor(name), t) for name, t in tensors.items())


def test_plan_shards() -> None:
    sizes = {"a": 60, "b": 60, "c": 30, "d": 200, "e": 10}
    specs = [TensorSpec(name, (size,), "U8") for name, size in sizes.items()]
    grouped = [[info.name for info in shard.tensors] for shard in plan_shards(specs, 100)]
    assert grouped == [["a"], ["b", "c"], ["d"], ["e"]]
    assert [shard.file for shard in plan_shards([], 100)] == ["model.safetensors"]


def test_nothing_to_write(tmp_path: Path) -> None:
    _write(tmp_path / "out", {})
    assert load_file(tmp_path / "out" / "model.safetensors") == {}


def test_several_threads_in_any_order(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(1000 + i, generator=generator) for i in range(60)}
    with (
        CheckpointWriter(tmp_path / "out", _specs(tensors), max_shard_bytes=50_000) as writer,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda name: writer.put(name, tensors[name]), reversed(list(tensors))))
    _equal(tmp_path / "out", tensors)


def test_views_and_gradients_are_written_as_they_look(tmp_path: Path) -> None:
    values = torch.arange(12.0, requires_grad=True).view(3, 4).T
    with CheckpointWriter(tmp_path / "out", _specs({"t": values})) as writer:
        writer.put("t", values)
    _equal(tmp_path / "out", {"t": values.detach()})


def _use_wrongly(out: Path) -> None:
    with CheckpointWriter(out, _specs({"a": torch.ones(2), "b": torch.ones(1)})) as writer:
        with pytest.raises(ValueError, match="'c' was not announced"):
            writer.put("c", torch.ones(2))
        with pytest.raises(ValueError, match="'a' is F32 3, announced was F32 2"):
            writer.put("a", torch.ones(3))
        with pytest.raises(ValueError, match="'a' is BF16 2, announced was F32 2"):
            writer.put("a", torch.ones(2, dtype=torch.bfloat16))
        writer.put("a", torch.ones(2))
        with pytest.raises(ValueError, match="'a' was written before"):
            writer.put("a", torch.ones(2))


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two tensors have the same name"):
        CheckpointWriter(tmp_path / "out", [TensorSpec("a", (1,), "F32")] * 2)
    with pytest.raises(OutputError, match="b were never written"):
        _use_wrongly(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_taken_folders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _write(out)  # empty: fine
    with pytest.raises(OutputError, match="is not empty: choose another folder, or allow overwriting"):
        _write(out)
    own = ["notes.txt", "link", ".git/HEAD", "data/more/items.jsonl", "lora.bin"]
    for name in own:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine") if name != "link" else (out / name).symlink_to("../nowhere")
    for name in ("tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md"):
        (out / name).write_text("old")
    _write(out, {"new": torch.ones(2)}, overwrite=True)
    left = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    assert left == sorted(["config.json", "model.safetensors", *own])
    assert (out / ".git/HEAD").read_text() == "mine"
    assert os.readlink(out / "link") == "../nowhere"  # noqa: PTH115
    _equal(out, {"new": torch.ones(2)})
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        _write(tmp_path / "file", overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(OutputError, match=r"it holds cat.jpg and no checkpoint"):
        _write(tmp_path / "photos", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "photos"]


def test_makes_the_folders_above(tmp_path: Path) -> None:
    _write(tmp_path / "x" / "y" / "out")
    _equal(tmp_path / "x" / "y" / "out", TENSORS)


def test_a_link_is_followed_and_kept(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    _write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    _equal(tmp_path / "real", TENSORS)


def _fail_in_the_middle(out: Path, error: BaseException) -> None:
    with CheckpointWriter(out, _specs(TENSORS), overwrite=True) as writer:
        writer.put("a", TENSORS["a"])
        raise error


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), OSError(errno.EACCES, "not mine")])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out"
    _write(out)
    before = _content(out)
    with pytest.raises(type(error)) as caught:
        _fail_in_the_middle(out, error)
    assert caught.value is error
    assert _content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_reading_the_model_that_is_replaced(tmp_path: Path) -> None:
    """A merge may overwrite one of its sources: the map keeps the old file."""
    _write(tmp_path / "out")
    source = open_checkpoint(str(tmp_path / "out"))
    old = source.tensor("b")
    _write(tmp_path / "out", {"b": torch.zeros(5)}, overwrite=True)
    assert torch.equal(old, TENSORS["b"])


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", _specs(TENSORS)) as writer:
        with pytest.raises(OutputError, match="is in use by process"):
            _write(tmp_path / "out")
        assert writer.folder.is_dir()  # the loser has not cleared it away
        _write(tmp_path / "other")
        for name, tensor in TENSORS.items():
            writer.put(name, tensor)
    _equal(tmp_path / "out", TENSORS)
    _equal(tmp_path / "other", TENSORS)


def test_a_disk_that_is_too_small_is_found_first(tmp_path: Path) -> None:
    spec = TensorSpec("huge", (1 << 60,), "U8")
    with pytest.raises(OutputError, match=r"the disk is full \(1152921504606847\d+ bytes needed, \d+ free\)"):
        CheckpointWriter(tmp_path / "out", [spec]).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    _write(out)
    before = _content(out)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="the disk is full"):
        _write(out, overwrite=True)
    assert _content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    _write(tmp_path / "out")
    _equal(tmp_path / "out", TENSORS)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real = getattr(os, call)
    calls: list[int] = []

    def filling(*arguments: int) -> int:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(real(*arguments) or 0)

    out = tmp_path / "out"
    _write(out)
    before = _content(out)
    monkeypatch.setattr(os, call, filling)
    with pytest.raises(OutputError, match=r"the disk is full \(\d+ bytes needed, \d+ free\)"):
        _write(out, {f"t{i}": torch.ones(3) for i in range(9)}, overwrite=True, max_shard_bytes=12)
    monkeypatch.undo()
    assert _content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_met_beside_the_weights(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full"), CheckpointWriter(tmp_path / "out", []):
        raise OSError(errno.ENOSPC, "No space left on device", "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One megabyte: a file system of that size for those who may mount one, else a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and sys.platform == "linux"
    mounted = (
        mounted and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False).returncode
    )
    yield disk
    if mounted:
        subprocess.run(["umount", "-l", disk], check=True)


_FILL = """
import resource, sys, torch
from pathlib import Path
from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
out = Path(sys.argv[1])
before = {path.name: path.read_bytes() for path in out.iterdir()}
for size, companion in ((3_000_000, 0), (300_000, 1_500_000)):  # the weights do not fit; the tokenizer does not
    try:
        with CheckpointWriter(out, [TensorSpec("w", (size,), "U8")], overwrite=True) as writer:
            writer.put("w", torch.ones(size, dtype=torch.uint8))
            (writer.folder / "tokenizer.json").write_bytes(b"x" * companion)
    except OutputError as error:
        print(error)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]
"""


def test_a_really_full_disk(small_disk: Path) -> None:
    """What was there stays whole, and nothing is left beside it."""
    _write(small_disk / "out")
    command = [sys.executable, "-c", _FILL, str(small_disk / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the disk is full (") == 2


_HANG = """
import sys, time, torch
from pathlib import Path
from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.writer import CheckpointWriter
with CheckpointWriter(Path(sys.argv[1]), [TensorSpec("w", (9,), "U8")] * 1, overwrite=True) as writer:
    writer.put("w", torch.ones(9, dtype=torch.uint8))
    print("ready", flush=True)
    time.sleep(60)
"""


def test_killed_in_the_middle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _write(out)
    before = _content(out)
    process = subprocess.Popen([sys.executable, "-c", _HANG, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(OutputError, match="is in use by process"):
        _write(out, overwrite=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert _content(out) == before
    assert (tmp_path / f".out.partial-{process.pid}").is_dir()
    _write(out, {"new": torch.ones(1)}, overwrite=True)
    _equal(out, {"new": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


_KILLED_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
import torch
from evomerge.checkpoints import writer
from evomerge.checkpoints.header import TensorSpec

os.fsync = lambda descriptor: None  # a killed process loses nothing that is written; waiting for the disk takes long
out = Path(sys.argv[1])

def write(value, at=None):
    left = at
    def event(*_):
        nonlocal left
        if left is not None:
            left -= 1
            if left < 0:
                left = None  # killing is an event, too
                os.kill(os.getpid(), signal.SIGKILL)
    if at is not None:
        sys.addaudithook(lambda name, _: event() if name.partition(".")[0] in ("open", "os", "shutil") else None)
        for call in ("pwrite", "fsync", "posix_fallocate", "close"):  # what Python does not announce
            plain = getattr(os, call)
            setattr(os, call, lambda *a, plain=plain: (event(), plain(*a))[1])
    specs = [TensorSpec(name, (4,), "F32") for name in "abc"]
    with writer.CheckpointWriter(out, specs, max_shard_bytes=20, overwrite=True) as checkpoint:
        for name in "abc":
            checkpoint.put(name, torch.full((4,), value))
        (checkpoint.folder / "config.json").write_text(str(value))

def content():
    return {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else None

write(1.0)
old = content()
write(2.0)
new = content()
for before, exchange in ((old, True), (None, True), (old, False), (None, False)):
    if not exchange:
        writer._exchange = lambda left, right: False
    at, states = 0, []
    while True:
        if before is None:
            __import__("shutil").rmtree(out, ignore_errors=True)
        else:
            write(1.0)
        child = os.fork()
        if child == 0:
            write(2.0, at)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        found = content()
        states.append("old" if found == before else "new" if found == new else "none" if found is None else "half")
        write(3.0)  # whoever comes next finds nothing in the way, and leaves nothing
        assert [path.name for path in out.parent.iterdir()] == [out.name], sorted(out.parent.iterdir())
        if status == 0:
            break
        assert os.WIFSIGNALED(status), status
        at += 1
    print(*dict.fromkeys(states), at, sep=",")
"""


@pytest.mark.slow
def test_killed_at_any_point(tmp_path: Path) -> None:
    """At every call that touches the disk, with and without an older checkpoint: the old one whole, or the new one."""
    command = [sys.executable, "-c", _KILLED_EVERYWHERE, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    states = [line.split(",") for line in done.stdout.splitlines()]
    # By one exchange of names, over an older checkpoint and over nothing; then by two renames.
    assert [line[:-1] for line in states] == [["old", "new"], ["old", "new"], ["old", "none", "new"], ["old", "new"]]
    assert min(int(line[-1]) for line in states) > 25


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """The old checkpoint is back before the next writer looks at what is there."""
    out = tmp_path / "out"
    _write(out)
    out.rename(tmp_path / ".out.previous-123")
    with pytest.raises(OutputError, match="is not empty"):
        _write(out)
    _equal(out, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_looks_alike_is_not_cleared(tmp_path: Path) -> None:
    for name in (".out.partial-1.partial-2", ".out.partial-x", ".outer.partial-3"):
        (tmp_path / name).mkdir()
    _write(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_rename_that_fails_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    _write(out)
    before = _content(out)
    real = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr(writer, "_exchange", lambda left, right: False)
    with pytest.raises(OutputError, match=r"out cannot be written: Input/output error"):
        _write(out, overwrite=True)
    monkeypatch.undo()
    assert _content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_are_readable_by_others_as_usual(tmp_path: Path) -> None:
    _write(tmp_path / "out")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_transformers_loads_it(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(str(tiny_family["base"]))
    with CheckpointWriter(tmp_path / "out", source.tensors.values(), max_shard_bytes=40_000) as writer:
        for name in source.tensors:
            writer.put(name, source.tensor(name))
        (writer.folder / "config.json").write_bytes((tiny_family["base"] / "config.json").read_bytes())
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert open_checkpoint(str(tmp_path / "out")).fingerprint == source.fingerprint


def test_bounded_memory(tmp_path: Path) -> None:
    """Half a gigabyte of weights is written by a process that never holds more than one tensor of it."""
    code = """
import resource, sys, torch
from pathlib import Path
from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.writer import CheckpointWriter
specs = [TensorSpec(f"w{i}", (4_000_000,), "F32") for i in range(16)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with CheckpointWriter(Path(sys.argv[1]), specs) as writer:
    for spec in specs:
        writer.put(spec.name, torch.ones(spec.shape))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 64_000  # kilobytes: four tensors of 16 MB, of 256 MB in all


def test_nothing_waits_for_ever(tmp_path: Path) -> None:
    started = time.monotonic()
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with CheckpointWriter(tmp_path / "out", []), pytest.raises(OutputError):
        _write(tmp_path / "out")
    assert time.monotonic() - started < 5
