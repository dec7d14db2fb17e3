"""One live model in memory, into which candidates are written in place.

Operations whose digest equals the resident one are skipped. Tensors that are copied unchanged are bound to the
source's memory map, so that repeated layers share their parameters and cost nothing; before anything is computed the
parameter is bound to storage of our own. Nothing touches the disk. On a
device the merge is computed there.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.config_values import transformers_config
from evomerge.checkpoints.dtypes import torch_dtype
from evomerge.checkpoints.module_names import model_class
from evomerge.engine.device.memory import room_for
from evomerge.engine.device.sources import Room
from evomerge.engine.execute import execute, execute_all, materialise, pieces, statistics_store
from evomerge.errors import CandidateError, EvoMergeError
from evomerge.planning.operation import COPY, Family, Operation, inputs_of
from evomerge.planning.plan import Plan

_SKELETONS = 4
_ROOM = 1 << 30  # bytes for what methods keep between candidates: singular vectors, ranks


@dataclass(frozen=True)
class Written:
    """What writing a plan cost.

    Attributes:
        computed: Operations carried out.
        bound: Operations that only bound a source's tensor.
        skipped: Operations whose result was there already.
    """

    computed: int
    bound: int
    skipped: int


class Resident:
    """A live model that becomes one candidate after another.

    Args:
        checkpoints: Open checkpoints by reference.
        dtype: What the model computes in; None for the plan's own dtypes.
        device: Where it lives.
        private: Copy what could be bound, so that nothing of the model is a view of a checkpoint's file.
        compiled: Use compiled kernels where the model lives in memory; otherwise the methods' own functions compute
            everything, as they do on a device.
        device_memory: Bytes of the device that sources may take; None for what is left.
        activations: Bytes of the device that scoring takes beside the model.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        *,
        private: bool = False,
        compiled: bool = True,
        device_memory: int | None = None,
        activations: int = 0,
    ) -> None:
        self._device = torch.device(device)
        if self._device.type == "cpu" and compiled:
            self.store = statistics_store(checkpoints, room=Room(remembered=_ROOM))
        else:
            room = room_for(checkpoints.values(), self._device, dtype, device_memory, activations)
            self.store = statistics_store(checkpoints, self._device, room=room)
        self._checkpoints = checkpoints
        self._dtype = dtype
        self._private = private
        self._skeletons: OrderedDict[str, nn.Module] = OrderedDict()
        self._owned: dict[str, Tensor] = {}
        self._digests: dict[str, str] = {}

    def write(self, plan: Plan) -> tuple[nn.Module, Written]:
        """Makes the model be the plan's result.

        Returns:
            The model, in evaluation mode, and what was done. The model is valid until the next call.

        Raises:
            CandidateError: When the architecture's parameters are not the plan's tensors, or have other shapes.
        """
        model: Any = self._skeleton(plan)
        slots = _slots(model)
        bound, kept, stale = self._sort(plan.operations)
        self._compute(stale, plan.family)
        state = {op.output: self._value(op, op.output in bound) for op in plan.operations}
        if state.keys() <= slots.keys() <= state.keys() | _tied(model):
            _require_shapes(slots, state)
            for name, value in state.items():
                _bind(slots[name], value)
            model.tie_weights()
        else:
            model = _loaded(type(model), plan.config, state, self._dtype, self._device)
        if model.can_generate():
            model.generation_config = _generation_config(model, generation_of(plan, self._checkpoints))
        return model, Written(len(stale), len(bound), kept)

    def _value(self, operation: Operation, bound: bool) -> Tensor:
        """The operation's result: storage of our own, or the source's where it serves as it is."""
        owned = None if bound else self._owned.get(operation.output)
        return self.store.tensors.flat(operation.sources[0]).view(operation.shape) if owned is None else owned

    def _sort(self, operations: Iterable[Operation]) -> tuple[set[str], int, list[Operation]]:
        """(outputs that a stored tensor serves as it is, how many are there already, what has to be computed)."""
        bound, kept, stale = set(), 0, []
        for operation in operations:
            if self._bindable(operation):
                bound.add(operation.output)
            elif self._digests.get(operation.output) == operation.digest:
                kept += 1
            else:
                stale.append(operation)
        return bound, kept, stale

    def _bindable(self, operation: Operation) -> bool:
        """The stored tensor is already what the model needs."""
        dtype = self._dtype or torch_dtype(operation.dtype)
        if self._private or operation.method != COPY or operation.scale != 1.0 or self._device.type != "cpu":
            return False
        stored = self.store.tensors.flat(operation.sources[0]).dtype
        return stored == dtype and stored == torch_dtype(operation.dtype)

    def _compute(self, operations: Sequence[Operation], family: Family) -> None:
        """Writes the results into storage of our own, each rounded once to its dtype before any further cast."""
        for operation in operations:  # first of all: whatever fails from here on, nothing stale counts as there
            self._digests.pop(operation.output, None)
        if self.store.device is None:
            self._compute_in_threads(operations, family)
        else:
            turns = self.store.tensors.in_turn(map(inputs_of, operations))
            for operation, _ in zip(operations, turns, strict=True):
                storage = self._storage(operation)
                if storage.dtype == torch_dtype(operation.dtype):
                    execute(operation, self.store, storage, family)
                else:
                    self._cast(operation, storage, family)
        self._digests |= {operation.output: operation.digest for operation in operations}

    def _compute_in_threads(self, operations: Sequence[Operation], family: Family) -> None:
        work: list[Callable[[], None]] = []
        for operation in operations:
            storage = self._storage(operation)
            if storage.dtype == torch_dtype(operation.dtype):
                work += pieces(operation, self.store, storage, family)
            else:
                work.append(partial(self._cast, operation, storage, family))
        execute_all(work, torch.get_num_threads())

    def _cast(self, operation: Operation, storage: Tensor, family: Family) -> None:
        storage.copy_(materialise(operation, self.store, torch_dtype(operation.dtype), family))

    def _storage(self, operation: Operation) -> Tensor:
        rounded = torch_dtype(operation.dtype)
        dtype = self._dtype if self._dtype is not None and rounded.is_floating_point else rounded
        storage = self._owned.get(operation.output)
        if storage is None or storage.shape != operation.shape or storage.dtype != dtype:
            storage = torch.empty(operation.shape, dtype=dtype, device=self._device)
            self._owned[operation.output] = storage
        return storage

    def _skeleton(self, plan: Plan) -> nn.Module:
        """A model of the plan's shape without weights, kept for the next candidate of that shape."""
        key = json.dumps(plan.config, sort_keys=True, default=str)
        if key in self._skeletons:
            self._skeletons.move_to_end(key)
            return self._skeletons[key]
        model = empty_model(plan.config, self._device)
        self._skeletons[key] = model
        if len(self._skeletons) > _SKELETONS:
            self._skeletons.popitem(last=False)
        return model


