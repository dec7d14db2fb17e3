"""A recipe to a checkpoint: its earlier steps first, each a temporary checkpoint beside the output."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.checkpoints.checkpoint import Checkpoint, open_checkpoint, open_checkpoints
from evomerge.checkpoints.header import TensorSpec, name_some
from evomerge.checkpoints.matching.compatible import mixed_architectures
from evomerge.checkpoints.matching.reconcile import reconcile, selected
from evomerge.checkpoints.tensors import UnwrittenTensor, UnwrittenWeights
from evomerge.checkpoints.writer import refuse_taken
from evomerge.engine.described_model import refuse_moved_layers
from evomerge.engine.execute import find_device
from evomerge.engine.to_disk import Progress, refuse_inputs, write_checkpoint
from evomerge.errors import BadInput, CheckpointError, OutputError
from evomerge.planning.plan import Plan, align_and_plan
from evomerge.recipe import Recipe
from evomerge.report.model_card import merge_card
from evomerge.system.files import expand_home
from evomerge.system.inputs import Inputs
from evomerge.system.locks import exclusive

if TYPE_CHECKING:
    pass


def merge_to_folder(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    allow_pickle: bool = False,
    dequantize: bool = False,
    tensor_intersection: bool = False,
    device: str = "cpu",
    allow_crimes: bool = False,
    truncate_vocabulary: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = warnings.warn,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Carries out a recipe, its earlier steps first.

    Args:
        recipe: What to merge.
        out: The checkpoint's folder, made by this call.
        overwrite: Replace a folder that is there.
        max_shard_size: Largest file: bytes, or text such as "5GB".
        allow_pickle: Also read pickle checkpoints.
        dequantize: Read float8 weights with their scales, and MXFP4, as the numbers that they stand for.
        tensor_intersection: Leave out tensors that not every model has.
        device: Where to compute: "cpu", or a device of torch such as "cuda:0", to which tensors are sent one by one.
        allow_crimes: Also merge models of different architectures, whose tensors still have to fit by name and shape.
        truncate_vocabulary: Cut vocabularies of different sizes to the smallest where the recipe has no tokenizer
            source; they are refused otherwise.
        progress: Called with (tensors written, tensors in all), by the thread that wrote the last one; for each step
            anew.
        warn: Called with what is odd but possible.
        finish: Called with the folder before it gets its final name, to add to it or take from it.

    Returns:
        `out`: weights, config, tokenizer and whatever small files lie beside the first model, a card and the recipe.

    Raises:
        BadInput: When the recipe or a checkpoint cannot be used; found before anything is written.
        OutputError: When writing fails; what was there before is intact.
    """
    find_device(device)
    out = expand_home(out)
    checkpoints = open_checkpoints(recipe.external_models(), allow_pickle=allow_pickle, dequantize=dequantize)
    if not allow_crimes:
        refuse_crimes(checkpoints)
    if tensor_intersection:
        checkpoints = _common_tensors(checkpoints, warn)
    refuse_inputs(out, checkpoints)
    refuse_taken(out.resolve(), overwrite)
    inputs = Inputs(file for checkpoint in checkpoints.values() for file in checkpoint.inputs)

    def carry_out(document: Recipe, opened: Mapping[str, Checkpoint], folder: Path, **options: Any) -> None:
        plan, aligned, warnings_ = align_and_plan(
            document, opened, identify=False, truncate_vocabulary=truncate_vocabulary
        )
        refuse_moved_layers(plan, aligned)
        for text in warnings_:
            warn(text)
        write_checkpoint(plan, aligned, folder, device=device, progress=progress, warn=warn, **options)

    first = functools.partial(carry_out, card="")
    with step_results(recipe, checkpoints, out, first, truncate_vocabulary=truncate_vocabulary) as opened:
        card = merge_card(recipe, opened, identify=False)

        def complete(folder: Path) -> None:
            inputs.renew(sampled=True)
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            if finish is not None:
                finish(folder)

        carry_out(recipe, opened, out, card=card, overwrite=overwrite, max_shard_size=max_shard_size, finish=complete)
    return out


def _common_tensors(checkpoints: Mapping[str, Checkpoint], warn: Callable[[str], None]) -> dict[str, Checkpoint]:
    """The models without the tensors that one of them lacks; says of each what it loses."""
    named = reconcile(checkpoints).checkpoints
    common = set.intersection(*(set(model.tensors) for model in named.values()))
    for reference, model in named.items():
        if lost := sorted(model.tensors.keys() - common):
            warn(f"{reference}: without {name_some(lost)}, which not every model has")
    return {reference: selected(model, common.__contains__) for reference, model in named.items()}


