"""`evomerge status`, `candidates`, `lineage`, `report`, `export`, `push`: what a run found; `extract-lora`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from evomerge.cli.options import AsJson, Overwrite, RunFolder
from evomerge.errors import BadInput

_WATCH_SECONDS = 10.0
_SHOWN = 20  # candidates of a list

ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest file of the checkpoint, such as 5GB.")]
Candidate = Annotated[int | None, typer.Option("--candidate", help="A candidate's number; default: the winner.")]


def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Progress of a run, its best candidate so far, its rate and the time left."""
    from evomerge.report.tables import status_text
    from evomerge.run.status import read_status

    state = read_status(run)
    typer.echo(json.dumps(state.to_json(), indent=2) if as_json else status_text(state))


def candidates(
    run: RunFolder,
    sort: Annotated[
        Literal["fitness", "number", "time"], typer.Option(help="Best first, in order, slowest first.")
    ] = "fitness",
    state: Annotated[
        Literal["done", "failed", "pruned"] | None, typer.Option(help="Only these.", show_default="all")
    ] = None,
    made_by: Annotated[str, typer.Option("--made-by", help="Only those whose operator contains this.")] = "",
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", help="How many.", min=1, show_default="20; all as CSV")
    ] = None,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV: all of the record, scores and genes included.")
    ] = False,
) -> None:
    """The candidates of a run, sorted and filtered."""
    from evomerge.report.candidates import candidate_csv, list_candidates
    from evomerge.report.tables import candidate_table
    from evomerge.run.folder import RunFolder as Folder

    folder = Folder.existing(run)
    chosen = list_candidates(folder.candidates(), sort=sort, state=state, made_by=made_by)
    names = folder.spec.objectives
    if csv:
        typer.echo(candidate_csv(chosen[:limit], names), nl=False)
        return
    shown = chosen[: limit or _SHOWN]
    typer.echo(candidate_table(shown, names))
    if len(shown) < len(chosen):
        typer.echo(f"{len(shown)} of {len(chosen)}; --limit N shows more, --csv all")


def lineage(
    run: RunFolder,
    candidate: Candidate = None,
    as_json: AsJson = False,
    dot: Annotated[bool, typer.Option("--dot", help="Print a Graphviz graph.")] = False,
) -> None:
    """The ancestry of a candidate, back to generation 0, and what changed in the recipe at each step."""
    from evomerge.report.lineage import ancestry, to_dot
    from evomerge.report.lineage import lineage as lineage_records
    from evomerge.run.folder import RunFolder as Folder

    folder = Folder.existing(run)
    if as_json:
        typer.echo(json.dumps(lineage_records(folder.candidates()), indent=2))
    elif dot:
        typer.echo(to_dot(folder.candidates(), candidate))
    else:
        from evomerge.report.run_data import shortened
        from evomerge.run.report import read_run

        data = read_run(run)
        number = folder.winner(data.history) if candidate is None else candidate
        typer.echo(
            ancestry(data.history, number, lambda c: {p: shortened(texts) for p, texts in data.changes(c).items()})
        )


def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Argument(help="The HTML file.", show_default="RUN/report.html")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Folder for the numbers behind each picture.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Write it again and again while the run goes on.")] = False,
) -> None:
    """Write a page with pictures: how good the winner is, what it is made of, how it was found."""
    from evomerge.run.report import watch_report, write_report

    if watch:
        watch_report(run, out, csv, _WATCH_SECONDS, typer.echo)
    else:
        typer.echo(write_report(run, out, csv=csv))


def export(
    run: RunFolder,
    out: Annotated[
        Path, typer.Argument(help="The checkpoint's folder; with --recipe a YAML file.", show_default=False)
    ],
    candidate: Candidate = None,
    recipe: Annotated[bool, typer.Option("--recipe", help="Write the recipe alone.")] = False,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Write a LoRA adapter over the base instead.", min=1, max=100_000)
    ] = None,
    overwrite: Overwrite = False,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Write a run's winner, or any candidate, as a Hugging Face checkpoint, and score it once more."""
    from evomerge.run.export import export_candidate, export_recipe

    if recipe and lora is not None:
        raise BadInput("--recipe writes the recipe alone, --lora an adapter: choose one")
    if recipe:
        export_recipe(run, out, candidate=candidate, overwrite=overwrite)
    elif lora is not None:
        from evomerge.run.sharing.lora import export_adapter

        typer.echo(export_adapter(run, out, rank=lora, candidate=candidate, overwrite=overwrite))
    else:
        text = export_candidate(run, out, candidate=candidate, overwrite=overwrite, max_shard_size=max_shard_size)
        typer.echo(text)


def push(
    run: RunFolder,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to, on the Hub.", show_default=False)],
    candidate: Candidate = None,
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; else it is private.")] = False,
    message: Annotated[
        str | None, typer.Option("--message", help="Of the commit.", show_default="which candidate it is")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Send nothing; list what would go up.")] = False,
) -> None:
    """Upload a run's winner, or any candidate, to the Hugging Face Hub: checkpoint, card, recipe, report, search."""
    from evomerge.run.sharing.push import push_candidate

    typer.echo(
        push_candidate(
            run,
            repository,
            candidate=candidate,
            public=public,
            message=message,
            dry_run=dry_run,
            report=lambda text: typer.echo(text, err=True),
        )
    )


def extract_lora(
    model: Annotated[str, typer.Argument(help="The fine-tune: a folder, a Hub id.", show_default=False)],
    base: Annotated[str, typer.Argument(help="What it was tuned from.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The adapter's folder.", show_default=False)],
    rank: Annotated[int, typer.Option(help="Rank of the adapter.", min=1, max=100_000)] = 32,
    overwrite: Overwrite = False,
) -> None:
    """Write what a model has beyond its base as a LoRA adapter, in PEFT's format."""
    from evomerge.run.sharing.lora import extract_adapter

    typer.echo(extract_adapter(model, base, out, rank=rank, overwrite=overwrite))
