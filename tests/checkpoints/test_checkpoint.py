"""Opening checkpoints: what is found where, that reading copies nothing, and every refusal."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.checkpoints.config_values import transformers_config
from evomerge.errors import CheckpointError
from tests.checkpoints.raw import entry, raw_file
from tests.models import write_tiny_llama

REAL = Path(__file__).resolve().parent.parent.parent / "models"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("sharded") / "m", max_shard_size="40KB", dtype=torch.bfloat16)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture
def broken(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded model to break."""
    copy = tmp_path / "broken"
    copy.mkdir()
    for path in sharded.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def _index(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def _edit_index(folder: Path, changes: dict[str, str | None]) -> None:
    content = json.loads(_index(folder).read_text())
    for name, file in changes.items():
        if file is None:
            del content["weight_map"][name]
        else:
            content["weight_map"][name] = file
    _index(folder).write_text(json.dumps(content))


def test_a_folder(tiny_family: dict[str, Path]) -> None:
    model = open_checkpoint(str(tiny_family["base"]))
    expected = load_file(tiny_family["base"] / "model.safetensors")
    assert list(model.tensors) == sorted(expected)
    assert all(torch.equal(model.tensor(name), tensor) for name, tensor in expected.items())
    assert model.folder == tiny_family["base"]
    assert model.config["model_type"] == "llama"
    assert (model.layout.layer_count, model.layout.tied_head) == (4, True)
    assert model.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert model.generation_config["bos_token_id"] == 0
    assert {path.name for path in model.tokenizer_files} >= {"tokenizer.json", "tokenizer_config.json"}
    assert repr(model) == f"Checkpoint({str(tiny_family['base'])!r})"


def test_shards(sharded: Path) -> None:
    model = open_checkpoint(str(sharded))
    assert len(model.files) > 1
    for path in model.files:
        for name, tensor in load_file(path).items():
            assert model.tensor(name).dtype == torch.bfloat16
            assert torch.equal(model.tensor(name), tensor)


def test_relative_to_the_file_that_names_it(
    tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tiny_family["base"].parent
    assert open_checkpoint("base", beside=root).folder == tiny_family["base"]
    monkeypatch.chdir(root)
    assert open_checkpoint("a").folder == tiny_family["a"]


def test_single_files(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    inside = open_checkpoint(str(tiny_family["base"] / "model.safetensors"))
    assert inside.folder == tiny_family["base"]
    assert inside.config["model_type"] == "llama"
    save_file({"x": torch.ones(2)}, tmp_path / "lone.safetensors")
    (tmp_path / "config.json").write_text("{}")
    lone = open_checkpoint(str(tmp_path / "lone.safetensors"))
    assert (lone.folder, lone.config, list(lone.tensors)) == (None, {}, ["x"])
    assert (lone.generation_config, lone.tokenizer_files) == ({}, ())


def test_tensors_are_views_of_one_map(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    values = {"a": torch.arange(8, dtype=torch.bfloat16), "b": torch.arange(6.0).view(2, 3), "c": torch.ones(3).half()}
    save_file(values, path)
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = open_checkpoint(str(path))
        tensors = {name: model.tensor(name) for name in values}
    assert all(torch.equal(tensors[name], value) for name, value in values.items())
    # The distance in memory is the distance in the file: nothing was copied.
    first = min(model.tensors.values(), key=lambda info: info.start)
    for name, info in model.tensors.items():
        assert tensors[name].data_ptr() - tensors[first.name].data_ptr() == info.start - first.start
        assert tensors[name].data_ptr() == model.tensor(name).data_ptr()
    tensors["b"].zero_()  # forbidden, and still nothing happens to the file
    assert path.read_bytes() == before


def test_tensors_outlive_their_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(5.0)}, path)
    tensor = open_checkpoint(str(path)).tensor("a")
    path.unlink()
    assert tensor.tolist() == [0, 1, 2, 3, 4]


def test_scalars_empty_and_unaligned_tensors(tmp_path: Path) -> None:
    data = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = {"odd": entry("U8", [1], 0, 1), "shifted": entry("F32", [2], 1, 9), "none": entry("BF16", [0, 3], 9, 9)}
    header["scalar"] = entry("F32", [], 9, 13)
    path = raw_file(tmp_path / "m.safetensors", header, data + torch.tensor(2.5).numpy().tobytes())
    model = open_checkpoint(str(path))
    assert model.tensors["shifted"].start % 4 == 1
    assert model.tensor("shifted").tolist() == [1.5, -2.0]
    assert model.tensor("none").shape == (0, 3)
    assert model.tensor("scalar").item() == 2.5
    assert model.check_finite() == []


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    size = 4 << 30  # larger than could be read in the time allowed
    raw_file(path, {"a": entry("F32", [size // 4], 0, size)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    started = time.perf_counter()
    model = open_checkpoint(str(path))
    assert model.tensor("a")[-1].item() == 0
    assert time.perf_counter() - started < 0.5


def test_unknown_tensor(tiny_family: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor 'lm_head.weight'"):
        open_checkpoint(str(tiny_family["base"])).tensor("lm_head.weight")


def test_a_file_replaced_after_opening_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(4)}, path)
    model = open_checkpoint(str(path))
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(path)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        model.tensor("a")


def test_check_finite(tmp_path: Path) -> None:
    tensors = {"fine": torch.ones(3), "ints": torch.ones(2, dtype=torch.int64), "empty": torch.ones(0)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = torch.ones(70, dtype=dtype)
            bad[33] = value
            tensors[f"{dtype} {value}"] = bad
    bad = torch.ones(3, dtype=torch.float8_e5m2)
    bad.view(torch.uint8)[1] = 0x7F
    tensors["small"] = bad
    tensors["complex"] = torch.tensor([1 + 1j, complex(0, float("nan"))], dtype=torch.complex64)
    save_file(tensors, tmp_path / "m.safetensors")
    found = open_checkpoint(str(tmp_path / "m.safetensors")).check_finite()
    assert found == sorted(set(tensors) - {"fine", "ints", "empty"})


def test_missing_shard(broken: Path) -> None:
    shard = sorted(broken.glob("model-*"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"the shard '{shard.name}' is missing"):
        open_checkpoint(str(broken))


def test_what_the_shards_hold_counts_and_not_their_index(broken: Path) -> None:
    """As transformers reads them: a tensor that only the index names, and one that it does not name."""
    before = open_checkpoint(str(broken))
    _edit_index(broken, {"model.ghost": sorted(broken.glob("model-*"))[0].name, "model.norm.weight": None})
    after = open_checkpoint(str(broken))
    assert after.tensors.keys() == before.tensors.keys()
    assert torch.equal(after.tensor("model.norm.weight"), before.tensor("model.norm.weight"))


def test_a_tensor_in_two_shards_is_one_where_it_is_equal_in_both(broken: Path) -> None:
    norm = open_checkpoint(str(broken)).tensor("model.norm.weight").clone()
    other = next(path for path in sorted(broken.glob("model-*")) if "model.norm.weight" not in load_file(path))
    content = load_file(other)
    save_file(content | {"model.norm.weight": norm}, other)
    assert torch.equal(open_checkpoint(str(broken)).tensor("model.norm.weight"), norm)
    save_file(content | {"model.norm.weight": norm + 1}, other)
    with pytest.raises(CheckpointError, match=r"both hold model\.norm\.weight, with different values"):
        open_checkpoint(str(broken))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_pointer_of_git_lfs(tiny_family: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cloned"
    shutil.copytree(tiny_family["a"], folder)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer .*git lfs pull"):
        open_checkpoint(str(folder))


def test_names_that_begin_with_a_tilde(tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = tiny_family["a"].parent / "tilde"
    shutil.copytree(tiny_family["a"], root / "~nobody-x")
    shutil.copytree(tiny_family["b"], root / "home" / "b")
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root / "home"))
    assert open_checkpoint("~nobody-x").folder == root / "~nobody-x"
    assert open_checkpoint("~/b").folder == root / "home" / "b"
    with pytest.raises(CheckpointError, match="no such model: '~nobody-y'"):
        open_checkpoint("~nobody-y")


def test_infinite_numbers_in_a_config() -> None:
    """As transformers 5 writes them, wherever they stand; everything else is as it was."""
    content = {"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}], "num_hidden_layers": 2}
    assert tuple(transformers_config(content).time_step_limit) == (0.0, math.inf)
    assert content["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


def test_problems_of_all_shards_at_once(broken: Path) -> None:
    shards = sorted(broken.glob("model-*"))[:2]
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="is truncated: header says") as caught:
        open_checkpoint(str(broken))
    assert [problem.split(" is truncated")[0] for problem in caught.value.problems] == [str(shard) for shard in shards]


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/../../x.safetensors",
        "..\\x.safetensors",
        "C:x",
        "",
        ".",
        "a\0b",
        "..",
    ],
)
def test_the_index_cannot_lead_out_of_the_folder(broken: Path, file: str) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, broken.parent / "outside.safetensors")
    _edit_index(broken, {"model.norm.weight": file})
    with pytest.raises(CheckpointError, match="points outside the folder"):
        open_checkpoint(str(broken))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is corrupt"),
        ("[]", "weight_map must map"),
        ("{}", "weight_map must map"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ('{"weight_map": {"a": 1}}', "weight_map must map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' occurs twice"),
        ('{"weight_map": {"a": "' + "x" * 5000 + '"}}', "is missing"),
    ],
)
def test_corrupt_index(broken: Path, content: str, message: str) -> None:
    _index(broken).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(broken))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=5), st.text(max_size=12) | st.integers(), max_size=3) | st.text() | st.none())
