"""`evomerge eval`: lm_eval's options, spelt as there or with dashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from evomerge.cli.options import AsJson, listed
from evomerge.evaluation.backends.registry import BackendName


def _as_lm_eval(*names: str, **more: Any) -> Any:
    """An option by the names that it has here and in lm_eval, where words are joined by underscores."""
    spelt = [name.replace("-", "_").replace("__", "--", 1) for name in names]
    return typer.Option(*dict.fromkeys((*names, *spelt)), **more)


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
        listed(tasks),
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
