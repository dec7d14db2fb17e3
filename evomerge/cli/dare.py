"""`evomerge dare`: DARE over plain safetensors files, from a TOML file, the command line, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from evomerge.errors import BadInput

DEFAULT_OUTPUT = "merged_model.safetensors"


def dare(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="FILE...", help="More files to merge, after those of --merge.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="TOML with [dare] and [models]; what is given here as well wins."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help="The base's safetensors file.")] = None,
    files: Annotated[
        list[str] | None, typer.Option("--merge", "-m", help="A fine-tune's safetensors file; once for each.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help=f"The result. [default: {DEFAULT_OUTPUT}]")
    ] = None,
    drop_rate: Annotated[float | None, typer.Option(help="Probability to drop an element. [default: 0.9]")] = None,
    delta_threshold: Annotated[float | None, typer.Option(help="Warn of larger deltas. [default: 0.002]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the masks. [default: 0]")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done; a file may turn it off.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Neither that nor warnings.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the largest deltas; write nothing.")] = False,
) -> None:
    """Merge plain safetensors files into a base with DARE, each file's drops its own, averaged."""
    from evomerge.run.dare import DareConfig, DareFile, DareMerger, load_dare_file
    from evomerge.trackers.console import tensor_progress

    written = load_dare_file(config) if config else DareFile()
    origin, merged = base or written.base_file, (*(files or []), *(more or [])) or written.merge_files
    missing = [text for text, given in (("base_file: --base", origin), ("merge_files: --merge", merged)) if not given]
    if missing:
        where = f"{config}: models." if config else ""
        raise BadInput([f"{where}{text} is missing: give it here or in a --config file" for text in missing])
    given: dict[str, Any] = {"drop_rate": drop_rate, "delta_threshold": delta_threshold, "seed": seed}
    settings = {**written.settings, **{key: value for key, value in given.items() if value is not None}}
    settings["verbose"] = (verbose or settings.get("verbose", True)) and not quiet
    with tensor_progress(not quiet) as progress:
        merger = DareMerger(
            origin or "",
            merged,
            DareConfig(**settings),
            warn=lambda text: None if quiet else typer.echo(f"warning: {text}", err=True),
            tell=lambda text: typer.echo(text, err=True),
            progress=progress,
        )
        if dry_run:
            typer.echo(_largest(merger.analyze()))
        else:
            typer.echo(str(merger.merge(output or written.output_file or DEFAULT_OUTPUT)))


def _largest(sizes: dict[str, dict[str, float]]) -> str:
    """A table, the largest delta first."""
    from evomerge.report.tables import table

    rows = [(size, tensor, model) for tensor, of in sizes.items() for model, size in of.items()]
    rows.sort(key=lambda row: (-row[0], row[1], row[2]))
    return table(["tensor", "file", "largest delta"], [[tensor, model, f"{size:.6g}"] for size, tensor, model in rows])
