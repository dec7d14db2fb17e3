"""The rules of docs/architecture.md: who imports whom, the shape of the tree, what stays light, who may touch what."""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.frame import ROOT, environment

PACKAGE = ROOT / "evomerge"

ROWS = [
    {"errors"},
    {"system"},
    {"methods", "zoo", "evaluation"},
    {"checkpoints"},
    {"recipe", "spec"},
    {"planning", "objective", "space"},
    {"engine", "study"},
    {"problem", "report", "algorithms", "executors", "trackers"},
    {"run"},
    {"cli", "testing", "api", "notebook", "__init__", "__main__"},
]
"""From the bottom up: a package imports from rows below its own only."""

IMPORTS: dict[str, set[str]] = {
    "system": set(),
    "methods": set(),
    "zoo": set(),
    "evaluation": set(),
    "checkpoints": {"zoo"},
    "recipe": {"methods", "checkpoints.reference"},
    "spec": {"methods.registry", "checkpoints.reference"},
    "planning": {"recipe", "checkpoints", "methods"},
    "objective": {"evaluation.scores", "evaluation.splits", "evaluation.tasks.task", "spec.schema"},
    "space": {"spec", "recipe", "methods"},
    "engine": {"planning", "checkpoints", "methods"},
    "study": {"space"},
    "algorithms": {"study", "space"},
    "executors": {"study"},
    "trackers": {"study", "spec.schema"},
    "report": {
        *("study", "objective", "evaluation.scores", "evaluation.splits", "recipe", "checkpoints", "methods"),
        "space.baselines",
    },
    "problem": {
        *("engine", "planning", "evaluation", "objective", "study", "space", "recipe", "spec", "checkpoints"),
    },
}
"""The whole list of what a package may import besides `errors` and `system`; a module's name where it is but that."""

NEVER: dict[str, set[str]] = {
    "space": {"torch", "optuna"},
    "recipe": {"torch"},
    "study": {"torch"},
    "objective": {"torch"},
    "spec": {"torch"},
    "methods": {"os", "io", "pathlib", "logging", "random", "time", "yaml", "tempfile", "shutil"},
}
"""Libraries that a package has no business with."""


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "_data" not in path.parts}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def _imported(module: str) -> set[str]:
    """The modules that a module imports, inside functions and for types too; other libraries by their first name."""
    names: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            origin = str(node.module)
            names |= {f"{origin}.{a.name}" if f"{origin}.{a.name}" in MODULES else origin for a in node.names}
    return {name if name.split(".")[0] == "evomerge" else name.split(".")[0] for name in names} - {module}


IMPORTED = {module: _imported(module) for module in MODULES}
GRAPH = {module: {name for name in names if name in MODULES} for module, names in IMPORTED.items()}


def _package(module: str) -> str:
    """The row entry of a module: its package, or its own name at the top."""
    return module.split(".")[1] if "." in module else "__init__"


ROW_OF = {package: row for row, packages in enumerate(ROWS) for package in packages}


def test_every_package_has_a_row() -> None:
    assert {_package(module) for module in MODULES} == set(ROW_OF)
    assert set(IMPORTS) == {package for row in ROWS[1:8] for package in row}


@pytest.mark.parametrize("package", sorted(ROW_OF))
def test_imports_run_down(package: str) -> None:
    wrong = [
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        if _package(module) == package
        for other in others
        if _package(other) != package and ROW_OF[_package(other)] >= ROW_OF[package]
    ]
    # The package itself hands on, lazily, what api and notebook define.
    assert [w for w in wrong if not w.startswith("evomerge -> ") and not w.startswith("evomerge.__main__ -> ")] == []


@pytest.mark.parametrize("package", sorted(IMPORTS))
def test_only_what_is_listed_is_imported(package: str) -> None:
    allowed = IMPORTS[package] | {"errors", "system", package}

    def listed(module: str) -> bool:
        inner = module.removeprefix("evomerge.")
        return any(inner == name or inner.startswith(name + ".") for name in allowed)

    wrong = [
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        if _package(module) == package
        for other in others
        if not listed(other)
    ]
    assert wrong == []


@pytest.mark.parametrize("package", sorted(NEVER))
def test_libraries_that_a_package_has_no_business_with(package: str) -> None:
    wrong = [
        f"{module} -> {name}"
        for module, names in IMPORTED.items()
        if _package(module) == package
        for name in names & NEVER[package]
    ]
    assert wrong == []


def _circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                circles.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return circles


def test_no_circle_of_files() -> None:
    assert _circles(GRAPH) == []


def _folders() -> list[str]:
    return [module for module, path in MODULES.items() if path.name == "__init__.py"]


@pytest.mark.parametrize("folder", _folders())
def test_no_circle_of_folders(folder: str) -> None:
    """Every file and folder right below a folder, each collapsed to one node."""
    collapsed: dict[str, set[str]] = defaultdict(set)
    prefix = folder + "."
    for module, others in GRAPH.items():
        if module.startswith(prefix):
            node = module.removeprefix(prefix).split(".")[0]
            below = {other.removeprefix(prefix).split(".")[0] for other in others if other.startswith(prefix)}
            collapsed[node] |= below - {node}
    assert _circles(collapsed) == []


def test_size_of_folders() -> None:
    assert len([path for path in MODULES.values() if path.parent == PACKAGE]) <= 6
    for folder in {path.parent for path in MODULES.values()}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 14 or folder.name == "methods", folder


