"""Compiles the kernels into the cache beside their sources: `python -m tests.engine.compile_kernels`.

Test processes that start together would otherwise compile the same kernels, each for itself.
"""

from __future__ import annotations

import torch

from evomerge.engine.execute import materialise
from tests.engine.helpers import operation_for, store_for
from tests.methods.helpers import MERGING, declared, family, fit, modes

VALUES = {"weight": 0.5, "density": 0.6, "drop_rate": 0.3, "epsilon": 0.1, "lambda": 0.9, "select_topk": 0.5}


def compile_kernels() -> None:
    """Merges a tensor by every method in every mode, from bfloat16 and from float32."""
    for dtype in (torch.bfloat16, torch.float32):
        base, sources = family(0, 3, (8, 40))
        for method in MERGING:
            for mode in modes(method):
                settings = method.settings([{} for _ in fit(method, sources)], declared(method, VALUES) | mode)
                operation = operation_for(method.name, settings, base.shape)
                store = store_for(base.to(dtype), [source.to(dtype) for source in fit(method, sources)])
                materialise(operation, store, dtype, ((operation.base, operation.sources),))


if __name__ == "__main__":
    compile_kernels()
