"""The command line: results on stdout, progress and logs on stderr, heavy imports inside the commands."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, get_args

import typer

from evomerge.cli.dare import dare
from evomerge.cli.merge import Crimes, Truncate, merge
from evomerge.errors import BadInput, EvoMergeError
from evomerge.evaluation.backends.registry import BackendName
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


_WATCH_SECONDS = 10.0
_SHOWN = 20  # candidates of a list

RunFolder = Annotated[Path, typer.Argument(help="A run folder, such as runs/NAME.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest file of the checkpoint, such as 5GB.")]
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
Candidate = Annotated[int | None, typer.Option("--candidate", help="A candidate's number; default: the winner.")]


@app.command()
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


@app.command()
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


@app.command()
def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Progress of a run, its best candidate so far, its rate and the time left."""
    from evomerge.report.tables import status_text
    from evomerge.run.status import read_status

    state = read_status(run)
    typer.echo(json.dumps(state.to_json(), indent=2) if as_json else status_text(state))


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command("extract-lora")
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


app.command()(merge)
app.command()(dare)


def _as_lm_eval(*names: str, **more: Any) -> Any:
    """An option by the names that it has here and in lm_eval, where words are joined by underscores."""
    spelt = [name.replace("-", "_").replace("__", "--", 1) for name in names]
    return typer.Option(*dict.fromkeys((*names, *spelt)), **more)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, base+adapter, zoo:NAME.", show_default=False)],
    tasks: Annotated[
        str,
        typer.Option(help="lm-eval tasks, groups, tags, patterns, YAML files, by commas.", show_default=False),
    ],
    include_path: Annotated[
        list[Path] | None, _as_lm_eval("--include-path", help="Folder with more task files.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Only the first N items of each task; a part, below 1.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto: the faster of the first two here.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    batch_tokens: Annotated[
        int | None, _as_lm_eval("--batch-tokens", help="Tokens a batch.", min=16, show_default="what suits")
    ] = None,
    num_fewshot: Annotated[
        int | None, _as_lm_eval("--num-fewshot", help="Examples before each question.", min=0)
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        _as_lm_eval("--gen-kwargs", help="Generation settings in place of the tasks': JSON, or key=value,..."),
    ] = None,
    max_length: Annotated[int | None, _as_lm_eval("--max-length", help="Longest input in tokens.", min=8)] = None,
    chat: Annotated[bool, _as_lm_eval("--apply-chat-template", help="Render prompts as conversations.")] = False,
    multiturn: Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
            "--fewshot_as_multiturn/--no_fewshot_as_multiturn",
            help="Examples as turns.",
        ),
    ] = None,
    system_instruction: Annotated[
        str | None, _as_lm_eval("--system-instruction", help="What every prompt begins with.")
    ] = None,
    chat_template: Annotated[
        Path | None, _as_lm_eval("--chat-template", help="File with a chat template, for the model's own.")
    ] = None,
    chat_template_args: Annotated[
        str | None,
        _as_lm_eval("--chat-template-args", help="What the template is rendered with: JSON, or key=value,..."),
    ] = None,
    think_end_token: Annotated[
        str | None, _as_lm_eval("--think-end-token", help="What ends the model's thinking; only the rest counts.")
    ] = None,
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(get_args(BackendName))}.")] = "native",
    bootstrap_iters: Annotated[
        int, _as_lm_eval("--bootstrap-iters", help="Samples for the errors of metrics such as f1; 0: none.", min=0)
    ] = 200,
    output_path: Annotated[
        Path | None, _as_lm_eval("--output-path", help="Folder for lm-eval's own result files.")
    ] = None,
    log_samples: Annotated[bool, _as_lm_eval("--log-samples", help="Write every sample there, too.")] = False,
    unsafe_code: Annotated[
        bool, _as_lm_eval("--confirm-run-unsafe-code", help="Tasks may run programs that the model writes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score any checkpoint with the same evaluator that a search uses."""
    from evomerge.report.tables import score_table
    from evomerge.run.evaluate import evaluate as evaluate_model

    result = evaluate_model(
        model,
        _names(tasks),
        include_path=[str(path) for path in include_path or []],
        limit=limit,
        dtype=dtype,
        device=device,
        batch_tokens=batch_tokens,
        num_fewshot=num_fewshot,
        gen_kwargs=gen_kwargs,
        max_length=max_length,
        apply_chat_template=chat,
        fewshot_as_multiturn=multiturn,
        system_instruction=system_instruction,
        chat_template=chat_template,
        chat_template_args=chat_template_args,
        think_end_token=think_end_token,
        backend=backend,
        bootstrap_iters=bootstrap_iters,
        output_path=output_path,
        log_samples=log_samples,
        confirm_run_unsafe_code=unsafe_code,
        warn=lambda text: typer.echo(f"warning: {text}", err=True),
    )
    typer.echo(json.dumps(result.to_json(), indent=2) if as_json else score_table(result.tasks, result.groups))


@app.command()
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


@app.command()
def init(
    models: Annotated[list[str], typer.Argument(help="Folders, Hub ids, base+adapter, zoo:NAME.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The ancestor; else it is looked for among the models.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("search.yaml"),
    tasks: Annotated[str, typer.Option(help="lm-eval tasks to search on, separated by commas.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Look at models: how they differ, whether they can be merged; write a search.yaml to start from."""
    from evomerge.run.init import init_search

    typer.echo(init_search(models, output, base=base, tasks=_names(tasks), overwrite=overwrite))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in detail.", show_default=False)] = None,
) -> None:
    """The merge methods and their parameters."""
    from evomerge.report.tables import method_table

    typer.echo(method_table(name))


@app.command()
def schema(
    of: Annotated[str, typer.Argument(metavar="search|recipe", help="What to describe.", show_default=False)],
) -> None:
    """Print the JSON Schema of a search.yaml or a recipe, for editors."""
    from evomerge.recipe.json_schema import recipe_schema
    from evomerge.spec.json_schema import search_schema

    schemas = {"search": search_schema, "recipe": recipe_schema}
    if of not in schemas:
        raise BadInput(f"'{of}' has no schema: choose search or recipe")
    typer.echo(json.dumps(schemas[of](), indent=2))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _interruptible() -> None:
    """Has SIGTERM stop a search as Ctrl-C does: resumable, exit code 130."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


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
