"""DARE over plain safetensors files: the numbers, what does not fit, and the ways to ask for it."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evomerge
from evomerge import DareConfig, DareMerger
from evomerge.checkpoints.checkpoint import open_checkpoint
from evomerge.errors import BadInput, CheckpointError, OutputError
from evomerge.methods.dare import METHOD
from evomerge.methods.random_field import field_key, kept_elements
from evomerge.run.dare import load_dare_file
from tests.frame import files, invoke

QUIET = DareConfig(drop_rate=0.5, delta_threshold=10.0, verbose=False)


def write(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture
def trio(tmp_path: Path) -> dict[str, Path]:
    """A base and two files near it, of tensors that belong to no language model."""
    generator = torch.Generator().manual_seed(0)
    base = {
        "conv.weight": torch.randn(4, 3, 5, 5, generator=generator),
        "bias": torch.randn(7, generator=generator),
        "half": torch.randn(40, 50, generator=generator).bfloat16(),
        "steps": torch.tensor([3, 4]),
        "empty": torch.zeros(0, 3),
    }
    trio = {"base": write(tmp_path / "base.safetensors", **base)}
    for name in ("a", "b"):
        moved = {
            key: (value + 0.01 * torch.randn(value.shape, generator=generator)).to(value.dtype)
            if value.is_floating_point()
            else value + 1
            for key, value in base.items()
        }
        trio[name] = write(tmp_path / f"{name}.safetensors", **moved)
    return trio


def test_the_defaults_are_the_papers() -> None:
    density = METHOD.parameter("density")
    assert density is not None
    assert DareConfig().drop_rate == pytest.approx(1 - float(density.paper or 0))
    assert {"DareConfig", "DareMerger"} <= set(evomerge.__all__)


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
def test_against_numpy_in_float64(trio: dict[str, Path], tmp_path: Path, rate: float) -> None:
    """base + mean over files of mask * delta / (1 - rate), each file under a mask of its own."""
    config = DareConfig(drop_rate=rate, delta_threshold=10.0, verbose=False, seed=5)
    out = DareMerger(trio["base"], [trio["a"], trio["b"]], config).merge(tmp_path / "out.safetensors")
    base, merged = load_file(trio["base"]), load_file(out)
    assert merged.keys() == base.keys()
    for key in ("conv.weight", "bias", "half"):
        origin, changes = base[key].double().numpy().ravel(), []
        for name in ("a", "b"):
            seed = field_key(5, key, open_checkpoint(str(trio[name])).fingerprint)
            mask = kept_elements(seed, 0, origin.size, 1 - rate)
            changes.append(mask * (load_file(trio[name])[key].double().numpy().ravel() - origin) / (1 - rate))
        expected = origin + np.mean(changes, axis=0)
        tolerance = {"rtol": 2**-8, "atol": 1e-6} if key == "half" else {"rtol": 1e-6, "atol": 1e-6}
        np.testing.assert_allclose(merged[key].double().numpy().ravel(), expected, **tolerance)
        assert merged[key].dtype == base[key].dtype
    assert torch.equal(merged["steps"], base["steps"])
    assert merged["empty"].shape == (0, 3)


def test_everything_dropped_is_the_base(trio: dict[str, Path], tmp_path: Path) -> None:
    config = DareConfig(drop_rate=1.0, delta_threshold=10.0, verbose=False)
    out = DareMerger(trio["base"], [trio["a"]], config).merge(tmp_path / "out.safetensors")
    base, merged = load_file(trio["base"]), load_file(out)
    assert all(torch.equal(merged[key], base[key]) for key in base)


def test_about_the_drop_rate_is_dropped(tmp_path: Path) -> None:
    """Of 40000 elements at rate 0.9 some 36000 stay the base's; sd 60, so 400 is more than six of them."""
    base = write(tmp_path / "base.safetensors", w=torch.zeros(200, 200))
    tuned = write(tmp_path / "tuned.safetensors", w=torch.ones(200, 200))
    config = DareConfig(delta_threshold=10.0, verbose=False)
    merged = load_file(DareMerger(base, [tuned], config).merge(tmp_path / "out.safetensors"))["w"]
    assert abs(int((merged == 0).sum()) - 36000) < 400
    torch.testing.assert_close(merged.unique(), torch.tensor([0.0, 10.0]), rtol=1e-3, atol=0)  # in steps of 2^-16


