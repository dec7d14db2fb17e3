"""Golden results: what searches, merges and scores gave, to the bit, which a change that only moves code gives again.

    python -m tests.golden.make [NAME...]            renews the files beside this one
    python -m tests.golden.make --check [NAME...]    compares, prints the first difference, exits with 1

Without names, all but the shipped quickstart. It goes through the command line and the JSON contracts alone, so that no
move of a module concerns it. The files:

- a search (`ga`, `frankenmerge`, `pareto`, `raced`, `quickstart`): `models`, hashes of what is
  merged; `candidates`, every one from `lineage --json`; `status` and `result`, the numbers of `status --json` and of
  result.json by their path, keys and indices joined by slashes, without recipes and times; `winner`, a hash of every
  exported tensor.
- `merges`: by method, parameters, models and dtype a hash of the whole checkpoint; and for every tensor, in the order
  of `tensors`, the sum of its absolute values and its sum, to eight digits.
- `eval`: the JSON of `evomerge eval`.

Bits are the same on the same kind of machine, with the same versions and one thread: where the `fingerprint` is equal,
everything has to be. Elsewhere, merges are compared by their sums, searches by the fitness of generation 0.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TASKS = ROOT / "tests" / "tasks"
MODELS = Path("/tmp/evomerge-golden")
"""Always the same folder: a recipe's hash covers the paths of its models."""

RENAMED: dict[str, str] = {}
"""Golden words -> today's, for operators, states and keys that have been renamed on purpose."""

VERSIONS = ("torch", "transformers", "numpy", "numba", "lm_eval", "optuna")
UNTOLD = frozenset({"recipe", "candidates_per_hour", "seconds_left", "seconds"})
FIELDS = (
    "candidate",
    "generation",
    "parents",
    "operator",
    "recipe_hash",
    "state",
    "fitness",
    "objectives",
    "items",
    "genome",
)

Document = dict[str, Any]


# ---------------------------------------------------------------- where and with what


@cache
def fingerprint() -> dict[str, Any]:
    """What the bits of a result depend on, besides the code."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    first = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in reversed(lines) if ":" in line)
    return {
        "cpu": " ".join(first.get(key, "?") for key in ("model name", "cpu family", "model", "stepping")),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: importlib.metadata.version(name) for name in VERSIONS},
        "threads": torch.get_num_threads(),
        "models": str(MODELS),
    }


def evomerge(*arguments: str | Path) -> str:
    """Runs `evomerge ARGUMENTS` in this process; gives what it prints."""
    module, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        "evomerge"
    ].partition(":")
    main = getattr(importlib.import_module(module), function)
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["evomerge", *map(str, arguments)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = before
    if code != 0:
        raise RuntimeError(f"evomerge {' '.join(map(str, arguments))} ended with {code}:\n{err.getvalue()}")
    return out.getvalue()


@contextlib.contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Nothing is taken from the user's cache, for the length of a block."""
    before = os.environ.get("EVOMERGE_CACHE")
    os.environ["EVOMERGE_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("EVOMERGE_CACHE")
        if before is not None:
            os.environ["EVOMERGE_CACHE"] = before


@cache
def family(kind: str, dtype: str = "float32") -> dict[str, Path]:
    """A random base and three noisy copies, {"base", "a", "b", "c"} -> folder.

    Args:
        kind: "tiny"; "short", with two layers; "wide", with matrices that are worked on in several pieces.
        dtype: That they are stored in.
    """
    import torch

    from tests.models import write_tiny_llama

    shape = {"tiny": {}, "short": {"layers": 2}, "wide": {"layers": 2, "hidden": 320}}[kind]
    root = MODELS / f"{kind}-{dtype}"
    MODELS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS, prefix=".new-") as new:
        base = write_tiny_llama(Path(new) / "original", 0, **shape)
        store: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        write_tiny_llama(Path(new) / "base", 0, **shape, **store)
        for seed, name in enumerate("abc", start=1):
            write_tiny_llama(Path(new) / name, seed, base=base, **store)
        for name in ("base", *"abc"):
            _put(Path(new) / name, root / name)
    return {name: root / name for name in ("base", *"abc")}


def _put(new: Path, folder: Path) -> None:
    """Makes a folder what another one is, and leaves it alone where it is that already."""
    content = {path.name: path.read_bytes() for path in new.iterdir()}
    if folder.is_dir() and content == {path.name: path.read_bytes() for path in folder.iterdir()}:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(new, folder)


