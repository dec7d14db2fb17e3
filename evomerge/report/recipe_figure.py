"""The picture of a recipe: its numbers by layer, tensors and source, or the stack of layers that it copies."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from evomerge.report.drawing import PALETTE, Picture, figure_of, label, name_rows, style
from evomerge.report.recipe_table import OUTER, Cell, RecipeTable

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MOST_TEXT = 12  # columns of a heat map whose cells have room for their number
_SEQUENTIAL = [[0.0, "#eef3f8"], [0.5, "#6fa8dc"], [1.0, "#08306b"]]
_DIVERGING = [[0.0, "#b2182b"], [0.5, "#f7f7f7"], [1.0, "#2166ac"]]


def recipe_picture(table: RecipeTable, title: str) -> Picture:
    """Draws a recipe: the stack of its layers where it copies them, its numbers otherwise."""
    if any(layer.copied_from for layer in table.layers) and not table.numbers:
        return _stack(table, title)
    return _numbers(table, title)


def _stack(table: RecipeTable, title: str) -> Picture:
    """The stack of copied layers: the output's layers from left to right, each in its model's row."""
    rows = [(k, layer.method, *(layer.copied_from or ("", None)), layer.scale) for k, layer in enumerate(table.layers)]
    models = list(dict.fromkeys(row[2] for row in rows))
    figure = figure_of(height=130 + 44 * len(models), left=10)
    for index, model in enumerate(models):
        own = [row for row in rows if row[2] == model]
        figure.add_scatter(
            x=[row[0] for row in own],
            y=[index] * len(own),
            mode="markers+text" if len(rows) <= 2 * _MOST_TEXT else "markers",
            marker={"symbol": "square", "size": 30 if len(rows) <= _MOST_TEXT else 16, "color": PALETTE[index % 8]},
            text=[str(row[3]) for row in own],
            textfont={"color": "#ffffff"},
            hovertext=[
                f"layer {row[0]} is layer {row[3]} of {label(row[2], 60)}"
                + (f"<br>scaled by {row[4]:.3g}" if row[4] != 1 else "")
                for row in own
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            showlegend=False,
        )
    name_rows(figure, [label(model) for model in models], margin=0.7)
    figure.update_xaxes(
        title_text="layer of the merged model", dtick=max(1, len(rows) // 12), range=[-0.7, len(rows) - 0.3]
    )
    caption = "Every column is a layer of the merged model; the number in it says which layer of its model it was."
    header = ("layer", "method", "model", "its layer", "scaled by")
    return Picture("recipe", title, caption, header, tuple(rows), figure)


def _numbers(table: RecipeTable, title: str) -> Picture:
    """A heat map for every parameter: sources and tensors in rows, layers in columns."""
    from plotly.subplots import make_subplots

    cells = table.numbers
    layers: list[int | None] = [*range(len(table.layers))]
    if any(cell.layer is None for cell in cells):
        layers.append(None)
    parameters = list(dict.fromkeys(cell.parameter for cell in cells))
    parameters.sort(key=lambda name: (all(not c.source for c in cells if c.parameter == name), name != "weight"))
    groups = {p: list(dict.fromkeys((c.source, c.tensors) for c in cells if c.parameter == p)) for p in parameters}
    sources = list(dict.fromkeys(cell.source for cell in cells))
    lines = {
        p: sorted({(s, t) for s, t in own if not _outside(t, own)}, key=lambda g: (sources.index(g[0]), own.index(g)))
        for p, own in groups.items()
    }
    count = [len(lines[p]) for p in parameters]
    if not parameters:
        return _only_methods(table, title)
    gap = 46 / max(1.0, 46.0 * (len(parameters) - 1) + 24 * sum(count)) if len(parameters) > 1 else 0
    figure = make_subplots(
        rows=len(parameters),
        cols=1,
        row_heights=count,
        vertical_spacing=gap,
        subplot_titles=[html.escape(p) for p in parameters],
    )
    style(figure, height=90 + 24 * sum(count) + 46 * len(parameters), left=10)
    figure.update_layout(margin_t=34)
    figure.update_annotations(font_size=14)
    for row, parameter in enumerate(parameters, start=1):
        _heat_map(figure, row, parameter, lines[parameter], layers, table)
    names = [f"{k}" if k is not None else "emb." for k in layers]
    step = max(1, math.ceil(len(names) / _MOST_TEXT))
    figure.update_xaxes(tickvals=[*range(0, len(names), step)], ticktext=names[::step], showgrid=False)
    figure.update_xaxes(title_text="layer", row=len(parameters))
    rows = tuple(
        (c.parameter, c.source, c.tensors, c.layer, table.layers[c.layer or 0].method, value)
        for c, value in cells.items()
    )
    methods = " and ".join(table.methods)
    caption = (
        f"Merged by {methods}. Every cell is one number of the recipe: the stronger the colour, the larger it is."
        + (
            " The last column is of the tensors outside of the layers: embeddings, final norm, head."
            if None in layers
            else ""
        )
    )
    header = ("parameter", "source", "tensors", "layer", "method", "value")
    return Picture("recipe", title, caption, header, rows, figure)


def _outside(tensors: str, groups: Iterable[tuple[str, str]]) -> bool:
    """Whether a group of tensors is a column of its own: that outside of the layers, beside others."""
    return tensors == OUTER and any(other != OUTER for _, other in groups)


def _heat_map(
    figure: go.Figure,
    row: int,
    parameter: str,
    lines: Sequence[tuple[str, str]],
    layers: Sequence[int | None],
    table: RecipeTable,
) -> None:
    values = [
        [table.numbers.get(Cell(parameter, source, OUTER if layer is None else tensors, layer)) for layer in layers]
        for source, tensors in lines
    ]
    numbers = [value for line in values for value in line if value is not None]
    low, high = min(numbers), max(numbers)
    reach = max(abs(low), abs(high)) or 1.0
    figure.add_heatmap(
        z=values,
        x=[*range(len(layers))],
        y=[*range(len(lines))],
        zmin=-reach if low < 0 else 0.0,
        zmax=reach,
        colorscale=_DIVERGING if low < 0 else _SEQUENTIAL,
        meta="diverging" if low < 0 else "sequential",  # a dark page has colours of its own for them
        showscale=False,
        xgap=1,
        ygap=1,
        text=[["" if value is None else f"{value:.2f}" if value else "0" for value in line] for line in values],
        texttemplate="%{text}" if len(layers) <= _MOST_TEXT else None,
        hovertext=[
            [_cell_text(parameter, source, tensors, layer, value) for layer, value in zip(layers, line, strict=True)]
            for (source, tensors), line in zip(lines, values, strict=True)
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        row=row,
        col=1,
    )
    several = len({tensors for _, tensors in lines}) > 1
    texts = [label(" · ".join(part for part in (s, t if several or not s else "") if part), 24, 1) for s, t in lines]
    figure.update_yaxes(
        tickvals=[*range(len(lines))], ticktext=texts, autorange="reversed", showgrid=False, row=row, col=1
    )


def _cell_text(parameter: str, source: str, tensors: str, layer: int | None, value: float | None) -> str:
    where = "outside of the layers" if layer is None else f"layer {layer}, {label(tensors, 60)}"
    of = f" of {label(source, 60)}" if source else ""
    return f"{label(parameter, 60)}{of}<br>{where}: " + ("not set" if value is None else f"{value:.4g}")


def _only_methods(table: RecipeTable, title: str) -> Picture:
    """A recipe without numbers: which method makes each layer."""
    rows = [(k, layer.method, *(layer.copied_from or ("", None))) for k, layer in enumerate(table.layers)]
    figure = figure_of(height=170, left=10)
    figure.add_scatter(
        x=[row[0] for row in rows],
        y=[table.methods.index(row[1]) for row in rows],
        mode="markers",
        marker={"symbol": "square", "size": 20, "color": PALETTE[0]},
        hovertext=[f"layer {row[0]}: {label(row[1], 60)}" for row in rows],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    name_rows(figure, [label(method) for method in table.methods], margin=0.7)
    figure.update_xaxes(title_text="layer", dtick=max(1, len(rows) // 12))
    header = ("layer", "method", "model", "its layer")
    return Picture("recipe", title, "The method of every layer; it takes no numbers.", header, tuple(rows), figure)