def test_random_weight_maps(tmp_path: Path, weight_map: object) -> None:
    _index(tmp_path).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError):
        open_checkpoint(str(tmp_path))


def test_links_within_the_folder_are_followed(broken: Path, tmp_path: Path) -> None:
    """The Hub's cache keeps the files elsewhere and links to them."""
    store = tmp_path / "blobs"
    store.mkdir()
    for number, shard in enumerate(sorted(broken.glob("model-*"))):
        shard.rename(store / str(number))
        shard.symlink_to(store / str(number))
    assert open_checkpoint(str(broken)).check_finite() == []


def test_a_file_of_the_cache_is_known_by_its_link(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "0123abc")
    (tmp_path / "weights.safetensors").symlink_to(tmp_path / "0123abc")
    assert list(open_checkpoint(str(tmp_path / "weights.safetensors")).tensors) == ["x"]


def test_corrupt_config(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config.json must be a JSON object, it is a list"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(str(tmp_path)).config["time_step_limit"][1] == float("inf")


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weights: looked for model.safetensors and"):
        open_checkpoint(str(tmp_path))
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"it has other.safetensors: give that file itself"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "other.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"has shards but no model.safetensors.index.json"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="is not a model"):
        open_checkpoint(str(tmp_path / "notes.txt"))


def test_no_such_model(tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = tiny_family["base"].parent
    monkeypatch.chdir(root)
    with pytest.raises(
        CheckpointError, match=r"no such model: 'bsae'\. Looked for .* working directory; near it: base"
    ):
        open_checkpoint("bsae")
    missing = str(root / "bsae")
    with pytest.raises(CheckpointError, match=f"near it: {root / 'base'}"):
        open_checkpoint(missing)
    with pytest.raises(CheckpointError, match=r"and for 'some/model@v1' on the Hugging Face Hub \("):
        open_checkpoint("some/model@v1")
    with pytest.raises(CheckpointError, match=rf"beside and above {root}.*near it: base"):
        open_checkpoint("basee", beside=root)
    for nothing in ("", " ", "a\0b"):
        with pytest.raises(CheckpointError, match="not a model"):
            open_checkpoint(nothing)


def test_a_hub_model(tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the Hub's cache, laid out as its client lays it out; no network."""
    revision = "0123456789012345678901234567890123456789"
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((tiny_family["a"] / name).read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = open_checkpoint("some/model@v1")
    assert model.fingerprint == open_checkpoint(str(tiny_family["a"])).fingerprint
    assert model.folder == snapshot


def test_the_zoo(tiny_family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomerge.checkpoints.reference.ensure", lambda name: tiny_family[name], raising=False)
    assert open_checkpoint("zoo:b").folder == tiny_family["b"]


def test_pickles_are_refused_unless_allowed(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(tiny_family["a"] / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*--allow-pickle"):
        open_checkpoint(str(tmp_path))
    model = open_checkpoint(str(tmp_path), allow_pickle=True)
    assert all(torch.equal(model.tensor(name), tensor) for name, tensor in state.items())
    assert model.fingerprint == open_checkpoint(str(tiny_family["a"])).fingerprint
    with pytest.raises(CheckpointError, match="is a pickle"):
        open_checkpoint(str(tmp_path / "pytorch_model.bin"))


def test_old_and_wrapped_pickles(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2, 3).T}}, path, _use_new_zipfile_serialization=False)
    model = open_checkpoint(str(path), allow_pickle=True)
    assert model.tensors["w"].shape == (3, 2)
    assert model.tensor("w").is_contiguous()


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch attacked",)


def test_hostile_and_broken_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": _Attack()}, tmp_path / "evil.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"w": 3}, tmp_path / "number.pt")
    for name, message in (
        ("evil", "cannot be loaded"),
        ("noise", "cannot be loaded"),
        ("list", "holds a list"),
        ("number", "'w' is not a dense tensor"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(f"{name}.pt", allow_pickle=True)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.real
@pytest.mark.skipif(not (REAL / "base").is_dir(), reason="the real models are not built")
def test_a_real_model_opens_in_milliseconds() -> None:
    open_checkpoint(str(REAL / "base"))
    started = time.perf_counter()
    model = open_checkpoint(str(REAL / "base"))
    assert model.layout.layer_count == 30
    assert time.perf_counter() - started < 0.1
