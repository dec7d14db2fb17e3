"""What is kept of a history that grows is what index all of it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evomerge.algorithms.history_index import HistoryIndex
from evomerge.space.baselines import baselines
from evomerge.space.decode import decode, genome_hash
from evomerge.study.candidate import Candidate, step_parent
from evomerge.study.ranking import best_first
from tests.algorithms.landscapes import make_space

SPACE = make_space()
STARTS = baselines(SPACE)

fitness = st.none() | st.sampled_from([0.0, 0.25, 0.5, 0.75])
steps = st.none() | st.integers(0, 5)
drawn = st.lists(st.tuples(fitness, steps, st.booleans()), max_size=len(STARTS) + 8)


def history_of(rows: Any) -> tuple[Candidate, ...]:
    """The baselines of a space, then random genomes."""
    rng = np.random.default_rng(0)
    history = []
    for number, (value, step, several) in enumerate(rows):
        start = STARTS[number] if number < len(STARTS) else None
        genome = start.genome if start else SPACE.sample(rng)
        recipe = start.recipe if start else decode(SPACE, genome)
        operator, parents = ("x", ()) if step is None else ("Jacobian step, 0.3 nats a token", (step,))
        objectives = (value, 1.0 - value) if several and value is not None else None
        made = Candidate(number, 0 if start else 1, genome, recipe, f"{number}", parents, operator, "done", value)
        history.append(replace(made, objectives=objectives, state="failed" if value is None else "done"))
    return tuple(history)


def afresh(history: tuple[Candidate, ...]) -> dict[str, Any]:
    """What a index says, by its definition."""
    first = [c for c in history if c.generation == 0]
    asked = [step_parent(c) for c in history]
    return {
        "tried": {c.recipe_hash for c in history} | {genome_hash(SPACE, c.genome) for c in first},
        "approximated": {c.number for c in first if genome_hash(SPACE, c.genome) != c.recipe_hash},
        "steps": {number: asked.count(number) for number in asked if number is not None},
        "best_first": best_first(history),
        "three": best_first(history, 3),
    }


def said(index: HistoryIndex) -> dict[str, Any]:
    return {
        "tried": index.tried,
        "approximated": index.approximated,
        "steps": dict(index.steps),
        "best_first": index.best_first(),
        "three": index.best_first(3),
    }


@given(drawn, st.lists(st.integers(0, 30), max_size=4), st.sampled_from([0, 3, 64]))
def test_it_goes_on_from_where_it_was(rows: Any, stops: Any, few: int) -> None:
    history = history_of(rows)
    with patch("evomerge.algorithms.history_index.MAX_INSERTIONS", few):
        for stop in [*sorted(stops), len(history)]:
            assert said(HistoryIndex.of(SPACE, history[:stop])) == afresh(history[:stop])


@given(drawn, st.data())
def test_another_history_is_another_reading(rows: Any, data: Any) -> None:
    """Shorter, or with a candidate that is no longer pending or never was the same: nothing of the old one is left."""
    history = history_of(rows)
    HistoryIndex.of(SPACE, history)
    other = list(history)
    for place in data.draw(st.lists(st.integers(0, len(history) - 1), max_size=2)) if history else []:
        other[place] = replace(other[place], state="done", fitness=1.0, recipe_hash="other", operator="y")
    other = other[: data.draw(st.integers(0, len(other)))]
    assert said(HistoryIndex.of(SPACE, tuple(other))) == afresh(tuple(other))


def test_genes_are_those_of_the_candidate_at_hand() -> None:
    history = history_of([(0.5, None, False)] * (len(STARTS) + 3))
    other = (*history[:-1], replace(history[-1], genome=history[-2].genome))
    for candidates in (history, other, history):
        index = HistoryIndex.of(SPACE, candidates)
        for candidate in candidates:
            assert np.array_equal(index.unit(candidate), SPACE.unit(candidate.genome))


def test_what_is_known_is_not_read_again(monkeypatch: Any) -> None:
    history = history_of([(0.5, None, False)] * (len(STARTS) + 5))
    asked: list[Any] = []
    monkeypatch.setattr("evomerge.algorithms.history_index.step_parent", lambda c: asked.append(c.number))
    for stop in range(len(history) + 1):
        HistoryIndex.of(SPACE, history[:stop])
    HistoryIndex.of(SPACE, history)
    assert asked == list(range(len(history)))
