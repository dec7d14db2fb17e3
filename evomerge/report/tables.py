"""Tables for people, as text: scores, results, methods."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from evomerge.errors import BadInput, suggest
from evomerge.evaluation.scores import Score, ScoreTable
from evomerge.evaluation.splits import TEST
from evomerge.objective.comparison import Difference, TaskDifference
from evomerge.report.result import (
    BestCandidate,
    CandidateCounts,
    ConstraintResult,
    Estimate,
    FrontEntry,
    FrontSoFar,
    GoalResult,
    InformativeItems,
    ResultRow,
    RunResult,
    RunStatus,
)
from evomerge.space.baselines import PARENT
from evomerge.study.candidate import Candidate
from evomerge.system.text import one_line

WIDTH = 100
"""Characters that a terminal shows in a line."""
_SHOWN = 12  # members of a front
_STATES = {"done": "scored", "pruned": "stopped early"}
_NAME = 36  # characters of a model's name in a table
_MOST_TASKS = 16  # rows of a status


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Draws a Markdown table with aligned columns."""
    lines = [[one_line(cell).replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])


def fitted(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """Draws a table; where it is wider than a terminal, as several that share their first column."""
    widths = [3 + max(len(one_line(cells[i])) for cells in (header, *rows)) for i in range(len(header))]
    blocks: list[list[int]] = [[]]
    for column in range(1, len(header)):
        if blocks[-1] and widths[0] + sum(widths[i] for i in blocks[-1]) + widths[column] + 1 > width:
            blocks.append([])
        blocks[-1].append(column)
    parts = [[[cells[i] for i in (0, *block)] for cells in (header, *rows)] for block in blocks]
    return "\n\n".join(table(part[0], part[1:]) for part in parts)


def called(name: str) -> str:
    """Says in words what a baseline is."""
    if not name.startswith(PARENT):
        return name
    source = name.removeprefix(PARENT)
    return "base model" if source == "base" else f"source {source}"


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
        f"{result.run}: {_counts_text(counts)}{saved}",
        jacobians_text(result.items.jacobians),
        _search_metric_text(result.goals),
        _overall_table(result),
        _task_table(result),
        _bias_table(result),
        _best_baseline_table(result),
        _front_table(result),
        table(*constraint_rows(result.constraints)) if result.constraints else "",
        _informative_text(result.informative),
        result.verdict,
    ]
    return "\n\n".join(part for part in parts if part)


def comparison_text(result: RunResult) -> str:
    """Says whether the winner is better than what it had to beat, with the scores of all of them."""
    parts = [result.verdict, _search_metric_text(result.goals), _overall_table(result), _task_table(result)]
    return "\n\n".join(part for part in parts if part)


def _counts_text(counts: CandidateCounts) -> str:
    return (
        f"{counts.recorded} of {counts.budget} candidates: {counts.done} scored in full, "
        f"{counts.pruned} stopped early, {counts.failed} failed"
    )


def status_text(status: RunStatus) -> str:
    """Says where a run stands, the verdict first: a screenful, whatever the run."""
    counts, items = status.candidates, status.items
    lines = [f"{status.run}: {status.state}"]
    if status.verdict:
        lines.append(status.verdict)
    saved = f"; racing saved {items.saved:.0%} of the item evaluations" if counts.pruned else ""
    lines.append(_counts_text(counts) + saved)
    if jacobians := jacobians_text(items.jacobians):
        lines.append(jacobians)
    if status.candidates_per_hour and status.seconds_left is not None and status.state != "finished":
        left = timedelta(seconds=round(status.seconds_left))
        lines.append(f"{status.candidates_per_hour:.0f} candidates an hour, about {left} left")
    if status.best is not None:
        lines.append(_best_text(status, status.best))
        lines.append(_best_table(status, status.best))
    if status.front is not None and status.front.size:
        lines += _front_lines(status.front)
    return "\n".join(lines)


