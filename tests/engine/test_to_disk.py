"""A recipe on disk: a complete checkpoint, or nothing at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import BadInput, OutputError
from evomerge.recipe import parse_recipe
from evomerge.run.merge import merge_to_folder
from evomerge.system.memory import parse_size
from tests.engine.recipes import recipe_for, single
from tests.frame import files
from tests.models import write_tiny_llama

TIES = "ties"


def ties(family: dict[str, Path], **more: Any) -> Any:
    from evomerge.methods.registry import METHODS

    return parse_recipe(recipe_for(METHODS[TIES], family, **more))


def test_a_complete_checkpoint(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = merge_to_folder(ties(tiny_family), tmp_path / "out", progress=lambda done, of: seen.append((done, of)))
    assert out == tmp_path / "out"
    assert seen == [(k, 38) for k in range(1, 39)]
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json"}
    config, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, tiny_family["base"]))
    assert config["dtype"] == "float32"
    assert "_name_or_path" not in config
    assert {key: value for key, value in config.items() if key != "_name_or_path"} == theirs
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    words = "red river 7"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (out, tiny_family["base"])]
    assert tokenizers[0](words).input_ids == tokenizers[1](words).input_ids
    assert sorted(tmp_path.iterdir()) in ([out], [tmp_path / ".out.lock", out])


def test_shards_with_their_index(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    whole = merge_to_folder(ties(tiny_family), tmp_path / "whole")
    out = merge_to_folder(ties(tiny_family), tmp_path / "shards", max_shard_size="50KB")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    expected = load_file(whole / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors = load_file(out / shard)
        assert all(index["weight_map"][name] == shard for name in tensors)
        assert sum(t.nbytes for t in tensors.values()) <= 50_000
        found |= tensors
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_sharded_sources_are_the_same_sources(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    family = dict(tiny_family)
    model = AutoModelForCausalLM.from_pretrained(tiny_family["a"])
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    family["a"] = tmp_path / "a"
    one, two = merge_to_folder(ties(tiny_family), tmp_path / "one"), merge_to_folder(ties(family), tmp_path / "two")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_a_single_file_is_a_model(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """Weights alone: what can be merged is; what cannot be known is left out."""
    lone = shutil.copyfile(tiny_family["a"] / "model.safetensors", tmp_path / "lone.safetensors")
    out = merge_to_folder(parse_recipe(single(lone)), tmp_path / "out")
    stored, source = load_file(out / "model.safetensors"), load_file(lone)
    assert stored.keys() == source.keys()
    assert all(torch.equal(stored[name], source[name]) for name in source)
    assert not (out / "config.json").exists()
    mixed = {
        "merge_method": "task_arithmetic",
        "base_model": str(tiny_family["base"]),
        "models": [{"model": str(lone), "parameters": {"weight": 1.0}}],
    }
    whole = merge_to_folder(parse_recipe(mixed), tmp_path / "mixed")
    assert AutoModelForCausalLM.from_pretrained(whole).config.num_hidden_layers == 4


@pytest.mark.parametrize("word", ["bfloat16", "float16", "float32"])
def test_dtype_and_config_agree(tiny_family: dict[str, Path], tmp_path: Path, word: str) -> None:
    out = merge_to_folder(ties(tiny_family, out_dtype=word), tmp_path / "out")
    assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {f"torch.{word}"}
    assert json.loads((out / "config.json").read_text())["dtype"] == word
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == getattr(torch, word)


def test_card_and_generation_config(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    family = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in tiny_family.items()}
    generation = json.loads((family["base"] / "generation_config.json").read_text()) | {"temperature": 0.7}
    (family["base"] / "generation_config.json").write_text(json.dumps(generation))
    (family["base"] / "chat_template.jinja").write_text("{{ messages }}")
    out = merge_to_folder(ties(family), tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text()) == generation
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "merge_method: ties" in card
    (family["base"] / "generation_config.json").unlink()
    again = merge_to_folder(ties(family), tmp_path / "again")
    assert json.loads((again / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


@pytest.mark.parametrize("threads", [1, 4])
def test_the_same_bytes_every_time(tiny_family: dict[str, Path], tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outs = [merge_to_folder(ties(tiny_family), tmp_path / name) for name in "xy"]
    finally:
        torch.set_num_threads(before)
    assert dict(files(outs[0])) == dict(files(outs[1]))


def test_an_error_in_the_middle_leaves_what_was_there(
    tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(tiny_family["c"], tmp_path / "out"))
    before = dict(files(out))
    put = CheckpointWriter.put_part

    def failing(self: CheckpointWriter, name: str, start: int, values: torch.Tensor) -> None:
        if name.endswith("norm.weight"):
            raise KeyError("a bug")
        put(self, name, start, values)

    monkeypatch.setattr(CheckpointWriter, "put_part", failing)
    with pytest.raises(KeyError, match="a bug"):
        merge_to_folder(ties(tiny_family), out, overwrite=True)
    assert dict(files(out)) == before
    assert not list(tmp_path.glob(".out.partial*"))


@pytest.mark.parametrize("where", ["weights", "companions"])
def test_full_disk(tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The disk fills up while weights are written, or when they are and the small files follow."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(*args: object, **kwargs: object) -> None:
        raise full

    name = "evomerge.checkpoints.writer._write_at" if where == "weights" else "evomerge.engine.to_disk.write_companions"
    monkeypatch.setattr(name, failing)
    out = Path(shutil.copytree(tiny_family["c"], tmp_path / "out"))
    before = dict(files(out))
    for target, overwrite in ((out, True), (tmp_path / "new", False)):
        with pytest.raises(OutputError, match=r"the disk is full \(\d+ bytes needed, \d+ free\)") as caught:
            merge_to_folder(ties(tiny_family), target, overwrite=overwrite)
        assert caught.value.exit_code == 1
    assert dict(files(out)) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.lock", ".new.lock"}


def test_a_limit_of_file_sizes_is_no_full_disk(
    tiny_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr("evomerge.checkpoints.writer._write_at", failing)
    with pytest.raises(OutputError, match=r"a file of \d+ bytes is longer than .*ulimit -f.*--max-shard-size"):
        merge_to_folder(ties(tiny_family), tmp_path / "out")


@pytest.mark.parametrize("out", ["models/a", "models"])
def test_what_is_merged_is_not_overwritten(tiny_family: dict[str, Path], tmp_path: Path, out: str) -> None:
    """Neither a model's own folder nor one that holds it."""
    for name in ("base", "a", "b"):
        shutil.copytree(tiny_family[name], tmp_path / "models" / name)
    (tmp_path / "models" / "config.json").write_text("{}")
    family = {name: tmp_path / "models" / name for name in ("base", "a", "b")} | {"c": tiny_family["c"]}
    before = dict(files(tmp_path / "models" / "a"))
    with pytest.raises(OutputError, match=r"is not overwritten: .*which is merged, lies there"):
        merge_to_folder(ties(family), tmp_path / out, overwrite=True)
    assert dict(files(tmp_path / "models" / "a")) == before
    assert merge_to_folder(ties(family), tmp_path / "models" / "a" / "merged").is_dir()


