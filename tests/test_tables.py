"""Tables for people."""

from __future__ import annotations

from typing import Any

from evomerge.tables import result_table, score_table, score_text, table

SCORE = {"value": 0.64, "stderr": 0.048, "n": 100}


def test_table_aligns_its_columns() -> None:
    assert table(["a", "long header"], [["wide cell", "1"], ["", "22"]]).splitlines() == [
        "| a         | long header |",
        "|-----------|-------------|",
        "| wide cell | 1           |",
        "|           | 22          |",
    ]


def test_score_text() -> None:
    assert score_text(SCORE) == "0.640 ± 0.048 (100)"
    assert score_text({"value": 1.0, "stderr": None, "n": 1}) == "1.000 (1)"
    assert score_text({"value": -0.5, "stderr": 0.25}) == "-0.500 ± 0.250"


def test_score_table() -> None:
    shown = score_table({"tasks": {"t": {"acc": SCORE, "f1": {"value": 0.5, "stderr": None, "n": 3}}}})
    assert "| t    | acc    | 0.6400 | 0.0480         | 100   |" in shown
    assert "| t    | f1     | 0.5000 | -              | 3     |" in shown


def row(fitness: float, **more: Any) -> dict[str, Any]:
    measured = {"value": fitness, "stderr": 0.1}
    scores = {"test": {"t": {"acc": SCORE}}, "guard": {"g": {"acc": SCORE, "acc_norm": SCORE}}}
    return {"fitness": dict.fromkeys(("search", "select", "test"), measured), "scores": scores, **more}


def test_result_table() -> None:
    result = {
        "run": "x",
        "candidates": {"done": 3, "failed": 1, "pruned": 0, "budget": 4},
        "items": {"evaluated": 40, "without_racing": 40, "saved": 0.0},
        "goals": [{"task": "t", "metric": "acc"}],
        "winner": row(1.25, candidate=2),
        "baselines": {"parent:a": row(1.0, winner_less_this={"value": 0.25, "stderr": None})},
        "verdict": "The winner is fine.",
    }
    lines = result_table(result).splitlines()
    assert lines[0] == "x: 3 scored, 1 failed, 0 pruned, budget 4"
    assert lines[2].split("|")[1:-1] == [
        f" {cell} "
        for cell in (
            "test items         ",
            "fitness      ",
            "winner is better by",
            "t acc              ",
            "guard: g acc       ",
        )
    ]
    assert "| winner: candidate 2 | 1.250 ± 0.100 |                     | 0.640 ± 0.048 (100) |" in lines[4]
    assert "| parent:a            | 1.000 ± 0.100 | 0.250               |" in lines[5]
    assert lines[-1] == "The winner is fine."
    raced = {**result, "items": {"evaluated": 10, "without_racing": 40, "saved": 0.75}}
    assert result_table(raced).splitlines()[0].endswith("budget 4; racing saved 75% of the item evaluations")
