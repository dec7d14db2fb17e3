"""Files that work rests on: changed in place, put back, replaced under their name, cut short."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.system.inputs import ChangedInput, Inputs
from tests.frame import environment

SIZES = [10, 4096, 3 << 20]


def make(path: Path, size: int) -> bytes:
    content = os.urandom(size)
    path.write_bytes(content)
    return content


def watched(*paths: Path) -> Inputs:
    """Watched as models are: with the content of the whole, computed by somebody else."""
    return Inputs(
        paths, {str(path): (path.read_bytes().hex(), lambda path=path: path.read_bytes().hex()) for path in paths}
    )


def write_in_place(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("put_back", [False, True])
def test_a_byte_changed_in_place_is_noticed(tmp_path: Path, size: int, put_back: bool) -> None:
    """At a position that is not sampled, too, and with the time of modification put back."""
    path, other = tmp_path / "a.bin", tmp_path / "b.bin"
    content = make(path, size)
    make(other, size)
    inputs = watched(path, other)
    inputs.renew()
    status = path.stat()
    position = size // 2 + size // 7
    write_in_place(path, position, bytes([content[position] ^ 1]))
    if put_back:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ChangedInput, match=r"a\.bin: has changed while it was in use.*goes on") as raised:
        inputs.renew()
    assert len(raised.value.problems) == 1
    write_in_place(path, position, content[position : position + 1])
    inputs.renew()  # the content is as it was
    inputs.verify()


def test_a_change_behind_the_signature_is_noticed_in_the_samples_or_at_the_end(tmp_path: Path) -> None:
    """As over a network whose attributes come late: what the content says is all there is."""
    path = tmp_path / "a.bin"
    content = make(path, 3 << 20)
    now = ["before"]
    inputs = Inputs([path], {"model": ("before", lambda: now[0])})
    now[0] = "after"
    inputs.renew(sampled=True)
    with pytest.raises(ChangedInput, match=r"model: has changed.*in doubt"):
        inputs.verify()
    assert path.read_bytes() == content


def test_a_file_replaced_under_its_name_or_removed_is_still_there(tmp_path: Path) -> None:
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in paths:
        make(path, 5000)
    inputs = Inputs(paths)
    make(tmp_path / "new", 5000)
    (tmp_path / "new").replace(paths[0])
    paths[1].unlink()
    inputs.renew(sampled=True)


def test_a_file_that_is_missing_or_a_link_or_a_folder(tmp_path: Path) -> None:
    make(tmp_path / "a.bin", 10)
    (tmp_path / "link").symlink_to(tmp_path / "a.bin")
    inputs = Inputs([tmp_path / "missing", tmp_path, tmp_path / "link"])
    inputs.renew(sampled=True)
    write_in_place(tmp_path / "a.bin", 0, b"x" * 10)
    with pytest.raises(ChangedInput, match="link: has changed"):
        inputs.renew()


def test_a_file_cut_short_under_its_map_is_told(tmp_path: Path) -> None:
    """In a process of its own, which would die of the bus error."""
    path = tmp_path / "cut.bin"
    make(path, 8 * mmap.PAGESIZE)
    code = f"""
import mmap, os, threading
from pathlib import Path
from evomerge.system.inputs import watch_map
path = Path({str(path)!r})
with path.open("r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
watch_map(path, path.stat().st_size)
os.truncate(path, mmap.PAGESIZE)
reader = threading.Thread(target=lambda: mapped[-1])
reader.start()
reader.join()
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"error: {path}: was truncated while it was in use: it had {8 * mmap.PAGESIZE} bytes" in done.stderr
