"""`evomerge merge`: its own options, and those that people type by habit after mergekit-yaml."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.errors import BadInput

if TYPE_CHECKING:
    from evomerge.recipe import Recipe

# mergekit-yaml's options that change nothing here, with the reason: for the help, and for a note when one is given.
WITHOUT_EFFECT: Mapping[str, str] = {
    "lazy_unpickle": "files are memory-mapped in any case",
    "low_cpu_memory": "tensors are streamed and memory is bounded in any case",
    "read_to_gpu": "tensors go to the device as they are needed",
    "multi_gpu": "one device computes",
    "clone_tensors": "a layer that occurs twice is written twice in any case",
    "async_write": "tensors are written while others are merged in any case",
    "write_threads": "see --num-threads",
    "lora_merge_cache": "adapters are applied tensor by tensor and nothing is stored",
    "lora_merge_dtype": "adapters are applied in float32 and rounded once",
    "unsafe_truncate_embeddings": "what happens to vocabularies is the recipe's to say: tokenizer_source",
}
_MERGEKIT_SIZE = re.compile(r"(\d+)([kmb]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def no_effect(name: str) -> str:
    """Gives the line of help of an option that changes nothing."""
    return f"No effect here: {WITHOUT_EFFECT[name]}."


Crimes = Annotated[
    bool,
    typer.Option(
        help="Also merge models whose configs name different architectures. Their tensors still have to fit by name "
        "and shape."
    ),
]

Truncate = Annotated[
    bool,
    typer.Option(
        help="Cut vocabularies of different sizes to the smallest, row by row. Without it, and without a "
        "tokenizer_source in the recipe, they are refused."
    ),
]


def merge(
    context: typer.Context,
    recipe: Annotated[
        Path,
        typer.Argument(help="A recipe, such as a mergekit configuration, of one or more steps.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="The checkpoint's folder.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the checkpoint, such as 5GB.")] = "5GB",
    out_shard_size: Annotated[str | None, typer.Option(help="The same in mergekit's spelling: 5B is 5GB.")] = None,
    copy_tokenizer: Annotated[bool, typer.Option(help="Write a tokenizer with its chat template.")] = True,
    write_model_card: Annotated[bool, typer.Option(help="Write README.md: sources, licences, recipe.")] = True,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Also read pickle checkpoints.")] = False,
    allow_crimes: Crimes = False,
    truncate_vocabulary: Truncate = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Read float8 with scales, and MXFP4, as the numbers they stand for.")
    ] = False,
    tensor_intersection: Annotated[
        bool, typer.Option("--tensor-intersection", help="Leave out tensors that not every model has.")
    ] = False,
    tensor_union: Annotated[
        bool, typer.Option("--tensor-union", help="Refused: a tensor that a model lacks cannot be merged.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, auto.")] = None,
    cuda: Annotated[bool, typer.Option(help="The same as --device cuda.")] = False,
    gpu_rich: Annotated[bool, typer.Option("--gpu-rich", help="The same as --device cuda.")] = False,
    num_threads: Annotated[int | None, typer.Option("--num-threads", "-j", help="Threads to use.", min=1)] = None,
    random_seed: Annotated[int | None, typer.Option(help="Seed in place of the recipe's.", min=0)] = None,
    transformers_cache: Annotated[Path | None, typer.Option(help="Folder for models from the Hub.")] = None,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Say what is read and written.", show_default=False)
    ] = 0,
    quiet: Annotated[
        bool, typer.Option("--quiet/--no-quiet", "-q", help="Neither progress nor warnings nor notes.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Refused: a merge runs no model's code.")] = False,
    safe_serialization: Annotated[bool, typer.Option(help="--no-... is refused: no pickles are written.")] = True,
    lazy_unpickle: Annotated[bool | None, typer.Option(help=no_effect("lazy_unpickle"))] = None,
    low_cpu_memory: Annotated[bool | None, typer.Option(help=no_effect("low_cpu_memory"))] = None,
    read_to_gpu: Annotated[bool | None, typer.Option(help=no_effect("read_to_gpu"))] = None,
    multi_gpu: Annotated[bool | None, typer.Option(help=no_effect("multi_gpu"))] = None,
    clone_tensors: Annotated[bool | None, typer.Option(help=no_effect("clone_tensors"))] = None,
    async_write: Annotated[bool | None, typer.Option(help=no_effect("async_write"))] = None,
    write_threads: Annotated[int | None, typer.Option(help=no_effect("write_threads"))] = None,
    lora_merge_cache: Annotated[str | None, typer.Option(help=no_effect("lora_merge_cache"))] = None,
    lora_merge_dtype: Annotated[str | None, typer.Option(help=no_effect("lora_merge_dtype"))] = None,
    unsafe_truncate_embeddings: Annotated[
        bool | None, typer.Option(help=no_effect("unsafe_truncate_embeddings"))
    ] = None,
) -> None:
    """Carry out one recipe, no search. Takes mergekit-yaml's options too."""
    if trust_remote_code:
        raise BadInput("--trust-remote-code: refused: a merge needs no model's code, tensors are found by their names")
    if tensor_union:
        raise BadInput(
            "--tensor-union: refused: a tensor that a model lacks would be another merge than the recipe's; "
            "--tensor-intersection leaves such tensors out, and evomerge dare takes files that lack some"
        )
    if not safe_serialization:
        raise BadInput("--no-safe-serialization: refused: only safetensors are written")
    if transformers_cache is not None:
        os.environ["HF_HUB_CACHE"] = str(transformers_cache.expanduser().resolve())
    ignored = [name for name in WITHOUT_EFFECT if context.params.get(name) is not None]
    options: dict[str, Any] = {
        "overwrite": overwrite,
        "max_shard_size": max_shard_size if out_shard_size is None else mergekit_size(out_shard_size),
        "allow_pickle": allow_pickle,
        "allow_crimes": allow_crimes,
        "truncate_vocabulary": truncate_vocabulary,
        "dequantize": dequantize,
        "tensor_intersection": tensor_intersection,
        "device": choose_device(device, cuda or gpu_rich),
    }
    if not (copy_tokenizer and write_model_card):
        options["finish"] = lambda folder: _remove(folder, not copy_tokenizer, not write_model_card)
    printer = _Printer(0 if quiet else 1 + verbose)
    for name in ignored:
        printer.note(f"--{name.replace('_', '-')} has no effect here: {WITHOUT_EFFECT[name]}")
    _carry_out(recipe, out, options, printer, seed=random_seed, threads=num_threads)


