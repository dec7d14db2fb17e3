"""The command line, all commands joined: results on stdout, progress and logs on stderr, heavy imports inside them."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer

from evomerge.cli.dare import dare
from evomerge.cli.evaluate import evaluate
from evomerge.cli.merge import merge
from evomerge.cli.results import candidates, export, extract_lora, lineage, push, report, status
from evomerge.cli.search import check, init, resume, run
from evomerge.errors import BadInput, EvoMergeError
from evomerge.system.memory import collect_rarely
from evomerge.system.streams import discard, prepare_streams

app = typer.Typer(
    name="evomerge",
    help="Evolve the best merge of the models you already have, on the benchmarks you care about.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
STOPPED = 130


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"evomerge {metadata.version('evomerge')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Evolve the best merge of the models you already have, on the benchmarks you care about."""


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in detail.", show_default=False)] = None,
) -> None:
    """The merge methods and their parameters."""
    from evomerge.report.tables import method_table

    typer.echo(method_table(name))


def schema(
    of: Annotated[str, typer.Argument(metavar="search|recipe", help="What to describe.", show_default=False)],
) -> None:
    """Print the JSON Schema of a search.yaml or a recipe, for editors."""
    from evomerge.recipe.json_schema import recipe_schema
    from evomerge.spec.schema import search_schema

    schemas = {"search": search_schema, "recipe": recipe_schema}
    if of not in schemas:
        raise BadInput(f"'{of}' has no schema: choose search or recipe")
    typer.echo(json.dumps(schemas[of](), indent=2))


_COMMANDS: tuple[Callable[..., None], ...] = (
    *(run, resume, status, candidates, lineage, report, export, push, extract_lora, merge, dare, evaluate),
    *(check, init, methods, schema),
)
for command in _COMMANDS:
    app.command("eval" if command is evaluate else None)(command)


def main() -> None:
    """Entry point: our own errors, and what the system refuses, become messages and exit codes; a bug keeps its
    traceback."""
    prepare_streams()
    collect_rarely()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where other processes compete for the cores, threads that spin at every barrier make scoring six times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    code = _exit_code()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _system_error(error)
    if code == STOPPED:
        _say("stopped; the same command goes on from here")
    sys.exit(code)


def _exit_code() -> int:
    """Carries out the command line; its exit code, after what went wrong has been told."""
    try:
        code = app(standalone_mode=False)
    except EvoMergeError as error:
        for problem in error.problems if isinstance(error, BadInput) else (str(error),):
            _say(f"error: {problem}")
        return error.exit_code
    except KeyboardInterrupt:
        return STOPPED
    except typer.Abort as error:
        if isinstance(error.__cause__, EOFError):  # typer takes the end of any file for the user's Ctrl-D
            raise error.__cause__ from None
        return STOPPED
    except OSError as error:
        return _system_error(error)
    except Exception as error:
        if not (hasattr(error, "exit_code") and hasattr(error, "show")):
            raise
        error.show()  # a usage error of the command line itself
        return int(error.exit_code)
    return code if isinstance(code, int) else 0  # typer itself turns Ctrl-C into that code


def _system_error(error: OSError) -> int:
    """Says what the system refused, and of which file."""
    if error.errno != errno.EPIPE:  # where whoever reads our output has seen enough
        _say(f"error: {error.filename or 'the standard output'}: {error.strerror or error}")
    discard(1)  # what is left of the output would fail again at the exit
    return EvoMergeError.exit_code


def _say(text: str) -> None:
    """Prints a line on the standard error, where that takes one."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # the exit status is all that can be told
        discard(2)