def _best_text(status: RunStatus, best: BestCandidate) -> str:
    if not best.overall:
        return f"best so far: candidate {best.candidate}, fitness {best.fitness:.4f} (by this the search compares)"
    splits = [f"{score_text(score)} on the {split} items" for split, score in best.overall.items()]
    return f"winner: candidate {best.candidate}, overall score {splits[-1]}"


def _best_table(status: RunStatus, best: BestCandidate) -> str:
    """The best candidate on every task, by the task's own metric, a split in each column."""
    splits = [split for split in best.scores if split != "guard"]
    rows = []
    for split_of_rows in (splits, ["guard"]):
        tasks = dict.fromkeys(task for split in split_of_rows for task in best.scores.get(split, {}))
        for task in tasks:
            tables = [best.scores.get(split, {}).get(task, {}) for split in split_of_rows]
            metric = status.metrics.get(task) or next(iter(tables[0]), "")
            cells = [_plain_score(row[metric]) if metric in row else "-" for row in tables]
            guard = split_of_rows == ["guard"]
            cells = [*["" for _ in splits[1:]], *cells] if guard else cells
            rows.append([one_line(f"{'guard: ' if guard else ''}{task} {metric}", 44), *cells])
    more = f"\n... and {len(rows) - _MOST_TASKS} more tasks; --json has all" if len(rows) > _MOST_TASKS else ""
    return fitted(["task and metric", *(f"{split} items" for split in splits)], rows[:_MOST_TASKS]) + more


def candidate_table(candidates: Sequence[Candidate], objectives: Sequence[str] = ()) -> str:
    """Draws candidates in the order given, a line each."""
    rows = []
    for c in candidates:
        made_by = f"{c.operator}: {c.failure}" if c.state == "failed" else c.operator
        fitness = "-" if c.fitness is None else f"{c.fitness:.4f}"
        values = ["-" if c.objectives is None else f"{c.objectives[k]:.4g}" for k in range(len(objectives))]
        state = _STATES.get(c.state, c.state)
        rows.append(
            [str(c.number), str(c.generation), state, fitness, *values, str(c.items or "-"), one_line(made_by, 36)]
        )
    return fitted(["candidate", "generation", "state", "fitness", *objectives, "items", "made by"], rows)


def _front_lines(front: FrontSoFar) -> list[str]:
    volume = "" if front.hypervolume is None else f", hypervolume {front.hypervolume:.4g}"
    shown = front.candidates[:_SHOWN]
    more = "" if len(shown) == front.size else f"; the {len(shown)} fittest:"
    names = list(shown[0].objectives)
    rows = [
        [str(row.candidate), f"{row.fitness:.4f}", *(f"{row.objectives[name]:.4f}" for name in names)] for row in shown
    ]
    return [f"front: {front.size} candidates{volume}{more}", fitted(["candidate", "fitness", *names], rows)]


def _overall_table(result: RunResult) -> str:
    """The winner and what it had to beat: the overall score on the test items, and how far the winner is ahead."""
    test = result.winner.fitness["test"]
    rows = [[f"winner: candidate {result.winner.candidate}", _plain_score(test), "", ""]]
    for name, row in result.baselines.items():
        ahead = row.winner_less_this
        cells = [_plain_score(row.fitness["test"]), _signed(ahead), _interval(ahead.interval)]
        rows.append([one_line(called(name), 43), *cells])
    return table([f"on {test.n} test items", "overall score", "winner ahead by", "95% interval"], rows)


def _task_table(result: RunResult) -> str:
    """Everyone on every task by its own metric, and on the first metric of each guard task."""
    guards = [(t, m) for t, metrics in result.winner.scores.get("guard", {}).items() for m in list(metrics)[:1]]
    columns = [("test", goal.task, goal.metric) for goal in result.goals] + [("guard", *guard) for guard in guards]
    models: list[tuple[str, ResultRow]] = [("winner", result.winner), *result.baselines.items()]
    header = ["by task", *(one_line(_short(name), _NAME) for name, _ in models)]
    rows = []
    for split, task, metric in columns:
        scores = [row.scores.get(split, {}).get(task, {}).get(metric) for _, row in models]
        name = one_line(f"{'guard: ' if split == 'guard' else ''}{task} {metric}", 44)
        rows.append([name, *("-" if score is None else f"{score.value:.3f}" for score in scores)])
    return fitted(header, rows)