class _Printer:
    """Prints on stderr as much as was asked for: nothing (0), warnings and progress (1), also what is done (2)."""

    def __init__(self, level: int) -> None:
        self.level = level

    def note(self, text: str) -> None:
        """Prints something odd that the user may want to know."""
        if self.level >= 1:
            typer.echo(f"note: {text}", err=True)

    def warn(self, text: str) -> None:
        """Prints something that is probably not meant."""
        if self.level >= 1:
            typer.echo(f"warning: {text}", err=True)

    def detail(self, text: str) -> None:
        """Prints what is done."""
        if self.level >= 2:
            typer.echo(text, err=True)


def _carry_out(
    path: Path, out: Path, options: dict[str, Any], printer: _Printer, *, seed: int | None, threads: int | None
) -> None:
    import torch

    from evomerge.checkpoints.checkpoint import open_checkpoint
    from evomerge.recipe import load_recipe
    from evomerge.run.merge import merge_to_folder
    from evomerge.trackers.console import tensor_progress

    if threads is not None:
        torch.set_num_threads(threads)
    recipe = load_recipe(path)
    if seed is not None:
        recipe = _seeded(recipe, seed)
    for text in recipe.warnings:
        printer.warn(text)
    if printer.level >= 2:
        for reference in recipe.external_models():
            model = open_checkpoint(reference, allow_pickle=options["allow_pickle"], dequantize=options["dequantize"])
            printer.detail(f"reads {reference}: {len(model.tensors)} tensors, {model.nbytes / 1e9:.3f} GB")
    started = time.monotonic()
    with tensor_progress(printer.level >= 1) as progress:
        folder = merge_to_folder(recipe, out, progress=progress, warn=printer.warn, **options)
    for file in sorted(folder.glob("*.safetensors")):
        printer.detail(f"wrote {file}: {file.stat().st_size / 1e9:.3f} GB")
    printer.detail(
        f"{len(recipe.documents)} merge{'s' * (len(recipe.documents) > 1)} in {time.monotonic() - started:.1f} s"
    )
    typer.echo(str(folder))


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    """Puts another seed in each of a recipe's modules and steps."""
    modules, steps = (tuple(_seeded(one, seed) for one in several) for several in (recipe.modules, recipe.steps))
    return replace(recipe, seed=seed, modules=modules, steps=steps)


def mergekit_size(text: str) -> int:
    """Reads mergekit's sizes: "5B" -> 5,000,000,000 bytes, although its help speaks of parameters.

    Raises:
        BadInput: For anything but a number with K, M or B.
    """
    match = _MERGEKIT_SIZE.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise BadInput(f"--out-shard-size: '{text}' is no size such as 500M or 5B")
    factor: int = _UNITS[match[2].lower()]
    return int(match[1]) * factor


def choose_device(device: str | None, cuda: bool) -> str:
    """Names the device that the options ask for."""
    if device == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return device or ("cuda" if cuda else "cpu")


def _remove(folder: Path, tokenizer: bool, card: bool) -> None:
    """Removes the tokenizer, or the card and the recipe, from a folder that is not an output yet."""
    from evomerge.checkpoints.tokenizer import tokenizer_contents

    names = [*(tokenizer_contents(folder) if tokenizer else ()), *(("README.md", "recipe.yaml") if card else ())]
    for name in names:
        (folder / name).unlink(missing_ok=True)
