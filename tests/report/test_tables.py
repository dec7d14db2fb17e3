"""Tables for people."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from evomerge.evaluation.scores import Score
from evomerge.objective.comparison import Difference, TaskDifference
from evomerge.report.result import (
    BaselineRow,
    CandidateCounts,
    Ending,
    Estimate,
    FrontEntry,
    GoalResult,
    Hypervolume,
    ItemCounts,
    RunResult,
    WinnerRow,
)
from evomerge.report.tables import called, fitted, result_table, score_table, score_text, table
from evomerge.study.ranking import Growth

SCORE = Score(0.64, 0.048, 100)


def test_table_aligns_its_columns() -> None:
    assert table(["a", "long header"], [["wide cell", "1"], ["", "22"]]).splitlines() == [
        "| a         | long header |",
        "|-----------|-------------|",
        "| wide cell | 1           |",
        "|           | 22          |",
    ]


def test_score_text() -> None:
    assert score_text(SCORE) == "0.640 ± 0.048 (100)"
    assert score_text(Score(1.0, None, 1)) == "1.000 (1)"
    assert score_text(Score(-0.5, 0.25, 2)) == "-0.500 ± 0.250 (2)"


def test_score_table() -> None:
    shown = score_table({"t": {"acc": SCORE, "f1": Score(0.5, None, 3)}}, {"of t": {"acc": SCORE}})
    assert "| t          | acc    | 0.6400 | 0.0480         | 100   |" in shown
    assert "| t          | f1     | 0.5000 | -              | 3     |" in shown
    assert "| group of t | acc    | 0.6400 | 0.0480         | 100   |" in shown


def row(fitness: float) -> dict[str, Any]:
    measured = Score(fitness, 0.1, 30)
    scores = {"test": {"t": {"acc": SCORE}}, "guard": {"g": {"acc": SCORE, "acc_norm": SCORE}}}
    return {"fitness": dict.fromkeys(("search", "select", "test"), measured), "scores": scores}


def baseline(fitness: float, difference: Difference) -> BaselineRow:
    return BaselineRow(candidate=1, recipe={}, **row(fitness), winner_less_this=difference)


DIFFERENCE = Difference(
    value=0.25,
    stderr=0.1,
    n=30,
    interval=(0.0625, 0.4375),
    joint_interval=(0.0, 0.5),
    tasks={
        "t": TaskDifference("acc", 0.125, 0.05, wins=15, losses=5, p=0.0414),
        "u": TaskDifference("bits", -0.5, None),
    },
)

FINISHED = RunResult(
    run="x",
    state="finished",
    ended=Ending("budget", "the budget of 4 candidates is spent", 0),
    candidates=CandidateCounts(done=3, failed=1, pruned=0, budget=4),
    items=ItemCounts(evaluated=40, without_racing=40, saved=0.0, jacobians=0),
    scale="relative",
    goals=(GoalResult("t", "acc", 1.0, 0.5, steered_by="acc"),),
    winner=WinnerRow(candidate=2, recipe={}, **row(1.25), generation=1, operator="mutation", parents=(0,)),
    selection_bias=Estimate(0.125, 0.0625),
    baselines={"parent:a": baseline(1.0, DIFFERENCE)},
    finalists=(),
    objectives=(),
    front=(),
    hypervolume=None,
    informative=None,
    within_noise_of=(),
    verdict="The winner is fine.",
    constraints=(),
)


def cells(text: str, first: str) -> list[str]:
    """The cells of the line that begins with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_result_table() -> None:
    text = result_table(FINISHED)
    assert text.splitlines()[0] == "x: 4 of 4 candidates: 3 scored in full, 0 stopped early, 1 failed"
    assert cells(text, "on 30 test items")[1:] == ["overall score", "winner ahead by", "95% interval"]
    assert cells(text, "winner: candidate 2")[1:] == ["1.250 ± 0.100", "", ""]
    assert cells(text, "source a")[1:] == ["1.000 ± 0.100", "+0.250 ± 0.100", "+0.062 to +0.438"]
    assert cells(text, "by task")[1:] == ["winner", "a"]
    assert cells(text, "t acc")[1:] == ["0.640", "0.640"]
    assert cells(text, "guard: g acc")[1:] == ["0.640", "0.640"]
    assert text.splitlines()[-1] == "The winner is fine."


def test_a_table_that_is_too_wide_is_several() -> None:
    header = ["model", *(f"task {k} of a long name" for k in range(9))]
    text = fitted(header, [["x" * 20, *(f"{k}.5" for k in range(9))]])
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("| model ") == text.count("xxxx |") == 3
    assert [f"{k}.5" in text for k in range(9)] == [True] * 9


