"""What the tests of the frame share: a tiny search, and the command line in this process and in one of its own."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "tests" / "tasks"


def search_spec(family: Mapping[str, Path], **changes: Any) -> dict[str, Any]:
    """A search over the tiny family: 20 candidates in a few seconds.

    Args:
        family: Name to folder, "base" among them.
        changes: Dotted keys with `__` for the dot, such as `search__seed=1`.
    """
    spec: dict[str, Any] = {
        "name": "tiny",
        "models": {"base": str(family["base"]), "sources": {name: str(family[name]) for name in "abc"}},
        "space": {
            "methods": ["linear", "task_arithmetic", "dare_ties", "frankenmerge"],
            "layer_groups": 2,
            "frankenmerge": {"min_layers": 3, "max_layers": 6, "scale": True},
        },
        "evaluation": {
            "include_path": str(TASKS),
            "tasks": [
                {"task": "tiny_choice", "metric": "acc"},
                {"task": "tiny_text", "metric": "bits_per_byte", "weight": 2.0},
            ],
            "splits": {"search": 0.5, "select": 0.25, "test": 0.25},
            "guard": ["tiny_answer"],
            "dtype": "float32",
            "cache": False,  # another test has scored the same models
        },
        "search": {"algorithm": "ga", "population": 4, "candidates": 18, "finalists": 3},
        "run": {"keep": 1},
    }
    return changed(spec, changes)


def changed(spec: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with other values under some dotted keys; `...` takes a key out."""
    result = copy.deepcopy(dict(spec))
    for path, value in changes.items():
        *above, last = path.split("__")
        inner = result
        for key in above:
            inner = inner.setdefault(key, {})
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    return result


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def invoke(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ended:
    """Runs `evomerge ARGUMENTS` in this process."""
    from evomerge.cli.main import main

    capsys.readouterr()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    captured = capsys.readouterr()
    return Ended(code, captured.out, captured.err)


# A shell that starts the tests in the background has their processes ignore Ctrl-C.
_MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from evomerge.cli.main import main
main()
"""


def command(arguments: Sequence[str | Path]) -> list[str]:
    """`evomerge ARGUMENTS` as a process's argument list."""
    return [sys.executable, "-c", _MAIN, *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """The environment of a process of its own: this checkout's package, offline, one thread."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("COV_", "PYTHONHASHSEED"))}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def process(
    *arguments: str | Path, cwd: Path | None = None, timeout: float = 300, more: Mapping[str, str] | None = None
) -> Ended:
    """Runs `evomerge ARGUMENTS` in a process of its own, with more variables in its environment."""
    done = subprocess.run(
        command(arguments),
        cwd=cwd,
        env=environment(**(more or {})),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Relative path and content of every file of a folder, sorted."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        yield str(path.relative_to(folder)), path.read_bytes()


def write_json(path: Path, **changes: Any) -> None:
    """Adds keys to a JSON file."""
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))
