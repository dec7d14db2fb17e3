"""Tables for people, as text: scores, results, methods."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from evomerge.errors import BadInput, suggest
from evomerge.evaluation.scores import Score, ScoreTable
from evomerge.objective.comparison import Difference, TaskDifference
from evomerge.report.result import (
    Estimate,
    FrontEntry,
    FrontSoFar,
    GoalResult,
    InformativeItems,
    ResultRow,
    RunResult,
    RunStatus,
)
from evomerge.system.text import one_line

_SHOWN = 12  # members of a front


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Draws a Markdown table with aligned columns."""
    lines = [[one_line(cell).replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])


def score_text(score: Score | Difference) -> str:
    """Writes a score as 0.640 ± 0.048 (100): value, standard error, items."""
    spread = "" if score.stderr is None else f" ± {score.stderr:.3f}"
    return f"{score.value:.3f}{spread} ({score.n})"


def score_table(tasks: ScoreTable, groups: ScoreTable | None = None) -> str:
    """Draws the scores of a model, task by task, then those of groups of tasks."""
    named = [*tasks.items(), *((f"group {name}", metrics) for name, metrics in (groups or {}).items())]
    rows = [
        [task, metric, f"{score.value:.4f}", "-" if score.stderr is None else f"{score.stderr:.4f}", str(score.n)]
        for task, metrics in named
        for metric, score in metrics.items()
    ]
    return table(["task", "metric", "value", "standard error", "items"], rows)


def jacobians_text(candidates: int) -> str:
    """Says what a search's count of item evaluations leaves out; empty where no Jacobians were taken."""
    return (
        f"Beside these, the derivatives of all log-likelihoods were taken at {candidates} candidates."
        if candidates
        else ""
    )


def result_table(result: RunResult) -> str:
    """Draws a finished run: everyone on the test items, the winner's three scores, the best baseline task by task."""
    counts = result.candidates
    saved = f"; racing saved {result.items.saved:.0%} of the item evaluations" if result.items.saved else ""
    parts = [
        f"{result.run}: {counts.done} scored, {counts.failed} failed, {counts.pruned} pruned, "
        f"budget {counts.budget}{saved}",
        jacobians_text(result.items.jacobians),
        _steering_text(result.goals),
        _test_table(result),
        _bias_table(result),
        _best_baseline_table(result),
        _front_table(result),
        _informative_text(result.informative),
        result.verdict,
    ]
    return "\n\n".join(part for part in parts if part)


def status_text(status: RunStatus) -> str:
    """Says where a run stands: counts, what racing saved, the rate, the best candidate, the front."""
    counts, items = status.candidates, status.items
    lines = [
        f"{status.run}: {status.state}; {counts.done} scored, {counts.failed} failed, "
        f"{counts.pruned} pruned of {counts.budget}"
    ]
    if counts.pruned:
        lines.append(
            f"racing: {items.evaluated} item evaluations instead of {items.without_racing}, {items.saved:.0%} saved"
        )
    if jacobians := jacobians_text(items.jacobians):
        lines.append(jacobians)
    if status.candidates_per_hour and status.seconds_left is not None and status.state != "finished":
        left = timedelta(seconds=round(status.seconds_left))
        lines.append(f"{status.candidates_per_hour:.0f} candidates an hour, {left} left")
    if status.best is not None:
        lines.append(f"best: candidate {status.best.candidate}, fitness {status.best.fitness:.4f}")
        rows = [
            [split, task, metric, score_text(score)]
            for split, tasks in status.best.scores.items()
            for task, metrics in tasks.items()
            for metric, score in metrics.items()
        ]
        lines.append(table(["items", "task", "metric", "value"], rows))
    if status.front is not None and status.front.size:
        lines += _front_lines(status.front)
    if status.verdict:
        lines.append(status.verdict)
    return "\n".join(lines)


def _front_lines(front: FrontSoFar) -> list[str]:
    volume = "" if front.hypervolume is None else f", hypervolume {front.hypervolume:.4g}"
    shown = front.candidates[:_SHOWN]
    more = "" if len(shown) == front.size else f"; the {len(shown)} fittest:"
    names = list(shown[0].objectives)
    rows = [
        [str(row.candidate), f"{row.fitness:.4f}", *(f"{row.objectives[name]:.4f}" for name in names)] for row in shown
    ]
    return [f"front: {front.size} candidates{volume}{more}", table(["candidate", "fitness", *names], rows)]


def _test_table(result: RunResult) -> str:
    """The winner and its baselines on the test items, and on the first metric of each guard task."""
    goals = [(goal.task, goal.metric) for goal in result.goals]
    guards = [
        (task, metric)
        for task, metrics in result.winner.scores.get("guard", {}).items()
        for metric in list(metrics)[:1]
    ]

    def line(name: str, row: ResultRow, *cells: str) -> list[str]:
        on_goals = [_cell(row, "test", task, metric) for task, metric in goals]
        on_guards = [_cell(row, "guard", task, metric) for task, metric in guards]
        return [name, score_text(row.fitness["test"]), *cells, *on_goals, *on_guards]

    header = ["test items", "fitness", "winner is better by", "95% interval"]
    header += [f"{task} {metric}" for task, metric in goals] + [f"guard: {task} {metric}" for task, metric in guards]
    rows = [line(f"winner: candidate {result.winner.candidate}", result.winner, "", "")]
    for name, row in result.baselines.items():
        difference = row.winner_less_this
        rows.append(line(name, row, score_text(difference), _interval(difference.interval)))
    return table(header, rows)


