"""Tables for people, as text: scores, results, methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.errors import BadInput, suggest


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def score_text(score: Mapping[str, Any]) -> str:
    """0.640 ± 0.048 (100)."""
    spread = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    items = f" ({score['n']})" if "n" in score else ""
    return f"{score['value']:.3f}{spread}{items}"


def score_table(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` as a table."""
    rows = [
        [
            task,
            metric,
            f"{score['value']:.4f}",
            "-" if score["stderr"] is None else f"{score['stderr']:.4f}",
            str(score["n"]),
        ]
        for task, metrics in [*result["tasks"].items(), *_groups(result)]
        for metric, score in metrics.items()
    ]
    return table(["task", "metric", "value", "standard error", "items"], rows)


def _groups(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"group {name}", metrics) for name, metrics in result.get("groups", {}).items()]


def slopes_text(items: Mapping[str, Any]) -> str:
    """What a search's count of item evaluations does not hold; empty where it asked for no slopes."""
    asked = items.get("gradients")
    return f"Beside these, the fitness' slopes were taken at {asked} candidates." if asked else ""


def result_table(result: Mapping[str, Any]) -> str:
    """A finished run: everyone on the test items, the winner's three scores, the best baseline task by task.

    What the result of an older run does not tell is left out.
    """
    winner = result["winner"]
    goals = [(goal["task"], goal["metric"]) for goal in result["goals"]]
    guards = [
        (task, metric) for task, metrics in winner["scores"].get("guard", {}).items() for metric in list(metrics)[:1]
    ]
    header = ["test items", "fitness", "winner is better by", "95% interval"]
    header += [f"{task} {metric}" for task, metric in goals] + [f"guard: {task} {metric}" for task, metric in guards]
    rows = []
    for name, row in [(f"winner: candidate {winner['candidate']}", winner), *result["baselines"].items()]:
        difference = row.get("winner_less_this", {})
        cells = [name, score_text(row["fitness"]["test"]), score_text(difference) if difference else ""]
        cells.append(_interval(difference.get("interval")))
        cells += [_cell(row, "test", task, metric) for task, metric in goals]
        cells += [_cell(row, "guard", task, metric) for task, metric in guards]
        rows.append(cells)
    counts = result["candidates"]
    share = result.get("items", {}).get("saved")
    saved = f"; racing saved {share:.0%} of the item evaluations" if share else ""
    parts = [
        f"{result['run']}: {counts['done']} scored, {counts['failed']} failed, {counts['pruned']} pruned, "
        f"budget {counts['budget']}{saved}",
        slopes_text(result.get("items", {})),
        _steering_text(result["goals"]),
        table(header, rows),
        _bias_table(result),
        _duel_table(result),
        _front_table(result),
        _informative_text(result.get("informative")),
        result["verdict"],
    ]
    return "\n\n".join(part for part in parts if part)


def _steering_text(goals: Sequence[Mapping[str, Any]]) -> str:
    """Which metrics steered in place of those that are told here; empty where they are the same."""
    changed = [
        (goal["steered_by"], goal["metric"])
        for goal in goals
        if goal.get("steered_by", goal["metric"]) != goal["metric"]
    ]
    if not changed:
        return ""
    pairs = dict.fromkeys(f"{by} in place of {metric}" for by, metric in changed)
    told = dict.fromkeys(metric for _, metric in changed)
    return f"Steered by {', '.join(pairs)}, a smoother measure of the same; the numbers below are of {', '.join(told)}."


def _bias_table(result: Mapping[str, Any]) -> str:
    """The winner on the items that steered, those that chose it, and those that did neither; and what that shows."""
    winner = result["winner"]["fitness"]
    uses = {"search": "steered the search", "select": "chose it among the finalists", "test": "chose nothing"}
    rows = [[f"{split} items, which {use}", score_text(winner[split])] for split, use in uses.items()]
    if "selection_bias" in result:
        rows.append(["selection bias: search - test", _signed(result["selection_bias"])])
    return table(["winner's fitness on", "value"], rows)


