"""The pictures of a run, each with its numbers: for the report, for notebooks, for CSV. Loads plotly when drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.report.drawing import ACCENT, PALETTE, QUIET, RANDOM, Picture, error_bars, figure_of, label, name_rows
from evomerge.report.family import family_layout
from evomerge.report.recipe_figure import recipe_picture
from evomerge.report.run_data import RunData, shortened
from evomerge.report.tables import called
from evomerge.study.budget import count_items
from evomerge.study.candidate import Candidate
from evomerge.study.ranking import growth, pareto_front
from evomerge.system.text import one_line

if TYPE_CHECKING:
    import plotly.graph_objects as go


def pictures(data: RunData) -> list[Picture]:
    """Draws all that there is to draw of a run, in the order of a report."""
    drawn = [
        scores(data),
        scores_by_task(data),
        history(data),
        recipe(data),
        lineage(data) if _has_parents(data) else None,
        front(data),
        hypervolume(data),
        racing(data),
        selection_bias(data),
        time_spent(data),
    ]
    return [picture for picture in drawn if picture is not None]


def _has_parents(data: RunData) -> bool:
    return any(c.parents for c in data.history if c.number == data.winner)


def scores(data: RunData) -> Picture | None:
    """The winner beside what it had to beat, on the test items; of a run under way the fitness so far."""
    result = data.result
    if result is None:
        return _standing(data)
    rows: list[tuple[Any, ...]] = []
    for name, row in sorted(result.baselines.items(), key=lambda item: item[1].fitness["test"].value):
        score, less = row.fitness["test"], row.winner_less_this
        rows.append((called(name), score.value, score.stderr, score.n, less.value, *(less.interval or (None, None))))
    won = result.winner.fitness["test"]
    rows.append((f"winner: candidate {result.winner.candidate}", won.value, won.stderr, won.n, None, None, None))
    hover = [
        f"{label(name, 60)}<br>{_with_error(value, stderr)}, {n} items"
        + ("" if less is None else f"<br>winner is better by {less:+.3f}")
        + ("" if low is None else f"<br>95% interval {low:+.3f} to {high:+.3f}")
        for name, value, stderr, n, less, low, high in rows
    ]
    figure = _dots(rows, hover, "overall score on the test items")
    caption = (
        "Each dot is a model's overall score on items that chose nothing; the bars are 95% intervals. Intervals of two "
        "models that overlap do not say that they are equally good: the differences below are paired, item by item."
    )
    header = ("model", "overall score", "standard error", "items", "winner is better by", "95% low", "95% high")
    return Picture("scores", "The winner beside the models it is made of", caption, header, tuple(rows), figure)


def _standing(data: RunData) -> Picture | None:
    best = next((c for c in data.history if c.number == data.winner), None)
    first = sorted(
        (c for c in data.history if c.generation == 0 and c.state == "done" and c is not best),
        key=lambda c: (c.fitness or 0.0, -c.number),
    )
    if best is None:
        return None
    rows = [(called(c.operator), c.fitness, None) for c in first]
    rows.append((f"best so far: candidate {best.number}", best.fitness, None))
    figure = _dots(rows, [f"{label(name, 60)}<br>fitness {value:.4f}" for name, value, _ in rows], "fitness so far")
    caption = (
        "The best candidate so far beside generation 0, on the items that the search looks at. Scores on items that "
        "chose nothing come when the search has ended."
    )
    header = ("model", "fitness")
    return Picture("scores", "The best so far beside generation 0", caption, header, tuple(r[:2] for r in rows), figure)


def scores_by_task(data: RunData) -> Picture | None:
    """The winner, its sources and the rest on every task, by the task's own metric."""
    result = data.result
    if result is None:
        return None
    rows: list[tuple[Any, ...]] = []
    models = [*((called(name), row.scores) for name, row in result.baselines.items()), ("winner", result.winner.scores)]
    for goal in result.goals:
        for name, tables in models:
            score = tables.get("test", {}).get(goal.task, {}).get(goal.metric)
            if score is not None:
                rows.append((goal.task, goal.metric, name, score.value, score.stderr, score.n))
    tasks = [(goal.task, goal.metric) for goal in result.goals]
    figure = figure_of(height=110 + 62 * len(tasks), left=10)
    for index, (name, _) in enumerate(models):
        own = [(task, metric, value, stderr) for task, metric, model, value, stderr, _ in rows if model == name]
        is_winner = name == "winner"
        figure.add_scatter(
            x=[value for _, _, value, _ in own],
            y=[tasks.index((task, metric)) for task, metric, _, _ in own],
            mode="markers",
            name=label(name),
            marker={
                "size": 15 if is_winner else 10,
                "color": ACCENT if is_winner else PALETTE[index % len(PALETTE)],
                "symbol": "diamond" if is_winner else "circle",
                "line": {"width": 1, "color": "rgba(255,255,255,0.7)"},
            },
            hovertext=[
                f"{label(name, 60)}<br>{label(task, 60)}: {_with_error(v, e)} {label(m, 60)}" for task, m, v, e in own
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    texts = [f"{label(task, 22, 1)}<br>{label(metric, 22, 1)}" for task, metric in tasks]
    name_rows(figure, texts, reverse=True)
    figure.update_xaxes(title_text="score on the test items")
    caption = "Every model on every task, by the task's own metric. Tap a name in the legend to hide it."
    header = ("task", "metric", "model", "score", "standard error", "items")
    return Picture("scores_by_task", "Task by task", caption, header, tuple(rows), figure)


def history(data: RunData) -> Picture | None:
    """Fitness by candidate, the best so far, what was pruned, and the random search."""
    scored = [c for c in data.history if c.fitness is not None]
    if not scored:
        return None
    figure = figure_of(height=400)
    running = _best_so_far(data.history)
    groups = {
        "generation 0": ([c for c in scored if c.state == "done" and c.generation == 0], "square", QUIET),
        "candidate": ([c for c in scored if c.state == "done" and c.generation > 0], "circle", PALETTE[0]),
        "stopped early (estimate)": ([c for c in scored if c.state == "pruned"], "circle-open", QUIET),
    }
    for name, (members, symbol, color) in groups.items():
        if members:
            figure.add_scatter(
                x=[c.number for c in members],
                y=[c.fitness for c in members],
                mode="markers",
                name=name,
                marker={"symbol": symbol, "color": color, "size": 7},
                hovertext=[_describe(c) for c in members],
                hovertemplate="%{hovertext}<extra></extra>",
            )
    _steps(figure, running, "best so far", PALETTE[0], "solid")
    random = _best_so_far(data.random_history)
    if random:
        _steps(figure, random, "best of random search", RANDOM, "dash")
    winner = next((c for c in scored if c.number == data.winner), None)
    if winner is not None:
        figure.add_scatter(
            x=[winner.number],
            y=[winner.fitness],
            mode="markers",
            name="winner" if data.result else "best",
            marker={"symbol": "star", "size": 17, "color": ACCENT, "line": {"width": 1, "color": "#fff"}},
            hovertext=[_describe(winner)],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    figure.update_xaxes(title_text="candidate")
    figure.update_yaxes(title_text="fitness")
    rows = [
        (search, c.number, c.generation, c.operator, c.state, c.fitness, best)
        for search, candidates in (("search", data.history), ("random search", data.random_history))
        for c, best in zip(candidates, _running(candidates), strict=True)
    ]
    goals = data.result.goals if data.result else ()
    by = ", ".join(dict.fromkeys(one_line(goal.steered_by) for goal in goals))
    caption = (
        "Fitness is what the search compares candidates by"
        + (f": {by}, on the search items" if by else ", on the search items")
        + ". It is not the overall score above, and flatters whoever was chosen by it."
    )
    header = ("search", "candidate", "generation", "made by", "state", "fitness", "best so far")
    return Picture("history", "How the search went", caption, header, tuple(rows), figure)


def recipe(data: RunData, candidate: int | None = None) -> Picture | None:
    """What goes into a candidate, the winner by default: every number by layer, tensors and source."""
    number = data.winner if candidate is None else candidate
    table = None if number is None else data.recipe(number)
    if table is None:
        return None
    what = "winner" if number == data.winner and data.result else f"candidate {number}"
    title = f"What the {what} is made of" if what == "winner" else f"What {what} is made of"
    return recipe_picture(table, title)


def lineage(data: RunData, candidate: int | None = None) -> Picture | None:
    """The family of a candidate, the winner by default: who it descends from, and what each step changed."""
    number = data.winner if candidate is None else candidate
    if number is None:
        return None
    nodes = family_layout(data.history, number)
    by_number = {node.candidate.number: node for node in nodes}
    depth = 1 + max(node.y for node in nodes)
    figure = figure_of(height=min(2400, 60 + 74 * depth), left=10)
    x: list[float | None] = []
    y: list[float | None] = []
    rows: list[tuple[Any, ...]] = []
    hover = []
    texts_of = {node.candidate.number: data.changes(node.candidate) for node in nodes}
    for node in nodes:
        texts = {parent: shortened(changed) for parent, changed in texts_of[node.candidate.number].items()}
        for parent in node.candidate.parents:
            if parent in by_number:
                x += [by_number[parent].x, node.x, None]
                y += [by_number[parent].y, node.y, None]
        c = node.candidate
        rows.append((c.number, c.generation, c.operator, c.state, c.fitness, _list(c.parents), _joined(texts)))
        hover.append(
            _describe(c) + "".join(f"<br>against {parent}:<br>{label(text, 44, 5)}" for parent, text in texts.items())
        )
    figure.add_scatter(x=x, y=y, mode="lines", line={"color": QUIET, "width": 1.5}, hoverinfo="skip", showlegend=False)
    alone = {level for level in {node.y for node in nodes} if sum(node.y == level for node in nodes) == 1}
    figure.add_scatter(
        x=[node.x for node in nodes],
        y=[node.y for node in nodes],
        mode="markers+text",
        marker={
            "size": 26,
            "color": [_node_color(node.candidate, number) for node in nodes],
            "line": {"width": 1, "color": "rgba(255,255,255,0.6)"},
        },
        text=[str(node.candidate.number) for node in nodes],
        textfont={"color": "#ffffff", "size": 11},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    beside = [node for node in nodes if node.y in alone]
    for node in beside:
        text = _beside(node.candidate, texts_of[node.candidate.number])
        anchor = {"xanchor": "left", "xshift": 18, "align": "left", "showarrow": False}
        figure.add_annotation(x=node.x, y=node.y, text=text, bgcolor="rgba(255,255,255,0.8)", **anchor)
    width = max(abs(node.x) for node in nodes)
    figure.update_xaxes(visible=False, range=[-width - 0.35, width + (2.6 if beside else 0.35)])
    figure.update_yaxes(visible=False, range=[depth - 0.4, -0.6])
    caption = (
        "Ancestors above, the candidate at the bottom; each line runs from a parent to a child. Point at a node to see "
        "what its recipe changed."
    )
    header = ("candidate", "generation", "made by", "state", "fitness", "parents", "what changed")
    what = "the winner" if number == data.winner and data.result else f"candidate {number}"
    return Picture("lineage", f"Where {what} comes from", caption, header, tuple(rows), figure)


def front(data: RunData) -> Picture | None:
    """The candidates by their objectives, and those that none dominates."""
    names = data.objectives
    scored = [c for c in data.history if c.objectives is not None and c.state == "done"]
    if not names or not scored:
        return None
    members = {c.number for c in pareto_front(data.history)}
    rows = [(c.number, c.number in members, *(c.objectives or ())) for c in scored]
    figure = _front_of_two(data, scored, members) if len(names) == 2 else _front_of_many(data, scored, members)
    caption = (
        "A candidate is on the front when no other is at least as good at everything and better at something. "
        "Higher is better for every objective; sizes count as what is saved."
    )
    header = ("candidate", "on the front", *names)
    return Picture("front", "What is traded for what", caption, header, tuple(rows), figure)


def _front_of_two(data: RunData, scored: Sequence[Candidate], members: set[int]) -> go.Figure:
    figure = figure_of(height=420)
    groups = {
        "dominated": ([c for c in scored if c.number not in members], QUIET, 6),
        "front": ([c for c in scored if c.number in members and c.number != data.winner], PALETTE[0], 10),
        "winner" if data.result else "best": ([c for c in scored if c.number == data.winner], ACCENT, 15),
    }
    for name, (group, color, size) in groups.items():
        group = sorted(group, key=lambda c: c.objectives or ())
        figure.add_scatter(
            x=[c.objectives[0] for c in group if c.objectives],
            y=[c.objectives[1] for c in group if c.objectives],
            mode="lines+markers" if name == "front" else "markers",
            line={"shape": "vh", "width": 1, "dash": "dot", "color": color},
            name=name,
            marker={"color": color, "size": size},
            hovertext=[_objectives_text(c, data.objectives) for c in group],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    figure.update_xaxes(title_text=label(data.objectives[0]))
    figure.update_yaxes(title_text=label(data.objectives[1]))
    return figure


def _front_of_many(data: RunData, scored: Sequence[Candidate], members: set[int]) -> go.Figure:
    """Profiles: a line for each candidate over the objectives, each scaled from the worst to the best there was."""
    figure = figure_of(height=420)
    columns = list(zip(*(c.objectives or () for c in scored), strict=True))
    spans = [(min(column), max(column) - min(column) or 1.0) for column in columns]
    on_front = [c for c in scored if c.number in members]
    for index, c in enumerate(sorted(on_front, key=lambda c: c.number == data.winner)):
        is_winner = c.number == data.winner
        figure.add_scatter(
            x=[*range(len(spans))],
            y=[(value - low) / span for value, (low, span) in zip(c.objectives or (), spans, strict=True)],
            mode="lines+markers",
            line={"width": 4 if is_winner else 1.5, "color": ACCENT if is_winner else PALETTE[index % len(PALETTE)]},
            name=("winner" if data.result else "best") if is_winner else f"candidate {c.number}",
            opacity=1.0 if is_winner else 0.6,
            showlegend=is_winner,
            hovertext=[_objectives_text(c, data.objectives)] * len(spans),
            hovertemplate="%{hovertext}<extra></extra>",
        )
    figure.update_xaxes(tickvals=[*range(len(spans))], ticktext=[label(name, 18) for name in data.objectives])
    figure.update_yaxes(tickvals=[0, 1], ticktext=["worst", "best"], range=[-0.06, 1.06])
    return figure


def _objectives_text(candidate: Candidate, names: Sequence[str]) -> str:
    values = zip(names, candidate.objectives or (), strict=True)
    return "<br>".join([f"candidate {candidate.number}", *(f"{label(name, 60)} {value:.4g}" for name, value in values)])


def hypervolume(data: RunData) -> Picture | None:
    """How the front grew."""
    steps = growth(data.history) if data.objectives else []
    if not steps:
        return None
    figure = figure_of(height=280)
    figure.add_scatter(
        x=[step.candidates for step in steps],
        y=[step.hypervolume for step in steps],
        mode="lines+markers",
        line={"color": PALETTE[0], "width": 2},
        hovertext=[
            f"generation {s.generation}: {s.hypervolume:.4g}<br>{s.front} candidates on the front" for s in steps
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title_text="candidates")
    figure.update_yaxes(title_text="hypervolume")
    rows = tuple((s.generation, s.candidates, s.front, s.hypervolume) for s in steps)
    caption = "The volume of what the front dominates, generation by generation: flat means that it no longer grows."
    header = ("generation", "candidates", "front", "hypervolume")
    return Picture("hypervolume", "How the front grew", caption, header, rows, figure)


def racing(data: RunData) -> Picture | None:
    """Items by candidate, where racing stopped some early."""
    counted = [c for c in data.history if c.items]
    if not any(c.state == "pruned" for c in counted):
        return None
    figure = figure_of(height=260)
    for name, state, color in (("all its items", "done", PALETTE[0]), ("stopped early", "pruned", ACCENT)):
        group = [c for c in counted if c.state == state]
        figure.add_bar(
            x=[c.number for c in group],
            y=[c.items for c in group],
            name=name,
            marker={"color": color, "line": {"width": 0}},
            hovertext=[f"{_describe(c)}<br>{c.items} items" for c in group],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    figure.update_layout(bargap=0.15)
    figure.update_xaxes(title_text="candidate")
    figure.update_yaxes(title_text="items scored")
    items = count_items(data.history)
    caption = (
        f"Racing stopped {sum(c.state == 'pruned' for c in counted)} of {len(counted)} candidates before they had seen "
        f"all items: {items['evaluated']:,} item evaluations in place of {items['without_racing']:,}, "
        f"{items['saved']:.0%} saved."
    )
    rows = tuple((c.number, c.state, c.items, c.failure or "") for c in counted)
    return Picture("racing", "What racing saved", caption, ("candidate", "state", "items", "why"), rows, figure)


def selection_bias(data: RunData) -> Picture | None:
    """The winner on the items that it was found on, chosen on, and neither."""
    result = data.result
    if result is None:
        return None
    uses = {"search": "guided the search", "select": "chose the winner", "test": "chose nothing"}
    splits = [split for split in uses if split in result.winner.fitness]
    rows = [(split, uses[split], *_parts(result.winner.fitness[split])) for split in splits]
    figure = figure_of(height=90 + 50 * len(rows), left=10)
    figure.add_scatter(
        x=[row[2] for row in rows],
        y=[*range(len(rows))],
        error_x=error_bars([row[3] for row in rows]),
        mode="markers",
        marker={"size": 12, "color": [ACCENT if row[0] == "test" else PALETTE[0] for row in rows]},
        hovertext=[f"{split} items: {_with_error(value, stderr)}" for split, _, value, stderr, _ in rows],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    name_rows(figure, [f"{split} items<br>{use}" for split, use, *_ in rows], reverse=True)
    figure.update_xaxes(title_text="the winner's overall score")
    bias = result.selection_bias
    caption = (
        "A winner is partly good and partly lucky on the items that picked it. "
        f"Search less test items: {_with_error(bias.value, bias.stderr, sign=True)}."
    )
    header = ("items", "use", "overall score", "standard error", "number of items")
    return Picture("selection_bias", "How much of it is luck", caption, header, tuple(rows), figure)


def time_spent(data: RunData) -> Picture | None:
    """Where the time went, stage by stage."""
    totals: dict[str, float] = {}
    for candidate in (*data.history, *data.random_history):
        for stage, seconds in candidate.seconds.items():
            totals[stage] = totals.get(stage, 0.0) + float(seconds)
    whole = totals.pop("total", 0.0)
    if whole <= 0:
        return None
    words = {"plan": "planning", "materialise": "merging weights", "score": "scoring items", "jacobian": "derivatives"}
    rows = [(words.get(stage, stage), seconds, seconds / whole) for stage, seconds in totals.items()]
    rest = whole - sum(totals.values())
    rows = sorted([*rows, ("everything else", max(0.0, rest), max(0.0, rest) / whole)], key=lambda row: row[1])
    figure = figure_of(height=90 + 34 * len(rows), left=10)
    figure.add_bar(
        x=[row[1] for row in rows],
        y=[*range(len(rows))],
        orientation="h",
        marker={"color": PALETTE[0]},
        text=[f"{row[2]:.0%}" for row in rows],
        textangle=0,
        hovertext=[f"{label(row[0], 60)}: {row[1]:.1f} s, {row[2]:.1%}" for row in rows],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    name_rows(figure, [label(row[0]) for row in rows])
    figure.update_xaxes(title_text="seconds, all candidates together")
    slowest = max(data.history, key=lambda c: c.seconds.get("total", 0.0))
    caption = (
        f"{_duration(whole)} of work on candidates, {whole / (len(data.history) + len(data.random_history)):.1f} s "
        f"each on average; the slowest was candidate {slowest.number} with {slowest.seconds.get('total', 0.0):.1f} s."
    )
    return Picture("time", "Where the time went", caption, ("stage", "seconds", "share"), tuple(rows), figure)


def _dots(rows: Sequence[tuple[Any, ...]], hover: Sequence[str], title: str) -> go.Figure:
    """A line for each model: name, value, standard error; the last one is what it is about."""
    figure = figure_of(height=90 + 40 * len(rows), left=10)
    figure.add_scatter(
        x=[row[1] for row in rows],
        y=[*range(len(rows))],
        error_x=error_bars([row[2] for row in rows]),
        mode="markers",
        marker={"size": 12, "color": [*[PALETTE[0]] * (len(rows) - 1), ACCENT]},
        hovertext=list(hover),
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    name_rows(figure, [label(row[0]) for row in rows])
    figure.update_xaxes(title_text=title)
    return figure


def _steps(figure: go.Figure, running: Sequence[tuple[int, float]], name: str, color: str, dash: str) -> None:
    figure.add_scatter(
        x=[number for number, _ in running],
        y=[value for _, value in running],
        mode="lines",
        line={"shape": "hv", "color": color, "dash": dash, "width": 2},
        name=name,
        hoverinfo="skip",
    )


def _running(candidates: Sequence[Candidate]) -> list[float | None]:
    """The best so far at every candidate."""
    best: float | None = None
    values = []
    for c in candidates:
        if c.state == "done" and c.fitness is not None:
            best = c.fitness if best is None else max(best, c.fitness)
        values.append(best)
    return values


def _best_so_far(candidates: Sequence[Candidate]) -> list[tuple[int, float]]:
    """Where the best so far changes, and the last candidate: what a line of steps is drawn through."""
    values = zip(candidates, _running(candidates), strict=True)
    return [(c.number, value) for c, value in values if value is not None]


def _describe(candidate: Candidate) -> str:
    value = candidate.state if candidate.fitness is None else f"fitness {candidate.fitness:.4f}"
    stopped = " (stopped early)" if candidate.state == "pruned" else ""
    made = label(called(candidate.operator), 44, 2)
    return f"candidate {candidate.number}, generation {candidate.generation}<br>{made}<br>{value}{stopped}"


def _beside(candidate: Candidate, texts: Mapping[int, Sequence[str]]) -> str:
    """What stands beside a node that has its row to itself: what made it, its fitness, what changed."""
    value = candidate.state if candidate.fitness is None else f"{candidate.fitness:.4f}"
    lines = [f"{label(called(candidate.operator), 40, 1)}: <b>{value}</b>"]
    lines += [label(shortened(changed, 2), 44, 3) for changed in list(texts.values())[:1]]
    return "<br>".join(lines)


def _node_color(candidate: Candidate, number: int) -> str:
    if candidate.number == number:
        return ACCENT
    return PALETTE[0] if candidate.generation else "#5f6b7a"


def _with_error(value: float, stderr: float | None, *, sign: bool = False) -> str:
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return text if stderr is None else f"{text} ± {stderr:.3f}"


def _parts(score: Any) -> tuple[float, float | None, int]:
    return score.value, score.stderr, score.n


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _joined(texts: Mapping[int, str]) -> str:
    return "; ".join(f"against {parent}: {text}" for parent, text in texts.items())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