def _steering_text(goals: Sequence[GoalResult]) -> str:
    """Which metrics steered in place of those that are told here; empty where they are the same."""
    changed = [goal for goal in goals if goal.steered_by != goal.metric]
    if not changed:
        return ""
    pairs = dict.fromkeys(f"{goal.steered_by} in place of {goal.metric}" for goal in changed)
    reported = dict.fromkeys(goal.metric for goal in changed)
    return (
        f"Steered by {', '.join(pairs)}, a smoother measure of the same; the numbers below are of "
        f"{', '.join(reported)}."
    )


def _bias_table(result: RunResult) -> str:
    """The winner on the items that steered, those that chose it, and those that did neither; and what that shows."""
    uses = {"search": "steered the search", "select": "chose it among the finalists", "test": "chose nothing"}
    rows = [[f"{split} items, which {use}", score_text(result.winner.fitness[split])] for split, use in uses.items()]
    rows.append(["selection bias: search - test", _signed(result.selection_bias)])
    return table(["winner's fitness on", "value"], rows)


def _best_baseline_table(result: RunResult) -> str:
    """The winner against the best baseline, task by task; empty without one."""
    if not result.baselines:
        return ""
    name, baseline = max(result.baselines.items(), key=lambda item: item[1].fitness["test"].value)
    rows = []
    for task, row in baseline.winner_less_this.tasks.items():
        counts = ["", "", ""] if row.p is None else [str(row.wins), str(row.losses), _p_text(row.p)]
        rows.append([f"{task} {row.metric}", _signed(row), *counts])
    return table([f"winner less {name}", "difference", "only winner right", "only it right", "McNemar p"], rows)


def _front_table(result: RunResult) -> str:
    """The candidates that none dominates, on the test items, and how the front grew; empty with one objective."""
    if not result.front:
        return ""
    sizes = [name for name in result.objectives if name in result.front[0].sizes]
    rows = [
        [
            f"candidate {row.candidate}" + (": the winner" if row.candidate == result.winner.candidate else ""),
            score_text(row.fitness["test"]) if "test" in row.fitness else "-",
            *(_cell(row, "test", goal.task, goal.metric) for goal in result.goals),
            *(str(row.sizes[name]) for name in sizes),
        ]
        for row in result.front
    ]
    goals = [f"{goal.task} {goal.metric}" for goal in result.goals]
    remark = (
        "Search and select items chose the front; whoever chooses from it by these test scores flatters the choice."
    )
    parts = [table(["front, on the test items", "fitness", *goals, *sizes], rows), remark]
    if result.hypervolume:
        first, last = (result.hypervolume.generations[k] for k in (0, -1))
        parts.append(
            f"Hypervolume on the items that steered: {first.hypervolume:.4g} after generation 0, "
            f"{last.hypervolume:.4g} after generation {last.generation}, of {last.front} candidates."
        )
    return "\n\n".join(parts)


def _informative_text(informative: InformativeItems | None) -> str:
    """Which items steered, and how far that led from all search items; empty when all of them steered."""
    if informative is None:
        return ""
    tasks = [
        [task, str(drawn.items), str(drawn.of), f"{drawn.effective:.1f}"] for task, drawn in informative.tasks.items()
    ]
    finalists = [
        [
            f"candidate {row.candidate}",
            "-" if row.estimate is None else f"{row.estimate:.4f}",
            f"{row.all_search_items:.4f}",
        ]
        for row in informative.finalists
    ]
    return "\n\n".join(
        [
            table(["items that steered", "drawn", "of", "worth, if all counted alike"], tasks),
            table(["fitness on the search items", "estimated from those drawn", "on all of them"], finalists),
        ]
    )


def _signed(score: Estimate | TaskDifference) -> str:
    spread = "" if score.stderr is None else f" ± {score.stderr:.3f}"
    return f"{score.value:+.3f}{spread}"


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _interval(span: tuple[float, float] | None) -> str:
    return f"{span[0]:+.3f} to {span[1]:+.3f}" if span else ""


def _cell(row: ResultRow | FrontEntry, split: str, task: str, metric: str) -> str:
    score = row.scores.get(split, {}).get(task, {}).get(metric)
    return score_text(score) if score else "-"


def method_table(name: str | None = None) -> str:
    """Draws tables of all methods and stages, or one of them with its parameters.

    Raises:
        BadInput: When there is no such method.
    """
    from evomerge.methods.contract import Method, Stage
    from evomerge.methods.registry import METHODS, STAGES

    if name is None:
        methods = table(
            ["method", "also called", "what it does", "parameters"],
            [
                [m.name, ", ".join(m.aliases), m.summary, ", ".join(p.name for p in m.parameters)]
                for m in METHODS.values()
            ],
        )
        stages = table(
            ["stage (after:)", "what it does", "parameters"],
            [[s.name, s.summary, ", ".join(p.name for p in s.parameters)] for s in STAGES.values()],
        )
        return f"{methods}\n\n{stages}"
    declared: dict[str, Method | Stage] = {alias: m for m in METHODS.values() for alias in (m.name, *m.aliases)}
    declared |= STAGES
    method = declared.get(name)
    if method is None:
        raise BadInput(f"no method is called '{name}'{suggest(name, [*METHODS, *STAGES])}")
    rows = [
        [
            p.name,
            "required" if p.required else str(p.default),
            "" if p.paper is None else str(p.paper),
            "each source" if p.per_source else "all",
            f"{p.gene[0]:g} to {p.gene[1]:g}" if p.gene else "",
            p.help,
        ]
        for p in method.parameters
    ]
    header = ["parameter", "recipe default", "paper", "one for", "searched", "meaning"]
    return f"{method.name}: {method.summary}\n{method.paper}\n\n{table(header, rows)}"
