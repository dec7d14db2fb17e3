"""`evomerge init`, `check`, `run` and `resume`."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer

from evomerge.cli.merge import Crimes, Truncate
from evomerge.cli.options import RunFolder, listed

Workers = Annotated[
    int | None, typer.Option(help="Processes that score candidates, instead of the file's.", min=1, max=1024)
]
Executor = Annotated[
    Literal["local", "ray"] | None,
    typer.Option(help="Who they are, instead of the file's: processes, or actors of Ray."),
]
RayAddress = Annotated[str | None, typer.Option(help="HOST:PORT of a Ray cluster, or auto, instead of the file's.")]
AcceptEdited = Annotated[bool, typer.Option("--accept-edited", help="Go on with a run's files that were edited.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="A line for each candidate.")]


def run(
    search: Annotated[str, typer.Argument(help="A search.yaml, or a shipped one's name.", show_default=False)],
    candidates: Annotated[int | None, typer.Option(help="Budget instead of the file's.", min=1, max=10**7)] = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="Run folder instead of the file's.")] = None,
    workers: Workers = None,
    executor: Executor = None,
    ray_address: RayAddress = None,
    accept_edited: AcceptEdited = False,
    verbose: Verbose = False,
) -> None:
    """Search for the best merge; on a run that exists already, go on with it."""
    from evomerge.report.tables import result_table
    from evomerge.run.preflight import load_search
    from evomerge.spec.load import find_search

    _interruptible()
    path = find_search(search)
    spec = load_search(path)
    from evomerge.run.search import start  # only now: what it loads takes seconds
    from evomerge.trackers.console import ConsoleTracker
    from evomerge.trackers.registry import with_trackers

    result = start(
        spec,
        source=path,
        candidates=candidates,
        folder=directory,
        workers=workers,
        executor=executor,
        ray_address=ray_address,
        accept_edited=accept_edited,
        tracker=with_trackers(ConsoleTracker(verbose=verbose), spec.run.track),
    )
    typer.echo(result_table(result))


def resume(
    run: RunFolder,
    candidates: Annotated[
        int | None, typer.Option(help="Extend the budget to this many candidates.", min=1, max=10**7)
    ] = None,
    workers: Workers = None,
    executor: Executor = None,
    ray_address: RayAddress = None,
    accept_edited: AcceptEdited = False,
    verbose: Verbose = False,
) -> None:
    """Go on with a search from where it stopped."""
    from evomerge.report.tables import result_table
    from evomerge.run.folder import RunFolder as Folder
    from evomerge.run.search import resume as resume_run
    from evomerge.trackers.console import ConsoleTracker
    from evomerge.trackers.registry import with_trackers

    _interruptible()
    names = Folder.existing(run, accept_edited=accept_edited).spec.run.track
    result = resume_run(
        run,
        candidates=candidates,
        workers=workers,
        executor=executor,
        ray_address=ray_address,
        accept_edited=accept_edited,
        tracker=with_trackers(ConsoleTracker(verbose=verbose), names),
    )
    typer.echo(result_table(result))


def check(
    file: Annotated[
        str, typer.Argument(help="A search.yaml or a recipe, or a shipped search's name.", show_default=False)
    ],
    allow_crimes: Crimes = False,
    truncate_vocabulary: Truncate = False,
    sources: Annotated[bool, typer.Option("--sources", help="Also survey a search's sources, in a minute.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only plan memory, from the models' headers.")] = False,
    device_memory: Annotated[float | None, typer.Option(help="GB that the device has, for a plan.")] = None,
    host_memory: Annotated[float | None, typer.Option(help="GB that the machine has, for a plan.")] = None,
) -> None:
    """Find everything that can be wrong with a search or a recipe, in seconds; estimate what it needs."""
    from evomerge.run.check import PlanOnly, check_file
    from evomerge.spec.load import find_search

    path = find_search(file)
    device, host = (None if size is None else int(size * 1e9) for size in (device_memory, host_memory))
    only = PlanOnly(host, device) if plan or device is not None or host is not None else None
    options = {"allow_crimes": allow_crimes, "truncate_vocabulary": truncate_vocabulary, "sources": sources}
    typer.echo(check_file(path, **options, plan=only))


def init(
    models: Annotated[list[str], typer.Argument(help="Folders, Hub ids, base+adapter, zoo:NAME.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The ancestor; else it is looked for among the models.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("search.yaml"),
    tasks: Annotated[str, typer.Option(help="lm-eval tasks to search on, separated by commas.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Look at models: how they differ, whether they can be merged; write a search.yaml to start from."""
    from evomerge.run.init import init_search

    typer.echo(init_search(models, output, base=base, tasks=listed(tasks), overwrite=overwrite))


def _interruptible() -> None:
    """Has SIGTERM stop a search as Ctrl-C does: resumable, exit code 130."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