def _short(name: str) -> str:
    """What a column of a baseline is called."""
    first, _, rest = name.partition(": ")
    shorter = {"best of generation 0": "best of gen. 0", "random search": "random search", "uniform average": "average"}
    return shorter.get(first, called(name).removeprefix("source ").removesuffix(" model")) if rest or first else name


def _search_metric_text(goals: Sequence[GoalResult]) -> str:
    """Which metrics the search went by in place of those that are told here; empty where they are the same."""
    changed = [goal for goal in goals if goal.steered_by != goal.metric]
    if not changed:
        return ""
    pairs = dict.fromkeys(f"{goal.steered_by} in place of {goal.metric}" for goal in changed)
    reported = dict.fromkeys(goal.metric for goal in changed)
    return (
        f"Search metric: {', '.join(pairs)}, a smoother measure of the same. All scores below are by "
        f"{', '.join(reported)}."
    )


def _bias_table(result: RunResult) -> str:
    """The winner on the items that steered, those that chose it, and those that did neither; and what that shows."""
    uses = {"search": "guided the search", "select": "chose it among the finalists", "test": "chose nothing"}
    rows = [[f"{split} items, which {use}", score_text(result.winner.fitness[split])] for split, use in uses.items()]
    rows.append(["selection bias: search - test", _signed(result.selection_bias)])
    return table(["the winner on", "overall score"], rows)


def _best_baseline_table(result: RunResult) -> str:
    """The winner against the best baseline, task by task; empty without one."""
    if not result.baselines:
        return ""
    name, baseline = max(result.baselines.items(), key=lambda item: item[1].fitness["test"].value)
    rows: list[list[str]] = []
    for task, row in baseline.winner_less_this.tasks.items():
        counts = ["", "", ""] if row.p is None else [str(row.wins), str(row.losses), _p_text(row.p)]
        rows.append([one_line(f"{task} {row.metric}", 38), _signed(row), *counts])
    header = [f"winner less {one_line(called(name), 26)}", "difference", "only winner right", "only it", "McNemar p"]
    return table(header, rows)


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
            *(f"{row.sizes[name]:.10g}" for name in sizes),
        ]
        for row in result.front
    ]
    goals = [f"{goal.task} {goal.metric}" for goal in result.goals]
    remark = (
        "Search and select items chose the front; whoever chooses from it by these test scores flatters the choice."
    )
    parts = [fitted(["front, on the test items", "overall score", *goals, *sizes], rows), remark]
    if result.hypervolume:
        first, last = (result.hypervolume.generations[k] for k in (0, -1))
        parts.append(
            f"Hypervolume on the search items: {first.hypervolume:.4g} after generation 0, "
            f"{last.hypervolume:.4g} after generation {last.generation}, of {last.front} candidates."
        )
    return "\n\n".join(parts)


def constraint_rows(constraints: Sequence[ConstraintResult]) -> tuple[list[str], list[list[str]]]:
    """Says of each constraint what the winner has, its limit, how far apart they are, and whether it is held.

    Returns:
        The header, and a row for each.
    """
    rows = [
        [
            constraint.name,
            f"{constraint.values[TEST].value:.4g}",
            f"{constraint.values[TEST].limit:.4g}",
            _interval(constraint.interval),
            constraint.verdict + (" at this number of items" if constraint.verdict == "not to be told" else ""),
        ]
        for constraint in constraints
    ]
    header = ["constraint", "winner, test items", "limit", "value less limit, 95% interval", "verdict"]
    return header, rows


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
            fitted(["search items", "drawn", "of", "worth, if all counted alike"], tasks),
            table(["fitness on the search items", "estimated from those drawn", "on all of them"], finalists),
        ]
    )


def _plain_score(score: Score) -> str:
    return f"{score.value:.3f}" + ("" if score.stderr is None else f" ± {score.stderr:.3f}")


def _signed(score: Estimate | TaskDifference | Difference) -> str:
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
