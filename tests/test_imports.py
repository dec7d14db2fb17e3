"""The directions of the import graph, and what a light command must not load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frame import ROOT, environment

PACKAGE = ROOT / "evomerge"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "_data" not in path.parts}


def _for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _statements(body: list[ast.stmt], inside: bool) -> Iterator[ast.stmt]:
    """Every statement that runs; those of functions only if `inside`."""
    for node in body:
        if _for_types_only(node) or (not inside and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, field, []), inside)
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body, inside)


def imports(module: str, *, inside: bool = True) -> set[str]:
    """Full names of the modules that a module imports: ours as `evomerge.x.y`, others by their first name."""
    found: set[str] = set()
    for node in _statements(ast.parse(MODULES[module].read_text()).body, inside):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            origin = str(node.module)
            found |= {f"{origin}.{a.name}" if f"{origin}.{a.name}" in MODULES else origin for a in node.names}
    return {name if name.split(".")[0] == "evomerge" else name.split(".")[0] for name in found}


def within(package: str) -> list[str]:
    return [name for name in MODULES if name == package or name.startswith(package + ".")]


FORBIDDEN = {
    "evomerge.engine": [
        "evomerge.search",
        "evomerge.evaluation",
        "evomerge.spec.schema",
        "evomerge.run.search",
        "lm_eval",
        "optuna",
    ],
    "evomerge.evaluation": ["evomerge.recipe", "evomerge.search", "evomerge.engine", "evomerge.spec.schema", "optuna"],
    "evomerge.search": ["torch", "transformers", "evomerge.engine", "evomerge.evaluation", "evomerge.checkpoints"],
    "evomerge.recipe": ["torch", "transformers", "evomerge.engine", "evomerge.search", "evomerge.evaluation"],
    "evomerge.vocabulary": ["evomerge.engine", "evomerge.methods", "evomerge.search", "evomerge.evaluation"],
    "evomerge.checkpoints": [
        "evomerge.engine",
        "evomerge.vocabulary",
        "evomerge.recipe",
        "evomerge.search",
        "evomerge.evaluation",
    ],
    "evomerge.methods": [
        *("evomerge.engine", "evomerge.recipe", "evomerge.search", "evomerge.evaluation", "evomerge.checkpoints"),
        *("os", "io", "pathlib", "logging", "random", "time", "yaml", "tempfile", "shutil"),
    ],
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_directions(package: str) -> None:
    for module in within(package):
        for name in imports(module):
            for banned in FORBIDDEN[package]:
                assert name != banned, f"{module} imports {name}"
                assert not name.startswith(banned + "."), f"{module} imports {name}"


def test_methods_read_and_write_nothing() -> None:
    for module in within("evomerge.methods"):
        for node in ast.walk(ast.parse(MODULES[module].read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"open", "print", "input"}, f"{module}:{node.lineno}"


def test_nobody_draws_from_a_global_generator() -> None:
    """Nor seeds one: `random`, `numpy.random.*` functions and `torch.manual_seed` share their state with everybody."""
    shared = {"seed", "rand", "randn", "randint", "random", "choice", "shuffle", "permutation", "normal", "uniform"}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name)):
                continue
            owner = ast.unparse(node.value)
            if owner in {"np.random", "numpy.random", "random"}:
                assert node.attr not in shared, f"{module}:{node.lineno} {owner}.{node.attr}"


def test_no_circles() -> None:
    """Imports inside functions count too, but for the package of the search that can be called."""
    graph = {module: {name for name in imports(module) if name in MODULES} - {module} for module in MODULES}
    graph["evomerge.search"].discard("evomerge.api")
    state: dict[str, int] = {}
    circles: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for other in sorted(graph[module]):
            if state.get(other) == 1:
                circles.append([*path[path.index(other) :], other] if other in path else [module, other])
            elif other not in state:
                visit(other, [*path, other])
        state[module] = 2

    for module in graph:
        if module not in state:
            visit(module, [module])
    assert circles == []


LIGHT = [
    "evomerge",
    "evomerge.cli.main",
    "evomerge.errors",
    "evomerge.spec.schema",
    "evomerge.recipe",
    "evomerge.search",
    "evomerge.methods.registry",
    "evomerge.evaluation.scores",
    "evomerge.evaluation.splits",
    "evomerge.objective.comparison",
    "evomerge.objective.fitness",
    "evomerge.objective.goals",
    "evomerge.objective.item_sampling",
    "evomerge.objective.racing",
    "evomerge.report.lineage",
    "evomerge.run.folder",
    "evomerge.run.status",
    "evomerge.report.tables",
    "evomerge.spec.load",
    "evomerge.executors.local",
]
HEAVY = ["torch", "transformers", "lm_eval", "datasets"]


def test_light_modules_stay_light() -> None:
    """In one fresh process, one after another: none loads torch, nor the command line anything large at all."""
    code = f"""
import importlib, json, sys
found = {{}}
for name in {LIGHT!r}:
    importlib.import_module(name)
    found[name] = sorted(set(sys.modules) & {{*{HEAVY!r}, "optuna", "pydantic", "numpy"}})
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["evomerge.cli.main"] == []
    for name, loaded in found.items():
        assert not set(loaded) & set(HEAVY), f"{name} loads {loaded}"
