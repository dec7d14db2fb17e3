"""What of a task or a model runs while items are made: Python files, templates of tasks, templates of conversations.

A task file may name functions of Python, which run as the user's own code does: they are named. Jinja is no code to its
writer, so it runs in a sandbox and, where a conversation is rendered, within a limit of time and memory.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError

_SECONDS = 10
_PROBE = f"""
import re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
import jinja2, json
from jinja2.sandbox import ImmutableSandboxedEnvironment
def refuse(text="", *_, **__): raise jinja2.TemplateError(str(text))
env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
env.filters["tojson"] = lambda value, *_, **__: json.dumps(value)
env.globals.update(raise_exception=refuse, strftime_now=lambda form: "2024-01-01")
source = re.sub(r"{{%-?\\s*(end)?generation\\s*-?%}}", "", sys.stdin.read())
turns = [dict(role="user", content="a question"), dict(role="assistant", content="an answer")]
try:
    text = env.from_string(source).render(
        messages=turns, bos_token="<s>", eos_token="</s>", tools=None, documents=None, add_generation_prompt=True
    )
    sys.exit(3 if len(text) > 1_000_000 else 0)
except MemoryError:
    sys.exit(4)
except Exception:
    sys.exit(0)
"""


def sandbox_templates() -> None:
    """Has lm-eval render the templates of tasks where they reach nothing but their document.

    lm-eval has no setting for it: its one environment is a variable of a module.
    """
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    if isinstance(lm_eval.utils.env, SandboxedEnvironment):
        return
    own = lm_eval.utils.env
    sandbox = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    sandbox.filters.update(own.filters)
    lm_eval.utils.env = sandbox


def refuse_pipes(folders: Iterable[Path]) -> None:
    """Refuses folders of task files in which one is a pipe or a device, which nobody would ever finish reading.

    Raises:
        TaskError: With the names of all such files.
    """
    files = (path for folder in folders for path in folder.rglob("*.yaml"))
    pipes = [str(path) for path in files if path.exists() and not (path.is_file() or path.is_dir())]
    if pipes:
        raise TaskError([f"include_path: {path} is not an ordinary file" for path in sorted(pipes)])


def require_bounded(template: str) -> None:
    """Renders a short conversation in a process of its own, with limits, before any is rendered here.

    Raises:
        TaskError: The template takes too long, or too much memory, or writes a text without measure.
    """
    try:
        code = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE],
            input=template.encode(errors="replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=6 * _SECONDS,
        ).returncode
    except subprocess.TimeoutExpired:
        code = -1
    if code:
        raise TaskError(
            f"the chat template does not render two short turns within {_SECONDS} s, 1 GiB of memory and a million "
            "characters: it is broken, or means harm"
        )


def python_files(task: Any) -> tuple[Path, ...]:
    """Lists the files of Python that a task of lm-eval's runs, beside those that come with installed packages."""
    functions = [*_functions(vars(task.config) if hasattr(task, "config") else {}), *_methods(type(task))]
    files = (Path(code.co_filename) for function in functions if (code := getattr(function, "__code__", None)))
    return tuple(sorted({file for file in files if file.is_file() and "site-packages" not in file.parts}))


def _functions(value: Any) -> Iterator[Any]:
    """The functions in a task's settings, however deep."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _functions(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _functions(part)
    elif callable(value):
        yield value
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("lm_eval"):
        yield from _functions(vars(value))


def _methods(kind: type) -> Iterator[Any]:
    """The methods of a task that is a class of its own."""
    if not kind.__module__.startswith(("lm_eval.", "evomerge.")):
        yield from (value for value in vars(kind).values() if callable(value))
