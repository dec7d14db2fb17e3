"""The models of a merge with one naming and one set of tensors, whichever of them stores what need not be stored.

What may be missing in any of them, the base or the first included: constants that newer versions compute, copies of the
embedding that the config ties to it, and layers that predict further tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.header import TensorSpec, name_some
from evomerge.checkpoints.layout import ties_head, vocabulary_tensors, with_tied_flag
from evomerge.checkpoints.matching.experts import with_single_experts
from evomerge.checkpoints.module_names import matched_names, without_number
from evomerge.checkpoints.tensors import SelectedWeights

_COMPUTED = re.compile(
    r"(^|\.)(\w*inv_freq|(cos|sin)_cached|(rotary_emb\.)?(cos|sin)|masked_bias|position_ids|token_type_ids|causal_mask"
    r"|relative_position_index|relative_coords_table|attn_mask|embed_positions\.weights|_float_tensor|alibi)$"
)
_MASKS = re.compile(r"\.(attn|attention|self_attn|self_attention)\.bias$")  # of four sizes; a real bias has one


@dataclass(frozen=True)
class Reconciled:
    """Models with one naming.

    Attributes:
        checkpoints: The models by reference, as they were where nothing had to change.
        notes: What is kept from one model alone, or left out.
    """

    checkpoints: Mapping[str, Checkpoint]
    notes: tuple[str, ...] = ()


def reconcile(
    checkpoints: Mapping[str, Checkpoint],
    reference: str | None = None,
    *,
    layers_move: bool = False,
    separate: Callable[[dict[str, Checkpoint]], dict[str, Checkpoint]] = dict,
    apart: Callable[[str], bool] = lambda name: False,
) -> Reconciled:
    """Gives models one naming and one set of tensors, as far as nothing of their own is lost by that.

    Args:
        checkpoints: Open checkpoints by reference.
        reference: The one whose names count, and whose further tensors are kept; the first by default.
        layers_move: Layers get other numbers, so that what is stored behind the last layer has no number of its own.
        separate: Takes out what is not to be merged, once the models have one naming.
        apart: Tells which tensors are taken from one model alone: no other one needs them.

    Returns:
        The models. What still differs is for `check_compatible` to name.
    """
    if not checkpoints:
        return Reconciled(checkpoints)
    main = reference if reference is not None else next(iter(checkpoints))
    checkpoints = with_single_experts(checkpoints)
    models = {model: _renamed(checkpoint, checkpoints[main]) for model, checkpoint in checkpoints.items()}
    models = separate(models)
    models = _without(models, {name for name in _computed(models) if not apart(name)})
    models = _one_head(models, apart)
    models, notes = _further_layers(models, main, layers_move)
    return Reconciled(models, notes)


def selected(checkpoint: Checkpoint, keep: Callable[[str], bool]) -> Checkpoint:
    """Returns a checkpoint with some of its tensors; the checkpoint itself where these are all."""
    names = {name: name for name in checkpoint.tensors if keep(name)}
    return checkpoint if len(names) == len(checkpoint.tensors) else _with_names(checkpoint, names)


def _with_names(checkpoint: Checkpoint, sources: Mapping[str, str]) -> Checkpoint:
    return checkpoint.changed(weights=SelectedWeights(checkpoint.weights, sources))


def _renamed(checkpoint: Checkpoint, reference: Checkpoint) -> Checkpoint:
    if checkpoint is reference or checkpoint.tensors.keys() == reference.tensors.keys():
        return checkpoint
    names = matched_names(checkpoint.tensors, reference.tensors, reference.config)
    return _with_names(checkpoint, {names.get(n, n): n for n in checkpoint.tensors}) if names else checkpoint


def _without(models: Mapping[str, Checkpoint], names: set[str]) -> dict[str, Checkpoint]:
    return {model: selected(checkpoint, lambda name: name not in names) for model, checkpoint in models.items()}


def _computed(models: Mapping[str, Checkpoint]) -> set[str]:
    """The constants that not every model stores."""
    every = [{without_number(name) for name in model.tensors} for model in models.values()]
    infos = {name: info for model in models.values() for name, info in model.tensors.items() if _is_computed(info)}
    return {name for name in infos if any(without_number(name) not in places for places in every)}


def _is_computed(info: TensorSpec) -> bool:
    mask = _MASKS.search(info.name) is not None and len(info.shape) == 4
    return mask or _COMPUTED.search(info.name) is not None


def _one_head(models: dict[str, Checkpoint], apart: Callable[[str], bool]) -> dict[str, Checkpoint]:
    """Leaves out copies of the embedding, and gives a tied model a head where another has one of its own."""
    tables = {m: vocabulary_tensors(model.layout, model.tensors) for m, model in models.items()}
    for name in sorted({name for names in tables.values() for name in names if not apart(name)}):
        owners = [m for m, model in models.items() if name in model.tensors]
        lacking = [m for m, model in models.items() if name not in model.tensors]
        is_head = any(models[m].layout.head == name for m in owners)
        tied = is_head and any(ties_head(models[m].config) for m in owners)
        if not (lacking or tied) or any(name not in tables[m] or models[m].layout.embedding == name for m in owners):
            continue
        if all(_is_copy(models[m], name, tables[m]) for m in owners):
            models = _without(models, {name})
            models = _tied_flag(models, True) if is_head else models
        elif all(_may_stand_in(models[m], models[owners[0]], name, is_head) for m in lacking):
            for m in lacking:
                every = {n: n for n in models[m].tensors} | {name: str(models[m].layout.embedding)}
                models[m] = _with_names(models[m], every)
            models = _tied_flag(models, False) if is_head else models
    return models


def _is_copy(model: Checkpoint, name: str, tables: Iterable[str]) -> bool:
    """Says whether a table repeats another one of the model: nothing is lost without it."""
    import torch

    shape = model.tensors[name].shape
    rest = [other for other in tables if other != name and other in model.tensors]
    others = [other for other in rest if model.tensors[other].shape == shape]
    return any(torch.equal(model.tensor(name), model.tensor(other)) for other in others)


def _may_stand_in(model: Checkpoint, owner: Checkpoint, name: str, is_head: bool) -> bool:
    """Says whether a model's embedding is what another stores as a table of its own."""
    embedding = model.layout.embedding
    if embedding is None or (is_head and not model.layout.tied_head):
        return False
    return len(owner.tensors[name].shape) == 2 == len(model.tensors[embedding].shape)