def test_tables_of_a_run_with_long_names_fit_a_terminal() -> None:
    long = "n" * 300
    goals = tuple(replace(FINISHED.goals[0], task=f"{long}{k}") for k in range(20))
    names = [f"parent:{long}{k}" for k in range(9)] + [f"best of generation 0: {long}", f"random search: {long}"]
    result = replace(FINISHED, goals=goals, baselines=dict.fromkeys(names, FINISHED.baselines["parent:a"]))
    assert max(len(line) for line in result_table(result).splitlines()) <= 100


def test_what_a_baseline_is_called() -> None:
    assert [called(name) for name in ("parent:math", "parent:base", "uniform average")] == [
        *("source math", "base model", "uniform average")
    ]


def test_one_number_has_one_name() -> None:
    """What is reported is never called by the name of what the search goes by."""
    smooth = replace(FINISHED, goals=(replace(FINISHED.goals[0], steered_by="prob"),))
    assert "fitness" not in result_table(smooth)


def test_selection_bias_stands_below_the_winners_three_scores() -> None:
    text = result_table(FINISHED)
    assert cells(text, "search items, which guided the search")[1] == "1.250 ± 0.100 (30)"
    assert cells(text, "test items, which chose nothing")[1] == "1.250 ± 0.100 (30)"
    assert cells(text, "selection bias: search - test")[1] == "+0.125 ± 0.062"


def test_the_best_baseline_task_by_task() -> None:
    worse = baseline(0.5, replace(DIFFERENCE, tasks={}))
    text = result_table(replace(FINISHED, baselines={"parent:b": worse, **FINISHED.baselines}))
    assert cells(text, "winner less source a")[1:] == ["difference", "only winner right", "only it", "McNemar p"]
    assert "| t acc                | +0.125 ± 0.050 | 15                | 5       | 0.041     |" in text
    assert cells(text, "u bits") == ["u bits", "-0.500", "", "", ""]


def test_a_winner_without_rivals() -> None:
    text = result_table(replace(FINISHED, baselines={}))
    assert "winner less" not in text
    assert cells(text, "winner: candidate 2")[1] == "1.250 ± 0.100"


def test_what_racing_saved() -> None:
    raced = replace(FINISHED, items=ItemCounts(10, 40, 0.75, jacobians=0))
    assert result_table(raced).splitlines()[0].endswith("1 failed; racing saved 75% of the item evaluations")
    assert "derivatives" not in result_table(raced)


def test_that_jacobians_are_not_among_the_item_evaluations_is_said() -> None:
    stepped = replace(FINISHED, items=ItemCounts(10, 40, 0.75, jacobians=3))
    assert (
        result_table(stepped).splitlines()[2]
        == "Beside these, the derivatives of all log-likelihoods were taken at 3 candidates."
    )


def test_what_steered_is_said_where_it_is_not_what_is_reported() -> None:
    smooth = replace(FINISHED, goals=(replace(FINISHED.goals[0], steered_by="prob"),))
    text = "Search metric: prob in place of acc, a smoother measure of the same. All scores below are by acc."
    assert f"\n\n{text}\n\n" in result_table(smooth)
    assert "Search metric" not in result_table(FINISHED)


def test_the_front_stands_below_the_winner() -> None:
    sizes = {"layers": 30, "parameters": 900}
    front = (
        FrontEntry(candidate=2, objectives={}, sizes=sizes, **row(1.25)),
        FrontEntry(candidate=5, objectives={}, sizes={**sizes, "layers": 24}, fitness={}, scores={}),
    )
    growth = tuple(Growth(g, 4, g + 1, 0.25 * (g + 1)) for g in range(3))
    several = replace(
        FINISHED, objectives=("t", "layers"), front=front, hypervolume=Hypervolume({"t": 0.5, "layers": 1.0}, growth)
    )
    text = result_table(several)
    assert cells(text, "front, on the test items")[1:] == ["overall score", "t acc", "layers"]
    assert cells(text, "candidate 2: the winner")[1:] == ["1.250 ± 0.100 (30)", "0.640 ± 0.048 (100)", "30"]
    assert cells(text, "candidate 5")[1:] == ["-", "-", "24"]  # gave no scores on the test items
    assert "0.25 after generation 0, 0.75 after generation 2, of 3 candidates." in text
    assert "front" not in result_table(FINISHED)
