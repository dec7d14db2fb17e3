"""examples/plugin, installed as anybody would: its method merges, its algorithm searches, both keep their contracts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.frame import ROOT, changed, environment, search_spec

SCRIPT = """
import json, sys
import evomerge
from evomerge.algorithms.registry import ALGORITHMS
from evomerge.executors.in_process import InProcess
from evomerge.methods.registry import METHODS
from evomerge.problem.fake_evaluator import fake_problem, quality
from evomerge.report.tables import method_table
from evomerge.spec.load import parse_spec
from evomerge.study.budget import StopConditions
from evomerge.study.candidate import Outcome
from evomerge.study.loop import search
from evomerge.study.record import Record
from evomerge.testing.algorithms import check_algorithm
from evomerge.testing.methods import check_method

check_method(METHODS["median"])
check_algorithm(ALGORITHMS["annealing"])
print(method_table("median"))
print("median" in method_table(), list(METHODS)[-1], list(ALGORITHMS)[-1], len(METHODS["median"].version))

spec, recipe, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
evomerge.merge(recipe, out)

space = fake_problem(parse_spec(spec)).space
print(sorted({gene.parameter for gene in space.reals}))
record = Record.open(out + "/study.log", "plugin")
score = InProcess(lambda proposal: Outcome(quality(proposal.recipe)))
done = search(space, ALGORITHMS[spec["search"]["algorithm"]], score, record, StopConditions(30), seed=0)
print(sorted({c.operator for c in done.candidates if c.generation}), done.best.recipe["merge_method"])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package in it, as pip installs it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder), str(ROOT / "examples" / "plugin")]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_it_is_installed_and_runs(site: Path, tiny_family: dict[str, Path], tmp_path: Path) -> None:
    changes = {
        "space": {"methods": ["median"], "layer_groups": 2},
        "search": {"algorithm": "annealing", "options": {"cooling": 0.5}},
    }
    spec = changed(search_spec(tiny_family), changes)
    models = [{"model": str(tiny_family[name])} for name in "abc"]
    recipe = {"merge_method": "median", "base_model": str(tiny_family["base"]), "models": models}
    recipe["parameters"] = {"scale": 0.5}
    out = tmp_path / "out"
    code = [sys.executable, "-c", SCRIPT, json.dumps(spec), json.dumps(recipe), str(out)]
    done = subprocess.run(code, env=environment(PYTHONPATH=f"{site}:{ROOT}"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "median: Base plus the element-wise median of the deltas." in done.stdout
    assert done.stdout.splitlines()[-3:] == ["True median annealing 32", "['scale']", "['annealed'] median"]
    base, a, b, c = (load_file(tiny_family[name] / "model.safetensors") for name in ("base", "a", "b", "c"))
    for name, merged in load_file(out / "model.safetensors").items():
        middle = torch.stack([source[name] - base[name] for source in (a, b, c)]).median(dim=0).values
        assert torch.allclose(merged, base[name] + 0.5 * middle, atol=1e-6), name
