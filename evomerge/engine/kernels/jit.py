"""How a kernel is compiled, and what all kernels keep to.

A merge comes near the speed of memory only if its many steps pass their results on in the processor's caches. A chunk
that sits in the second-level cache is worked on in tiles that stay in the first. The results are those of the torch
functions in `evomerge.methods`, bit for bit: the same IEEE operations in the same order, no fused multiply-add, no
reassociation.

The kernels of `merge` and `linear` take float32. `reductions` and `dropout` read the bits of stored elements instead,
uint16 for bfloat16 and uint32 for float32, so that a model is read once and nothing is written. Every kernel releases
the interpreter's lock; threads are the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

import numba
from numpy.typing import NDArray

from evomerge.methods import random_field
from evomerge.system.hashing import digest

TILE = 1024  # elements; a tile's scratch arrays, for a handful of sources, about fill the first-level cache

F = TypeVar("F", bound=Callable[..., Any])
Array = NDArray[Any]

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}
_INNER = _OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

#: What a kernel's machine code depends on besides its own file: the parts and constants that it takes in.
SOURCES = (*sorted(Path(__file__).parent.glob("*.py")), Path(random_field.__file__))
_VERSION = digest(*(path.read_bytes() for path in SOURCES))[:12]


def kernel(function: F) -> F:
    """Compiled on first use; kept on disk for the next process where there is a place to write.

    What is kept is that of the present sources: numba files it by the function's name, and looks at its own file only.
    """
    plain = cast(FunctionType, function)
    named = FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__)
    named.__qualname__ = f"{plain.__qualname__}-{_VERSION}"
    try:
        return cast(F, numba.njit(cache=True, **_OPTIONS)(named))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return cast(F, numba.njit(**_OPTIONS)(named))


def part(function: F) -> F:
    """Part of a kernel: compiled with it, not callable from Python."""
    return cast(F, numba.njit(**_INNER)(function))