# ---------------------------------------------------------------- what is kept of a checkpoint


def tensors(folder: Path) -> dict[str, Any]:
    """The tensors of a checkpoint by name, sorted."""
    from safetensors.torch import load_file

    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return dict(sorted(stored.items()))


def tensor_hash(tensors: Mapping[str, Any]) -> str:
    """One hash of names, dtypes, shapes and bytes."""
    import torch

    content = hashlib.sha256()
    for name, tensor in tensors.items():
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def sums(tensors: Mapping[str, Any]) -> list[list[float]]:
    """For every tensor, the sum of absolute values and the sum, to eight digits."""
    wide = [tensor.double() for tensor in tensors.values()]
    return [[float(f"{x:.8g}") for x in (float(tensor.abs().sum()), float(tensor.sum()))] for tensor in wide]


# ---------------------------------------------------------------- searches


def _spec(**changes: Any) -> Document:
    """A search over the tiny family; `changes` are merged into its sections."""
    models = family("tiny")
    spec: Document = {
        "name": "golden",
        "models": {"base": str(models["base"]), "sources": {name: str(models[name]) for name in "abc"}},
        "space": {"methods": ["linear", "task_arithmetic", "ties", "dare_ties"], "layer_groups": 3},
        "evaluation": {
            "include_path": str(TASKS),
            "tasks": [
                {"task": "tiny_choice", "metric": "acc"},
                {"task": "tiny_text", "metric": "bits_per_byte", "weight": 2.0},
            ],
            "guard": ["tiny_answer"],
            "splits": {"search": 0.5, "select": 0.25, "test": 0.25},
            "dtype": "float32",
            "cache": False,
        },
        "search": {"candidates": 20, "finalists": 3, "seed": 0},
        "run": {"keep": 0},
    }
    for section, values in changes.items():
        spec[section] |= values
    return spec


def _copied(**more: Any) -> Document:
    return {"layer_groups": 2, "frankenmerge": {"min_layers": 3, "max_layers": 6, "scale": True}, **more}


def ga() -> Document:
    """As the quickstart, on tiny models: parameters only, steps by the Jacobian."""
    return _spec(search={"algorithm": "ga"})


def frankenmerge() -> Document:
    """Stacks of copied layers."""
    return _spec(space=_copied(methods=["frankenmerge"]), search={"algorithm": "ga", "population": 6})


def pareto() -> Document:
    """A front of two tasks and the number of layers."""
    options = {"jacobian_steps": False}  # so few children are to be of both methods
    return _spec(
        space=_copied(methods=["task_arithmetic", "frankenmerge"]),
        search={"objectives": "pareto", "also_minimize": ["layers"], "seed": 1, "population": 5, "options": options},
    )


def raced() -> Document:
    """With racing, parameters and copied layers, and a random search beside it."""
    return _spec(
        space=_copied(methods=["linear", "task_arithmetic", "dare_ties", "frankenmerge"]),
        evaluation={"racing": True},
        search={"algorithm": "ga", "population": 4, "baseline": "random"},
    )


def quickstart() -> Document:
    """The shipped one, but that nothing is taken from the cache of scores."""
    spec: Document = yaml.safe_load((ROOT / "search_spaces" / "quickstart.yaml").read_text())
    spec["evaluation"] |= {"include_path": str(ROOT / "eval"), "cache": False}
    return spec


SEARCHES = {case.__name__: case for case in (ga, frankenmerge, pareto, raced)}
SHIPPED = {case.__name__: case for case in (quickstart,)}


EXPORTED = frozenset({"ga", "quickstart"})
"""Searches whose winner is exported; the others' is merged from its recipe: the same tensors, and no scores."""


