"""Tables for people."""

from __future__ import annotations

from typing import Any

from evomerge.report.tables import result_table, score_table, score_text, table

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


RIVAL = {
    "value": 0.25,
    "stderr": 0.1,
    "interval": [0.0625, 0.4375],
    "joint_interval": [0.0, 0.5],
    "tasks": {
        "t": {"metric": "acc", "value": 0.125, "stderr": 0.05, "wins": 15, "losses": 5, "p": 0.0414},
        "u": {"metric": "bits", "value": -0.5, "stderr": None},
    },
}


def finished(**changes: Any) -> dict[str, Any]:
    return {
        "run": "x",
        "candidates": {"done": 3, "failed": 1, "pruned": 0, "budget": 4},
        "items": {"evaluated": 40, "without_racing": 40, "saved": 0.0},
        "goals": [{"task": "t", "metric": "acc"}],
        "winner": row(1.25, candidate=2),
        "selection_bias": {"value": 0.125, "stderr": 0.0625},
        "baselines": {"parent:a": row(1.0, winner_less_this=RIVAL)},
        "verdict": "The winner is fine.",
        **changes,
    }


def cells(text: str, first: str) -> list[str]:
    """The cells of the line that begins with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_result_table() -> None:
    text = result_table(finished())
    assert text.splitlines()[0] == "x: 3 scored, 1 failed, 0 pruned, budget 4"
    assert cells(text, "test items") == [
        *("test items", "fitness", "winner is better by", "95% interval", "t acc", "guard: g acc")
    ]
    score = "0.640 ± 0.048 (100)"
    assert cells(text, "winner: candidate 2") == ["winner: candidate 2", "1.250 ± 0.100", "", "", score, score]
    assert cells(text, "parent:a") == [
        *("parent:a", "1.000 ± 0.100", "0.250 ± 0.100", "+0.062 to +0.438", score, score)
    ]
    assert text.splitlines()[-1] == "The winner is fine."


def test_selection_bias_stands_below_the_winners_three_scores() -> None:
    text = result_table(finished())
    assert cells(text, "search items, which steered the search")[1] == "1.250 ± 0.100"
    assert cells(text, "test items, which chose nothing")[1] == "1.250 ± 0.100"
    assert cells(text, "selection bias: search - test")[1] == "+0.125 ± 0.062"


def test_the_best_baseline_task_by_task() -> None:
    worse = row(0.5, winner_less_this={**RIVAL, "tasks": {}})
    text = result_table(finished(baselines={"parent:b": worse, "parent:a": row(1.0, winner_less_this=RIVAL)}))
    assert cells(text, "winner less parent:a")[1:] == ["difference", "only winner right", "only it right", "McNemar p"]
    assert cells(text, "t acc") == ["t acc", "+0.125 ± 0.050", "15", "5", "0.041"]
    assert cells(text, "u bits") == ["u bits", "-0.500", "", "", ""]


def test_a_winner_without_rivals() -> None:
    text = result_table(finished(baselines={}))
    assert "winner less" not in text
    assert cells(text, "winner: candidate 2")[1] == "1.250 ± 0.100"


def test_what_racing_saved() -> None:
    raced = finished(items={"evaluated": 10, "without_racing": 40, "saved": 0.75})
    assert result_table(raced).splitlines()[0].endswith("budget 4; racing saved 75% of the item evaluations")
    assert "slopes" not in result_table(raced)


def test_that_slopes_are_not_among_the_item_evaluations_is_said() -> None:
    climbed = finished(items={"evaluated": 10, "without_racing": 40, "saved": 0.75, "gradients": 3})
    assert result_table(climbed).splitlines()[2] == "Beside these, the fitness' slopes were taken at 3 candidates."


def test_what_steered_is_said_where_it_is_not_what_is_told() -> None:
    smooth = finished(goals=[{"task": "t", "metric": "acc", "steered_by": "prob"}])
    assert "\n\nSteered by prob in place of acc, a smoother measure of the same; the numbers below are of acc.\n\n" in (
        result_table(smooth)
    )
    same = finished(goals=[{"task": "t", "metric": "acc", "steered_by": "acc"}])
    assert result_table(same) == result_table(finished())


def test_the_front_stands_below_the_winner() -> None:
    sizes = {"layers": 30, "parameters": 900}
    front = [
        row(1.25, candidate=2, sizes=sizes),
        {"candidate": 5, "fitness": {}, "scores": {}, "sizes": {**sizes, "layers": 24}},
    ]
    grown = [{"generation": g, "candidates": 4, "front": g + 1, "hypervolume": 0.25 * (g + 1)} for g in range(3)]
    several = finished(
        objectives=["t", "layers"], front=front, hypervolume={"reference": {"t": 0.5}, "generations": grown}
    )
    text = result_table(several)
    assert cells(text, "front, on the test items")[1:] == ["fitness", "t acc", "layers"]
    assert cells(text, "candidate 2: the winner")[1:] == ["1.250 ± 0.100", "0.640 ± 0.048 (100)", "30"]
    assert cells(text, "candidate 5")[1:] == ["-", "-", "24"]  # gave no scores on the test items
    assert "0.25 after generation 0, 0.75 after generation 2, of 3 candidates." in text
    assert result_table(finished(objectives=[], front=[], hypervolume=None)) == result_table(finished())


def test_the_result_of_an_older_run() -> None:
    """It had no item counts, no selection bias, and of a difference the value and its error alone."""
    old = finished(baselines={"parent:a": row(1.0, winner_less_this={"value": 0.25, "stderr": 0.1})})
    del old["items"], old["selection_bias"]
    text = result_table(old)
    assert text.splitlines()[0] == "x: 3 scored, 1 failed, 0 pruned, budget 4"
    assert cells(text, "parent:a")[1:4] == ["1.000 ± 0.100", "0.250 ± 0.100", ""]
    assert "selection bias" not in text
    assert "McNemar" not in text
