"""`evomerge init`: what it says of models, which one it takes for the base, and a search.yaml that can be read."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge.checkpoints.checkpoint import open_checkpoints
from evomerge.run.init import Geometry, ancestor, init_search, measure, search_yaml
from evomerge.spec.load import load_spec
from tests.frame import invoke
from tests.models import write_tiny_llama


def flat(folder: Path) -> torch.Tensor:
    return torch.cat(
        [value.double().reshape(-1) for _, value in sorted(load_file(folder / "model.safetensors").items())]
    )


def test_distances_and_cosines_against_torch(tiny_family: dict[str, Path]) -> None:
    found = measure(open_checkpoints(str(path) for path in tiny_family.values()))
    names = {name: str(path) for name, path in tiny_family.items()}
    vectors = {name: flat(path) for name, path in tiny_family.items()}
    assert found.share == 1.0
    for name, vector in vectors.items():
        assert found.norms[names[name]] == pytest.approx(float(vector.norm()), rel=1e-5)
        for other in vectors:
            if other != name:
                expected = float((vector - vectors[other]).norm())
                assert found.distances[names[name], names[other]] == pytest.approx(expected, rel=1e-5)
    deltas = [vectors[name] - vectors["base"] for name in "ab"]
    cosine = float(torch.nn.functional.cosine_similarity(*deltas, dim=0))
    assert found.cosine(names["base"], names["a"], names["b"]) == pytest.approx(cosine, abs=1e-4)


def geometry(**points: tuple[float, float, float]) -> Geometry:
    distances = {(a, b): math.dist(points[a], points[b]) for a in points for b in points if a != b}
    return Geometry(dict.fromkeys(points, 1.0), distances, 1.0)


def test_the_ancestor_is_in_the_middle() -> None:
    """Three unit steps along three axes: from the origin 3 in all, from an end 1 + 2 sqrt(2) = 3.83; 3 < 0.9 * 3.83."""
    ends = {"x": (1.0, 0.0, 0.0), "y": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0)}
    assert ancestor(geometry(**ends, o=(0.0, 0.0, 0.0))) == "o"
    assert ancestor(geometry(**ends)) is None, "three that are as far from each other"
    assert ancestor(geometry(x=ends["x"], o=(0.0, 0.0, 0.0))) is None, "two tell nothing"


def test_the_command(tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    ended = invoke(capsys, "init", *(tiny_family[name] for name in ("a", "b", "base", "c")), "--output", out)
    assert (ended.code, ended.err) == (0, "")
    assert f"base: {tiny_family['base']}, from which the others differ" in ended.out
    assert "| a                     | b            | " in ended.out
    assert ended.out.endswith(f"wrote {out}; next: evomerge check {out}\n")
    spec = load_spec(out)
    assert spec.name == "mine"
    assert spec.models.base == str(tiny_family["base"])
    assert spec.models.sources == {name: str(tiny_family[name]) for name in "abc"}
    assert spec.space.layer_groups == 4
    assert spec.space.tensor_groups == ["attention", "mlp"]
    assert "# tensor_groups that these models have, too: norm\n" in out.read_text()
    assert [task.task for task in spec.evaluation.tasks] == ["arc_easy", "hellaswag"]
    again = invoke(capsys, "init", tiny_family["a"], tiny_family["b"], "-o", out)
    assert again.code == 2
    assert "is there already" in again.err
    assert invoke(capsys, "init", tiny_family["a"], tiny_family["b"], "-o", out, "--overwrite").code == 0


def test_without_a_base_only_methods_that_need_none(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "search.yaml"
    ended = invoke(capsys, "init", tiny_family["a"], tiny_family["b"], "-o", out, "--tasks", "x, y")
    assert "base: no model is clearly the ancestor" in ended.out
    spec = load_spec(out)
    assert spec.models.base is None
    assert spec.space.methods == ["linear"]
    assert [task.task for task in spec.evaluation.tasks] == ["x", "y"]
    named = invoke(capsys, "init", tiny_family["a"], "-o", out, "--overwrite", "--base", tiny_family["base"])
    assert named.code == 0
    assert load_spec(out).models.base == str(tiny_family["base"])


def test_models_below_the_file_are_written_from_there(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(tiny_family[name], tmp_path / "models" / name)
    init_search([str(tmp_path / "models" / name) for name in "ab"], tmp_path / "search.yaml")
    content = yaml.safe_load((tmp_path / "search.yaml").read_text())
    assert content["models"]["sources"] == {"a": "models/a", "b": "models/b"}


def test_names_are_told_apart(tiny_family: dict[str, Path], tmp_path: Path) -> None:
    for folder in ("one/v1.0", "two/v1.0", "three/base"):
        shutil.copytree(tiny_family["a"], tmp_path / folder)
    opened = open_checkpoints(str(tmp_path / folder) for folder in ("one/v1.0", "two/v1.0", "three/base"))
    content = yaml.safe_load(search_yaml(opened, None, tmp_path / "x.yaml", ["t"]))
    assert list(content["models"]["sources"]) == ["v1-0", "v1-0-2", "source"]


def test_models_that_do_not_fit(
    tiny_family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = write_tiny_llama(tmp_path / "narrow", 3, hidden=16)
    ended = invoke(capsys, "init", tiny_family["a"], narrow, tmp_path / "none", "-o", tmp_path / "search.yaml")
    assert ended.code == 2
    assert "no such model" in ended.err
    ended = invoke(capsys, "init", tiny_family["a"], narrow, "-o", tmp_path / "search.yaml")
    assert (ended.code, ended.out) == (2, "")
    assert f"error: {narrow}: other shapes than {tiny_family['a']}" in ended.err
    alone = invoke(capsys, "init", tiny_family["a"], "-o", tmp_path / "search.yaml")
    assert alone.code == 2
    assert "at least two models" in alone.err
    assert not (tmp_path / "search.yaml").exists()


def test_the_ancestor_of_the_zoo_is_found_though_one_of_its_models_hardly_differs() -> None:
    names = [f"zoo:{name}" for name in ("arithmetic", "facts", "base", "agreement")]
    assert ancestor(measure(open_checkpoints(names))) == "zoo:base"