def search_results(name: str, folder: Path) -> Document:
    """Carries out a search; gives its record, its result and the hashes of its winner's tensors."""
    spec = {**SEARCHES, **SHIPPED}[name]()
    (folder / "search.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    run, out = folder / "run", folder / "winner"
    evomerge("run", folder / "search.yaml", "--dir", run)
    candidates = json.loads(evomerge("lineage", run, "--json"))
    status = json.loads(evomerge("status", run, "--json"))
    if name in EXPORTED:
        evomerge("export", run, out)
        winner = tensors(out)
    else:
        evomerge("export", run, folder / "winner.yaml", "--recipe")
        winner = merged(yaml.safe_load((folder / "winner.yaml").read_text()), out)
    references = {"base": spec["models"]["base"], **spec["models"]["sources"]}
    return {
        "fingerprint": fingerprint(),
        "models": {name: _model_hash(reference) for name, reference in references.items()},
        "candidates": [{key: candidate.get(key) for key in FIELDS} for candidate in candidates],
        "status": dict(numbers(status)),
        "result": dict(numbers(json.loads((run / "result.json").read_text()))),
        "winner": {name: tensor_hash({name: tensor}) for name, tensor in winner.items()},
    }


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers within a JSON value by their path: keys and indices joined by slashes."""
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        entries = ((key, inner) for key, inner in value.items() if key not in UNTOLD)
    elif isinstance(value, list):
        entries = enumerate(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value
    for key, inner in entries:
        yield from numbers(inner, f"{path}/{key}" if path else str(key))


@cache
def _model_hash(reference: str) -> str:
    """The hash of a model's tensors in float32, whatever the reference stands for."""
    models = [{"model": reference, "parameters": {"weight": 1.0}}]
    with tempfile.TemporaryDirectory() as folder:
        return tensor_hash(
            merged({"merge_method": "linear", "models": models, "dtype": "float32"}, Path(folder) / "model")
        )


# ---------------------------------------------------------------- merges


def merged(recipe: Document, out: Path) -> dict[str, Any]:
    """The tensors that `evomerge merge` writes for a recipe; the folder is removed again."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    evomerge("merge", path, out, "--quiet", "--no-copy-tokenizer", "--no-write-model-card")
    copies = {name: tensor.clone() for name, tensor in tensors(out).items()}
    shutil.rmtree(out)
    return copies


W3 = [{"weight": 0.7}, {"weight": 1.1}, {"weight": 0.4}]
NEGATIVE = [{"weight": 0.9}, {"weight": -0.35}, {"weight": 0.6}]
NONE3: list[Document] = [{}, {}, {}]


def _each(name: str, *values: Any, weights: Sequence[Document] = W3) -> list[Document]:
    return [{**weight, name: value} for weight, value in zip(weights, values, strict=False)]


Parameters = tuple[list[Document], Document]
"""What every source has for its own, and what they share."""

MERGES: dict[str, dict[str, Parameters]] = {
    "linear": {
        "normalized": (W3, {}),
        "sum": (NEGATIVE, {"normalize": False}),
        "gradient": (_each("weight", [0.2, 0.9], [0.5, 0.1], 0.3), {}),
    },
    "slerp": {
        "t": ([{}], {"t": 0.3}),
        "weights": (W3, {}),
        "deltas": (W3, {"on": "deltas"}),
        "deltas of the model": (W3, {"on": "deltas", "scope": "model"}),
    },
    "task_arithmetic": {
        "lambda": (NEGATIVE, {"lambda": 0.8}),
        "normalized": (W3, {"normalize": True, "int8_mask": True}),
    },
    "ties": {
        "density": (_each("density", 0.2, 0.5, 0.8), {}),
        "untrimmed": (W3, {"lambda": 1.3}),
        "sum": (NEGATIVE, {"density": 0.3, "normalize": False, "lambda": 0.7}),
        "of the model": (W3, {"density": 0.2, "scope": "model"}),
        "count": (NEGATIVE, {"density": 0.6, "consensus": "count"}),
        "average of all": (W3, {"density": 0.6, "average": "all"}),
        "count, average of all": (W3, {"density": 0.35, "consensus": "count", "average": "all", "lambda": 1.2}),
    },
    "dare": {
        "density": (_each("density", 0.2, 0.5, 0.8), {}),
        "drop_rate": (W3, {"drop_rate": 0.9, "lambda": 0.8}),
        "sum": (NEGATIVE, {"density": 0.5, "normalize": False, "rescale": False}),
        "nothing dropped": (W3, {"lambda": 0.6}),
    },
    "dare_linear": {
        "density": (NEGATIVE, {"density": 0.4}),
        "drop_rate": (_each("drop_rate", 0.9, 0.0, 0.5), {"normalize": True, "lambda": 1.1}),
        "not rescaled": (W3, {"density": 0.6, "rescale": False}),
    },
    "dare_ties": {
        "density": (W3, {"density": 0.4}),
        "normalized": (_each("density", 0.1, 0.6, 1.0, weights=NEGATIVE), {"normalize": True, "lambda": 0.9}),
        "drop_rate": (W3, {"drop_rate": 0.5}),
        "drop and trim": (_each("drop_rate", 0.3, 0.6, 0.0), {"density": 0.5, "normalize": True}),
        "count": (NEGATIVE, {"density": 0.7, "consensus": "count", "rescale": False}),
        "average of all": (W3, {"drop_rate": 0.4, "density": 0.3, "normalize": True, "average": "all"}),
    },
    "frankenmerge": {
        "scale": ([{"residual_scale": 1.2}, {}], {"pattern": "BA", "scale": 0.7}),
        "pattern": ([{}, {"scale": [1, 0.8]}], {"pattern": "ABBA", "residual_scale": 0.9}),
        "random": (NONE3, {"seed": 3}),
    },
    "dfs": {
        "tensor": (W3, {}),
        "gamma": (W3, {"gamma": 0.5, "lambda": 1.2}),
        "row": (W3, {"scope": "row", "gamma": 1.7}),
        "position": (W3, {"mode": "position", "tau": 0.5}),
        "position, density": (W3, {"mode": "position", "tau": 2.0, "density": 0.4, "lambda": 0.9}),
    },
    "della": {
        "density": (_each("density", 0.3, 0.5, 0.7), {}),
        "epsilon": (_each("epsilon", 0.05, 0.1, 0.3, weights=NEGATIVE), {"density": 0.6, "lambda": 1.1}),
        "sum": (W3, {"density": 0.5, "normalize": False, "rescale": False}),
        "count, average of all": (W3, {"density": 0.7, "epsilon": 0.07, "consensus": "count", "average": "all"}),
    },
    "della_linear": {
        "density": (NEGATIVE, {"density": 0.5}),
        "normalized": (_each("density", 0.3, 1.0, 0.7), {"epsilon": 0.1, "normalize": True, "lambda": 0.8}),
        "not rescaled": (W3, {"density": 0.6, "epsilon": 0.2, "rescale": False}),
    },
    "breadcrumbs": {
        "density": (W3, {"density": 0.5, "gamma": 0.02}),
        "normalized": (_each("gamma", 0.01, 0.05, 0.2), {"density": 0.7, "normalize": True, "lambda": 1.2}),
    },
    "breadcrumbs_ties": {
        "density": (W3, {"density": 0.5, "gamma": 0.02}),
        "normalized": (_each("density", 0.2, 0.5, 0.9, weights=NEGATIVE), {"normalize": True, "lambda": 0.7}),
        "count, average of all": (
            W3,
            {"density": 0.6, "gamma": 0.1, "normalize": True, "consensus": "count", "average": "all"},
        ),
    },
    "model_stock": {"tensor": (NONE3, {}), "filter_wise": (NONE3, {"filter_wise": True})},
    "sce": {
        "everything": (NONE3, {}),
        "half": (NONE3, {"select_topk": 0.5}),
        "tenth": (NONE3, {"select_topk": 0.1, "int8_mask": True}),
    },
    "wudi": {"spectral": (NONE3, {"lambda": 0.9}), "average": (NONE3, {"spectral": False})},
    "ram": {"default": (NONE3, {}), "epsilon": (NONE3, {"epsilon": 0.02, "lambda": 0.9})},
    "ramplus_tl": {"default": (NONE3, {}), "epsilon": (NONE3, {"epsilon": 0.02, "r": 0.5, "alpha": 1.0})},
    "arcee_fusion": {"a": ([{}], {}), "b": ([{}], {})},
    "nuslerp": {
        "flat": (W3[:2], {}),
        "three": (W3, {}),
        "rows": (W3[:2], {"nuslerp_flatten": False}),
        "columns": (W3, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    },
    "multislerp": {"normalized": (W3, {}), "sum": (W3, {"normalize_weights": False})},
    "karcher": {"default": (W3, {}), "one step": (NONE3, {"max_iter": 1, "tol": 1e-9})},
    "nearswap": {"t": (W3, {"t": 0.005}), "one": ([{}], {"t": 0.0001})},
    "tsv_merge": {"spectral": (W3, {"lambda": 0.9}), "average": (W3, {"spectral": False})},
    "iso_c": {"spectral": (W3, {"lambda": 1.1}), "average": (NONE3, {"spectral": False})},
}

WITHOUT_BASE = {"linear/normalized", "linear/gradient", "slerp/weights", "nuslerp/three", "multislerp/sum"} | {
    f"{method}/{name}" for method in ("frankenmerge", "karcher") for name in MERGES[method]
}


def method_names() -> list[str]:
    """Of all methods, from `evomerge methods`."""
    of_methods = evomerge("methods").partition("\n\n")[0]
    rows = [line.split("|") for line in of_methods.splitlines() if line.startswith("|")]
    return [row[1].strip() for row in rows[2:]]


def recipe(method: str, name: str, models: Mapping[str, Path], dtype: str) -> Document:
    """The recipe of one entry of `MERGES`."""
    own, shared = MERGES[method][name]
    names = name if method == "arcee_fusion" else "abc"
    sources = [
        {"model": str(models[source]), **({"parameters": values} if values else {})}
        for source, values in zip(names, own, strict=False)
    ]
    if method == "linear" and name == "sum":  # the base is a source of this one
        sources.append({"model": str(models["base"]), "parameters": {"weight": 0.1}})
    written: Document = {"merge_method": method, "models": sources, "dtype": dtype, "seed": 7}
    if f"{method}/{name}" not in WITHOUT_BASE and method != "linear":
        written["base_model"] = str(models["base"])
    if shared:
        written["parameters"] = shared
    return written


def merge_results(methods: Iterable[str], folder: Path) -> Document:
    """Carries out the merges of these methods: every entry on short models, the first on wide ones in bfloat16."""
    orders: dict[str, list[str]] = {}
    results: Document = {}
    for method in methods:
        first = next(iter(MERGES[method]))
        small = "tiny" if method == "frankenmerge" else "short"
        cases = [(name, small, "float32") for name in MERGES[method]]
        cases.append((first, "wide", "bfloat16"))
        for name, kind, dtype in cases:
            result = merged(recipe(method, name, family(kind, dtype), dtype), folder / "merged")
            order = f"{len(result)} tensors"
            orders[order] = list(result)
            key = f"{method}/{name}/{kind}/{dtype}"
            results[key] = {"sha256": tensor_hash(result), "tensors": order, "sums": sums(result)}
    return {"fingerprint": fingerprint(), "merges": results, "tensors": orders}


def merges(folder: Path) -> Document:
    """Merges by every method."""
    missing = set(method_names()) ^ set(MERGES)
    if missing:
        raise SystemExit(f"MERGES and `evomerge methods` differ in {', '.join(sorted(missing))}")
    return merge_results(MERGES, folder)


# ---------------------------------------------------------------- scores


def evaluation(folder: Path) -> Document:
    """Scores of tiny models on all tasks of the tests, by every metric."""
    tasks = "tiny_choice,tiny_text,tiny_answer"
    results = {}
    for name, dtype in (("base", "float32"), ("a", "bfloat16")):
        model, options = family("tiny")[name], ("--include-path", TASKS, "--dtype", dtype, "--json")
        results[f"{name}/{dtype}"] = json.loads(evomerge("eval", model, "--tasks", tasks, *options))["tasks"]
    return {"fingerprint": fingerprint(), "eval": results}


# ---------------------------------------------------------------- files and comparisons

NAMES = (*SEARCHES, "merges", "eval")


def make(name: str) -> Document:
    """Today's results of a file."""
    with tempfile.TemporaryDirectory() as folder:
        if name in SHIPPED:
            return search_results(name, Path(folder))
        with own_cache(Path(folder) / "cache"):
            if name in SEARCHES:
                return search_results(name, Path(folder))
            return merges(Path(folder)) if name == "merges" else evaluation(Path(folder))


def compact(value: Any) -> str:
    """JSON without spaces; floats by their shortest exact form."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def render(document: Document) -> str:
    """JSON with one line for each entry of a section."""
    sections = []
    for key, section in document.items():
        if isinstance(section, list):
            sections.append(f"{compact(key)}:[\n" + ",\n".join(map(compact, section)) + "\n]")
        else:
            entries = ",\n".join(f"{compact(name)}:{compact(value)}" for name, value in section.items())
            sections.append(f"{compact(key)}:{{\n{entries}\n}}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def golden(name: str) -> Document:
    """What a file says, in today's words."""
    document: Document = json.loads((HERE / f"{name}.json").read_text())
    return {key: value if key == "fingerprint" else renamed(value) for key, value in document.items()}


def renamed(value: Any) -> Any:
    """A JSON value with today's words in its keys and its texts."""
    if isinstance(value, Mapping):
        return {renamed(key): renamed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner) for inner in value]
    if isinstance(value, str):
        for old, new in RENAMED.items():
            value = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", new, value)
    return value


