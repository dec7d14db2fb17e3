"""Who breeds, with whom, and by which operator."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from evomerge.algorithms.ga.selection import (
    ASSEMBLY,
    RECOMBINATIONS,
    SAME_METHODS_RATE,
    Parent,
    choose,
    choose_partner,
    possible_recombinations,
)
from tests.algorithms.landscapes import make_space, pattern_space


def parent(number: int, method: str = "ties") -> Parent:
    return Parent(number, np.zeros(2), {"method": method}, ())


def test_names_are_drawn_by_their_weight() -> None:
    rng = np.random.default_rng(0)
    drawn = [choose({"a": 3.0, "b": 1.0, "c": 0.0}, rng) for _ in range(4000)]
    assert drawn.count("a") / 4000 == pytest.approx(0.75, abs=0.03)
    assert "c" not in drawn


def test_recombinations_have_a_sense_in_the_space() -> None:
    space = make_space(methods=("ties",))
    first = Parent(0, space.unit(space.default()), {}, ())
    assert possible_recombinations(space, first, 1) == {"none": 1.0}
    assert set(possible_recombinations(space, first, 9)) == set(RECOMBINATIONS) - {ASSEMBLY}
    narrow = make_space(methods=("ties",), layer_groups=1, sources={"a": "a"})
    first = Parent(0, narrow.unit(narrow.default()), {}, ())
    senseless = {ASSEMBLY, "crossover by layers", "split-point crossover", "crossover by model"}
    assert set(possible_recombinations(narrow, first, 9)) == set(RECOMBINATIONS) - senseless
    copying = pattern_space()
    first = Parent(0, copying.unit(copying.default()), {}, copying.default().layers)
    assert ASSEMBLY in possible_recombinations(copying, first, 9)


def test_partners_are_others_rather_good_ones_and_rather_of_the_same_methods() -> None:
    rng = np.random.default_rng(1)
    parents = [parent(k, "ties" if k % 2 else "dare") for k in range(8)]
    drawn = [choose_partner(parents, parents[1], rng) for _ in range(2000)]
    counts = Counter(p.number for p in drawn)
    assert 1 not in counts
    assert counts[0] > counts[6]
    # Of the rest too, three others of seven are of the same methods, and tournaments see mostly the first ones.
    assert sum(p.choices == {"method": "ties"} for p in drawn) / 2000 >= SAME_METHODS_RATE