@pytest.mark.parametrize("kind", ["a link to it", "a link to what holds it", "its files are links", "its tokenizer"])
def test_what_is_merged_is_not_overwritten_through_links(
    tiny_family: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    model, out = Path(shutil.copytree(tiny_family["a"], tmp_path / "models" / "a")), tmp_path / "out"
    (tmp_path / "models" / "config.json").write_text("{}")
    if kind == "a link to it":
        out.symlink_to(model)
    elif kind == "a link to what holds it":
        out.symlink_to(tmp_path / "models")
    else:
        store = Path(shutil.copytree(model, out))
        for path in store.iterdir():
            if ("tokenizer" in kind) == path.name.startswith("tokenizer"):
                (model / path.name).unlink()
                (model / path.name).symlink_to(path)
    before = dict(files(out))
    with pytest.raises(OutputError, match=r"is not overwritten: .*which is merged, lies there"):
        merge_to_folder(ties({**tiny_family, "a": model}), out, overwrite=True)
    assert dict(files(out)) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 160 kB, less than the tiny model; where none can be mounted, a limit on file sizes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (160_000, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_really_too_small(tiny_family: dict[str, Path], small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"the disk is full|ulimit -f"):
        merge_to_folder(ties(tiny_family), small_disk / "out")
    assert [path.name for path in small_disk.iterdir() if path.name != ".out.lock"] == []
    half = write_tiny_llama(small_disk / "fits", 1, layers=1, hidden=16)
    assert AutoModelForCausalLM.from_pretrained(half).config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 kB", 1500),
        ("2MiB", 2 * 2**20),
        ("800", 800),
        ("3g", 3 * 10**9),
        (7, 7),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text, "--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "0GB", "-1GB", "five", "5 PB", "1e3", "GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="is no size such as 500MB or 5GB"):
        parse_size(text, "--max-shard-size")
