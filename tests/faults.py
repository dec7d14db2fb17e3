"""Faults: commands over files that are damaged in every way, and what may come of it.

An attempt copies a small world (models, a task, a recipe, a search, a finished run), damages one file of it, and runs
one command in a process of its own. Right is a result, or a refusal that names the file; never a traceback, a signal,
a hang, or another file than the command's own changed. The files of a run folder have checksums: where a command takes
a damaged one, it says what it says of the undamaged one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.frame import TASKS

LIMIT, PATIENCE = 60, 600
"""Processor seconds of one command, whose clock other work on the machine does not move; and seconds in all."""
_MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
_MODELS = tuple(f"{model}/{name}" for model in ("base", "a") for name in _MODEL)
_TASK = ("tasks/tiny_choice.yaml", "tasks/tiny_choice.jsonl")
_RUN = tuple(
    f"run/{name}"
    for name in ("resolved.yaml", "environment.json", "study.log", "result.json", "search.yaml", "scores/*", "log.txt")
)

COMMANDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "merge": (("merge", "recipe.yaml", "out"), ("recipe.yaml", *_MODELS)),
    "check a recipe": (("check", "recipe.yaml"), ("recipe.yaml", *_MODELS)),
    "init": (("init", "base", "a", "-o", "out.yaml"), _MODELS),
    "status": (("status", "run", "--json"), _RUN),
    "lineage": (("lineage", "run", "--json"), _RUN),
    "export a recipe": (("export", "run", "out.yaml", "--recipe"), _RUN),
    "eval": (
        ("eval", "a", "--tasks", "tiny_choice", "--include-path", "tasks", "--limit", "2", "--json"),
        (*_MODELS, *_TASK),
    ),
    "check a search": (("check", "search.yaml"), ("search.yaml", *_MODELS, *_TASK)),
    "resume": (("resume", "run"), (*_RUN, *_MODELS, *_TASK)),
    "run": (("run", "search.yaml", "--dir", "out"), ("search.yaml", *_MODELS, *_TASK)),
}
"""What a command is called with, and the files that it reads."""

QUICK = ("merge", "check a recipe", "init", "status", "lineage", "export a recipe", "eval")
"""Commands of under a second."""


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        bit = chance.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(max(1, path.stat().st_size)))


def _replaced(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, chance: random.Random) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: Mapping[str, Callable[[Path, random.Random], None]] = {
    "missing": lambda path, chance: path.unlink(),
    "empty": lambda path, chance: os.truncate(path, 0),
    "truncated": _cut,
    "one bit flipped": _flip,
    "null": _replaced(lambda path: path.write_text("null\n")),
    "a list": _replaced(lambda path: path.write_text("[1, [2], {}]\n")),
    "a mapping": _replaced(lambda path: path.write_text('{"x": 1}\n')),
    "text": _replaced(lambda path: path.write_text("some words\n")),
    "no text": _replaced(lambda path: path.write_bytes(bytes(range(256)))),
    "deep": _replaced(lambda path: path.write_text("[" * 5000)),
    "a folder": _replaced(lambda path: path.mkdir()),
    "a pipe": _replaced(os.mkfifo),
    "a link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "no permission": lambda path, chance: path.chmod(0),
    "changed in the middle": _flip,
}


@dataclass(frozen=True)
class Attempt:
    """One command, the file that was damaged, how, and what came of it: "survived", "refused", or what is broken."""

    command: str
    file: str
    damage: str
    seed: int
    outcome: str

    @property
    def broken(self) -> bool:
        """Whether it came to anything that may not be."""
        return self.outcome not in ("survived", "refused")


class World:
    """A folder in which commands are tried, again and again from the same files.

    Args:
        folder: An empty folder.
        family: Tiny models, "base", "a" and "b" among them.
    """

    def __init__(self, folder: Path, family: Mapping[str, Path]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        commands = ("search", "export", "init", "evaluate", "check", "merge")
        self._context.set_forkserver_preload([__name__, *(f"evomerge.run.{name}" for name in commands)])
        self._pristine, self.folder, self._logs = (folder / name for name in ("pristine", "world", "logs"))
        self._logs.mkdir()
        self._pristine.mkdir()
        for name in ("base", "a", "b"):
            shutil.copytree(family[name], self._pristine / name)
            (self._pristine / name / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
        (self._pristine / "tasks").mkdir()
        for path in TASKS.glob("tiny_choice.*"):
            shutil.copy(path, self._pristine / "tasks")
        models = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
        recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
        (self._pristine / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        search = {
            "name": "tiny",
            "models": {"base": "base", "sources": {"a": "a", "b": "b"}},
            "space": {"methods": ["linear"], "layer_groups": 1},
            "evaluation": {
                "include_path": "tasks",
                "tasks": ["tiny_choice"],
                "scale": "raw",
                "dtype": "float32",
                "splits": {"search": 4, "select": 4, "test": 4},
            },
            "search": {"candidates": 4, "population": 2},
            "run": {"keep": 0},
        }
        (self._pristine / "search.yaml").write_text(json.dumps(search))
        self._reset()
        code, _, said = self._call(("run", "search.yaml", "--dir", "run"))
        if code:
            raise RuntimeError(f"the undamaged run failed: {said}")
        shutil.copytree(self.folder / "run", self._pristine / "run")
        self._expected: dict[str, str] = {}

    def files(self, command: str) -> list[str]:
        """The files that a command reads, patterns written out."""
        patterns = COMMANDS[command][1]
        paths = (path for pattern in patterns for path in sorted(self._pristine.glob(pattern)))
        return [path.relative_to(self._pristine).as_posix() for path in paths]

    def attempt(self, command: str, file: str, damage: str, seed: int) -> Attempt:
        """Tries a command on a damaged file."""
        arguments, chance = COMMANDS[command][0], random.Random(seed)
        own = file.startswith("run/")
        if own and command not in self._expected:
            self._reset()
            self._expected[command] = self._call(arguments)[1]
        self._reset()
        before = self._contents()
        middle = damage == "changed in the middle"
        path = self.folder / file
        if not middle:
            DAMAGES[damage](path, chance)
        code, out, err = self._call(arguments, (lambda: DAMAGES[damage](path, chance)) if middle else None, chance)
        if path.is_file() and damage == "no permission":
            path.chmod(0o600)
        outcome = self._judge(code, out, err, file, self._expected.get(command) if own and not middle else None)
        changed = {name for name, content in self._contents().items() if before.get(name, content) != content}
        changed |= before.keys() - self._contents().keys()
        lost = {name for name in changed if not name.startswith("run/") and name != file}
        return Attempt(command, file, damage, seed, f"changed: {sorted(lost)}" if lost else outcome)

    def _judge(self, code: int | None, out: str, err: str, file: str, expected: str | None) -> str:
        if code is None:
            return f"no end after {PATIENCE} s"
        if code == -signal.SIGXCPU:
            return f"no end after {LIMIT} s of a processor"
        if "Traceback (most recent call last)" in err or code not in (0, 1, 2):
            return f"exit {code}: {err.strip()[-300:]}"
        if code == 0:
            return "survived" if expected in (None, out) else f"another result than undamaged: {out[:200]}"
        names = {Path(file).name, Path(file).stem, Path(file).parent.name or file}
        return "refused" if any(name in err for name in names) else f"refused without naming {file}: {err[-300:]}"

    def _reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._pristine, self.folder)

    def _contents(self) -> dict[str, bytes]:
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file() and not path.is_symlink())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    def _call(
        self,
        arguments: tuple[str, ...],
        middle: Callable[[], object] | None = None,
        chance: random.Random | None = None,
    ) -> tuple[int | None, str, str]:
        """Runs a command in a fork of a process that has the packages loaded: exit status, output, errors.

        That process computes nothing: torch cannot go on in the fork of one whose threads have worked.
        """
        out, err = self._logs / "out", self._logs / "err"
        child = self._context.Process(target=_run, args=(arguments, self.folder, out, err, dict(os.environ)))
        child.start()
        if middle is not None:
            time.sleep((chance or random.Random(0)).uniform(0, 0.7))
            middle()
        child.join(PATIENCE)
        if child.exitcode is None:
            child.kill()
            child.join()
            return None, "", ""
        return child.exitcode, out.read_text(), err.read_text(errors="replace")


def _run(arguments: tuple[str, ...], folder: Path, out: Path, err: Path, environment: Mapping[str, str]) -> None:
    """The forked process: the command line as it is, its streams in files; never returns."""
    code = 1
    try:
        os.environ.update(environment)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        os.chdir(folder)
        sys.argv = ["evomerge", *arguments]
        import torch

        from evomerge.cli.main import main

        torch.set_num_threads(1)
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