def test_a_tensor_that_a_file_lacks(tmp_path: Path) -> None:
    """Averaged over the files that have it: (1 + 3) / 2 = 2 for x; only a has y, so 1; nobody has z: the base's 0."""
    zero, one = torch.zeros(3), torch.ones(3)
    base = write(tmp_path / "base.safetensors", x=zero, y=zero, z=zero)
    a = write(tmp_path / "a.safetensors", x=one, y=one)
    b = write(tmp_path / "b.safetensors", x=3 * one, extra=one)
    said: list[str] = []
    config = DareConfig(drop_rate=0.0, delta_threshold=10.0, verbose=False)
    merged = load_file(DareMerger(base, [a, b], config, warn=said.append).merge(tmp_path / "out.safetensors"))
    assert {key: value.tolist() for key, value in merged.items()} == {"x": [2.0] * 3, "y": [1.0] * 3, "z": [0.0] * 3}
    assert said == [
        f"{a}: lacks z: it takes no part there",
        f"{b}: lacks y, z: it takes no part there",
        f"{b}: has extra, which {base} lacks: left out",
    ]


def test_what_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", x=torch.zeros(3), y=torch.zeros(2, 2), i=torch.zeros(1))
    a = write(tmp_path / "a.safetensors", x=torch.zeros(4), y=torch.zeros(4), i=torch.zeros(1, dtype=torch.int64))
    b = write(tmp_path / "b.safetensors", other=torch.zeros(4))
    with pytest.raises(CheckpointError) as caught:
        DareMerger(base, [a, b], QUIET).merge(tmp_path / "out.safetensors")
    told = caught.value.problems
    assert len(told) == 4
    assert told[0] == f"{a}: i: is I64, the base's is F32"
    assert told[1].startswith(f"{a}: x: its shape is not the base's (")
    assert told[2].startswith(f"{a}: y: its shape is not the base's (")
    assert told[3] == f"{b}: has none of the tensors of {base}"
    assert not (tmp_path / "out.safetensors").exists()