def _tied_flag(models: Mapping[str, Checkpoint], tied: bool) -> dict[str, Checkpoint]:
    flagged = {m: with_tied_flag(model.config, tied) for m, model in models.items() if model.config}
    return {m: model.changed(config=flagged[m]) if m in flagged else model for m, model in models.items()}


def _further_layers(
    models: dict[str, Checkpoint], reference: str, layers_move: bool
) -> tuple[dict[str, Checkpoint], tuple[str, ...]]:
    """Leaves out the layers for further tokens that the reference lacks, or whose number other layers may take."""
    notes = []
    kept: set[str] = set()
    first = models[reference].tensors.keys()
    for m, model in models.items():
        further = model.layout.further
        gone = {name for name in further if name not in first or (layers_move and _numbered(model, name))}
        if m == reference:
            kept = set(further) - gone
        if gone:
            notes.append(f"{m}: {name_some(sorted(gone))} predict further tokens and are left out")
            models[m] = selected(model, lambda name, gone=gone: name not in gone)  # type: ignore[misc]
    alone = {name for name in kept if any(name not in model.tensors for model in models.values())}
    if alone:
        notes.append(f"{name_some(sorted(alone))} predict further tokens: kept from {reference}, as they are")
    return models, tuple(notes)


def _numbered(model: Checkpoint, name: str) -> bool:
    """Says whether a tensor stands behind the layers of a stack, as if it were one of them."""
    return any(name.startswith(f"{stack.prefix}.") for stack in model.layout.stacks)
