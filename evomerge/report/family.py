"""Where to draw the ancestors of a candidate: generation by generation, parents above their children."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evomerge.report.lineage import ancestors
from evomerge.study.candidate import Candidate


@dataclass(frozen=True)
class Node:
    """A candidate and where it is drawn: x around 0, y from 0 for the oldest generation there is downwards."""

    candidate: Candidate
    x: float
    y: int


def family_layout(candidates: Iterable[Candidate], number: int) -> list[Node]:
    """Places a candidate and its ancestors, the oldest first.

    A generation is a row. From the candidate upwards, each ancestor is put above the mean of its children, and those
    of a row are then moved apart.

    Raises:
        RunError: There is no such candidate.
    """
    family = ancestors(candidates, number)
    row_of = {generation: row for row, generation in enumerate(sorted({c.generation for c in family}))}
    rows: dict[int, list[Candidate]] = defaultdict(list)
    children: dict[int, list[int]] = defaultdict(list)
    for candidate in family:
        rows[candidate.generation].append(candidate)
        for parent in candidate.parents:
            children[parent].append(candidate.number)
    x: dict[int, float] = {}
    for generation in sorted(rows, reverse=True):
        above = {
            c.number: sum(x[child] for child in children[c.number] if child in x)
            / max(1, sum(child in x for child in children[c.number]))
            for c in rows[generation]
        }
        order = sorted(rows[generation], key=lambda c: (above[c.number], c.number))
        x.update(zip((c.number for c in order), _apart([above[c.number] for c in order]), strict=True))
    return [Node(c, x[c.number], row_of[c.generation]) for c in family]


def _apart(positions: Sequence[float]) -> list[float]:
    """Moves sorted positions apart to a distance of at least 1, around where they were."""
    moved: list[float] = []
    for position in positions:
        moved.append(position if not moved else max(position, moved[-1] + 1.0))
    shift = sum(a - b for a, b in zip(positions, moved, strict=True)) / max(1, len(moved))
    return [position + shift for position in moved]