def first_difference(expected: Document, today: Document) -> str | None:
    """The first of what differs between a file and today's results; None where nothing does that may not."""
    exact = expected["fingerprint"] == today["fingerprint"]
    sections = {key: value for key, value in expected.items() if key != "fingerprint"}
    return next(differences(sections, today) if exact else loose_differences(sections, today), None)


def differences(expected: Any, today: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ. Keys that are new today are none: contracts may grow."""
    if isinstance(expected, Mapping) and isinstance(today, Mapping):
        for key, value in expected.items():
            inner = f"{path} > {key}" if path else str(key)
            if key in today:
                yield from differences(value, today[key], inner)
            else:
                yield f"{inner}: golden {compact(value)[:200]}, today missing"
    elif isinstance(expected, list) and isinstance(today, list):
        for index, (one, other) in enumerate(zip(expected, today, strict=False)):
            yield from differences(one, other, f"{path} > {index}")
        if len(expected) != len(today):
            yield f"{path}: golden has {len(expected)} entries, today {len(today)}"
    elif compact(expected) != compact(today):
        yield f"{path}: golden {compact(expected)}, today {compact(today)}"


def loose_differences(expected: Document, today: Document) -> Iterator[str]:
    """Where results differ by more than another processor or another version of a library explains."""
    for old, new in zip(expected.get("candidates", []), today.get("candidates", []), strict=False):
        if old["generation"] == 0 and not _near(old["fitness"], new["fitness"], 1e-3):
            yield f"candidates > {old['candidate']} > fitness: golden {old['fitness']}, today {new['fitness']}"
    for name, old in expected.get("merges", {}).items():
        new = today["merges"].get(name)
        if new is None or len(new["sums"]) != len(old["sums"]):
            yield f"merges > {name}: {'missing' if new is None else 'other tensors'}"
            continue
        tolerance = 1e-3 if name.endswith("/bfloat16") else 1e-5
        for index, (pair, other) in enumerate(zip(old["sums"], new["sums"], strict=True)):
            if any(not _near(x, y, tolerance * pair[0]) for x, y in zip(pair, other, strict=True)):
                yield f"merges > {name} > sums > {index}: golden {pair}, today {other}"
    old_scores, new_scores = dict(numbers(expected.get("eval", {}))), dict(numbers(today.get("eval", {})))
    for path, value in old_scores.items():
        if not _near(value, new_scores.get(path), 1e-3 * max(1.0, abs(value))):
            yield f"eval > {path}: golden {value}, today {new_scores.get(path)}"


def _near(one: float | None, other: float | None, tolerance: float) -> bool:
    return one == other or (one is not None and other is not None and abs(one - other) <= tolerance)


def main() -> int:
    """Renews or checks the files."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.make", description="Golden results.")
    parser.add_argument("--check", action="store_true", help="compare, and print the first difference")
    parser.add_argument("names", nargs="*", help=f"of {', '.join((*NAMES, *SHIPPED))}; default: the first six")
    chosen = parser.parse_args()
    for name in chosen.names:
        if name not in (*NAMES, *SHIPPED):
            parser.error(f"no golden results are called {name}")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    failed = False
    for name in chosen.names or NAMES:
        today = make(name)
        if not chosen.check:
            (HERE / f"{name}.json").write_text(render(today))
            print(f"{name}: written")
            continue
        expected = golden(name)
        how = (
            "to the bit" if expected["fingerprint"] == today["fingerprint"] else "loosely: another machine or versions"
        )
        difference = first_difference(expected, json.loads(render(today)))
        print(f"{name}: {f'equal ({how})' if difference is None else difference}", flush=True)
        failed |= difference is not None
    return int(failed)


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.exit(main())
