"""Where a candidate comes from: the family of a search as JSON, as a text tree, and as a Graphviz graph."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evomerge.errors import RunError
from evomerge.recipe import Recipe
from evomerge.recipe.flatten import with_steps
from evomerge.study.candidate import Candidate
from evomerge.study.rounds import merged_winners

_WIDTH = 100  # characters of a line that says what changed


def lineage(candidates: Iterable[Candidate]) -> list[dict[str, Any]]:
    """Lists the candidates by number, each as what `json` can write."""
    return [
        {
            "candidate": candidate.number,
            "generation": candidate.generation,
            "parents": list(candidate.parents),
            "operator": candidate.operator,
            "recipe_hash": candidate.recipe_hash,
            "state": candidate.state,
            "fitness": candidate.fitness,
            "objectives": None if candidate.objectives is None else list(candidate.objectives),
            "items": candidate.items,
            "genome": candidate.genome.to_json(),
        }
        for candidate in sorted(candidates, key=lambda candidate: candidate.number)
    ]


def whole_recipe(history: Sequence[Candidate], candidate: Candidate) -> Recipe:
    """Returns a candidate's recipe over the models that its run began with: winners of rounds are steps of it."""
    return with_steps(candidate.recipe, merged_winners(history, candidate.recipe))


def ancestors(candidates: Iterable[Candidate], number: int) -> tuple[Candidate, ...]:
    """Collects the candidate and everything that it descends from, by number.

    Raises:
        RunError: There is no such candidate.
    """
    by_number = _by_number(candidates)
    _check(by_number, number)
    visited: set[int] = set()
    waiting = [number]
    while waiting:
        current = waiting.pop()
        if current not in visited and current in by_number:
            visited.add(current)
            waiting.extend(by_number[current].parents)
    return tuple(by_number[n] for n in sorted(visited))


def ancestry(
    candidates: Iterable[Candidate], number: int, changed: Callable[[Candidate], Mapping[int, str]] | None = None
) -> str:
    """Draws the ancestry of a candidate as a text tree, back to generation 0.

    A candidate that appears several times is drawn in full once; later it is named only, marked with ``↑``.

    Args:
        candidates: The history.
        number: The candidate.
        changed: Says by parent how a candidate's recipe differs from the parent's; None leaves that out.

    Raises:
        RunError: There is no such candidate.
    """
    by_number = _by_number(candidates)
    _check(by_number, number)
    lines: list[str] = []
    drawn: set[int] = set()
    # (number, what stands before its own line, what stands before its parents' lines); a stack, not recursion, since a
    # line of descent can be longer than Python's recursion limit.
    waiting: list[tuple[int, str, str]] = [(number, "", "")]
    while waiting:
        current, before, below = waiting.pop()
        candidate = by_number.get(current)
        if candidate is None:
            lines.append(f"{before}{current} (not recorded)")
            continue
        again = current in drawn and bool(candidate.parents)
        lines.append(before + describe(candidate) + (" ↑" if again else ""))
        drawn.add(current)
        if not again:
            stem = below + ("│  " if candidate.parents else "   ")
            for parent, text in (changed(candidate) if changed else {}).items():
                lines += [stem + line for line in textwrap.wrap(f"from {parent}: {text}", max(40, _WIDTH - len(stem)))]
            waiting.extend(reversed(_branches(candidate.parents, below)))
    return "\n".join(lines)


def _branches(parents: Sequence[int], below: str) -> list[tuple[int, str, str]]:
    last = len(parents) - 1
    return [
        (parent, below + ("└─ " if i == last else "├─ "), below + ("   " if i == last else "│  "))
        for i, parent in enumerate(parents)
    ]


def describe(candidate: Candidate) -> str:
    """Describes a candidate in a line: number, generation, operator, and fitness or state."""
    value = f"fitness {candidate.fitness:.4f}" if candidate.fitness is not None else candidate.state
    if candidate.state == "pruned":
        value = "stopped early"
    return f"{candidate.number}  [generation {candidate.generation}]  {candidate.operator}  {value}"


def to_dot(candidates: Iterable[Candidate], number: int | None = None) -> str:
    """Draws the family of one candidate, or all of it, as a Graphviz graph.

    Raises:
        RunError: There is no such candidate.
    """
    chosen = tuple(candidates)
    if number is not None:
        chosen = ancestors(chosen, number)
    lines = ["digraph lineage {", "  rankdir=TB;", "  node [shape=box, fontname=sans];"]
    for candidate in sorted(chosen, key=lambda candidate: candidate.number):
        value = candidate.state if candidate.fitness is None else f"{candidate.fitness:.4f}"
        label = _quoted(f"{candidate.number}: {candidate.operator}\\n{value}")
        style = "" if candidate.state == "done" else ", style=dashed"
        lines.append(f"  c{candidate.number} [label={label}{style}];")
    for candidate in sorted(chosen, key=lambda candidate: candidate.number):
        lines += [f"  c{parent} -> c{candidate.number};" for parent in candidate.parents]
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'


def _by_number(candidates: Iterable[Candidate]) -> Mapping[int, Candidate]:
    return {candidate.number: candidate for candidate in candidates}


def _check(by_number: Mapping[int, Candidate], number: int) -> None:
    if number not in by_number:
        span = f"0 to {max(by_number)}" if by_number else "none yet"
        raise RunError(f"there is no candidate {number}; the run has {span}")
