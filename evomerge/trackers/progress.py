"""What a merge shows while it runs: a bar on a terminal, nothing elsewhere. Always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def tensor_progress(show: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of tensors written, for the length of a block.

    Args:
        show: Show it at all.

    Yields:
        A function to call with (tensors written, tensors in all); None where nobody would see the bar.
    """
    if not (show and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("tensors"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