def refuse_crimes(checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raises CheckpointError where the models' configs name different architectures."""
    if mixed := mixed_architectures(checkpoints):
        raise CheckpointError(f"{mixed}: if that is meant, allow it with --allow-crimes; tensors still have to fit")


class CarryOut(Protocol):
    """Carries out one merge, its models open, into a folder."""

    def __call__(self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint], out: Path, /) -> None: ...


@contextmanager
def step_results(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    out: Path,
    carry_out: CarryOut,
    *,
    truncate_vocabulary: bool = False,
) -> Iterator[Mapping[str, Checkpoint]]:
    """Carries out the steps of a recipe; their results last as long as the block.

    Args:
        recipe: The recipe.
        checkpoints: Its external models, open, by reference.
        out: Where the final result will be; temporary folders are made beside it and removed, whatever happens.
        carry_out: Carries out one step.
        truncate_vocabulary: As for `merge_to_folder`.

    Yields:
        The checkpoints that the final merge reads, by reference.

    Raises:
        BadInput: Something is wrong with a step; as far as headers tell, that is found before the first is written.
        OutputError: When writing fails.
    """
    if not recipe.steps:
        yield checkpoints
        return
    plan_documents(recipe, checkpoints, truncate_vocabulary=truncate_vocabulary)
    opened = dict(checkpoints)
    with _folder_beside(out) as folder:
        for number, step in enumerate(recipe.steps, start=1):
            result = folder / f"step-{number}"
            carry_out(step, opened, result)
            opened |= {reference: _open(result, reference) for reference in _references_to(step, recipe)}
        yield opened


def _references_to(step: Recipe, recipe: Recipe) -> list[str]:
    """How other documents mention the result of a step: its name, or its name with an adapter."""
    every = dict.fromkeys(reference for document in recipe.documents for reference in document.opened())
    return [reference for reference in every if reference.partition("+")[0] == step.name]


def _open(result: Path, reference: str) -> Checkpoint:
    _, plus, adapter = reference.partition("+")
    # Messages speak of it as the recipe does.
    return open_checkpoint(f"{result}{plus}{adapter}").changed(reference=reference)


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A folder for intermediate results, cleared of what a killed process left there."""
    whole = out.resolve()
    folder = whole.parent / f".{whole.name}.steps"
    with ExitStack() as stack:
        try:
            whole.parent.mkdir(parents=True, exist_ok=True)
            lock = whole.parent / f"{folder.name}.lock"
            stack.enter_context(exclusive(lock, str(out), error=OutputError, remove=True))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def plan_documents(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    warn: Callable[[str], None] = lambda text: None,
    *,
    truncate_vocabulary: bool = False,
) -> list[Plan]:
    """Plans every merge of a recipe from headers alone, nothing carried out.

    Args:
        recipe: The recipe.
        checkpoints: Its external models, open, by reference.
        warn: Called with what is odd but possible.
        truncate_vocabulary: As for `merge_to_folder`.

    Returns:
        The plans in the order of the work. They end before a document that cannot be planned without the tensors or
        the tokenizer that an earlier one would make.

    Raises:
        BadInput: What is wrong with a document.
    """
    opened, plans = dict(checkpoints), []
    for document in recipe.documents:
        if any(reference not in opened for reference in document.opened()):  # a step with an adapter
            break
        if (document.tokenizer_source or document.tokenizer) and set(document.opened()) - set(checkpoints):
            break
        try:
            plan, aligned, notes = align_and_plan(
                document, opened, identify=False, truncate_vocabulary=truncate_vocabulary
            )
            refuse_moved_layers(plan, aligned)
        except UnwrittenTensor:
            break
        except BadInput as error:
            if document is recipe:
                raise
            raise type(error)([f"the merge '{document.name}': {problem}" for problem in error.problems]) from error
        plans.append(plan)
        for text in notes:
            warn(text)
        if document.name is not None:
            specs = (TensorSpec(op.output, op.shape, op.dtype) for op in plan.operations)
            opened[document.name] = Checkpoint(document.name, None, plan.config, UnwrittenWeights(specs))
    return plans
