"""Draws disjoint splits of every task's items: what is optimised, what chooses among finalists, what is read once.

The split of an item depends on the seed, the task and the item's id alone, never on the order of tasks or of earlier
draws, so a split is never re-drawn: asking again gives the same items, and items added to a task move only those at
the borders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evomerge.errors import TaskError
from evomerge.system.hashing import digest_bytes

SEARCH, SELECT, TEST, GUARD = "search", "select", "test", "guard"
"""What is optimised; what chooses among the finalists; what is read once; tasks that should not get worse."""

Selection = Mapping[str, tuple[int, ...]]
"""Task to positions of its items."""

Sizes = Mapping[str, float]
"""Split name to a fraction of the items (up to 1) or a whole number of items (above 1)."""


def split_items(
    items: Mapping[str, Sequence[str]],
    sizes: Sizes,
    seed: int = 0,
    per_task: Mapping[str, Sizes] | None = None,
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Draws disjoint splits of every task's items.

    Args:
        items: Task to item ids, in order.
        sizes: Split to its size, for every task. Splits are filled in this order.
        seed: Another seed gives another draw.
        per_task: Sizes for single tasks, which replace `sizes` there.

    Returns:
        ``{split: {task: positions in items, ascending}}``.

    Raises:
        TaskError: A size that is no fraction or number of items, more items asked for than there are, an empty split,
            or sizes for a task that is not there; all such problems at once.
    """
    per_task = per_task or {}
    problems = [
        f"splits are given for {task!r}, which is not among the tasks" for task in per_task if task not in items
    ]
    drawn: dict[str, dict[str, tuple[int, ...]]] = {}
    for task, ids in items.items():
        counts, wrong = _counts(task, per_task.get(task, sizes), len(ids))
        problems += wrong
        if wrong:
            continue
        order = balanced_order(ids, [_random_key(seed, task, item) for item in ids])
        start = 0
        for split, count in counts.items():
            drawn.setdefault(split, {})[task] = tuple(sorted(order[start : start + count]))
            start += count
    if problems:
        raise TaskError(problems)
    return drawn


def balanced_order(items: Sequence[str], keys: Sequence[bytes]) -> list[int]:
    """Orders items at random, so that every run of them holds each task that they are of in its proportion.

    Args:
        items: Their ids, "TASK:NUMBER"; those of a group are of several tasks.
        keys: The random key of each.

    Returns:
        Their positions.
    """
    tasks: dict[str, list[int]] = {}
    for k in sorted(range(len(items)), key=keys.__getitem__):
        tasks.setdefault(items[k].rpartition(":")[0], []).append(k)
    evenly = {k: (rank + 0.5) / len(own) for own in tasks.values() for rank, k in enumerate(own)}
    return sorted(evenly, key=lambda k: (evenly[k], keys[k]))


def _random_key(seed: int, task: str, item: str) -> bytes:
    """The item's key in the random order of its task's items."""
    return digest_bytes(f"{seed}\0{task}\0{item}")


def _counts(task: str, sizes: Sizes, n: int) -> tuple[dict[str, int], list[str]]:
    """The items of every split of one task with `n` items, and what is wrong with them."""
    counts: dict[str, int] = {}
    problems: list[str] = []
    share = 0.0
    for split, size in sizes.items():
        if not math.isfinite(size) or size <= 0 or (size > 1 and size != int(size)):
            problems.append(f"task {task!r}, split {split!r}: a fraction in (0, 1] or a number of items, got {size!r}")
            continue
        if size > 1:
            counts[split] = int(size)
            continue
        # The borders are rounded, not the sizes, so that fractions that sum to 1 use every item once.
        counts[split] = round((share + size) * n) - round(share * n)
        share += size
        if counts[split] == 0:
            problems.append(f"task {task!r}, split {split!r}: {size} of {n} items is none; ask for more of them")
    if not problems and not sizes:
        problems.append(f"task {task!r}: no splits are asked for")
    if not problems and sum(counts.values()) > n:
        asked = ", ".join(f"{split} {count}" for split, count in counts.items())
        problems.append(f"task {task!r} has {n} items, fewer than the splits ask for ({asked}); ask for fewer")
    return counts, problems
