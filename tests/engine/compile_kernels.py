"""Compiles the kernels into the cache beside their sources: `python -m tests.engine.compile_kernels`.

Test processes that start together would otherwise compile the same kernels, each for itself.
"""

from __future__ import annotations

import importlib
import pkgutil

import numpy as np
import torch
from numba.core.dispatcher import Dispatcher

from evomerge.engine import kernels
from evomerge.engine.execute import materialise
from evomerge.engine.kernels import dropout, random_field, reductions
from evomerge.testing.methods import declared, family, fit, modes
from tests.engine.helpers import operation_for, store_for
from tests.engine.statistics import test_sce_selection
from tests.methods.helpers import MERGING

VALUES = {"weight": 0.5, "density": 0.6, "drop_rate": 0.3, "epsilon": 0.1, "lambda": 0.9, "select_topk": 0.5}


def compile_by_merging() -> None:
    """Merges a tensor by every method in every mode, from bfloat16 and from float32."""
    for dtype in (torch.bfloat16, torch.float32):
        base, sources = family(0, 3, (8, 40))
        for method in MERGING:
            for mode in modes(method):
                settings = method.settings([{} for _ in fit(method, sources)], declared(method, VALUES) | mode)
                operation = operation_for(method.name, settings, base.shape)
                store = store_for(base.to(dtype), [source.to(dtype) for source in fit(method, sources)])
                materialise(operation, store, dtype, ((operation.base, operation.sources),))


def compile_the_rare() -> None:
    """Calls what only some values need: many equal magnitudes, a threshold outside its bracket, parts of tensors."""
    for dtype in (np.uint16, np.uint32):
        bits, marks = np.zeros(32, dtype), np.zeros(2, np.uint16)
        dropout.find_kept(bits, bits, np.float32(1.0), marks, 0, 1)
        dropout.delta_after_drop(bits, bits, np.float32(1.0), marks, np.empty(32, np.float32))
        reductions.count_low_bits(bits, bits, 16, 0, np.zeros(1 << 16, np.int64))
    random_field.philox(np.uint64(1), np.uint64(2), 0, np.empty(4, np.uint64))
    test_sce_selection.selected(test_sce_selection.tensors(0.25), 0.4)


def missing() -> list[str]:
    """Kernels that have not been compiled; parts of kernels are compiled with these."""
    names = [info.name for info in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")]
    dispatchers = {
        value.py_func.__qualname__: value
        for name in names
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, Dispatcher) and not value.targetoptions.get("no_cpython_wrapper")
    }
    return sorted(name for name, kernel in dispatchers.items() if not kernel.signatures)


if __name__ == "__main__":
    compile_by_merging()
    compile_the_rare()
    if missing():
        raise SystemExit(f"not compiled: {', '.join(missing())}")
