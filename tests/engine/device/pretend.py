"""A device that is not there: torch's meta device, whose tensors have their values in memory after all.

What computes on it computes on the processor, and whatever mixes its tensors with those of memory is an error, as on a
GPU: arithmetic on both, a tensor made without a device, `numpy()` of one of its tensors. Numbers and copies go both
ways. It has no streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Pretend(Tensor):
    """A tensor that says that it is elsewhere."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Pretend:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        made.values = values
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def item(self) -> Any:
        return self.values.item()

    def tolist(self) -> Any:
        return self.values.tolist()

    def __float__(self) -> float:
        return float(self.values)

    def __int__(self) -> int:
        return int(self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __index__(self) -> int:
        return int(self.values)


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.dim() > 0]
    if there and here and func not in _COPIES:
        raise RuntimeError(f"{func}: tensors on two devices")
    goes = kwargs.get("device")
    stays = isinstance(args[0], Pretend) if func is torch.ops.aten.copy_.default else bool(there)
    pretends = stays if goes is None else torch.device(goes) == DEVICE
    bare = {id(tensor.values): tensor for tensor in there}
    args, kwargs = tree_map(lambda leaf: leaf.values if isinstance(leaf, Pretend) else leaf, (args, kwargs))
    made = func(*args, **(kwargs if goes is None else kwargs | {"device": "cpu"}))

    def named(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not pretends:
            return leaf
        return bare.get(id(leaf)) if id(leaf) in bare else Pretend(leaf)

    return tree_map(named, made)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Tensors made of Python's numbers, which reach no dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor and isinstance(args[0], Pretend):
            return Pretend(args[0].values.new_tensor(*args[1:], **kwargs))
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return Pretend(torch.tensor(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def pretending() -> Iterator[torch.device]:
    """The device, while tensors on it have values."""
    with _Dispatch(), _Functions():
        yield DEVICE