def test_a_large_delta_is_warned_of_by_tensor_and_file(trio: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(trio["b"])
    tensors["bias"][3] += 2.0
    write(trio["b"], **tensors)
    merger = DareMerger(trio["base"], [trio["a"], trio["b"]], DareConfig(delta_threshold=1.0, verbose=False))
    with pytest.warns(UserWarning, match="delta_threshold") as caught:
        merger.merge(tmp_path / "out.safetensors")
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith(f"bias: the delta of {trio['b']} reaches ")
    size = float((tensors["bias"] - load_file(trio["base"])["bias"]).abs().max())
    assert f"reaches {size:.6g}, above delta_threshold 1" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DareMerger(trio["base"], [trio["b"]], DareConfig(delta_threshold=size, verbose=False)).merge(
            tmp_path / "out.safetensors"
        )


def test_analyze_writes_nothing(trio: dict[str, Path], tmp_path: Path) -> None:
    before = dict(files(tmp_path))
    sizes = DareMerger(trio["base"], [trio["a"], trio["b"]], QUIET).analyze()
    base = load_file(trio["base"])
    for name in ("a", "b"):
        moved = load_file(trio[name])
        for key in ("conv.weight", "bias", "half"):
            expected = float((moved[key].float() - base[key].float()).abs().max())
            assert sizes[key][str(trio[name])] == pytest.approx(expected, rel=1e-6)
    assert dict(files(tmp_path)) == before


def test_nan_is_told_by_file_and_tensor_and_the_old_output_stays(trio: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(trio["a"])
    tensors["bias"][0] = float("nan")
    broken = write(tmp_path / "broken.safetensors", **tensors)
    out = write(tmp_path / "out.safetensors", old=torch.ones(1))
    with pytest.raises(CheckpointError, match=r"broken\.safetensors: NaN or infinite weights in bias"):
        DareMerger(trio["base"], [broken], QUIET).merge(out)
    assert list(load_file(out)) == ["old"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_output_is_replaced_whole_and_has_the_usual_metadata(trio: dict[str, Path], tmp_path: Path) -> None:
    out = write(tmp_path / "out.safetensors", old=torch.ones(1))
    DareMerger(str(trio["base"]), [str(trio["a"])], QUIET).merge(str(out))
    with safe_open(out, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert "bias" in set(opened.keys())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_outputs_that_are_refused(trio: dict[str, Path], tmp_path: Path) -> None:
    merger = DareMerger(trio["base"], [trio["a"]], QUIET)
    with pytest.raises(BadInput, match="one of the files to merge"):
        merger.merge(trio["a"])
    with pytest.raises(BadInput, match=r"has to be a \.safetensors file"):
        merger.merge(tmp_path / "out")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        merger.merge(tmp_path / "folder.safetensors")
    with pytest.raises(BadInput, match="at least one file"):
        DareMerger(trio["base"], [])


def test_a_model_beside_its_config_is_a_plain_file_too(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    """Equal to the same merge by recipe: one engine, one field."""
    names = {name: folder / "model.safetensors" for name, folder in tiny_family.items()}
    config = DareConfig(drop_rate=0.75, delta_threshold=10.0, verbose=False)
    out = DareMerger(names["base"], [names["a"], names["b"]], config).merge(tmp_path / "out.safetensors")
    models = [{"model": str(tiny_family[n]), "parameters": {"weight": 1, "drop_rate": 0.75}} for n in "ab"]
    recipe = {"merge_method": "dare", "base_model": str(tiny_family["base"]), "models": models}
    merged, plain = load_file(evomerge.merge(recipe, tmp_path / "folder") / "model.safetensors"), load_file(out)
    assert all(torch.equal(merged[key], plain[key]) for key in merged)
    assert {path.name for path in tmp_path.iterdir()} == {"out.safetensors", "folder"}


# The command line.

TOML = """
[dare]
drop_rate = 0.5
delta_threshold = 10.0
verbose = false

[models]
base_file = "base.safetensors"
merge_files = ["a.safetensors", "b.safetensors"]
output_file = "from_file.safetensors"
"""


@pytest.fixture
def config(trio: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "dare.toml"
    path.write_text(TOML)
    return path


def merged_with(trio: dict[str, Path], names: str, rate: float, out: Path) -> bytes:
    config = DareConfig(drop_rate=rate, delta_threshold=10.0, verbose=False)
    return DareMerger(trio["base"], [trio[name] for name in names], config).merge(out).read_bytes()


def test_a_file_alone(config: Path, trio: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    ended = invoke(capsys, "dare", "-c", config)
    assert (ended.code, ended.out, ended.err) == (0, "from_file.safetensors\n", "")
    written = Path("from_file.safetensors").read_bytes()
    assert written == merged_with(trio, "ab", 0.5, Path("expected.safetensors"))


def test_the_command_line_wins(config: Path, trio: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", config, "--drop-rate", "0.25", "-m", trio["a"], "-o", "out.safetensors", "--verbose"]
    ended = invoke(capsys, "dare", *arguments)
    assert (ended.code, ended.out) == (0, "out.safetensors\n")
    assert "4 of 5 tensors of " in ended.err
    assert "drop rate 0.25" in ended.err
    assert not Path("from_file.safetensors").exists()
    written = Path("out.safetensors").read_bytes()
    assert written == merged_with(trio, "a", 0.25, Path("expected.safetensors"))


def test_the_command_line_alone(config: Path, trio: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """--merge once for each file, or once with the rest after it."""
    plain = ["dare", "--base", trio["base"], "--delta-threshold", "10", "--drop-rate", "0.5"]
    assert invoke(capsys, *plain, "--merge", trio["a"], "--merge", trio["b"]).out == "merged_model.safetensors\n"
    written = Path("merged_model.safetensors").read_bytes()
    assert written == merged_with(trio, "ab", 0.5, Path("expected.safetensors"))
    assert invoke(capsys, *plain, "--merge", trio["a"], trio["b"], "--output", "other.safetensors").code == 0
    assert Path("other.safetensors").read_bytes() == written
    assert invoke(capsys, *plain, "-m", trio["a"], "-m", trio["b"], "--seed", "1", "-o", "seed.safetensors").code == 0
    assert Path("seed.safetensors").read_bytes() != written


def test_warnings_go_to_stderr_unless_quiet(
    config: Path, trio: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["dare", "-c", config, "--delta-threshold", "0.0001"]
    ended = invoke(capsys, *arguments)
    told = ended.err.splitlines()
    assert len(told) == 6  # three tensors of two files; the empty one has no delta
    assert all(line.startswith("warning: ") and "delta_threshold 0.0001" in line for line in told)
    assert ended.out == "from_file.safetensors\n"
    assert invoke(capsys, *arguments, "--quiet").err == ""
    dry = invoke(capsys, *arguments, "-q", "--dry-run", "-o", "dry.safetensors")
    assert dry.out.splitlines()[0].startswith("| tensor ")
    assert len(dry.out.splitlines()) == 2 + 8  # the empty one, too
    assert not Path("dry.safetensors").exists()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("drop_rate = 0.5", "drop_rate = 1.5", "dare.drop_rate: expected a number from 0 to 1, got 1.5"),
        ("drop_rate = 0.5", "drop_rate = 'x'", "dare.drop_rate: expected a number from 0 to 1, got 'x'"),
        ("drop_rate", "droprate", "dare.droprate: unknown (did you mean 'drop_rate'?)"),
        ("delta_threshold = 10.0", "delta_threshold = -1", "dare.delta_threshold: expected a number of at least 0"),
        ("delta_threshold = 10.0", "delta_threshold = nan", "dare.delta_threshold: expected a number of at least 0"),
        ("verbose = false", "verbose = 1", "dare.verbose: expected true or false, got 1"),
        ("verbose = false", "seed = -1", "dare.seed: expected a whole number of at least 0, got -1"),
        ("[models]", "[model]", "model: unknown (did you mean 'models'?)"),
        ('["a.safetensors", "b.safetensors"]', '"a.safetensors"', "models.merge_files: expected a list of paths"),
        ('["a.safetensors", "b.safetensors"]', "[]", "models.merge_files: --merge is missing"),
        ('base_file = "base.safetensors"', "", "models.base_file: --base is missing"),
        ('"base.safetensors"', "3", "models.base_file: expected a path as text, got 3"),
        ('"from_file.safetensors"', "3", "models.output_file: expected a path as text, got 3"),
        ("[dare]", "dare = 3\n[dare]", "not valid TOML"),
        ("[dare]", "[dare", "not valid TOML"),
    ],
)
def test_mistakes_in_a_file(
    config: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, expected: str
) -> None:
    config.write_text(TOML.replace(old, new, 1))
    ended = invoke(capsys, "dare", "-c", config)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {config}: ")
    assert expected in ended.err
    assert not Path("from_file.safetensors").exists()


def test_files_that_cannot_be_used(
    config: Path, trio: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = invoke(capsys, "dare", "-c", "none.toml")
    assert (missing.code, missing.err) == (2, "error: none.toml: cannot be read: No such file or directory\n")
    nothing = invoke(capsys, "dare")
    assert [line.split(":")[1] for line in nothing.err.splitlines()] == [" base_file", " merge_files"]
    gone = invoke(capsys, "dare", "-c", config, "-m", "gone.safetensors")
    assert gone.code == 2
    assert "no such model: 'gone.safetensors'" in gone.err
    absurd = tmp_path / "absurd.safetensors"
    absurd.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused = invoke(capsys, "dare", "-c", config, "-m", absurd)
    assert refused.code == 2
    assert str(absurd) in refused.err


def test_a_file_names_its_models_from_where_it_is(config: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    read = load_dare_file(config)
    assert read.base_file == str(tmp_path / "base.safetensors")
    assert read.merge_files == (str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    assert json.dumps(dict(read.settings)) == '{"drop_rate": 0.5, "delta_threshold": 10.0, "verbose": false}'
