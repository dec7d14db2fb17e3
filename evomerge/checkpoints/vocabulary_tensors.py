"""Which tensors of a model have one row for each token."""

from __future__ import annotations

import re
from collections.abc import Mapping

from evomerge.checkpoints.header import TensorSpec
from evomerge.checkpoints.layout import Layout

_NO_TOKENS = re.compile(r"pos|wpe|token_type|patch")  # tables of something else that may be as tall


def vocabulary_tensors(layout: Layout, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """The token embedding, what is stored beside it in its shape (a copy, a head), a head, and the head's bias.

    Returns:
        Names, sorted; () when no embedding can be told.
    """
    if layout.embedding is None:
        return ()
    rows, columns = tensors[layout.embedding].shape
    found = {layout.embedding, *([layout.head] if layout.head else [])}
    for name in layout.outer:
        shape = tensors[name].shape
        table = shape == (rows, columns) and not _NO_TOKENS.search(name)
        bias = shape == (rows,) and rows != columns and name.endswith("bias")
        if table or bias or name == _bias_of(layout.head):
            found.add(name)
    return tuple(sorted(found))


def _bias_of(head: str | None) -> str | None:
    return None if head is None else f"{head.removesuffix('.weight')}.bias"