def test_tests_mirror_the_tree() -> None:
    """Every folder of tests is a folder of the package, or of data."""
    others = {"golden", "tools"}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = path.parent.relative_to(ROOT / "tests")
        if folder.parts and folder.parts[0] not in others:
            assert (PACKAGE / folder).is_dir(), path


@pytest.mark.parametrize("folder", _folders())
def test_packages_say_one_sentence_and_hand_nothing_on(folder: str) -> None:
    body = TREES[folder].body
    assert ast.get_docstring(TREES[folder]), folder
    if folder not in ("evomerge", "evomerge.recipe"):
        assert len(body) == 1, folder


def test_no_package_is_called_like_a_public_function() -> None:
    import evomerge

    packages = {module.split(".")[1] for module in MODULES if module.count(".") == 1}
    assert packages & set(evomerge.__all__) == set()


@pytest.mark.parametrize("module", MODULES)
def test_nobody_sees_everything(module: str) -> None:
    """But for the wiring in `run/`, no module imports from more than eight packages of ours (`system` aside)."""
    packages = {_package(other) for other in GRAPH[module]} - {_package(module), "errors", "system"}
    assert len(packages) <= 8 or _package(module) == "run", sorted(packages)


def test_small_modules_are_shared_or_plug_ins() -> None:
    plug_ins = {"methods", "algorithms", "executors", "trackers", "backends", "scorers"}
    for module, path in MODULES.items():
        if path.name in ("__init__.py", "__main__.py") or path.parent.name in plug_ins:
            continue
        users = [other for other in GRAPH if module in GRAPH[other]]
        assert len(path.read_text().splitlines()) >= 50 or len(users) >= 2, f"{module}: {users}"


def _calls(module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every call."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node.lineno, ast.unparse(node.func)


def test_methods_read_and_write_nothing() -> None:
    for module in MODULES:
        if _package(module) == "methods":
            for line, name in _calls(module):
                assert name not in {"open", "print", "input"}, f"{module}:{line}"


def test_only_the_command_line_and_trackers_write_to_the_terminal() -> None:
    for module in MODULES:
        if _package(module) not in ("cli", "trackers"):
            for line, name in _calls(module):
                assert name not in {"print", "sys.stdout.write", "sys.stderr.write", "typer.echo"}, f"{module}:{line}"


def test_only_system_locks_renames_and_silences() -> None:
    """And nobody seeds what everybody shares."""
    system = {"fcntl.flock", "os.rename", "os.replace", "warnings.simplefilter", "logging.disable", "os.dup2"}
    for module in MODULES:
        if _package(module) != "system":
            for line, name in _calls(module):
                assert name not in system, f"{module}:{line} {name}"


def test_nobody_draws_from_a_global_generator() -> None:
    """Nor seeds one: `random`, `numpy.random.*` functions and `torch.manual_seed` share their state with everybody."""
    shared = {"seed", "rand", "randn", "randint", "random", "choice", "shuffle", "permutation", "normal", "uniform"}
    for module in MODULES:
        for line, name in _calls(module):
            owner, _, attribute = name.rpartition(".")
            assert not (owner in {"np.random", "numpy.random", "random"} and attribute in shared), f"{module}:{line}"
            # Within a block that puts it back, in the one place for that.
            assert name != "torch.manual_seed" or module == "evomerge.system.quiet", f"{module}:{line}"


WORDS = "found|known|wanted|told|ours|theirs|held|mine|place|settle|says"


def test_local_names_say_the_thing() -> None:
    pattern = re.compile(rf"^\s*(?:{WORDS})(?:,| =|:)", re.M)
    wrong = {module: names for module, path in MODULES.items() if (names := pattern.findall(path.read_text()))}
    assert wrong == {}


def _assigned(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns to, tuples taken apart."""
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    else:
        return []
    return [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]


def test_nothing_sets_an_attribute_of_another_object() -> None:
    """But for what a function has made itself: no assignment goes through an argument that is not `self`."""
    wrong = []
    for module, tree in TREES.items():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            arguments = {a.arg for a in itertools.chain(function.args.args, function.args.kwonlyargs)} - {"self", "cls"}
            wrong += [
                f"{module}:{node.lineno} {ast.unparse(target)}"
                for node in ast.walk(function)
                for target in _assigned(node)
                if isinstance(target, ast.Attribute)
                and isinstance(target.value, ast.Name)
                and target.value.id in arguments
            ]
    assert wrong == []


HEAVY = ["torch", "transformers", "lm_eval", "datasets"]
LIGHT = [
    module
    for module in MODULES
    if _package(module) in {"spec", "recipe", "space", "study", "algorithms", "executors", "trackers", "objective"}
    or (_package(module) == "report" and not module.endswith("model_card"))
    or module
    in ("evomerge", "evomerge.cli.main", "evomerge.errors", "evomerge.methods.registry", "evomerge.evaluation.scores")
    or module in ("evomerge.evaluation.splits", "evomerge.run.folder", "evomerge.run.status")
]


def test_light_modules_stay_light() -> None:
    """In one fresh process, one after another: none loads torch, nor the command line anything large at all."""
    order = ["evomerge", "evomerge.cli.main", *LIGHT]
    code = f"""
import importlib, json, sys
loaded = {{}}
for name in {order!r}:
    importlib.import_module(name)
    loaded.setdefault(name, sorted(set(sys.modules) & {{*{HEAVY!r}, "optuna", "pydantic", "numpy", "scipy"}}))
print(json.dumps(loaded))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert loaded["evomerge.cli.main"] == []
    for name, heavy in loaded.items():
        assert not set(heavy) & set(HEAVY), f"{name} loads {heavy}"