def _duel_table(result: Mapping[str, Any]) -> str:
    """The winner against the best baseline, task by task; empty without one, or without that being known."""
    if not result["baselines"]:
        return ""
    name, rival = max(result["baselines"].items(), key=lambda item: float(item[1]["fitness"]["test"]["value"]))
    if "tasks" not in rival["winner_less_this"]:
        return ""
    rows = [
        [
            f"{task} {row['metric']}",
            _signed(row),
            *([str(row["wins"]), str(row["losses"]), _p_text(row["p"])] if "p" in row else ["", "", ""]),
        ]
        for task, row in rival["winner_less_this"]["tasks"].items()
    ]
    return table([f"winner less {name}", "difference", "only winner right", "only it right", "McNemar p"], rows)


def _front_table(result: Mapping[str, Any]) -> str:
    """The candidates that none dominates, on the test items, and how the front grew; empty with one objective."""
    if not result.get("front"):
        return ""
    goals = [(goal["task"], goal["metric"]) for goal in result["goals"]]
    sizes = [name for name in result["objectives"] if name in result["front"][0]["sizes"]]
    rows = [
        [
            f"candidate {row['candidate']}"
            + (": the winner" if row["candidate"] == result["winner"]["candidate"] else ""),
            score_text(row["fitness"]["test"]) if "test" in row["fitness"] else "-",
            *(_cell(row, "test", task, metric) for task, metric in goals),
            *(str(row["sizes"][name]) for name in sizes),
        ]
        for row in result["front"]
    ]
    header = ["front, on the test items", "fitness", *(f"{task} {metric}" for task, metric in goals), *sizes]
    remark = (
        "Search and select items chose the front; whoever chooses from it by these test scores flatters the choice."
    )
    parts = [table(header, rows), remark]
    if result["hypervolume"]:
        first, last = (result["hypervolume"]["generations"][k] for k in (0, -1))
        parts.append(
            f"Hypervolume on the items that steered: {first['hypervolume']:.4g} after generation 0, "
            f"{last['hypervolume']:.4g} after generation {last['generation']}, of {last['front']} candidates."
        )
    return "\n\n".join(parts)


def _informative_text(informative: Mapping[str, Any] | None) -> str:
    """Which items steered, and how far that led from all search items; empty when all of them steered."""
    if not informative:
        return ""
    tasks = [
        [t, str(row["items"]), str(row["of"]), f"{row['effective']:.1f}"] for t, row in informative["tasks"].items()
    ]
    finalists = [
        [f"candidate {row['candidate']}", f"{row['estimate']:.4f}", f"{row['all_search_items']:.4f}"]
        for row in informative["finalists"]
    ]
    return "\n\n".join(
        [
            table(["items that steered", "drawn", "of", "worth, if all counted alike"], tasks),
            table(["fitness on the search items", "estimated from those drawn", "on all of them"], finalists),
        ]
    )


def _signed(score: Mapping[str, Any]) -> str:
    spread = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['value']:+.3f}{spread}"


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _interval(span: Sequence[float] | None) -> str:
    return f"{span[0]:+.3f} to {span[1]:+.3f}" if span else ""


def _cell(row: Mapping[str, Any], split: str, task: str, metric: str) -> str:
    score = row["scores"].get(split, {}).get(task, {}).get(metric)
    return score_text(score) if score else "-"


def method_table(name: str | None = None) -> str:
    """All methods, or one of them with its parameters.

    Raises:
        BadInput: When there is no such method.
    """
    from evomerge.methods.registry import METHODS

    if name is None:
        return table(
            ["method", "also called", "what it does", "parameters"],
            [
                [m.name, ", ".join(m.aliases), m.summary, ", ".join(p.name for p in m.parameters)]
                for m in METHODS.values()
            ],
        )
    found = next((m for m in METHODS.values() if name == m.name or name in m.aliases), None)
    if found is None:
        raise BadInput(f"no method is called '{name}'{suggest(name, METHODS)}")
    rows = [
        [
            p.name,
            "required" if p.required else str(p.default),
            "" if p.paper is None else str(p.paper),
            "each source" if p.per_source else "all",
            f"{p.gene[0]:g} to {p.gene[1]:g}" if p.gene else "",
            p.help,
        ]
        for p in found.parameters
    ]
    header = ["parameter", "recipe default", "paper", "one for", "searched", "meaning"]
    return f"{found.name}: {found.summary}\n{found.paper}\n\n{table(header, rows)}"