def generation_of(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> Mapping[str, Any]:
    """Returns what generation_config.json of the plan's result says; {} where it would not have one."""
    if plan.tokenizer is not None:
        return plan.tokenizer.generation_config
    return checkpoints[plan.reference].generation_config


def _generation_config(model: Any, settings: Mapping[str, Any]) -> Any:
    """What a model generates by, had it been loaded from a folder with this generation_config.json."""
    from transformers import GenerationConfig

    if settings:
        return GenerationConfig.from_dict(dict(settings))
    return GenerationConfig.from_model_config(model.config)


def empty_model(config: Mapping[str, object], device: torch.device) -> nn.Module:
    """Builds the architecture that a config.json describes, parameters on the meta device, buffers real.

    Raises:
        CandidateError: When the config names no architecture that transformers knows, or none that it can build.
    """
    from accelerate import init_empty_weights

    if "model_type" not in config:
        raise CandidateError("the merged config.json has no model_type: a model cannot be built from it")
    resolved = transformers_config(config)
    try:
        with init_empty_weights(include_buffers=False):
            model = model_class(config)._from_config(resolved)
    except EvoMergeError:
        raise
    except Exception as error:  # whatever a model's own code makes of a config
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CandidateError(f"transformers cannot build the model that config.json describes: {reason}") from error
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()  # type: ignore[no-any-return]


def _loaded(
    kind: type[nn.Module],
    config: Mapping[str, object],
    state: dict[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device,
) -> nn.Module:
    """A new model by transformers' own loading.

    For architectures whose modules are not the checkpoint's tensors one by one: it renames them, and puts the experts
    of a layer into one tensor, which costs a copy of them.

    Raises:
        CandidateError: When tensors are missing or left over.
    """
    with _no_progress_bar():
        model, report = kind.from_pretrained(  # type: ignore[attr-defined]
            None,
            config=transformers_config(config),
            state_dict=state,
            dtype=dtype or "auto",
            output_loading_info=True,
        )
    wrong = {key: sorted(map(str, names))[:3] for key, names in report.items() if names}
    if wrong:
        raise CandidateError(f"{kind.__name__} does not have the checkpoint's tensors: {wrong}")
    return model.to(device).requires_grad_(False).eval()  # type: ignore[no-any-return]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


Slot = tuple[nn.Module, str]


def _slots(model: nn.Module) -> dict[str, Slot]:
    """Where each tensor of the state dict lives."""
    slots: dict[str, Slot] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        unsaved = module._non_persistent_buffers_set
        for name in [*module._parameters, *(b for b in module._buffers if b not in unsaved)]:
            if module._parameters.get(name) is not None or module._buffers.get(name) is not None:
                slots[dot + name] = (module, name)
    return slots


def _tied(model: nn.Module) -> set[str]:
    """Names that are another tensor's under a second name, when the config ties them."""
    keys = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or {}
    return set(keys)


def _require_shapes(slots: Mapping[str, Slot], state: Mapping[str, Tensor]) -> None:
    """Refuses tensors that the config describes otherwise: they would be taken as they are, and fail in a layer."""
    for name, value in state.items():
        described = getattr(slots[name][0], slots[name][1]).shape
        if described != value.shape:
            raise CandidateError(
                f"config.json describes {name} with shape {list(described)}, the weights have {list(value.shape)}"
            )


def _bind(slot: Slot, value: Tensor) -> None:
    module, name = slot
    if name in module._buffers:
        module._buffers[name] = value
    elif (bound := module._parameters[name]) is None or bound.data_ptr() != value.data_ptr() or bound.is_meta:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
