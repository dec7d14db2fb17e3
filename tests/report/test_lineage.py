"""The family of a candidate, as JSON, text and graph."""

from __future__ import annotations

import json

import pytest

from evomerge.errors import RunError
from evomerge.report.lineage import ancestors, ancestry, lineage, to_dot
from evomerge.space.genome import Genome
from evomerge.study.candidate import Candidate


def made(number: int, generation: int, parents: tuple[int, ...], operator: str, fitness: float | None) -> Candidate:
    return Candidate(
        number=number,
        generation=generation,
        genome=Genome.of({"weight.a.g0": 0.5}),
        recipe={"merge_method": "linear"},
        recipe_hash=f"{number:032x}",
        parents=parents,
        operator=operator,
        state="done" if fitness is not None else "failed",
        fitness=fitness,
    )


FAMILY = (
    made(0, 0, (), "parent:math", 0.5),
    made(1, 0, (), "uniform average", 0.6),
    made(2, 0, (), "ties (defaults)", None),
    made(3, 1, (0, 1), "line", 0.65),
    made(4, 2, (3, 1), "crossover by layers", 0.7),
    made(5, 3, (4, 3), 'say "centroid of 2"', 0.75),
)


def test_json_entries_by_hand() -> None:
    entries = json.loads(json.dumps(lineage(reversed(FAMILY))))
    assert [entry["candidate"] for entry in entries] == [0, 1, 2, 3, 4, 5]
    assert entries[3] == {
        "candidate": 3,
        "generation": 1,
        "parents": [0, 1],
        "operator": "line",
        "recipe_hash": "00000000000000000000000000000003",
        "state": "done",
        "fitness": 0.65,
        "objectives": None,
        "items": 0,
        "genome": {"genes": {"weight.a.g0": 0.5}},
    }
    assert (entries[2]["state"], entries[2]["fitness"]) == ("failed", None)


def test_ancestors_leave_out_who_had_no_part() -> None:
    assert [c.number for c in ancestors(FAMILY, 5)] == [0, 1, 3, 4, 5]
    assert [c.number for c in ancestors(FAMILY, 1)] == [1]


def test_text_tree_by_hand() -> None:
    assert ancestry(FAMILY, 5) == "\n".join(
        [
            '5  [generation 3]  say "centroid of 2"  fitness 0.7500',
            "├─ 4  [generation 2]  crossover by layers  fitness 0.7000",
            "│  ├─ 3  [generation 1]  line  fitness 0.6500",
            "│  │  ├─ 0  [generation 0]  parent:math  fitness 0.5000",
            "│  │  └─ 1  [generation 0]  uniform average  fitness 0.6000",
            "│  └─ 1  [generation 0]  uniform average  fitness 0.6000",
            "└─ 3  [generation 1]  line  fitness 0.6500 ↑",
        ]
    )


def test_a_long_line_of_descent_is_drawn() -> None:
    family = [made(0, 0, (), "parent:math", 0.0)]
    family += [made(n, n, (n - 1,), "mutation", float(n)) for n in range(1, 3000)]
    lines = ancestry(family, 2999).splitlines()
    assert len(lines) == 3000
    assert lines[-1].endswith("parent:math  fitness 0.0000")


def test_graph() -> None:
    text = to_dot(FAMILY, 4)
    assert text.startswith("digraph lineage {")
    assert "c3 -> c4;" in text
    assert "c5" not in text
    assert "label=\"5: say 'centroid of 2'\\n0.7500\"" in to_dot(FAMILY)
    assert 'label="2: ties (defaults)\\nfailed", style=dashed' in to_dot(FAMILY)


def test_an_unknown_candidate_is_refused() -> None:
    for function in (ancestors, ancestry, to_dot):
        with pytest.raises(RunError, match=r"no candidate 9; the run has 0 to 5"):
            function(FAMILY, 9)
