"""Where the nodes of a family tree are drawn."""

from __future__ import annotations

import itertools

from evomerge.report.family import family_layout
from tests.report.test_lineage import FAMILY


def test_generations_are_rows_and_nodes_are_apart() -> None:
    nodes = family_layout(FAMILY, 5)
    assert {n.candidate.number: n.y for n in nodes} == {0: 0, 1: 0, 3: 1, 4: 2, 5: 3}
    for a, b in itertools.combinations(nodes, 2):
        assert a.y != b.y or abs(a.x - b.x) >= 1


def test_a_line_of_descent_is_straight() -> None:
    nodes = family_layout([c for c in FAMILY if c.number != 0], 5)
    assert {n.x for n in nodes} == {0.0}
